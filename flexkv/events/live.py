"""Carries a log to routers that can't ask: everything is told again whenever they may be wrong."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from itertools import chain
from typing import TYPE_CHECKING

from flexkv.events.publisher import Publisher
from flexkv.events.types import AllBlocksCleared, num_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from flexkv.config import EventsConfig
    from flexkv.events.dynamo import DynamoCodec, WorkerRank
    from flexkv.events.log import EventSource
    from flexkv.events.publisher import Link
    from flexkv.events.types import Event

SETTLE_S = 1.0
"""After this long a router that was there when a record appeared does listen to it.

Measured: 2 to 7 ms after the write on two idle cores; up to 16 ms with six busy processes on them,
where the first event of 5 starts in 15 was missed. Nothing sent later was.
"""

_REST_S = 0.5  # after an overflow: the burst that caused it should pass first


class LiveFeed(Publisher):
    """An event source that routers can rely on while they are up.

    A router hears what is published while it listens. So everything resident is told again
    ("resync": clear, snapshot, then news) at the start, once more after SETTLE_S;
    ``reconnect_resync_s`` after each reconnect, since a router's client may come back up to 4 s
    after ours; when more than ``outbox`` blocks would wait to be sent; and on ``resync``. A router
    that starts later stays cold until the next of these. The wire has a count of ids of its own.
    """

    def __init__(
        self,
        settings: EventsConfig,
        worker: WorkerRank,
        codec: DynamoCodec,
        source: EventSource,
        link: Link,
    ) -> None:
        super().__init__(worker, codec, source, link)
        self._settings = settings
        self._resyncs = _Resyncs()
        self._outbox = _Outbox(settings.outbox)
        self.num_resyncs: Counter[str] = Counter()

    @property
    def counts(self) -> Mapping[str, int]:
        """What was sent and left out so far; from any thread. ``waiting``: blocks.

        ``left_out``: blocks that waited when the link was lost, or were too many to wait.
        """
        return {**self._counts, "waiting": self._outbox.num_blocks}

    def wake(self) -> None:
        """The source has news: take them, unless a resync is to come that will tell them."""
        if self._outbox.is_open:
            num_left_out = self._outbox.fill(self._source)
            if num_left_out is not None:
                self._counts["overflows"] += 1
                self._counts["left_out"] += num_left_out
                self._plan("overflow", _REST_S)
            self._wake.set()

    def resync(self, reason: str = "request") -> None:
        """Tell everything again, and once more after SETTLE_S, for a router that has come late."""
        self._plan(reason)
        self._plan("settle", SETTLE_S)

    def on_connect(self, *, again: bool) -> None:
        """Tell everything: now, or once the routers are back too."""
        if again:
            self._give_up_news()
        else:
            self.resync("start")

    def on_loss(self) -> None:
        """Take no news, up to the next resync: nobody would hear them."""
        self._drop_news()

    async def _step(self) -> float | None:
        """Send news, or everything where that is due."""
        reason = self._resyncs.take(asyncio.get_running_loop().time())
        if reason is None:
            await self._send(self._outbox.drain())
        elif await self._send_everything(clear=reason != "settle"):
            self.num_resyncs[reason] += 1
        return self._resyncs.next_due()

    async def _send_rest(self) -> None:
        await self._send(self._outbox.drain())

    async def _send_everything(self, *, clear: bool) -> bool:
        """What is resident. News of the time meanwhile come after it, and are idempotent."""
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
            if self._giving_up or not await self._publish(batch):
                self._give_up_news()  # its ids are used up: a gap makes the router forget
                return False
            await asyncio.sleep(0)
        return True

    def _drop_news(self) -> None:
        self._counts["left_out"] += self._outbox.num_blocks
        self._outbox.close()

    def _give_up_news(self) -> None:
        self._drop_news()
        self._plan("reconnect", self._settings.reconnect_resync_s)

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
        self.num_blocks = 0
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
        self.num_blocks = 0
        self.is_open = False

    def fill(self, source: EventSource) -> int | None:
        """Take what is new. Where that is too much: closed, and how much it was."""
        entries = source.since(self._last_id)
        for entry in entries or ():
            self._events.append(entry.event)
            self.num_blocks += _weight(entry.event)
        self._last_id = source.last_id
        num_blocks = self.num_blocks
        if entries is None or num_blocks > self._limit:
            self.close()
            return max(num_blocks, self._limit)
        return None

    def drain(self) -> Iterator[Event]:
        """Take out what is in it now, one by one."""
        for _ in range(len(self._events)):
            if not self._events:  # closed meanwhile
                return
            event = self._events.popleft()
            self.num_blocks -= _weight(event)
            yield event


def _weight(event: Event) -> int:
    return max(1, num_named(event))
