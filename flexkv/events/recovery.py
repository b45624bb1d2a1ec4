"""Answers Dynamo routers that ask what they have missed: a small TCP server for many sources."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

from flexkv.errors import EngineClosedError, FeedError
from flexkv.events import reqplane
from flexkv.events.callbacks import CallbackPolicy
from flexkv.events.reqplane import MalformedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from flexkv.config import EventsConfig
    from flexkv.events.reqplane import Parts, Query, Request

    Answering: TypeAlias = Callable[[Query], AbstractAsyncContextManager[Parts]]

_READ_S = 10.0  # for the rest of a request that has begun
_CONNECT_S = 2.0
_ANSWER_S = 30.0  # after which a router asks again
_GOODBYE_S = 2.0
_MAX_ANSWERS = 64  # at once
_SLAB_NBYTES = 256 * 1024
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, and a number
_WILDCARDS = {"0.0.0.0", "::", "[::]"}  # noqa: S104  # they are what is refused
_LOST = (OSError, EOFError, TimeoutError)

_log = logging.getLogger(__name__)


class RecoveryServer:
    """Serves Dynamo's request plane at ``address``, for each source under a path of its own.

    The answer goes over a new connection to where the request says: to this machine, or to what
    ``recovery_callback_hosts`` names. For any other place the request is not accepted, so that the
    router goes on without an answer. What is not understood ends its connection. A router keeps
    its connection open between queries: where there are too many, the longest idle one is closed.
    ``counts``: queries, answers, lost answers, refused and malformed requests, evicted connections.
    """

    def __init__(self, settings: EventsConfig) -> None:
        self._host = settings.recovery_host
        self._port = settings.recovery_port
        self._max_connections = settings.recovery_connections
        self._policy = CallbackPolicy(settings.recovery_callback_hosts)
        self._sources: dict[str, Answering] = {}
        self._server: asyncio.Server | None = None
        self._tasks: asyncio.TaskGroup
        self._running: set[asyncio.Task[None]] = set()
        self._num_answers = 0
        self._connections: set[asyncio.StreamWriter] = set()
        self._idle: dict[asyncio.StreamWriter, None] = {}  # the longest idle first
        self._refused: set[str] = set()
        self._counts: Counter[str] = Counter()

    @property
    def address(self) -> str:
        """Where it listens: host and port."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    @property
    def counts(self) -> Mapping[str, int]:
        """What has happened since the start."""
        return dict(self._counts)

    @property
    def refused_hosts(self) -> list[str]:
        """Where routers wanted their answers, and got none."""
        return sorted(self._refused)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Listen; ``tasks`` owns the connections.

        Raises:
            FeedError: the address can't be listened at.
        """
        self._tasks = tasks
        if self._host in _WILDCARDS:
            raise FeedError(
                f"events.recovery_host (DYN_TCP_RPC_HOST) is {self._host}: routers connect to what "
                "it says, so name one address of this machine"
            )
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self._port)
        except OSError as error:
            raise FeedError(
                f"events.recovery_host and recovery_port: can't listen at {self.address} "
                f"({error.strerror or error}): name an address of this machine, and a free port "
                "or 0 for any"
            ) from error
        self._port = self._server.sockets[0].getsockname()[1]

    def serve(self, path: str, answering: Answering) -> None:
        """Answer the queries for ``path``: with what ``answering`` yields, kept up until it is out.

        Raises:
            EngineClosedError: the server does not listen.
        """
        if self._server is None:
            raise EngineClosedError("the recovery server is not started, or closed already")
        self._sources[path] = answering

    def forget(self, path: str) -> None:
        """Answer no more queries for ``path``."""
        self._sources.pop(path, None)

    async def close(self) -> None:
        """Answer nobody any more."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._has_room():
            self._counts["refused"] += 1
            writer.close()
        else:
            self._connections.add(writer)
            _keep_alive(writer)
            self._own(self._requests(reader, writer))

    def _has_room(self) -> bool:
        """Whether one more may connect, now that an idle one has made way if need be."""
        if len(self._connections) < self._max_connections:
            return True
        longest_idle = next(iter(self._idle), None)
        if longest_idle is None:
            return False
        del self._idle[longest_idle]
        self._connections.discard(longest_idle)
        self._counts["evicted"] += 1
        longest_idle.transport.abort()
        return True

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a router: many requests, one after another."""
        try:
            while True:
                self._idle[writer] = None
                try:
                    start = await reader.readexactly(2)  # however long it takes to come
                finally:
                    self._idle.pop(writer, None)
                path, request = await _request(reader, start)
                if not self._accepts(request):
                    return
                writer.write(reqplane.ACCEPTED)
                self._own(self._answer(path, request))  # gives its place back, come what may
                async with asyncio.timeout(_READ_S):
                    await writer.drain()
        except MalformedError as error:
            self._counts["malformed"] += 1
            _log.debug("dropped a malformed recovery request: %s", error)
        except _LOST:
            pass
        finally:
            self._connections.discard(writer)
            await _closed(writer)

    def _accepts(self, request: Request) -> bool:
        host = request.address[0]
        self._counts["queries"] += 1
        allowed = self._policy.allows(host)
        if allowed and self._num_answers < _MAX_ANSWERS:
            self._num_answers += 1
            return True
        self._counts["refused"] += 1
        if not allowed and host not in self._refused and len(self._refused) < _MAX_ANSWERS:
            self._refused.add(host)
            _log.error(
                "a router wants its answer at %s, which is not an address of this machine: it gets "
                "none, and does not learn what it has missed; name %s in "
                "events.recovery_callback_hosts, or give it an address of this machine "
                "(DYN_TCP_RESPONSE_STREAM_HOST)",
                host,
                host,
            )
        return False

    async def _answer(self, path: str, request: Request) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S), contextlib.AsyncExitStack() as stack:
                answering = self._sources.get(path)
                if answering is None:
                    parts = reqplane.error_answer("no such source")
                else:
                    parts = await stack.enter_async_context(answering(request.query))
                await _deliver(request, parts)
                self._counts["answers"] += 1
        except _LOST as error:
            self._counts["lost"] += 1
            _log.warning("a recovery answer to %s:%d is lost: %r", *request.address, error)
        finally:
            self._num_answers -= 1


async def _request(reader: asyncio.StreamReader, start: bytes) -> tuple[str, Request]:
    """A connection's request that begins with the two bytes of ``start``.

    Raises:
        MalformedError: it is none.
    """
    async with asyncio.timeout(_READ_S):
        path = await _part(reader, start, reqplane.MAX_PATH_NBYTES)
        await _part(reader, await reader.readexactly(2), reqplane.MAX_HEADERS_NBYTES)
        length = await reader.readexactly(4)
        payload = await _part(reader, length, reqplane.MAX_PAYLOAD_NBYTES)
    return path.decode("ascii", errors="replace"), reqplane.request_of(payload)


async def _part(reader: asyncio.StreamReader, length: bytes, limit: int) -> bytes:
    nbytes = int.from_bytes(length, "big")
    if nbytes > limit:
        raise MalformedError(f"a part of {nbytes} bytes")
    return await reader.readexactly(nbytes)


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    """Notice within a minute that the other side's machine is gone."""
    connected: socket.socket = writer.get_extra_info("socket")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _deliver(request: Request, parts: Parts) -> None:
    """Bring an answer to where the request wants it, and wait until it was read."""
    async with asyncio.timeout(_CONNECT_S):
        reader, writer = await asyncio.open_connection(*request.address)
    try:
        writer.write(reqplane.greeting(request.subject))
        slab = bytearray()
        for part in reqplane.answer_frame(parts):
            slab += part
            if len(slab) >= _SLAB_NBYTES:
                writer.write(slab)
                await writer.drain()
                slab = bytearray()
        writer.write(slab + reqplane.farewell())
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                while await reader.read(4096):
                    pass
    finally:
        await _closed(writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(*_LOST):
        async with asyncio.timeout(_GOODBYE_S):
            await writer.wait_closed()
