"""Endpoints that both roles derive alike, and the lock that one engine holds."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flexkv.link.endpoint import (
    EndpointLock,
    default_endpoint,
    private_folder,
    socket_path,
    with_dp_rank,
)
from flexkv.link.errors import EndpointTakenError, LinkError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def lock_file(endpoint: str) -> Path:
    path = socket_path(endpoint)
    assert path is not None
    return path.with_name(path.name + ".lock")


@pytest.fixture
def owner(endpoint: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    program = (
        "import sys, time\n"
        "from flexkv.link.endpoint import EndpointLock\n"
        "lock = EndpointLock(sys.argv[1]); lock.take(); print('taken', flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, endpoint], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_both_roles_derive_the_same_private_endpoint(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    endpoint = default_endpoint("engine-a", None, env)
    assert endpoint == f"ipc://{tmp_path}/flexkv/engine-a"
    assert default_endpoint("engine-a", 3, env) == f"{endpoint}.dp3"
    assert stat.S_IMODE((tmp_path / "flexkv").stat().st_mode) == 0o700


@pytest.mark.parametrize("engine_id", ["x" * 300, "../../etc", "a b", "", "é"])
def test_an_odd_engine_id_becomes_a_short_name(engine_id: str, tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    endpoint = default_endpoint(engine_id, 1, env)
    path = socket_path(endpoint)
    assert path is not None
    assert path.parent == tmp_path / "flexkv"
    assert path.name.endswith(".dp1")
    assert len(path.name) < 40
    assert endpoint != default_endpoint(engine_id + "y", 1, env)


def test_a_long_folder_shortens_the_name_or_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * (107 - len(str(tmp_path)) - len("//flexkv/") - 32))
    folder.mkdir()
    endpoint = default_endpoint("e" * 60, 1, {"XDG_RUNTIME_DIR": str(folder)})
    assert len(endpoint.removeprefix("ipc://")) <= 107
    longer = folder / "longer"
    longer.mkdir()
    with pytest.raises(LinkError, match="107: set a shorter server_recv_port"):
        default_endpoint("e" * 60, 1, {"XDG_RUNTIME_DIR": str(longer)})


def test_without_a_runtime_folder_the_temporary_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert private_folder({}) == tmp_path / f"flexkv-{os.geteuid()}"
    assert private_folder({"XDG_RUNTIME_DIR": "/nowhere"}) == private_folder({})


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flexkv").mkdir(mode=0o755)
    with pytest.raises(LinkError, match="0700"):
        private_folder({"XDG_RUNTIME_DIR": str(tmp_path)})


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "flexkv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LinkError, match="0700"):
        private_folder({"XDG_RUNTIME_DIR": str(tmp_path)})


def test_data_parallel_ranks_have_endpoints_of_their_own() -> None:
    assert with_dp_rank("ipc:///tmp/a", 2) == "ipc:///tmp/a.dp2"
    assert with_dp_rank("tcp://127.0.0.1:5000", 2) == "tcp://127.0.0.1:5002"
    with pytest.raises(LinkError, match="no port 65536"):
        with_dp_rank("tcp://127.0.0.1:65535", 1)
    with pytest.raises(LinkError, match="107"):
        with_dp_rank("ipc:///" + "x" * 106, 1)
    with pytest.raises(LinkError, match="ipc://PATH or tcp://HOST:PORT"):
        with_dp_rank("tcp://localhost", 1)


def test_the_second_owner_fails_at_once_and_is_told_whom_to_ask(
    endpoint: str, owner: subprocess.Popen[str]
) -> None:
    with pytest.raises(EndpointTakenError) as raised:
        EndpointLock(endpoint).take()
    assert raised.value.owner_pid == owner.pid
    for word in (endpoint, str(owner.pid), "server_recv_port"):
        assert word in str(raised.value)


def test_a_killed_owner_leaves_the_endpoint_free(
    endpoint: str, owner: subprocess.Popen[str]
) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait(30)
    assert lock_file(endpoint).exists()
    lock = EndpointLock(endpoint)
    lock.take()
    assert lock_file(endpoint).read_text().startswith(f"{os.getpid()} ")
    lock.release()
    assert not lock_file(endpoint).exists()


def test_one_process_has_one_owner_too(endpoint: str) -> None:
    first, second = EndpointLock(endpoint), EndpointLock(endpoint)
    first.take()
    with pytest.raises(EndpointTakenError) as raised:
        second.take()
    assert raised.value.owner_pid == os.getpid()
    first.release()
    second.take()
    second.release()


def test_the_lock_is_for_its_user_only(endpoint: str) -> None:
    lock = EndpointLock(endpoint)
    lock.take()
    assert stat.S_IMODE(lock_file(endpoint).stat().st_mode) == 0o600
    lock.release()


def test_a_forked_child_does_not_hold_its_parents_lock(endpoint: str) -> None:
    program = (
        "import os, sys, time\n"
        "from flexkv.link.endpoint import EndpointLock\n"
        "lock = EndpointLock(sys.argv[1]); lock.take()\n"
        "parent = os.getpid()\n"
        "if not os.fork(): os.kill(parent, 9); print(os.getpid(), flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, endpoint], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert parent.wait(30) == -signal.SIGKILL
            lock = EndpointLock(endpoint)
            lock.take()
            lock.release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_file_that_was_replaced_meanwhile_is_no_lock(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (EndpointLock(endpoint) for _ in range(3))
    first.take()
    real_flock = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        monkeypatch.undo()
        first.release()  # removes the file that the third one has just opened
        second.take()
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(EndpointTakenError):
        third.take()
    second.release()


def test_a_folder_that_is_not_there_is_named(endpoint: str) -> None:
    with pytest.raises(LinkError, match=r"the folder .*/absent does not exist: make it"):
        EndpointLock(endpoint.replace("/link", "/absent/link")).take()


def test_a_tcp_endpoint_is_locked_in_the_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    lock = EndpointLock("tcp://127.0.0.1:5000")
    lock.take()
    assert [path.suffix for path in (tmp_path / "flexkv").iterdir()] == [".lock"]
    with pytest.raises(EndpointTakenError, match=r"tcp://127\.0\.0\.1:5000"):
        EndpointLock("tcp://127.0.0.1:5000").take()
    lock.release()


def test_what_a_killed_engine_left_in_the_private_folder_is_swept_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = private_folder()
    for name in ("dead", "dead.lock", "fresh.lock", "living", "living.lock"):
        (folder / name).write_text("1 elsewhere\n")
    living = os.open(folder / "living.lock", os.O_RDWR)
    fcntl.flock(living, fcntl.LOCK_EX)
    for name in ("dead.lock", "living.lock"):
        os.utime(folder / name, (0, 0))
    lock = EndpointLock(f"ipc://{folder}/mine")
    lock.take()
    assert {path.name for path in folder.iterdir()} == {
        "fresh.lock",
        "living",
        "living.lock",
        "mine.lock",
    }
    lock.release()
    os.close(living)
