"""A plain event source, and questions to a real router about it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

from flexkv.blocks import Blocks, Tier
from flexkv.config import EventsConfig
from flexkv.events.log import EventLog
from flexkv.events.nats import NatsSink
from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored
from flexkv.hashing import blocks_of
from flexkv.replay.deployment import Overlap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from flexkv.events.types import Event
    from flexkv.replay.deployment import Router

TOKENS_PER_BLOCK = 16
DEADLINE_S = 20.0


class Shelf:
    """Chains that are resident, per tier, and their log: the truth in its simplest form."""

    def __init__(self, *, ring: int = 100_000, max_event_blocks: int = 512) -> None:
        self.log = EventLog(ring=ring, max_event_blocks=max_event_blocks, walk=self._walk)
        self.sinks: list[NatsSink] = []
        self._held: dict[tuple[Tier, bytes], Blocks] = {}

    def _walk(self) -> Iterator[BlockStored]:
        held = [BlockStored(blocks, tier) for (tier, _), blocks in self._held.items()]
        return iter(held)

    def store(self, blocks: Blocks, tier: Tier = Tier.HOST, *, of: int | None = None) -> None:
        """The first ``of`` blocks of a chain, of which some may be there already."""
        have = self.num_held(blocks, tier)
        wanted = blocks[: len(blocks) if of is None else of]
        self._held[tier, blocks.key(0)] = wanted
        self.tell(BlockStored(wanted[have:], tier))

    def trim(self, blocks: Blocks, to: int, tier: Tier = Tier.HOST) -> None:
        """Keep the first ``to`` blocks of a chain."""
        have = self.num_held(blocks, tier)
        del self._held[tier, blocks.key(0)]
        if to:
            self._held[tier, blocks.key(0)] = blocks[:to]
        self.tell(BlockRemoved(blocks[to:have], tier))

    def clear(self) -> None:
        self._held.clear()
        self.tell(AllBlocksCleared())

    def tell(self, event: Event) -> None:
        self.log.append([event])
        for sink in self.sinks:
            sink.wake()

    def num_held(self, blocks: Blocks, tier: Tier) -> int:
        return len(self._held.get((tier, blocks.key(0)), ()))

    def truth(self, blocks: Blocks) -> Overlap:
        """What a router should answer: disk counts for what it adds behind host."""
        host = self.num_held(blocks, Tier.HOST)
        return Overlap(gpu=0, host=host, ssd=max(0, self.num_held(blocks, Tier.SSD) - host))


def chain(num_blocks: int, *, namespace: str | None = None, lora: str | None = None) -> Blocks:
    token_ids = [random.randrange(3, 60_000) for _ in range(num_blocks * TOKENS_PER_BLOCK)]
    return blocks_of(token_ids, TOKENS_PER_BLOCK, namespace=namespace, lora=lora)


def settings(nats_url: str, discovery_path: Path, worker_id: int, **others: object) -> EventsConfig:
    return EventsConfig.model_validate(
        {
            "sink": "nats",
            "nats_servers": [nats_url],
            "namespace": "flexkv",
            "worker_id": worker_id,
            "discovery_path": str(discovery_path),
        }
        | others
    )


async def believed(router: Router, worker_id: int, blocks: Blocks) -> Overlap:
    token_ids = blocks.token_ids.cast("I").tolist()
    overlap = await router.overlap(token_ids, namespace=blocks.namespace, lora=blocks.lora)
    return overlap[worker_id]


async def until_it_believes(
    router: Router, worker_id: int, shelf: Shelf, *chains: Blocks, deadline_s: float = DEADLINE_S
) -> None:
    """Return once the router believes the truth about ``chains``; fail where it never does."""
    last: list[tuple[Overlap, Overlap]] = []
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                last = [(await believed(router, worker_id, c), shelf.truth(c)) for c in chains]
                if all(belief == truth for belief, truth in last):
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        wrong = [pair for pair in last if pair[0] != pair[1]]
        raise AssertionError(f"(belief, truth) after {deadline_s} s: {wrong}") from None


@contextlib.asynccontextmanager
async def feeding(shelf: Shelf, config: EventsConfig) -> AsyncIterator[NatsSink]:
    sink = NatsSink(config)
    shelf.sinks.append(sink)
    async with asyncio.TaskGroup() as tasks:
        await sink.start(shelf.log, tasks)
        try:
            yield sink
        finally:
            shelf.sinks.remove(sink)
            await sink.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)
