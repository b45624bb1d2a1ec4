"""kill -9 at random times: what comes back is right, and never more than the cap."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from typing import TYPE_CHECKING

from flexkv import Tier
from flexkv.replay.payload import num_wrong, payload_of
from tests.engine.crashing import BLOCK_NBYTES, CAP_NBYTES, chains, serve_until_killed, serving
from tests.engine.followers import believed
from tests.tiers.disks import nbytes_in

if TYPE_CHECKING:
    from pathlib import Path

NUM_KILLS = 200 if os.environ.get("FLEXKV_HYPOTHESIS") == "nightly" else 20
MAX_RECORDS = 4  # each process may write so many first, however slow the disk is
MAX_LIFE_S = 0.3  # and then lives so long


def live_and_be_killed(folder: Path, seed: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.crashing"])
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=serve_until_killed, args=(folder, seed, tell))
    process.start()
    tell.close()  # so that its death is heard of
    chance = random.Random(seed)
    try:
        for _ in range(1 + chance.randint(0, MAX_RECORDS)):
            assert told.poll(60), "the process did not begin, or wrote nothing"
            told.recv()
        time.sleep(chance.uniform(0, MAX_LIFE_S))
        assert process.is_alive(), "the process found something wrong, or died"
    finally:
        process.kill()
        process.join(60)
        told.close()


async def test_after_every_kill_all_that_is_served_is_right_and_the_cap_holds(
    tmp_path: Path,
) -> None:
    num_back = 0
    for seed in range(NUM_KILLS):
        live_and_be_killed(tmp_path, seed)
        assert nbytes_in([tmp_path]) <= CAP_NBYTES
        async with serving(tmp_path) as (engine, worker, sink):
            held = engine.residency(Tier.SSD)
            num_back += len(held)
            assert believed(sink.events, Tier.SSD) == held, "what a router is told at the start"
            for blocks in chains():
                ids = list(range(len(blocks)))
                loaded = await engine.load(blocks, ids)
                assert loaded.num_blocks == sum(key in held for key in blocks)
                found = worker._cache.read(ids[: loaded.num_blocks])
                right = payload_of(blocks, BLOCK_NBYTES)[: loaded.num_blocks]
                assert num_wrong(found, right) == 0
            assert engine._below._risings.num_lost == 0, "the journal names whole blocks only"
        assert nbytes_in([tmp_path]) <= CAP_NBYTES
    assert num_back > 20 * NUM_KILLS
