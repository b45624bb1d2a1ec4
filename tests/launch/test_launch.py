"""``flexkv launch`` with real processes: stand-ins for Dynamo's programs, a real nats-server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from flexkv import cli
from flexkv.launch.machine import machine_of
from flexkv.launch.options import Options
from flexkv.link.endpoint import EndpointLock
from tests.launch.conftest import is_alive

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.launch.conftest import Launcher


@pytest.fixture
def refused(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """``refused(*arguments)``: what standard error says; the exit status is 2."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["flexkv", *launcher.words(*arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


# A process of its own: signals.


def test_ready_is_one_line_and_ctrl_c_ends_all_of_it_and_nothing_else(
    launcher: Launcher, refused: Callable[..., str]
) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        launcher.start()
        assert launcher.ready() == f"ready: http://127.0.0.1:{launcher.http_port}\n"
        document = launcher.document()
        assert document["state"] == "ready"
        assert [worker["state"] for worker in document["workers"]] == ["ready", "ready"]
        assert len({worker["worker_id"] for worker in document["workers"]}) == 2
        assert document["own_nats"]
        nats = Path(f"/proc/{document['nats_pid']}/cmdline").read_bytes().split(b"\0")
        assert Path(os.fsdecode(nats[0])).name == "nats-server"
        address = urlsplit(document["nats"])
        with socket.create_connection((address.hostname or "", address.port or 0), 5) as client:
            assert client.recv(4096).startswith(b"INFO ")
        assert launcher.popen is not None
        folder = f"a deployment of pid {launcher.popen.pid} runs in {launcher.folder}"
        assert folder in refused()  # a second one in the same folder
        started = [*launcher.pids(), launcher.child_of(0), launcher.child_of(1)]
        assert all(os.getpgid(pid) == pid == os.getsid(pid) for pid in launcher.pids())
        assert launcher.end(signal.SIGINT) == 0
        assert [pid for pid in started if is_alive(pid)] == []
        assert "all has ended" in launcher.errors.read_text()
        assert launcher.document()["state"] == "ended"
        assert set(launcher.pids()) == {None}
        assert {worker["state"] for worker in launcher.document()["workers"]} == {"dead"}
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_what_a_killed_launcher_left_is_named_with_the_command_that_ends_it(
    launcher: Launcher, refused: Callable[..., str]
) -> None:
    launcher.start("--workers", 1)
    assert launcher.ready()
    left = launcher.pids()
    assert launcher.end(signal.SIGKILL) == -signal.SIGKILL
    try:
        command = refused("--workers", 1).strip().partition("kill -- ")[2]
        assert sorted(command.split()) == sorted(f"-{pid}" for pid in left)
    finally:
        for pid in left:
            os.killpg(pid, signal.SIGKILL)


# In this process: what dies.


async def test_a_dead_worker_is_reported_its_children_ended_and_it_is_started_again(
    launcher: Launcher,
) -> None:
    async with launcher.supervised() as running:
        await launcher.until_ready()
        before, other = launcher.worker(1), launcher.worker(0)
        orphan = launcher.child_of(1)
        os.kill(before["pid"], signal.SIGKILL)  # its main process alone
        await launcher.until(lambda: launcher.worker(1)["restarts"] == 1, "the restart")
        await launcher.until(lambda: launcher.worker(1)["state"] == "ready", "ready again")
        assert not is_alive(orphan)
        after = launcher.worker(1)
        assert after["pid"] != before["pid"]
        assert after["worker_id"] != before["worker_id"]
        assert after["config"] == before["config"]
        assert launcher.worker(0) == other
    assert running.result() == 0
    assert f"worker1 (pid {before['pid']}) died with signal SIGKILL" in launcher.errors.read_text()


async def test_frontend_and_nats_are_started_again_too(launcher: Launcher) -> None:
    async with launcher.supervised(num_workers=1) as running:
        await launcher.until_ready()
        nats, frontend, *_ = launcher.pids()
        os.kill(nats, signal.SIGKILL)
        os.kill(frontend, signal.SIGKILL)

        def are_back() -> bool:
            now = launcher.pids()[:2]
            return None not in now and not {nats, frontend} & set(now)

        await launcher.until(are_back, "both are back")
    assert running.result() == 0


