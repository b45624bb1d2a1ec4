"""Many users of one engine at once, with failures and cancellation, from a seed."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import pytest

from flexkv import Tier
from flexkv.events.digest import digest_of
from tests.engine.chains import chain
from tests.engine.fakes import SlowCopier, slow_engine
from tests.engine.followers import believed
from tests.virtual_time import run_virtual

if TYPE_CHECKING:
    from flexkv import Blocks, Engine

NUM_USERS = 6
BLOCKS_EACH = 8
NUM_SLOTS = 20
NUM_SEEDS = 1000 if os.environ.get("FLEXKV_HYPOTHESIS") == "nightly" else 25


class User:
    """Loads what is there, computes the rest, stores it: as an inference engine does."""

    def __init__(self, number: int, engine: Engine, copier: SlowCopier, rng: random.Random) -> None:
        self.block_ids = [number * BLOCKS_EACH + i for i in range(BLOCKS_EACH)]
        self.engine = engine
        self.copier = copier
        self.rng = rng
        self.num_loaded = 0

    async def live(self) -> None:
        for _ in range(25):
            self.copier.seconds = self.rng.choice([0.0, 0.1, 1.0])
            self.copier.failing += self.rng.random() < 0.1
            patience_s = self.rng.choice([0.05, 0.5, 1e6, 1e6])
            try:
                async with asyncio.timeout(patience_s):
                    await self.serve(self.some_chain())
            except TimeoutError:
                pass
            if self.rng.random() < 0.02:
                await self.engine.clear()

    def some_chain(self) -> Blocks:
        length = self.rng.randint(1, BLOCKS_EACH)
        return chain(*(self.rng.choice([0, 0, 0, 1]) for _ in range(length)))

    async def serve(self, blocks: Blocks) -> None:
        block_ids = self.block_ids[: len(blocks)]
        first = self.rng.choice([0, 0, self.rng.randint(0, len(blocks))])  # a GPU prefix hit
        if self.rng.random() < 0.8:
            loaded = await self.engine.load(blocks, block_ids[first:], first)
            arrived = blocks.part(first, first + loaded.num_blocks)
            ids = block_ids[first : first + loaded.num_blocks]
            assert self.copier.wrong_blocks(arrived, ids) == 0
            assert loaded.missing == tuple(block_ids[first + loaded.num_blocks :])
            self.num_loaded += loaded.num_blocks
        self.copier.compute(blocks, block_ids)
        stored = await self.engine.store(blocks, block_ids[first:], first)
        assert stored.num_stored + stored.num_present + stored.num_dropped == len(blocks) - first
        assert min(stored.num_stored, stored.num_present, stored.num_dropped) >= 0


async def scenario(seed: int) -> int:
    rng = random.Random(seed)
    async with slow_engine(
        NUM_SLOTS,
        evict_ratio=rng.choice([0.0, 0.2]),
        chunk_blocks=rng.choice([1, 3]),
        max_blocks_in_flight=rng.choice([3, 100]),
        deadline_s=2.0,
    ) as (engine, copier, sink):
        users = [User(i, engine, copier, rng) for i in range(NUM_USERS)]
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(user.live())
        assert believed(sink.events) == engine.residency(Tier.HOST)
        held = digest_of(int.from_bytes(key[-8:]) for key in engine.residency(Tier.HOST))
        assert engine.stats().tiers[Tier.HOST].digest == str(held)
        assert engine.stats().lanes == {"load": 0, "store": 0}
        await engine.clear()
        assert engine.stats().tiers[Tier.HOST].num_free == NUM_SLOTS, "no slot is lost"
    return sum(user.num_loaded for user in users)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_loaded_byte_is_right_and_events_tell_the_truth(seed: int) -> None:
    assert run_virtual(scenario(seed)) > 0, "the scenario must load something to show anything"
