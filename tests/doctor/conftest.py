"""Little processes that look like those of a deployment, and real servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.dynamo.servers import etcd_url, nats_server, worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Spawn", "etcd_url", "nats_server", "spawn", "worker"]

_READY_S = 60.0


class Spawn(Protocol):
    def __call__(
        self, *arguments: str, env: dict[str, str] | None = None, program: str = ""
    ) -> subprocess.Popen[str]: ...


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """``spawn("-m", "dynamo.vllm", env=...)``: a process with that command line, which sleeps.

    ``program``: what it does, once it has said so, instead of sleeping.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str, env: dict[str, str] | None = None, program: str = ""
    ) -> subprocess.Popen[str]:
        code = f"import time\n{program}\nprint('ready', flush=True)\ntime.sleep(100)"
        log = tmp_path / f"process{len(started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env={"PATH": os.environ["PATH"]} | (env or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        deadline_s = time.monotonic() + _READY_S
        while "ready" not in log.read_text():
            assert time.monotonic() < deadline_s, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # its group may be empty
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
