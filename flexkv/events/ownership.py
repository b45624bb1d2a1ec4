"""Who speaks for a worker and rank: one process, named in the record, until it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any

from flexkv.errors import FeedError
from flexkv.events.dynamo import TOPIC
from flexkv.process import Process, host_name, machine_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from flexkv.events.dynamo import WorkerRank

OWNER = "flexkv_owner"
MAX_RECORD_NBYTES = 64 * 1024
"""A record is about a thousand bytes: whatever is longer is none."""

EXPIRED_S = 12.0
"""A record that was not touched for 10 s is dead for every router; the rest is for slow clocks."""


def this_process() -> dict[str, Any]:
    """The owner, as a record names it."""
    pid = os.getpid()
    return {
        "host": host_name(),
        "machine": machine_id(),
        "pid": pid,
        "started": Process(pid).started,
    }


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the process is known to have ended: it was one of this machine, and is no more."""
    pid, started = owner.get("pid"), owner.get("started")
    if owner.get("machine") != machine_id() or type(pid) is not int or started is None:
        return False
    return bool(Process(pid).started != started)


def rivals(
    records: Iterable[tuple[str, Any]], worker: WorkerRank, publisher_id: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of all records, by name, those of other sources for the same worker and rank."""
    for name, record in records:
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            metadata = record["metadata"]
            whose = (metadata["worker"]["worker_id"], metadata["worker"]["dp_rank"])
            if whose != (worker.worker_id, worker.dp_rank) or record["topic"] != TOPIC:
                continue
            if record["publisher_id"] != publisher_id:
                yield name, record


def refusal(record: Mapping[str, Any], worker: WorkerRank, where: str) -> FeedError:
    """Names who has the worker and rank already."""
    owner = record["metadata"].get(OWNER)
    if isinstance(owner, dict):
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        remedy = "end it, or close its engine, first"
    else:
        who = "a publisher that is not flexkv's"
        remedy = "switch the worker's own KV events off, or set events.sink to none"
    return FeedError(
        f"worker {worker.worker_id}, rank {worker.dp_rank} has its event source already: {who} "
        f"({where}). Dynamo accepts one and believes neither of two: {remedy}"
    )


def live_records(folder: Path) -> Iterator[tuple[str, Any]]:
    """The records of a discovery folder that a router would heed, by path."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return
    oldest_s = time.time() - EXPIRED_S
    for path in paths:
        if path.name.startswith("."):
            continue
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = _content(path, oldest_s)
            if content is not None:
                yield str(path), json.loads(content)


def _content(path: Path, oldest_s: float) -> bytes | None:
    """Of a regular file that is not too large and not older; never waits for a pipe's writer."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(fd, "rb") as file:  # noqa: PTH123  # it is open already
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_mtime < oldest_s:
            return None
        content = file.read(MAX_RECORD_NBYTES + 1)
    return content if len(content) <= MAX_RECORD_NBYTES else None
