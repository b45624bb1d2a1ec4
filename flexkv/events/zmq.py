"""Publishes an engine's events over ZMQ as vLLM does: PUB, and a ROUTER that replays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
import zmq.asyncio

from flexkv.errors import EngineClosedError, FeedError
from flexkv.events.types import AllBlocksCleared
from flexkv.events.vllm_wire import VllmCodec, num_blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flexkv.config import EventsConfig
    from flexkv.events.log import EventSource
    from flexkv.events.types import Event

_END = (-1).to_bytes(8, "big", signed=True)
_FEW = 256  # entries that are looked at in one step
_HIGH_WATER = 100_000  # messages that may wait for a slow subscriber; as in vLLM
_LINGER_MS = 500
_MAX_FRAME_NBYTES = 4096  # of a request, or a topic; who sends more is disconnected
_REPLAY_S = 30.0

_log = logging.getLogger(__name__)


class ZmqSink:
    """vLLM's event stream, for consumers that know it: Dynamo's relay, llm-d, own indexers.

    Every batch has a number, and is buffered before it is sent: who misses one asks at
    ``zmq_replay_endpoint`` for it and all later ones. The buffer keeps ``zmq_buffer_bytes``.
    What is resident at the start is told first. More than the log's ring at once is told as a
    clear, and everything again.
    """

    def __init__(self, settings: EventsConfig) -> None:
        self._settings = settings
        self._codec = VllmCodec(settings.dp_rank)
        self._topic = settings.zmq_topic.encode()
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._buffer_nbytes = 0
        self._next_number = 0
        self._cursor = 0
        self._wake = asyncio.Event()
        self._context: zmq.asyncio.Context | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._counts: Counter[str] = Counter()

    async def start(self, source: EventSource, tasks: asyncio.TaskGroup) -> None:
        """Bind, and tell everything resident; ``tasks`` owns what goes on.

        Raises:
            FeedError: an endpoint can't be bound.
            EngineClosedError: the sink was closed: make a new one.
        """
        if self._closing:
            raise EngineClosedError("the sink is closed: make a new ZmqSink")
        self._source = source
        self._context = zmq.asyncio.Context()
        try:
            self._publisher = self._bound(zmq.PUB, "zmq_endpoint", self._settings.zmq_endpoint)
            if (replay := self._settings.zmq_replay_endpoint) is not None:
                router = self._bound(zmq.ROUTER, "zmq_replay_endpoint", replay)
                router.router_mandatory = True  # waits for a slow asker, where it would drop
                self._tasks.append(tasks.create_task(self._replays(router)))
        except BaseException:
            await self.close()
            raise
        self._tasks.append(tasks.create_task(self._run()))

    def wake(self) -> None:
        """The source has news."""
        self._wake.set()

    def counts(self) -> Mapping[str, int]:
        """Messages, blocks, bytes, dumps, replays and malformed requests so far."""
        return dict(self._counts)

    async def close(self) -> None:
        """Send what is left, within ``close_timeout_s``, then let go."""
        self._closing = True
        self._wake.set()
        if self._tasks:
            await asyncio.wait(self._tasks[-1:], timeout=self._settings.close_timeout_s)
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        context, self._context = self._context, None
        if context is not None:
            await asyncio.to_thread(context.destroy, _LINGER_MS)

    def _bound(self, kind: int, key: str, endpoint: str) -> zmq.asyncio.Socket:
        assert self._context is not None
        socket: zmq.asyncio.Socket = self._context.socket(kind)
        socket.sndhwm = _HIGH_WATER
        socket.maxmsgsize = _MAX_FRAME_NBYTES
        try:
            socket.bind(endpoint)
            if endpoint.startswith("ipc://"):
                Path(endpoint.removeprefix("ipc://")).chmod(0o600)
        except (zmq.ZMQError, OSError) as error:
            raise FeedError(
                f"events.{key}: can't bind {endpoint} ({error.strerror}): name an address of this "
                "machine that nobody uses"
            ) from error
        return socket

    async def _run(self) -> None:
        self._cursor, resident = self._source.dump()
        await self._send(resident)
        while True:
            self._wake.clear()
            await self._send_news()
            if self._closing:
                return
            await self._wake.wait()

    async def _send_news(self) -> None:
        while self._cursor < self._source.last_id:
            self._counts["waiting"] = self._source.backlog(self._cursor) or 0
            entries = self._source.since(self._cursor, _FEW)
            if entries is None:
                self._counts["dumps"] += 1
                self._cursor, resident = self._source.dump()
                await self._send(chain([AllBlocksCleared()], resident))
            elif entries:
                await self._send([entry.event for entry in entries])
                self._cursor = entries[-1].event_id
        self._counts["waiting"] = 0

    async def _send(self, events: Iterable[Event]) -> None:
        for batch in self._codec.batches(events):
            payload = self._codec.payload(batch, time.time())
            number = self._next_number
            self._next_number += 1
            self._keep(number, payload)  # first: whoever has seen it can have it again
            await self._publisher.send_multipart([self._topic, number.to_bytes(8, "big"), payload])
            self._counts["messages"] += 1
            self._counts["blocks"] += num_blocks_of(batch)
            self._counts["nbytes"] += len(payload)
            await asyncio.sleep(0)

    def _keep(self, number: int, payload: bytes) -> None:
        self._buffer.append((number, payload))
        self._buffer_nbytes += len(payload)
        while self._buffer_nbytes > self._settings.zmq_buffer_bytes and len(self._buffer) > 1:
            self._buffer_nbytes -= len(self._buffer.popleft()[1])

    async def _replays(self, router: zmq.asyncio.Socket) -> None:
        """One request after another: ["", the first number wanted]."""
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3 or frames[1] or len(frames[2]) != 8:  # noqa: PLR2004  # see above
                self._counts["malformed"] += 1
                continue
            try:
                async with asyncio.timeout(_REPLAY_S):
                    await self._replay(router, frames[0], int.from_bytes(frames[2], "big"))
                self._counts["replays"] += 1
            except (TimeoutError, zmq.ZMQError) as error:  # who asked is gone, or does not read
                _log.warning("a replay was broken off: %r", error)

    async def _replay(self, router: zmq.asyncio.Socket, who: bytes, start: int) -> None:
        for number, payload in [kept for kept in self._buffer if kept[0] >= start]:
            head = [who, b"", self._topic, number.to_bytes(8, "big")]
            await router.send_multipart([*head, payload])
            await asyncio.sleep(0)
        with contextlib.suppress(zmq.ZMQError):
            await router.send_multipart([who, b"", b"", _END, b""])
