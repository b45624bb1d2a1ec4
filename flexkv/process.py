"""Who and where a process is, and whether it is still there."""

from __future__ import annotations

import socket
from pathlib import Path


def host_name() -> str:
    """This host, for people."""
    return socket.gethostname()


def machine_id() -> str:
    """Equal for two processes if each can see the other by its pid: one boot, one pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: the host pool says so
        return host_name()


class Process:
    """One process of this machine, told apart from a later one with the same pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.started = _start_of(pid)

    def is_alive(self) -> bool:
        """A zombie is not: it runs no code and holds no memory."""
        return self.started is not None and _start_of(self.pid) == self.started


def _start_of(pid: int) -> str | None:
    """When the process began, in ticks since boot; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # its name may hold anything
    return None if fields[0] in {"Z", "X"} else fields[19]
