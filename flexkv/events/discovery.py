"""The record by which Dynamo's routers find an event source, in a folder they share."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from flexkv.errors import FeedError
from flexkv.events import ownership
from flexkv.events.dynamo import TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv.events.dynamo import WorkerRank

_T = TypeVar("_T")

REFRESH_S = 3.0
"""How often ``refresh`` is due: a record that was not touched for 10 s counts as dead."""


class WorkerCard:
    """A worker's model card: before it is there, routers ignore the worker and its events."""

    def __init__(self, folder: Path, worker: WorkerRank) -> None:
        key = f"{worker.namespace}/{worker.component}/{worker.endpoint}/{worker.worker_id:x}"
        self.path = folder / "v1" / "mdc" / escaped(key)

    async def exists(self) -> bool:
        """Whether the worker has registered."""
        return await asyncio.to_thread(self._exists)

    def _exists(self) -> bool:
        try:
            return self.path.exists()
        except OSError:  # a folder that is out of reach for now holds no card for us
            return False


async def find_worker(folder: Path, worker_id: int) -> tuple[str, str, str] | None:
    """Namespace, component and endpoint of the worker, by its model card; None if there is none."""
    return await asyncio.to_thread(_find_worker, folder / "v1" / "mdc", worker_id)


def _find_worker(cards: Path, worker_id: int) -> tuple[str, str, str] | None:
    try:
        keys = [unquote(entry.name) for entry in cards.iterdir()]
    except OSError:
        return None
    for key in keys:
        match key.split("/"):
            case [namespace, component, endpoint, card_id] if card_id == f"{worker_id:x}":
                return namespace, component, endpoint
    return None


def source_key(worker: WorkerRank, publisher_id: int) -> str:
    """Under which key of its ``event_sources`` discovery keeps a source."""
    return (
        f"namespace/{worker.namespace}/component/{worker.component}"
        f"/endpoint/{worker.endpoint}/topic/{TOPIC}/{publisher_id:x}"
    )


def source_record(
    worker: WorkerRank, publisher_id: int, recovery_address: str | None
) -> dict[str, Any]:
    """What discovery says of a source. ``recovery_address``: where it can be asked for the past."""
    where = {
        "namespace": worker.namespace,
        "component": worker.component,
        "name": worker.endpoint,
    }
    metadata: dict[str, Any] = {
        "kv_state_endpoint": where,
        "worker": {"worker_id": worker.worker_id, "dp_rank": worker.dp_rank},
        "publisher_id": publisher_id,
        ownership.OWNER: ownership.this_process(),
    }
    if recovery_address is not None:
        metadata["recovery_target"] = {
            "component": worker.component,
            "endpoint": _recovery_endpoint(publisher_id),
            "namespace": worker.namespace,
            "instance_id": publisher_id,
            "transport": {"tcp": f"{recovery_address}/{recovery_path(worker, publisher_id)}"},
            "device_type": "cuda",
            "request_plane_codec": "msgpack",
        }
    return {
        "type": "EventSource",
        "scope": {"kind": "endpoint", "endpoint": where},
        "topic": TOPIC,
        "publisher_id": publisher_id,
        "metadata": metadata,
    }


def recovery_path(worker: WorkerRank, publisher_id: int) -> str:
    """What a router asks for at the recovery address: one source of maybe several there."""
    endpoint = _recovery_endpoint(publisher_id)
    return f"{publisher_id:x}/{worker.namespace}/{worker.component}/{endpoint}"


def _recovery_endpoint(publisher_id: int) -> str:
    return f"worker_kv_query_source_{publisher_id:x}"


class FileRecord:
    """The record of one event source of (worker, data-parallel rank), as file discovery keeps it.

    A router that sees the record reads what ``publisher_id`` publishes. There must be no other
    source for the same worker and rank: it would make the router believe neither.
    """

    def __init__(
        self,
        folder: Path,
        worker: WorkerRank,
        publisher_id: int,
        recovery_address: str | None = None,
    ) -> None:
        self._worker = worker
        self._publisher_id = publisher_id
        self.path = folder / "v1" / "event_sources" / escaped(source_key(worker, publisher_id))
        self._content = json.dumps(source_record(worker, publisher_id, recovery_address))
        self._is_written = self._is_removed = False
        self._lock = threading.Lock()  # a write whose waiter was cancelled goes on in its thread

    async def claim(self) -> None:
        """Show the record, as the only one of its worker and rank: those of the dead are removed.

        Raises:
            FeedError: the folder does not take it, or somebody else's record is there. Ours isn't.
        """
        await self._in_thread(self._claim)

    async def write(self) -> None:
        """Show the record, whole from the first moment.

        Raises:
            FeedError: the folder does not take it.
        """
        await self._in_thread(self._write)

    async def refresh(self) -> bool:
        """Keep the record alive; False if it was gone and had to be written again.

        Raises:
            FeedError: the folder takes it no longer.
        """
        return await self._in_thread(self._refresh)

    async def remove(self) -> None:
        """Take the record away for good; routers forget the source's blocks at once."""
        await self._in_thread(self._remove)

    async def _in_thread(self, step: Callable[[], _T]) -> _T:
        try:
            return await asyncio.to_thread(step)
        except OSError as error:
            raise FeedError(
                f"events.discovery_path: can't write to {self.path.parent}: {error.strerror}. "
                "Name a folder that this process may write to and that the routers share "
                "(Dynamo's own is DYN_FILE_KV)"
            ) from error

    def _claim(self) -> None:
        self._remove_the_dead()
        self._write()
        try:
            self._remove_the_dead()  # again: two may have come at once
        except FeedError:
            self._remove()
            raise

    def _remove_the_dead(self) -> None:
        records = ownership.live_records(self.path.parent)
        for name, record in ownership.rivals(records, self._worker, self._publisher_id):
            owner = record["metadata"].get(ownership.OWNER)
            if not isinstance(owner, dict) or not ownership.is_gone(owner):
                raise ownership.refusal(record, self._worker, name)
            Path(name).unlink(missing_ok=True)

    def _write(self) -> None:
        with self._lock:
            if self._is_removed:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_name(f".tmp_{secrets.token_hex(8)}")
            try:
                draft.write_text(self._content)
                draft.rename(self.path)
                self._is_written = True
            except OSError:
                draft.unlink(missing_ok=True)
                raise

    def _refresh(self) -> bool:
        try:
            os.utime(self.path)
        except FileNotFoundError:
            self._write()
            return False
        return True

    def _remove(self) -> None:
        with self._lock:
            self._is_removed = True
            if self._is_written:
                self.path.unlink(missing_ok=True)


def escaped(key: str) -> str:
    """A discovery key as a file name: every byte but ASCII letters and digits as %XX."""
    return "".join(
        char if char.isascii() and char.isalnum() else "".join(f"%{b:02X}" for b in char.encode())
        for char in key
    )
