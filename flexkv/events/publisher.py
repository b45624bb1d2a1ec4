"""What both feeds share: a loop that sends what is due over a link, until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from flexkv.events.dynamo import Batch, DynamoCodec, WorkerRank
    from flexkv.events.log import EventSource


class Link(Protocol):
    """A way to publish, as long as it is connected."""

    @property
    def connected(self) -> bool:
        """Whether ``publish`` may succeed."""
        ...

    @property
    def max_payload(self) -> int:
        """The longest message that it takes."""
        ...

    async def publish(self, to: str, message: bytes) -> bool:
        """Hand over one message; False if it is lost."""
        ...

    async def flush(self) -> bool:
        """Wait until the other side keeps up; False if it does not in time."""
        ...


class Publisher(ABC):
    """Publishes one source's events for a worker and rank."""

    def __init__(
        self, worker: WorkerRank, codec: DynamoCodec, source: EventSource, link: Link
    ) -> None:
        self._subject = worker.subject
        self._codec = codec
        self._source = source
        self._link = link
        self._wake = asyncio.Event()
        self._stopping = self._giving_up = False
        self._counts: Counter[str] = Counter()

    def stop(self) -> None:
        """Let ``run`` end once everything is sent."""
        self._stopping = True
        self._wake.set()

    def give_up(self) -> None:
        """Let it end at once."""
        self._giving_up = True

    async def run(self) -> None:
        """Send what is due until ``stop``, then what is left."""
        while not self._stopping:
            self._wake.clear()
            due_s = await self._step() if self._link.connected else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due_s):
                    await self._wake.wait()
        if self._link.connected:
            await self._send_rest()
            await self._link.flush()

    @abstractmethod
    async def _step(self) -> float | None:
        """Send what may be sent now. Returns when to look again; None: once woken."""

    @abstractmethod
    async def _send_rest(self) -> None:
        """Send what is left at the end."""

    async def _publish(self, batch: Batch) -> bool:
        """Send one message, and count it; False if it is lost."""
        message = self._codec.message(batch.events, time.time_ns() // 1_000_000)
        if not await self._link.publish(self._subject, message):
            self._counts["unsent"] += 1
            return False
        self._counts["events"] += len(batch.events)
        self._counts["blocks"] += batch.num_blocks
        self._counts["messages"] += 1
        self._counts["nbytes"] += len(message)
        return True
