"""Dynamo's discovery in etcd, over its HTTP gateway: the record under a lease, the card."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from flexkv.errors import FeedError
from flexkv.events import ownership
from flexkv.events.discovery import source_key, source_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flexkv.config import EventsConfig
    from flexkv.events.dynamo import WorkerRank

_SOURCES = "v1/event_sources/"
_LEASE_S = 10  # as Dynamo's own
_CALL_S = 2.0
_MAX_ANSWER_NBYTES = 64 * 2**20
_PIECE_NBYTES = 2**16
_NOT_AUTHORIZED = {400, 401}  # no token, or one that has expired
_NO_ANSWER = (
    OSError,
    ValueError,
    http.client.HTTPException,
    msgspec.MsgspecError,
    RecursionError,
)

_Number = int | Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,19}$")]  # int64 comes as a text
_T = TypeVar("_T")


class _Done(msgspec.Struct):
    pass


class _Token(msgspec.Struct):
    token: str


class _Lease(msgspec.Struct):
    ID: _Number


class _Left(msgspec.Struct):
    TTL: _Number = 0


class _Kept(msgspec.Struct):
    result: _Left = msgspec.field(default_factory=_Left)


class _Pair(msgspec.Struct):
    key: str = ""
    value: str = ""


class _Found(msgspec.Struct):
    kvs: list[_Pair] = []
    count: _Number = 0


class Etcd:
    """The calls that discovery needs, each of them in the thread of the caller.

    Of several endpoints the one that answered last is asked first. Each call raises FeedError
    where none answers, or not as an etcd does.
    """

    def __init__(
        self, endpoints: Sequence[str], user: str | None = None, password: str | None = None
    ) -> None:
        self._endpoints = list(endpoints)
        self._user = user
        self._password = password
        self._token = ""
        no_proxy = urllib.request.ProxyHandler({})  # Dynamo's own client knows none either
        self._opener = urllib.request.build_opener(no_proxy)

    def grant(self) -> str:
        """A new lease, which lives for 10 s unless it is kept."""
        return str(self._call("lease/grant", {"TTL": _LEASE_S}, _Lease).ID)

    def keep(self, lease_id: str) -> bool:
        """Let the lease live on; False if it has ended."""
        return int(self._call("lease/keepalive", {"ID": lease_id}, _Kept).result.TTL) > 0

    def revoke(self, lease_id: str) -> None:
        """End the lease, and forget what it keeps."""
        self._call("lease/revoke", {"ID": lease_id}, _Done)

    def put(self, key: str, value: str, lease_id: str) -> None:
        """Keep ``value`` as long as the lease lives."""
        body = {"key": _coded(key), "value": _coded(value), "lease": lease_id}
        self._call("kv/put", body, _Done)

    def delete(self, key: str) -> None:
        """Forget one key."""
        self._call("kv/deleterange", {"key": _coded(key)}, _Done)

    def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        found = self._call("kv/range", {"key": _coded(key), "count_only": True}, _Found)
        return int(found.count) > 0

    def under(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Keys that begin with ``prefix``, with what their JSON says."""
        after = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        body = {"key": _coded(prefix), "range_end": _coded(after)}
        for pair in self._call("kv/range", body, _Found).kvs:
            try:
                yield _decoded(pair.key), json.loads(_decoded(pair.value))
            except (ValueError, RecursionError):  # somebody else's
                continue

    def _call(self, path: str, body: dict[str, Any], answer: type[_T]) -> _T:
        last: Exception | None = None
        for endpoint in self._endpoints:
            try:
                found = msgspec.json.decode(self._asked(endpoint, path, body), type=answer)
            except _NO_ANSWER as error:
                last = error
            else:
                others = [other for other in self._endpoints if other != endpoint]
                self._endpoints = [endpoint, *others]
                return found
        raise FeedError(
            f"events.etcd_endpoints: no etcd answers at {', '.join(self._endpoints)} ({last!r}): "
            "start it, name another (Dynamo's own is ETCD_ENDPOINTS), or correct etcd_user and "
            "etcd_password (ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD)"
        )

    def _asked(self, endpoint: str, path: str, body: dict[str, Any]) -> bytes:
        try:
            return self._posted(endpoint, path, body)
        except urllib.error.HTTPError as error:
            if self._user is None or error.code not in _NOT_AUTHORIZED:
                raise
        self._token = ""
        who = {"name": self._user, "password": self._password}
        answer = self._posted(endpoint, "auth/authenticate", who)
        self._token = msgspec.json.decode(answer, type=_Token).token
        return self._posted(endpoint, path, body)

    def _posted(self, endpoint: str, path: str, body: dict[str, Any]) -> bytes:
        url = f"{endpoint.rstrip('/')}/v3/{path}"
        headers = {"Authorization": self._token} if self._token else {}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310  # http(s)
        try:
            with self._opener.open(request, timeout=_CALL_S) as answer:
                return _whole(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise


def _whole(answer: http.client.HTTPResponse) -> bytes:
    deadline_s = time.monotonic() + _CALL_S
    pieces: list[bytes] = []
    while piece := answer.read1(_PIECE_NBYTES):
        pieces.append(piece)
        is_long = len(pieces) * _PIECE_NBYTES > _MAX_ANSWER_NBYTES
        if is_long or time.monotonic() > deadline_s:
            raise TimeoutError(f"its answer has no end within {_CALL_S} s")
    return b"".join(pieces)


def etcd_of(settings: EventsConfig) -> Etcd:
    """The one that the settings name."""
    return Etcd(settings.etcd_endpoints, settings.etcd_user, settings.etcd_password)


def source_records(etcd: Etcd) -> Iterator[tuple[str, Any]]:
    """The records of all event sources, by key; in the thread of the caller.

    Raises:
        FeedError: etcd does not answer.
    """
    return etcd.under(_SOURCES)


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
        self._lock = threading.Lock()  # a write whose waiter was cancelled goes on in its thread

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
        """Take the record away for good; routers forget the source's blocks at once.

        Raises:
            FeedError: etcd does not answer; the record is dead in 10 s.
        """
        await asyncio.to_thread(self._remove)

    def _claim(self) -> None:
        self._remove_the_dead()
        self._write()
        try:
            self._remove_the_dead()  # again: two may have come at once
        except FeedError:
            self._remove()
            raise

    def _remove_the_dead(self) -> None:
        records = source_records(self._etcd)
        for key, record in ownership.rivals(records, self._worker, self._publisher_id):
            owner = record["metadata"].get(ownership.OWNER)
            if not isinstance(owner, dict) or not ownership.is_gone(owner):
                raise ownership.refusal(record, self._worker, key)
            self._etcd.delete(key)

    def _write(self) -> None:
        with self._lock:
            if not self._is_removed:
                self._lease_id = self._etcd.grant()
                self._etcd.put(self._key, self._content, self._lease_id)

    def _refresh(self) -> bool:
        if self._etcd.keep(self._lease_id) and self._etcd.exists(self._key):
            return True
        self._write()
        return False

    def _remove(self) -> None:
        with self._lock:
            self._is_removed = True
            if self._lease_id:
                self._etcd.revoke(self._lease_id)


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode()
