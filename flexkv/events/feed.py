"""Carries a log to routers that can ask for what they miss: its ids are the wire's ids."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from flexkv.events.answers import Answers
from flexkv.events.publisher import Publisher
from flexkv.events.pulse import Pulse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from flexkv.config import EventsConfig
    from flexkv.events.dynamo import Batch, DynamoCodec, WorkerRank
    from flexkv.events.log import EventSource
    from flexkv.events.publisher import Link
    from flexkv.events.reqplane import Parts, Query

_FEW = 256  # entries that are looked at in one step
_REST_S = 0.1  # after dropped news: the burst that caused it should pass first


class RecoverableFeed(Publisher):
    """Publishes what is new, beats when nothing is, and answers who has missed something.

    The log itself is the outbox: a cursor goes through it. What can't be sent is left out, and the
    next id shows the gap.
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
        self._outbox = settings.outbox
        self._answers = Answers(source, codec, worker)
        self._pulse = Pulse(settings.heartbeat_s)
        self._cursor = source.last_id
        self._num_waiting = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """What was sent, left out and answered so far; from any thread.

        ``waiting``: blocks that were to be sent when the publisher looked last.
        """
        too_long = self._codec.num_too_long
        return {**self._counts, "too_long": too_long, "waiting": self._num_waiting}

    def wake(self) -> None:
        """The log has something new."""
        self._wake.set()

    def resync(self) -> None:
        """Make every router ask for everything, within 2 s."""
        self._pulse.want_kick(asyncio.get_running_loop().time())
        self._wake.set()

    def on_connect(self, *, again: bool) -> None:
        """The link is there: what happened without it is missing, and a beat shows it."""
        if again:
            backlog = self._source.backlog(self._cursor)
            self._counts["left_out"] += self._outbox if backlog is None else backlog
            self._cursor = self._source.last_id
        self._pulse.urge(asyncio.get_running_loop().time())
        self._wake.set()

    def on_loss(self) -> None:
        """The link is gone: nothing is sent until it is back, and nothing waits for it."""
        self._num_waiting = 0

    @contextlib.asynccontextmanager
    async def answering(self, query: Query) -> AsyncIterator[Parts]:
        """The answer to a router's query; until the exit it is on its way, and news wait."""
        loop, pulse = asyncio.get_running_loop(), self._pulse
        pulse.begin_recovery(loop.time())
        num_blocks = 0
        try:
            answer = await self._answers.to(query)
            num_blocks = answer.num_blocks
            if answer.counted:
                self._counts[answer.counted] += 1
            yield answer.parts
            if answer.is_filling:
                pulse.filled(loop.time())
        finally:
            pulse.end_recovery(loop.time(), num_blocks)
            self._wake.set()

    async def _step(self) -> float:
        loop, pulse = asyncio.get_running_loop(), self._pulse
        await self._send_news()
        if held_until_s := pulse.held_until(loop.time()):
            return held_until_s
        what = pulse.due(loop.time())
        if what is not None:
            self._counts[f"{what}s"] += 1
            if what == "kick":
                self._source.kick()
            else:
                self._source.beat()
            pulse.sent(loop.time())  # even if it is lost: the next one is due then
            await self._send_news(self._source.last_id)
            if what == "kick":
                pulse.kicked(loop.time())
        return pulse.held_until(loop.time()) or pulse.next_due()

    async def _send_rest(self) -> None:
        await self._send_news()

    def _may_send(self) -> bool:
        if self._giving_up or not self._link.connected:
            return False
        return self._stopping or not self._pulse.held_until(asyncio.get_running_loop().time())

    async def _send_news(self, last_id: int | None = None) -> None:
        source = self._source
        while self._may_send() and (last_id is None or self._cursor < last_id):
            backlog = source.backlog(self._cursor)
            self._num_waiting = backlog or 0
            if backlog is None or backlog > self._outbox:
                self._leave_out(backlog)
                return
            entries = source.since(self._cursor, _FEW)
            if not entries:
                return
            for batch in self._codec.numbered(entries, self._link.max_payload):
                if not self._may_send() or not await self._publish(batch):
                    return
                self._cursor = batch.last_id
                await asyncio.sleep(0)
            self._cursor = max(self._cursor, entries[-1].event_id)

    async def _publish(self, batch: Batch) -> bool:
        if not await super()._publish(batch):
            return False
        self._pulse.sent(asyncio.get_running_loop().time())
        return True

    def _leave_out(self, num_blocks: int | None) -> None:
        """More than the outbox may hold: routers ask for it, once a beat has shown the gap."""
        self._counts["overflows"] += 1
        self._counts["left_out"] += num_blocks or self._outbox
        self._cursor = self._source.last_id
        self._num_waiting = 0
        self._pulse.urge(asyncio.get_running_loop().time() + _REST_S)
