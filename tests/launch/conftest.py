"""What the tests of ``flexkv launch`` share: options, a made-up machine, a launcher to run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from flexkv.launch.machine import machine_of, prepare
from flexkv.launch.options import Machine, Options
from flexkv.launch.plan import plan_of
from flexkv.launch.record import Record
from flexkv.launch.supervisor import Supervisor, Timing
from flexkv.launch.terminal import Terminal

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncIterator, Callable, Iterator

STANDINS = Path(__file__).parent / "standins"
ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 20.0

FAST = Timing(end_s=1.0, end_unready_s=0.5, poll_s=0.05, logs_s=0.02, first_restart_s=0.02)
_FAST = f"""
import sys
from flexkv.launch import supervisor
from flexkv.launch.supervisor import Timing
fast = {FAST}
supervisor.Timing = lambda ready_s: fast
sys.argv[0] = "flexkv"
from flexkv.cli import main
main()
"""


class OptionsMaker(Protocol):
    def __call__(self, **changed: Any) -> Options: ...


@pytest.fixture
def options(tmp_path: Path) -> OptionsMaker:
    def make(**changed: Any) -> Options:
        given: dict[str, Any] = {"model": "m/odel", "folder": tmp_path / "d", "python": "python3"}
        return Options(**given | changed)

    return make


def machine(**changed: Any) -> Machine:
    ports = iter(range(21000, 22000))

    def free_port(preferred: int | None, width: int) -> int:
        given = [next(ports) for _ in range(width)]
        return preferred or given[0]

    given: dict[str, Any] = {
        "env": {},
        "num_cpus": 8,
        "free_port": free_port,
        "programs": {"nats-server": "/bin/nats-server", "etcd": "/bin/etcd"},
    }
    return Machine(**given | changed)


class Launcher:
    """``flexkv launch`` with stand-ins for Dynamo's programs, and short waits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http_port, self.system_port = _free_ports()
        self.popen: subprocess.Popen[str] | None = None
        self.errors = folder.with_suffix(".err")

    def words(self, *arguments: object) -> list[str]:
        fixed = ["--model", "tiny", "--folder", self.folder, "--gpus-per-worker", 0]
        ports = ["--http-port", self.http_port, "--system-port", self.system_port]
        return [str(word) for word in ("launch", *fixed, *ports, *arguments)]

    def start(self, *arguments: object) -> None:
        """As a process of its own, which takes seconds to import flexkv."""
        with self.errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _FAST, *self.words(*arguments)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ready(self) -> str:
        """The line that says so; empty if it ended instead."""
        assert self.popen is not None
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def document(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "deployment.json").read_text())
        return loaded

    def worker(self, index: int) -> dict[str, Any]:
        entry: dict[str, Any] = self.document()["workers"][index]
        return entry

    def end(self, number: signal.Signals) -> int:
        assert self.popen is not None
        self.popen.send_signal(number)
        return self.popen.wait(DEADLINE_S)

    def child_of(self, worker: int, nth: int = -1) -> int:
        """What the worker of that number has started."""
        log = (self.folder / "logs" / f"worker{worker}.log").read_text()
        return [int(line.split()[1]) for line in log.splitlines() if line.startswith("child ")][nth]

    def pids(self) -> list[int]:
        document = self.document()
        entries = [document["frontend"], *document["workers"]]
        return [document["nats_pid"], *(entry["pid"] for entry in entries)]

    @contextlib.asynccontextmanager
    async def supervised(self, **changed: Any) -> AsyncIterator[asyncio.Task[int]]:
        """The same in this process: the task ends with the exit status."""
        ports = {"http_port": self.http_port, "system_port": self.system_port}
        fixed = {"model": "tiny", "folder": self.folder, "python": sys.executable}
        options = Options(**fixed | ports | {"gpus_per_worker": 0} | changed)
        plan = plan_of(options, machine_of(options))
        with self.errors.open("w") as errors, Record(self.folder) as record:
            prepare(plan)
            with Terminal(errors) as terminal:
                async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
                    supervisor = Supervisor(plan, record, terminal, FAST)
                    task = tasks.create_task(supervisor.run())
                    try:
                        yield task
                    finally:
                        supervisor.stop()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not ((self.folder / "deployment.json").exists() and condition()):
            assert time.monotonic() < deadline_s, f"not in {DEADLINE_S} s: {what}"
            await asyncio.sleep(0.02)

    async def until_ready(self) -> None:
        await self.until(lambda: self.document()["state"] == "ready", "ready")


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    monkeypatch.setenv("PYTHONPATH", f"{STANDINS}{os.pathsep}{ROOT}")
    made = Launcher(tmp_path / "d")
    try:
        yield made
    finally:
        if made.popen is not None and made.popen.poll() is None:
            made.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                made.popen.wait(DEADLINE_S)
            made.popen.kill()
            made.popen.wait()
        if made.popen is not None and made.popen.stdout is not None:
            made.popen.stdout.close()


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def _free_ports() -> tuple[int, int]:
    """One for the frontend, and the first of two for workers."""
    for first in range(20000 + os.getpid() % 5000 * 2, 32000, 7):
        with contextlib.suppress(OSError):
            for port in range(first, first + 3):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", port))
            return first, first + 1
    raise AssertionError("no free ports")
