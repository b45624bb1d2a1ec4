"""The record by which Dynamo's routers find an event source, in a folder they share."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import threading
from typing import TYPE_CHECKING, TypeVar

from flexkv.errors import FeedError
from flexkv.events.dynamo import TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


class FileRecord:
    """One live-only event source of (worker, data-parallel rank), as file discovery keeps it.

    A router that sees the record reads what ``publisher_id`` publishes. There must be no other
    source for the same worker and rank: it would make the router believe neither.
    """

    def __init__(self, folder: Path, worker: WorkerRank, publisher_id: int) -> None:
        where = {
            "namespace": worker.namespace,
            "component": worker.component,
            "name": worker.endpoint,
        }
        key = (
            f"namespace/{worker.namespace}/component/{worker.component}"
            f"/endpoint/{worker.endpoint}/topic/{TOPIC}/{publisher_id:x}"
        )
        self.path = folder / "v1" / "event_sources" / escaped(key)
        self._content = json.dumps(
            {
                "type": "EventSource",
                "scope": {"kind": "endpoint", "endpoint": where},
                "topic": TOPIC,
                "publisher_id": publisher_id,
                "metadata": {
                    "kv_state_endpoint": where,
                    "worker": {"worker_id": worker.worker_id, "dp_rank": worker.dp_rank},
                    "publisher_id": publisher_id,
                },
            }
        )
        self._is_written = self._is_removed = False
        self._lock = threading.Lock()  # a write whose waiter was cancelled goes on in its thread

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
