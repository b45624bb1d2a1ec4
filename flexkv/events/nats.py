"""Publishes an engine's events on NATS, as a Dynamo event source of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.errors import EngineClosedError, FeedError
from flexkv.events.discovery import REFRESH_S, FileRecord, WorkerCard
from flexkv.events.dynamo import MAX_ID, DynamoCodec, WorkerRank
from flexkv.events.nats_link import NatsLink
from flexkv.events.types import AllBlocksCleared

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from flexkv.config import EventsConfig
    from flexkv.events.log import EventSource
    from flexkv.events.types import Event

SETTLE_S = 1.0
"""After this long a router that was there when a record appeared does listen to it.

Measured: 2 to 7 ms after the write on two idle cores; up to 16 ms with six busy processes on them,
where the first event of 5 starts in 15 was missed. Nothing sent later was.
"""

_REST_S = 0.5  # after an overflow: the burst that caused it should pass first
_CARD_POLL_S = 0.25
_CARD_PATIENCE_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NatsStats:
    """What a sink has done so far. ``resyncs``: how often it told everything again, by reason."""

    connected: bool
    num_events: int
    num_blocks: int
    num_messages: int
    nbytes: int
    resyncs: Mapping[str, int]


class NatsSink:
    """An event source that one worker's routers can rely on while they are up.

    The source is live-only: a router hears what is published while it listens. So everything
    resident is told again ("resync": clear, snapshot, then news) when the sink starts and when the
    worker's model card appears, each time once more after SETTLE_S; ``reconnect_resync_s`` after
    each reconnect, since a router's client may come back up to 4 s after ours; when more than
    ``outbox`` blocks would wait to be sent; and on ``resync``. A router that starts later stays
    cold until the next of these.

    While disconnected nothing is queued. Connection errors are logged, counted, and end nothing.
    """

    def __init__(self, settings: EventsConfig) -> None:
        self._settings = settings
        worker = _worker(settings)
        publisher_id = secrets.randbelow(MAX_ID) + 1
        folder = _discovery_folder(settings)
        self._record = FileRecord(folder, worker, publisher_id)
        self._card = WorkerCard(folder, worker)
        self._subject = worker.subject
        self._codec = DynamoCodec(
            worker_id=worker.worker_id, dp_rank=worker.dp_rank, publisher_id=publisher_id
        )
        self._resyncs = _Resyncs()
        self._wake = asyncio.Event()
        self._link = NatsLink(settings, on_connect=self._on_connect, on_loss=self._drop_news)
        self._source: EventSource | None = None
        self._outbox = _Outbox(settings.outbox)
        self._task: asyncio.Task[None] | None = None
        self._closing = self._giving_up = False
        self._sent: Counter[str] = Counter()
        self._num_resyncs: Counter[str] = Counter()

    async def start(self, source: EventSource, tasks: asyncio.TaskGroup) -> None:
        """Register, connect, and tell everything resident; ``tasks`` owns what goes on.

        Raises:
            FeedError: the discovery folder can't be written to, or no server answers within
                ``connect_timeout_s`` and ``nats_required`` is set. Nothing is left behind.
            EngineClosedError: the sink was closed: make a new one.
        """
        if self._closing:
            raise EngineClosedError("the sink is closed: make a new NatsSink")
        self._source = source
        await self._record.write()
        try:
            await self._link.open()
        except BaseException:
            await self._record.remove()
            raise
        self._task = tasks.create_task(self._run(), name="flexkv-nats-sink")

    def wake(self) -> None:
        """The source has news: take them, unless a resync is to come that will tell them."""
        if self._outbox.is_open:
            assert self._source is not None
            if not self._outbox.fill(self._source):
                self._plan("overflow", _REST_S)
            self._wake.set()

    def resync(self) -> None:
        """Tell everything again, and once more after SETTLE_S, for a router that has come late."""
        self._plan_settled("request")

    def stats(self) -> NatsStats:
        """Counters since the start."""
        sent = self._sent
        return NatsStats(
            connected=self._link.connected,
            num_events=sent["events"],
            num_blocks=sent["blocks"],
            num_messages=sent["messages"],
            nbytes=sent["nbytes"],
            resyncs=dict(self._num_resyncs),
        )

    async def close(self) -> None:
        """Send what is left, within ``close_timeout_s``; then routers forget the source."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._settings.close_timeout_s)
            self._giving_up = True  # nats-py may swallow the cancellation
            self._task.cancel()
            await asyncio.wait([self._task], timeout=self._settings.close_timeout_s)
        try:
            await self._record.remove()
        except FeedError as error:  # it is dead in 10 s without us
            _log.warning("%s", error)
        await self._link.close()

    async def _run(self) -> None:
        """Own everything that goes on until ``close``."""
        async with asyncio.TaskGroup() as group:
            others = [
                group.create_task(self._link.keep()),
                group.create_task(self._keep_record()),
            ]
            await self._publish()
            for task in others:
                task.cancel()

    async def _publish(self) -> None:
        """Send news and resyncs as they come due; return once closing, with nothing left."""
        loop = asyncio.get_running_loop()
        while not self._closing:
            self._wake.clear()
            if self._link.connected:
                await self._send_due(loop.time())
            due = self._resyncs.next_due() if self._link.connected else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
        if self._link.connected:
            await self._send(self._outbox.drain())
            await self._link.flush()

    async def _send_due(self, now_s: float) -> None:
        reason = self._resyncs.take(now_s)
        if reason is None:
            await self._send(self._outbox.drain())
        elif await self._send_everything(clear=reason != "settle"):
            self._num_resyncs[reason] += 1

    async def _send_everything(self, *, clear: bool) -> bool:
        """What is resident. News of the time meanwhile come after it, and are idempotent."""
        assert self._source is not None
        # without a clear, the removals among the news that wait must not be lost
        before: list[Event] = [AllBlocksCleared()] if clear else list(self._outbox.drain())
        last_id, resident = self._source.dump()
        self._outbox.open(last_id)
        if not await self._send(chain(before, resident)):
            return False
        if not await self._link.flush():
            self._give_up_news()
            return False
        return True

    async def _send(self, events: Iterable[Event]) -> bool:
        """Publish ``events`` in pieces that leave the loop free; False where the link is lost."""
        for batch in self._codec.batches(events, self._link.max_payload):
            message = self._codec.message(batch.events, time.time_ns() // 1_000_000)
            if self._giving_up or not await self._link.publish(self._subject, message):
                self._give_up_news()  # its ids are used up: a gap makes the router forget
                return False
            self._sent["events"] += len(batch.events)
            self._sent["blocks"] += batch.num_blocks
            self._sent["messages"] += 1
            self._sent["nbytes"] += len(message)
            await asyncio.sleep(0)
        return True

    async def _keep_record(self) -> None:
        """Keep the record alive, and look out for the worker's card."""
        loop = asyncio.get_running_loop()
        began_s = refreshed_s = loop.time()
        has_card = has_warned = False
        while True:
            await asyncio.sleep(REFRESH_S if has_card else _CARD_POLL_S)
            now_s = loop.time()
            if not has_card and await self._card.exists():
                has_card = True
                if now_s - began_s > 2 * _CARD_POLL_S:  # else the start's resyncs are enough
                    self._plan_settled("card")
            elif not has_card and not has_warned and now_s - began_s > _CARD_PATIENCE_S:
                has_warned = True
                _log.warning("no model card at %s: routers ignore this worker", self._card.path)
            if now_s - refreshed_s >= REFRESH_S:
                refreshed_s = now_s
                await self._refresh_record()

    async def _refresh_record(self) -> None:
        try:
            if not await self._record.refresh():
                self._plan_settled("record")
        except FeedError as error:
            _log.warning("%s", error)

    def _on_connect(self, *, again: bool) -> None:
        if again:
            self._give_up_news()
        else:
            self._plan_settled("start")

    def _give_up_news(self) -> None:
        self._drop_news()
        self._plan("reconnect", self._settings.reconnect_resync_s)

    def _drop_news(self) -> None:
        """Take none either, up to the next resync: nobody would hear them."""
        self._outbox.close()

    def _plan_settled(self, reason: str) -> None:
        self._plan(reason)
        self._plan("settle", SETTLE_S)

    def _plan(self, reason: str, delay_s: float = 0) -> None:
        self._resyncs.plan(reason, asyncio.get_running_loop().time() + delay_s)
        self._wake.set()


class _Resyncs:
    """When everything is to be told again, and why."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}

    def plan(self, reason: str, at_s: float) -> None:
        """A reconnect replaces all plans: nobody would hear what is sent before."""
        if reason == "reconnect":
            self._due.clear()
        self._due[reason] = at_s

    def take(self, now_s: float) -> str | None:
        """The first reason that is due; one resync serves for all of them."""
        due = [reason for reason, at_s in self._due.items() if at_s <= now_s]
        if not due:
            return None
        due.sort(key=lambda reason: (reason == "settle", self._due[reason]))
        for reason in due:
            del self._due[reason]
        return due[0]

    def next_due(self) -> float | None:
        """When the next one is due, if one is planned."""
        return min(self._due.values(), default=None)


class _Outbox:
    """News that wait to be sent, up to ``limit`` blocks. Closed at first: a resync opens it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._events: deque[Event] = deque()
        self._num_blocks = 0
        self._last_id = 0
        self.is_open = False

    def open(self, last_id: int) -> None:
        """Empty it, and take what comes after ``last_id`` from now on."""
        self.close()
        self._last_id = last_id
        self.is_open = True

    def close(self) -> None:
        """Empty it, and take nothing more."""
        self._events.clear()
        self._num_blocks = 0
        self.is_open = False

    def fill(self, source: EventSource) -> bool:
        """Take what is new; False, and closed, where that is too much."""
        entries = source.since(self._last_id)
        for entry in entries or ():
            self._events.append(entry.event)
            self._num_blocks += _weight(entry.event)
        self._last_id = source.last_id
        if entries is None or self._num_blocks > self._limit:
            self.close()
        return self.is_open

    def drain(self) -> Iterator[Event]:
        """Take out what is in it now, one by one."""
        for _ in range(len(self._events)):
            if not self._events:  # closed meanwhile
                return
            event = self._events.popleft()
            self._num_blocks -= _weight(event)
            yield event


def _worker(settings: EventsConfig) -> WorkerRank:
    if settings.worker_id is None:
        raise FeedError("events.worker_id is not set: name the Dynamo worker that events speak for")
    return WorkerRank(
        namespace=settings.namespace,
        component=settings.component,
        endpoint=settings.endpoint,
        worker_id=settings.worker_id,
        dp_rank=settings.dp_rank,
    )


def _discovery_folder(settings: EventsConfig) -> Path:
    folder = settings.discovery_path
    return Path(folder or f"{tempfile.gettempdir()}/dynamo_store_kv")  # Dynamo's own default


def _weight(event: Event) -> int:
    return 1 if isinstance(event, AllBlocksCleared) else len(event.blocks)
