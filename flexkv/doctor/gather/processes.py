"""The processes of a deployment, as /proc shows them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.doctor.facts import Process

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from flexkv.doctor.facts import Role

_PROC = Path("/proc")
_MODULES: dict[str, Role] = {"dynamo.frontend": "frontend", "dynamo.vllm": "worker"}
_PROGRAMS: dict[str, Role] = {"nats-server": "nats", "etcd": "etcd"}
_TITLE = "VLLM::"
_WORKER_ID = "DYN_FPM_WORKER_ID"


@dataclass(frozen=True, slots=True)
class _Row:
    parent: int
    group: int
    session: int
    command: tuple[str, ...]


def processes(of: Collection[int] | None = None) -> list[Process]:
    """Those with a part in a deployment; ``of``: of the one that these pids and groups belong to.

    What a killed worker has left behind is always among them.
    """
    table = dict(_rows())
    ours = None
    if of is not None:
        ours = set(of) | {pid for pid, row in table.items() if row.group in of}
        ours |= {member for pid in tuple(ours) for member in _family(pid, table)}
    found = []
    for pid, row in table.items():
        role = role_of(row.command)
        is_foreign = ours is not None and pid not in ours
        is_orphan = role == "engine" and _is_orphan(row, table)
        if role and (not is_foreign or is_orphan):
            found.append(_process(pid, role, table, is_orphan=is_orphan, is_foreign=is_foreign))
    return found


def role_of(command: Sequence[str]) -> Role:
    """What a process is, by its command line."""
    if not command:
        return ""
    if command[0].startswith(_TITLE):
        return "engine"
    for flag, module in pairwise(command):
        if flag == "-m" and module in _MODULES:
            return _MODULES[module]
    return _PROGRAMS.get(Path(command[0]).name, "")


def variables(pid: int) -> dict[str, str] | None:
    """The environment that a process was started with; None where it can't be read."""
    try:
        text = (_PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return None
    pairs = (entry.partition("=") for entry in text.split("\0"))
    return {name: value for name, sign, value in pairs if sign}


def output_of(pid: int) -> str | None:
    """The file that a process writes its output to; None where it is none."""
    try:
        path = (_PROC / str(pid) / "fd" / "1").readlink()
    except OSError:
        return None
    return str(path) if path.is_absolute() and path.is_file() else None


def folder_of(pid: int) -> Path:
    """The working folder of a process."""
    try:
        return (_PROC / str(pid) / "cwd").readlink()
    except OSError:
        return Path()


def _process(
    pid: int, role: Role, table: Mapping[int, _Row], *, is_orphan: bool, is_foreign: bool
) -> Process:
    row, family = table[pid], _family(pid, table)
    return Process(
        pid=pid,
        role=role,
        command=row.command,
        env=variables(pid),
        parent=row.parent,
        group=row.group,
        is_orphan=is_orphan,
        is_foreign=is_foreign,
        has_leader=row.group in table,
        family=frozenset(family),
        worker_id=_worker_id(family) if role == "worker" else None,
        memlock=_memlock(pid),
    )


def _rows() -> Iterator[tuple[int, _Row]]:
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text(errors="replace")
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
            fields = stat.rpartition(")")[2].split()
            if fields[0] not in {"Z", "X"}:
                words = tuple(command.rstrip("\0 ").split("\0")) if command else ()
                yield int(entry.name), _Row(int(fields[1]), int(fields[2]), int(fields[3]), words)


def _is_orphan(row: _Row, table: Mapping[int, _Row]) -> bool:
    """Children of a living vLLM share its session, and are not adopted by some init."""
    parent = table.get(row.parent)
    if parent is None or parent.session != row.session:
        return True
    words = " ".join(parent.command)
    return row.parent == 1 and not any(word in words for word in ("python", "vllm", _TITLE))


def _family(pid: int, table: Mapping[int, _Row]) -> set[int]:
    family, todo = {pid}, [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, row in table.items() if row.parent == parent]
        todo += [child for child in children if child not in family]
        family.update(children)
    return family


def _worker_id(family: Collection[int]) -> int | None:
    """Dynamo sets it for the children of a worker."""
    for pid in family:
        text = (variables(pid) or {}).get(_WORKER_ID, "")
        if text.isdecimal():
            return int(text)
    return None


def _memlock(pid: int) -> int | None:
    """The soft limit in bytes; None: there is none, or it can't be read."""
    try:
        lines = (_PROC / str(pid) / "limits").read_text().splitlines()
    except OSError:
        return None
    words = next((line.split() for line in lines if line.startswith("Max locked memory")), [])
    return int(words[3]) if len(words) > 3 and words[3].isdecimal() else None  # noqa: PLR2004
