"""A source whose content a seed decides: two real indexes, and chains that share prefixes."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from flexkv.blocks import Tier
from flexkv.engine.index import TierIndex
from flexkv.errors import TierFullError
from flexkv.events.log import EventLog
from flexkv.events.types import AllBlocksCleared, BlockStored
from flexkv.hashing import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.blocks import Blocks
    from flexkv.events.nats import NatsSink
    from flexkv.events.types import Event

TOKENS_PER_BLOCK = 16
BURST = 0.15
_NAMES = {"host_pinned": Tier.HOST, "disk": Tier.SSD}

Held = dict[str, set[int]]
"""Router hashes, by Dynamo's name of the tier."""


class Stock:
    """Stores, evicts, loses and clears blocks as ``seed`` has it."""

    def __init__(self, seed: int, *, ring: int | None = None) -> None:
        self.rng = random.Random(f"{seed} stock")
        self._tiers = {
            Tier.HOST: TierIndex(Tier.HOST, 400, evict_ratio=0.1),
            Tier.SSD: TierIndex(Tier.SSD, 800, evict_ratio=0.1),
        }
        ring = ring or self.rng.choice([20, 200, 5000])  # some gaps need a dump
        self.log = EventLog(ring=ring, max_event_blocks=8, walk=self._walk)
        self.sink: NatsSink | None = None
        self._bases = [self._tokens(self.rng.randrange(1, 20)) for _ in range(12)]

    def _tokens(self, num_blocks: int) -> list[int]:
        return [self.rng.randrange(60_000) for _ in range(num_blocks * TOKENS_PER_BLOCK)]

    def chain(self) -> Blocks:
        """A head of what is known, and maybe something new behind it."""
        base = self.rng.choice(self._bases)
        num_blocks = self.rng.randrange(len(base) // TOKENS_PER_BLOCK + 1)
        tokens = base[: num_blocks * TOKENS_PER_BLOCK] + self._tokens(self.rng.randrange(4))
        if self.rng.random() < 0.3:
            self._bases[self.rng.randrange(len(self._bases))] = tokens or base
        return blocks_of(tokens or base, TOKENS_PER_BLOCK)

    def step(self) -> None:
        """One change, and its event."""
        tier = self._tiers[self.rng.choice([Tier.HOST, Tier.SSD])]
        luck, blocks = self.rng.random(), self.chain()
        if luck < 0.002:
            for each in self._tiers.values():
                each.clear()
            self._emit([AllBlocksCleared()])
        elif luck < 0.08:
            self._emit(tier.lose(blocks))
        else:
            try:
                reservation, removed = tier.reserve(blocks)
            except TierFullError:
                return
            self._emit(removed)
            self._emit(tier.commit(reservation))

    async def keep_busy(self) -> None:
        """Go on stepping, now and then in a burst of as many messages."""
        while True:
            num_steps = self.rng.choice([1, 2, 4, 100 if self.rng.random() < BURST else 1])
            for _ in range(num_steps):
                self.step()
                if num_steps > 4:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    def held(self) -> Held:
        return {
            name: {int.from_bytes(key[-8:]) for key in self._tiers[tier].residency()}
            for name, tier in _NAMES.items()
        }

    def _walk(self) -> Iterator[BlockStored]:
        for tier, index in self._tiers.items():
            for blocks in index.walk():
                yield BlockStored(blocks, tier)

    def _emit(self, events: list[Event]) -> None:
        if events:
            self.log.append(events)
            if self.sink is not None:
                self.sink.wake()


def held_by_rank(dump: list[dict[str, Any]]) -> dict[int, Held]:
    """What a router's dump has, by data-parallel rank."""
    ranks: dict[int, Held] = {}
    for event in dump:
        held = ranks.setdefault(event["event"]["dp_rank"], {name: set() for name in _NAMES})
        blocks = event["event"]["data"]["stored"]["blocks"]
        held[event["storage_tier"]] |= {block["block_hash"] for block in blocks}
    return ranks
