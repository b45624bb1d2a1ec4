"""Many users of an engine with an SSD tier whose disk fails, from a seed."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flexkv import Tier
from tests.engine.fakes import slow_engine
from tests.engine.followers import believed
from tests.engine.test_engine_simulation import NUM_USERS, User
from tests.tiers.disks import FaultyDisk
from tests.virtual_time import run_virtual

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv.tiers.ssd_journal import DiskCalls

NUM_SEEDS = 300 if os.environ.get("FLEXKV_HYPOTHESIS") == "nightly" else 12
NUM_HOST_SLOTS = 20


def slow(call: Callable[..., int], chance: random.Random) -> Callable[..., int]:
    def slowly(*arguments: object) -> int:
        if chance.random() < 0.05:
            time.sleep(0.002)
        return call(*arguments)

    return slowly


def faulty_calls(chance: random.Random) -> tuple[DiskCalls, FaultyDisk]:
    disk = FaultyDisk(
        chance,
        rot=chance.choice([0, 0.2]),
        short_read=chance.choice([0, 0.2]),
        read_error=chance.choice([0, 0, 0.02]),
        write_error=chance.choice([0, 0, 0.02]),
        short_write=chance.choice([0, 0, 0, 0.02]),
        sync_error=chance.choice([0, 0, 0, 0.02]),
        number=chance.choice([errno.EIO, errno.ENOSPC, errno.EROFS]),
    )
    calls = disk.calls()
    return replace(calls, preadv=slow(calls.preadv, chance)), disk


async def scenario(seed: int, folder: Path) -> tuple[int, int]:
    """Blocks that came from SSD, and faults that were thrown."""
    rng = random.Random(seed)
    calls, disk = faulty_calls(random.Random(seed + 1))
    ssd = {
        "enable_ssd": True,
        "num_ssd_blocks": rng.choice([12, 40]),
        "ssd_cache_dir": tuple(str(folder / name) for name in rng.choice(["a", "ab"])),
        "ssd_cache_iouring_entries": 0,
        "ssd_read_threads": 1,  # so that faults come in the order of the seed
        "ssd_write_threads": 1,
        "ssd_admission": rng.choice(["all", "all", "second_sight"]),
        "ssd_write_queue_bytes": rng.choice([256, 2**28]),
        "weights_id": "tiny",
    }
    num_from_ssd = 0
    for _ in range(2):  # and once more after a restart
        async with slow_engine(
            NUM_HOST_SLOTS,
            evict_ratio=rng.choice([0.0, 0.2]),
            chunk_blocks=rng.choice([1, 3]),
            max_blocks_in_flight=rng.choice([3, 100]),
            deadline_s=2.0,
            ssd=ssd,
            calls=calls,
        ) as (engine, copier, sink):
            users = [User(i, engine, copier, rng) for i in range(NUM_USERS)]
            async with asyncio.TaskGroup() as group:
                for user in users:
                    group.create_task(user.live())
            await engine._below.settle(10)
            for tier in (Tier.HOST, Tier.SSD):
                assert believed(sink.events, tier) == engine.residency(tier)
            assert not any(engine.stats().lanes.values())
            num_from_ssd += engine._below._risings.num_risen
            await engine.clear()
            tiers = engine.stats().tiers
            assert all(tier.num_free == tier.num_slots for tier in tiers.values())
    return num_from_ssd, disk.num_faults


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_loaded_byte_is_right_whatever_the_disk_does(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        num_from_ssd, num_faults = run_virtual(scenario(seed, Path(folder)))
    assert num_from_ssd > 0 or num_faults > 0, "otherwise this shows nothing"
