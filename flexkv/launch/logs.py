"""The children's logs: kept from the run before, read as they grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MAX_READ = 2**16  # at a time, so that one noisy log does not hold up the rest
_MAX_LINE = 4096
_MAX_TAIL = 2**16


def set_aside(log: Path) -> None:
    """Begin a new log; the last run's is beside it."""
    if log.exists():
        log.replace(log.with_name(log.name + ".previous"))


def last_lines(log: Path, num_lines: int) -> list[str]:
    """What it said last."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _MAX_TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line[:_MAX_LINE] for line in lines if line.strip()][-num_lines:]


class Follower:
    """The lines of a log, from its present end on."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0
        self._rest = b""

    def lines(self) -> list[str]:
        """Those that are new and whole; some of them, if there are many."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._offset)
                read = file.read(_MAX_READ)
        except OSError:
            return []
        self._offset += len(read)
        *whole, self._rest = (self._rest + read).replace(b"\r", b"\n").split(b"\n")
        if len(self._rest) > _MAX_LINE:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode(errors="replace")[:_MAX_LINE] for line in whole if line.strip()]
