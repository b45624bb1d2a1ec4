"""Starts and ends what the tests run: children that run cases, servers; all with deadlines."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(sys.executable)
PYTHON_031 = ROOT / ".venv-e2e-031" / "bin" / "python"

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MULTI_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

_TAIL = 6000  # characters of a log in a failure
_QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This one's, less what would configure flexkv, vLLM or Dynamo, and ``more``."""
    foreign = ("FLEXKV_", "VLLM_", "DYN_", "NATS_", "ETCD_", "PYTHONHASHSEED", "PYTEST_")
    kept = {name: v for name, v in os.environ.items() if not name.startswith(foreign)}
    path = f"{ROOT}{os.pathsep}{Path(__file__).parent / 'plugin'}"
    return kept | _QUIET | {"PYTHONPATH": path} | dict(more)


class Process:
    """A process group with a log; it ends with the ``with`` block, however that ends."""

    def __init__(
        self,
        command: Sequence[object],
        log: Path,
        env: Mapping[str, str],
        *,
        pass_fds: Sequence[int] = (),
        pipe_stdin: bool = False,
    ) -> None:
        self.log_path = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE if pipe_stdin else subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(env),
                cwd=log.parent,
                start_new_session=True,  # vLLM has children: the group ends as one
                pass_fds=pass_fds,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def end(self, grace_s: float = 10.0) -> None:
        """SIGTERM to the process, then SIGKILL to what is left of its group."""
        if self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)

    def failure(self, what: str) -> AssertionError:
        return AssertionError(f"{what}; the end of {self.log_path}:\n{self.log()[-_TAIL:]}")

    def wait_for(self, condition: Callable[[], object], deadline_s: float, what: str) -> None:
        until_s = time.monotonic() + deadline_s
        while not condition():
            if self.popen.poll() is not None:
                raise self.failure(f"it ended ({self.popen.returncode}) before {what}")
            if time.monotonic() > until_s:
                raise self.failure(f"not within {deadline_s} s: {what}")
            time.sleep(0.1)


class Child:
    """Runs cases in a process of their own, one after another; started anew when one broke it."""

    def __init__(
        self,
        folder: Path,
        env: Mapping[str, str],
        python: Path = PYTHON,
        module: str = "tests.e2e.child",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._module = module
        self._folder = folder
        self._env = dict(env)
        self._python = python
        self._process: Process | None = None
        self._answers = -1

    def start(self) -> Process:
        if self._process is None:
            read_fd, write_fd = os.pipe()
            self._process = Process(
                [self._python, "-m", self._module, write_fd],
                self._folder / "log",
                self._env,
                pass_fds=[write_fd],
                pipe_stdin=True,
            )
            os.close(write_fd)
            self._answers = read_fd
        return self._process

    def send(self, case: Mapping[str, Any]) -> Process:
        process = self.start()
        assert process.popen.stdin is not None
        process.popen.stdin.write(json.dumps(case).encode() + b"\n")
        process.popen.stdin.flush()
        return process

    def answer(self, deadline_s: float) -> dict[str, Any]:
        """What came of the case that was sent."""
        process = self.start()
        until_s = time.monotonic() + deadline_s
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], max(0, until_s - time.monotonic()))
            part = os.read(self._answers, 1 << 16) if ready else b""
            if not part:
                problem = "it ended" if ready else f"no answer within {deadline_s} s"
                self.end()
                raise process.failure(problem)
            line += part
        answer: dict[str, Any] = json.loads(line)
        answer["log"] = process.log().rpartition("\n=== {")[2]
        return answer

    def run(self, case: Mapping[str, Any], deadline_s: float = 90.0) -> dict[str, Any]:
        """What came of ``case``, which must not fail."""
        self.send(case)
        answer = self.answer(deadline_s)
        if "error" in answer:
            failure = self.start().failure(answer["error"])
            self.end()
            raise failure
        return answer

    def end(self) -> None:
        if self._process is not None:
            self._process.end()
            os.close(self._answers)
            self._process = None


def http(url: str, body: object = None, *, deadline_s: float = 60.0) -> tuple[int, str]:
    """Status and text; status 0 if nobody answers."""
    payload = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, payload, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=deadline_s) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
