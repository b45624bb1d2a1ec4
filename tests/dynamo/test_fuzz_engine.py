"""A whole engine with host memory and SSD, its users and its feed: routers believe both tiers.

Each seed is an engine that lives twice on the same disk, behind a lossy way to NATS.
FLEXKV_FEED_SEEDS=FIRST:LAST runs others; FLEXKV_FEED_FUZZ=nightly 30.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from typing import TYPE_CHECKING

import pytest

from flexkv import CacheConfig, Config, Engine, KVLayout, Tier, TransfersConfig
from flexkv.events.digest import digest_of
from flexkv.events.nats import NatsSink
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from tests.dynamo.lossy import LossyProxy
from tests.dynamo.shelf import settings, until
from tests.dynamo.stock import Held, held_by_rank
from tests.dynamo.test_fuzz import NOTHING, difference
from tests.engine.chains import TOKENS_PER_BLOCK, chain
from tests.engine.fakes import BLOCK_NBYTES, SlowCopier

if TYPE_CHECKING:
    from pathlib import Path

    from flexkv import Blocks

NUM_USERS = 6
BLOCKS_EACH = 8
LIFE_S = 1.0
PATIENCE_S = 45.0  # a router waits 30 for an answer that is lost once it was promised
TIERS = {"host_pinned": Tier.HOST, "disk": Tier.SSD}


def seeds() -> range:
    if given := os.environ.get("FLEXKV_FEED_SEEDS"):
        first, _, last = given.partition(":")
        return range(int(first), int(last or first) + 1)
    return range(30 if os.environ.get("FLEXKV_FEED_FUZZ") == "nightly" else 2)


def engine_on(folder: Path, sink: NatsSink) -> Engine:
    cache = CacheConfig(
        tokens_per_block=TOKENS_PER_BLOCK,
        num_cpu_blocks=60,
        evict_ratio=0.1,
        enable_ssd=True,
        num_ssd_blocks=150,
        ssd_cache_dir=(str(folder),),
        ssd_cache_iouring_entries=0,
        weights_id="tiny",
    )
    config = Config(cache=cache, transfers=TransfersConfig(chunk_bytes=3 * BLOCK_NBYTES))
    layout = KVLayout(tokens_per_block=TOKENS_PER_BLOCK, block_nbytes=BLOCK_NBYTES)
    return Engine(config, layout, sinks=[sink])


class User:
    """Loads what is there, computes the rest, stores it, and once in a while clears everything."""

    def __init__(self, number: int, engine: Engine, copier: SlowCopier, seed: str) -> None:
        self._ids = [number * BLOCKS_EACH + i for i in range(BLOCKS_EACH)]
        self._engine = engine
        self._copier = copier
        self._rng = random.Random(f"{seed} user {number}")

    async def live(self) -> None:
        rng = self._rng
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIFE_S):
                while True:
                    self._copier.seconds = rng.choice([0.0, 0.002, 0.01])
                    self._copier.failing += rng.random() < 0.1
                    await self._serve(self._some_chain())
                    if rng.random() < 0.001:
                        await self._engine.clear()
                    await asyncio.sleep(rng.uniform(0, 0.01))

    def _some_chain(self) -> Blocks:
        length = self._rng.randint(1, BLOCKS_EACH)
        return chain(*(self._rng.choice([0, 0, 0, 1, 2]) for _ in range(length)))

    async def _serve(self, blocks: Blocks) -> None:
        ids = self._ids[: len(blocks)]
        if self._rng.random() < 0.8:
            loaded = await self._engine.load(blocks, ids, 0)
            arrived = blocks.part(0, loaded.num_blocks)
            assert not self._copier.wrong_blocks(arrived, ids[: loaded.num_blocks])
        self._copier.compute(blocks, ids)
        await self._engine.store(blocks, ids)


def residency(engine: Engine) -> Held:
    return {
        name: {int.from_bytes(key[-8:]) for key in engine.residency(tier)}
        for name, tier in TIERS.items()
    }


async def until_they_agree(routers: list[Router], engine: Engine, sink: NatsSink) -> None:
    """Return once all of them have believed exactly the truth for a second."""
    loop = asyncio.get_running_loop()
    deadline_s, num_agreed = loop.time() + PATIENCE_S, 0
    while num_agreed < 2:
        beliefs = [held_by_rank(await router.dump_events()).get(0, NOTHING) for router in routers]
        truth = residency(engine)
        wrong = [difference(belief, truth) for belief in beliefs if belief != truth]
        num_agreed = 0 if wrong else num_agreed + 1
        assert not wrong or loop.time() < deadline_s, (wrong, sink.stats())
        await asyncio.sleep(1.0 if num_agreed == 1 else 0.1)


async def lived(engine: Engine, copier: SlowCopier, seed: str) -> Held:
    """What is resident in the end, which is what was announced."""
    engine.attach_copier(copier, 0)
    async with asyncio.TaskGroup() as tasks:
        for number in range(NUM_USERS):
            tasks.create_task(User(number, engine, copier, seed).live())
    copier.failing = 0
    await until(lambda: not any(engine.stats().lanes.values()))  # nobody waits, bytes still move
    await engine.flush()
    truth, stats = residency(engine), engine.stats()
    for name, tier in TIERS.items():
        assert stats.tiers[tier].digest == str(digest_of(truth[name]))
    return truth


@pytest.mark.timeout(240)  # the patience of two lives, and what starts
@pytest.mark.parametrize("seed", seeds())
async def test_routers_believe_both_tiers_of_an_engine(
    nats_server: NatsServer, tmp_path: Path, seed: int
) -> None:
    rng, url, size = random.Random(f"{seed} engine"), nats_server.url, TOKENS_PER_BLOCK
    async with (
        LossyProxy(url, random.Random(f"{seed} fates"), rng.uniform(0.02, 0.1)) as proxy,
        FakeWorker(url, tmp_path, tokens_per_block=size) as worker,
        Router(url, tmp_path, tokens_per_block=size) as first,
    ):
        await first.wait_for_workers([worker.worker_id])
        loss = proxy.loss
        num_on_disk = 0
        for life in range(2):
            proxy.loss = loss
            sink = NatsSink(settings(proxy.url, tmp_path, worker.worker_id, heartbeat_s=0.5))
            async with engine_on(tmp_path / "ssd", sink) as engine:
                assert len(engine.residency(Tier.SSD)) == num_on_disk, "the disk is as it was left"
                truth = await lived(engine, SlowCopier(), f"{seed} {life}")
                num_on_disk = len(truth["disk"])
                proxy.calm()
                async with Router(url, tmp_path, tokens_per_block=size) as second:
                    await until_they_agree([first, second], engine, sink)
                assert residency(engine) == truth, "all was quiet"
        assert proxy.fates["lost"]