async def test_a_crash_loop_is_given_up_after_five_restarts(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN", "crash1")
    async with launcher.supervised() as running:
        assert await running == 1
    errors = launcher.errors.read_text()
    assert errors.count("worker1 (pid") == 6
    assert "started again 5 times in 10 minutes: given up" in errors
    assert "the model is broken" in errors
    assert launcher.document()["state"] == "ended"


async def test_no_restart_means_none(launcher: Launcher) -> None:
    async with launcher.supervised(restarts=False) as running:
        await launcher.until_ready()
        os.kill(launcher.worker(0)["pid"], signal.SIGKILL)
        await launcher.until(lambda: launcher.worker(0)["state"] == "dead", "it is seen")
        await asyncio.sleep(0.1)
        assert not running.done()
        os.kill(launcher.worker(1)["pid"], signal.SIGKILL)
        assert await running == 1  # nobody is left
    assert "it is not started again; the other workers go on" in launcher.errors.read_text()


async def test_wrong_arguments_are_not_tried_again(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN", "usage0")
    async with launcher.supervised() as running:
        assert await running == 1
    assert launcher.errors.read_text().count("worker0 (pid") == 1


async def test_who_does_not_listen_to_sigterm_is_killed(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN", "deaf0")
    async with launcher.supervised(num_workers=1):
        await launcher.until_ready()
        worker, child = launcher.worker(0)["pid"], launcher.child_of(0)
    assert not is_alive(worker)
    assert not is_alive(child)


# Refused before anything starts.


def test_ports_in_use(launcher: Launcher, refused: Callable[..., str]) -> None:
    with socket.socket() as http, socket.socket() as system:
        for sock, port in ((http, launcher.http_port), (system, launcher.system_port + 1)):
            sock.bind(("127.0.0.1", port))
            sock.listen()
        error = refused()
    assert f"port {launcher.http_port} of 127.0.0.1, for frontend, is in use" in error
    assert "give another --http-port" in error
    assert f"port {launcher.system_port + 1} of 127.0.0.1, for worker1, is in use" in error
    assert not (launcher.folder / "worker0.json").exists()


def test_one_endpoint_for_two_workers(refused: Callable[..., str], tmp_path: Path) -> None:
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"server_recv_port": "ipc:///tmp/flexkv_0"}))
    error = refused("--config", template)
    assert "server_recv_port is ipc:///tmp/flexkv_0 for worker 0 and worker 1" in error


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_endpoint_that_another_engine_has(
    refused: Callable[..., str], tmp_path: Path, num_ranks: int
) -> None:
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"server_recv_port": f"ipc://{tmp_path}/kv{{worker}}"}))
    taken = f"ipc://{tmp_path}/kv1" + (".dp1" if num_ranks > 1 else "")
    lock = EndpointLock(taken)
    lock.take()
    try:
        error = refused("--config", template, "--data-parallel-size", num_ranks)
    finally:
        lock.release()
    assert error.startswith(f"flexkv: worker1: {taken}: the endpoint is taken by process")
    assert str(os.getpid()) in error


def test_a_port_of_another_engine(refused: Callable[..., str], tmp_path: Path) -> None:
    with socket.socket() as engine:
        engine.bind(("127.0.0.1", 0))
        engine.listen()
        port = engine.getsockname()[1]
        template = tmp_path / "template.json"
        template.write_text(json.dumps({"server_recv_port": f"tcp://127.0.0.1:{port}"}))
        error = refused("--config", template, "--workers", 1)
    assert f"port {port} of 127.0.0.1, for worker0, is in use" in error
    assert "server_recv_port" in error


def test_host_tiers_beyond_this_machines_memory(
    launcher: Launcher, refused: Callable[..., str], tmp_path: Path
) -> None:
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"cpu_cache_gb": 2**20}))
    error = refused("--config", template)
    assert "the host tiers of 2 workers take 2097152.0 GiB" in error
    assert "MemAvailable" in error
    assert not launcher.folder.exists()


@pytest.mark.parametrize("is_downloaded", [True, False])
def test_a_models_size_is_taken_from_the_hubs_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_downloaded: bool
) -> None:
    cached = tmp_path / "config.json"
    cached.write_text('{"num_hidden_layers": 3}')
    there = str(cached) if is_downloaded else None
    hub = SimpleNamespace(try_to_load_from_cache=lambda *_: there)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    options = Options(model="some/model", folder=tmp_path, python=sys.executable)
    assert machine_of(options).model == ({"num_hidden_layers": 3} if is_downloaded else {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "model" / "config.json").write_text('{"num_hidden_layers": 4}')
    assert machine_of(options).model == {"num_hidden_layers": 4}, "vLLM takes the folder"


def test_a_folder_that_is_no_models(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert f"--model {folder} is not there" in refused("--model", folder)
    folder.mkdir()
    assert f"--model {folder} has no config.json" in refused("--model", folder)


def test_what_would_break_it_silently_is_refused_all_at_once(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")
    vllm = ("--connector", "flexkv", "--no-enable-prefix-caching", "--block-size", "16")
    error = refused("--system-port", 32767, "--", *vllm)
    assert "5 settings can't be used" in error
    for words in (
        "--connector flexkv: Dynamo's --connector is gone",
        "--no-enable-prefix-caching: without prefix caching no block is ever kept",
        "--block-size 16: the router, flexkv and the other workers have blocks of 64",
        "DYN_EVENT_PLANE is zmq",
        "above 32767: give 32766 or less",
    ):
        assert words in error


def test_a_server_that_is_reused_must_answer(refused: Callable[..., str]) -> None:
    said = refused("--nats", "nats://127.0.0.1:1")
    assert '--nats "nats://127.0.0.1:1" does not answer' in said


def test_an_address_with_a_password_is_refused_and_named_without_it(
    refused: Callable[..., str],
) -> None:
    said = refused("--without-flexkv", "--nats", "nats://me:sesame@127.0.0.1:1")
    assert '--nats is "nats://...@127.0.0.1:1"' in said
    assert "without credentials" in said
    assert "sesame" not in said


def test_an_interpreter_without_dynamo(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    assert "has no dynamo.frontend, dynamo.vllm, vllm" in refused("--python", sys.executable)


def test_a_dry_run_prints_files_and_commands_and_starts_nothing(
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"cache_config": {"num_cpu_blocks": 7}}))
    words = launcher.words("--dry-run", "--config", template, "--", "--dtype", "float32")
    monkeypatch.setattr(sys, "argv", ["flexkv", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    for index in range(2):
        assert f"# {launcher.folder}/worker{index}.json" in out
        assert f"DYN_SYSTEM_PORT={launcher.system_port + index}" in out
    assert out.count("--dtype float32") == 2
    assert "-m dynamo.frontend" in out
    assert '"num_cpu_blocks": 7' in out
    assert not launcher.folder.exists()
