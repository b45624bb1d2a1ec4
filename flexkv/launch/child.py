"""One child in a session of its own: started, watched, ended whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.launch.plan import inherited

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.launch.plan import Program

_POLL_S = 0.05
_KILL_S = 10.0  # until the kernel has taken a killed process away
_PROC = Path("/proc")


class Child:
    """A process and everything that it starts: a session, whose id is the process's pid.

    The process is not reaped before the rest of its session is ended, so no signal of ours can
    reach a stranger that was given the same pid.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._popen: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    @property
    def pid(self) -> int | None:
        """Of the session, while anything of it may be there."""
        return self._popen.pid if self._popen is not None else None

    def start(self) -> None:
        """Start it, its output at the end of its log.

        Raises:
            OSError: there is no such program, or the log can't be written.
        """
        assert self._popen is None, "it is ended before it is started again"
        with self.program.log.open("ab") as log:
            self._popen = subprocess.Popen(  # noqa: S603  # our own plan
                self.program.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=inherited(os.environ) | dict(self.program.env),
                start_new_session=True,
            )
        self._pidfd = os.pidfd_open(self._popen.pid)

    async def exited(self) -> None:
        """Return once the process has ended; what it started may go on."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)

    def terminate(self) -> None:
        """Ask all of the session to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all of the session at once."""
        self._signal(signal.SIGKILL)

    async def end(self, deadline_s: float = 0.0) -> int | None:
        """Wait for the process until the deadline, then kill what is left of its session.

        Returns its exit status, minus the signal's number if one ended it.
        """
        if self._popen is None:
            return None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited(), deadline_s) if deadline_s > 0 else None
        until_s = time.monotonic() + _KILL_S
        while True:
            self._signal(signal.SIGKILL)
            if not list(self._living()) or time.monotonic() > until_s:
                break
            await asyncio.sleep(_POLL_S)
        status = self._popen.wait(_KILL_S)
        os.close(self._pidfd)
        self._popen = None
        return status

    def worker_id(self) -> int | None:
        """Dynamo's id of the worker, once the process has told its own children."""
        for pid in self._living():
            with contextlib.suppress(OSError, ValueError):
                for entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                    name, _, value = entry.partition(b"=")
                    if name == b"DYN_FPM_WORKER_ID":
                        return int(value)
        return None

    def _signal(self, number: signal.Signals) -> None:
        """To every process group of the session: its leader is not reaped, so its id is ours."""
        if self._popen is None:
            return
        groups = {self._popen.pid} | {_stat(pid)[1] for pid in self._living()}
        for group in groups - {0}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    def _living(self) -> Iterator[int]:
        """The processes of the session that run still."""
        assert self._popen is not None
        for entry in _PROC.iterdir():
            if entry.name.isdigit():
                state, _, session = _stat(int(entry.name))
                if session == self._popen.pid and state not in {"Z", "X", ""}:
                    yield int(entry.name)


def _stat(pid: int) -> tuple[str, int, int]:
    """State, process group and session; an empty state if it is gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0, 0
    state, _parent, group, session = text.rpartition(")")[2].split()[:4]
    return state, int(group), int(session)
