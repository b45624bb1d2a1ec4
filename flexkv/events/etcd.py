"""Dynamo's discovery in etcd, over its HTTP gateway: the record under a lease, the card."""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from flexkv.errors import FeedError
from flexkv.events import ownership
from flexkv.events.discovery import source_key, source_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flexkv.events.dynamo import WorkerRank

_SOURCES = "v1/event_sources/"
_LEASE_S = 10  # as Dynamo's own
_CALL_S = 2.0
_MAX_ANSWER_NBYTES = 64 * 2**20


class Etcd:
    """The calls that discovery needs; of several endpoints the first that answers is asked."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._endpoints = endpoints

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request, in the thread of the caller.

        Raises:
            FeedError: no endpoint answers.
        """
        last: Exception | None = None
        for endpoint in self._endpoints:
            url = f"{endpoint.rstrip('/')}/v3/{path}"
            request = urllib.request.Request(url, json.dumps(body).encode())  # noqa: S310  # http(s)
            try:
                with urllib.request.urlopen(request, timeout=_CALL_S) as answer:  # noqa: S310  # as above
                    found: dict[str, Any] = json.loads(answer.read(_MAX_ANSWER_NBYTES))
                    return found
            except (OSError, ValueError) as error:
                last = error
        raise FeedError(
            f"events.etcd_endpoints: no etcd answers at {', '.join(self._endpoints)} ({last!r}): "
            "start it, or name another (Dynamo's own is ETCD_ENDPOINTS)"
        )

    def put(self, key: str, value: str, lease_id: str) -> None:
        """Keep ``value`` as long as the lease lives."""
        self.call("kv/put", {"key": _coded(key), "value": _coded(value), "lease": lease_id})

    def delete(self, key: str) -> None:
        """Forget one key."""
        self.call("kv/deleterange", {"key": _coded(key)})

    def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        return bool(self.call("kv/range", {"key": _coded(key), "count_only": True}).get("count"))

    def under(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Keys that begin with ``prefix``, with what their JSON says."""
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found = self.call("kv/range", {"key": _coded(prefix), "range_end": _coded(after)})
        for pair in found.get("kvs", []):
            try:
                yield base64.b64decode(pair["key"]).decode(), json.loads(_decoded(pair["value"]))
            except (ValueError, RecursionError):  # somebody else's
                continue


class EtcdCard:
    """A worker's model card: before it is there, routers ignore the worker and its events."""

    def __init__(self, etcd: Etcd, worker: WorkerRank) -> None:
        self._etcd = etcd
        where = f"{worker.namespace}/{worker.component}/{worker.endpoint}"
        self.path = f"v1/mdc/{where}/{worker.worker_id:x}"

    async def exists(self) -> bool:
        """Whether the worker has registered."""
        try:
            return await asyncio.to_thread(self._etcd.exists, self.path)
        except FeedError:  # an etcd that is out of reach for now has no card for us
            return False


class EtcdRecord:
    """The record of one event source, as ``FileRecord``, bound to a lease of 10 s."""

    def __init__(
        self, etcd: Etcd, worker: WorkerRank, publisher_id: int, recovery_address: str | None
    ) -> None:
        self._etcd = etcd
        self._worker = worker
        self._publisher_id = publisher_id
        self._key = _SOURCES + source_key(worker, publisher_id)
        self._content = json.dumps(source_record(worker, publisher_id, recovery_address))
        self._lease_id = ""
        self._is_removed = False

    async def claim(self) -> None:
        """Show the record, as the only one of its worker and rank: those of the dead are removed.

        Raises:
            FeedError: etcd does not answer, or somebody else's record is there. Ours isn't.
        """
        await asyncio.to_thread(self._claim)

    async def refresh(self) -> bool:
        """Keep the record alive; False if it was gone and had to be written again.

        Raises:
            FeedError: etcd does not answer.
        """
        return await asyncio.to_thread(self._refresh)

    async def remove(self) -> None:
        """Take the record away for good; routers forget the source's blocks at once."""
        self._is_removed = True
        if self._lease_id:
            await asyncio.to_thread(self._etcd.call, "lease/revoke", {"ID": self._lease_id})

    def _claim(self) -> None:
        self._remove_the_dead()
        self._write()
        try:
            self._remove_the_dead()  # again: two may have come at once
        except FeedError:
            self._is_removed = True
            self._etcd.call("lease/revoke", {"ID": self._lease_id})
            raise

    def _remove_the_dead(self) -> None:
        records = self._etcd.under(_SOURCES)
        for key, record in ownership.rivals(records, self._worker, self._publisher_id):
            owner = record["metadata"].get(ownership.OWNER)
            if not isinstance(owner, dict) or not ownership.is_gone(owner):
                raise ownership.refusal(record, self._worker, key)
            self._etcd.delete(key)

    def _write(self) -> None:
        if not self._is_removed:
            self._lease_id = str(self._etcd.call("lease/grant", {"TTL": _LEASE_S})["ID"])
            self._etcd.put(self._key, self._content, self._lease_id)

    def _refresh(self) -> bool:
        alive = self._etcd.call("lease/keepalive", {"ID": self._lease_id})
        if int(alive.get("result", {}).get("TTL", 0)) > 0 and self._etcd.exists(self._key):
            return True
        self._write()
        return False


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode()
