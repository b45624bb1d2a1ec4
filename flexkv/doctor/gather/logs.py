"""The lines of logs that mean something to doctor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.doctor.facts import LogLine
from flexkv.doctor.index import KNOWN_LINES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_TAIL_NBYTES = 16 * 2**20
_MAX_LINES = 100
_POOL = r"(\d+) host blocks of (\d+) bytes"
_WANTED = re.compile("|".join([*(known.pattern for known in KNOWN_LINES), _POOL]))


def known_lines(logs: Iterable[str]) -> list[LogLine]:
    """The latest of each log."""
    found: list[LogLine] = []
    for log in dict.fromkeys(logs):
        lines = [line for line in _tail(Path(log)) if _WANTED.search(line)]
        found += [LogLine(log=log, text=line[:1000]) for line in lines[-_MAX_LINES:]]
    return found


def pool_nbytes(lines: Sequence[LogLine]) -> int | None:
    """The largest host pool that an engine has announced."""
    found = (re.search(_POOL, line.text) for line in lines)
    return max((int(one.group(1)) * int(one.group(2)) for one in found if one), default=None)


def _tail(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_NBYTES))
            yield from file.read(_TAIL_NBYTES).decode(errors="replace").splitlines()
    except OSError:
        return
