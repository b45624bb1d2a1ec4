"""An engine that stores and loads until it is killed, in a process of its own."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from flexkv import CacheConfig, Config, Engine, ListSink, blocks_of
from flexkv.engine import disk_records
from flexkv.replay.worker import SimulatedWorker, layout_of
from flexkv.tiers.ssd_frames import is_addition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

    from flexkv import Blocks

TOKENS_PER_BLOCK = 16
BLOCK_NBYTES = 65536
NUM_CHAINS = 40
MAX_BLOCKS = 12
CAP_NBYTES = 12 << 20
disk_records.MIN_JOURNAL_NBYTES = 16 << 10  # snapshots happen all the time


def chains() -> list[Blocks]:
    """Conversations: a shared beginning, then each its own."""
    chance = random.Random(7)
    made = []
    for _ in range(NUM_CHAINS):
        shared = [chance.randrange(3)] * (TOKENS_PER_BLOCK * 2)
        length = TOKENS_PER_BLOCK * chance.randint(1, MAX_BLOCKS - 2)
        own = [chance.randrange(1000) for _ in range(length)]
        made.append(blocks_of(shared + own, TOKENS_PER_BLOCK))
    return made


@asynccontextmanager
async def serving(
    folder: Path, *, uring_entries: int = 0
) -> AsyncIterator[tuple[Engine, SimulatedWorker, ListSink]]:
    """An engine with a host tier that is too small, and an SSD tier that is too."""
    config = Config(
        num_log_interval_requests=0,
        cache=CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK,
            num_cpu_blocks=32,
            enable_ssd=True,
            ssd_cache_dir=(str(folder / "a"), str(folder / "b")),
            ssd_cache_bytes=CAP_NBYTES,
            ssd_cache_iouring_entries=uring_entries,
            weights_id="tiny",
        ),
    )
    layout = layout_of(BLOCK_NBYTES, TOKENS_PER_BLOCK)
    sink = ListSink()
    async with Engine(config, layout, sinks=[sink]) as engine:
        worker = SimulatedWorker("x", engine, layout, num_longest=MAX_BLOCKS, max_requests=2)
        yield engine, worker, sink


def serve_until_killed(folder: Path, seed: int, tell: Connection) -> None:
    """Runs in the process that is killed; tells when it begins, and of all that will be back."""
    asyncio.run(_serve(folder, seed, tell))


async def _serve(folder: Path, seed: int, tell: Connection) -> None:
    chance = random.Random(seed)
    made = chains()
    uring_entries = 64 * (seed % 2)  # every other process, where there is io_uring
    async with serving(folder, uring_entries=uring_entries) as (engine, worker, _):
        store = engine._below._disk.store
        record = store.record

        async def record_and_tell(records: Sequence[bytes]) -> None:
            await record(records)
            if any(map(is_addition, records)):
                tell.send(None)

        store.record = record_and_tell  # type: ignore[method-assign]
        tell.send(None)
        while True:
            await asyncio.gather(*(worker.serve(chance.choice(made)) for _ in range(2)))
            assert worker.tally.num_wrong_bytes == 0
