"""Processes beside the one that measures: an engine's feed that can be killed, and a router.

``engine NATS FOLDER WORKER_ID NUM_BLOCKS SEED`` says when it began to register, and stays.
``router NATS FOLDER WORKER_ID NUM_BLOCKS SEED NUM_ROUNDS`` has no DYN_TCP_* variable, and says
after how many seconds a new router believed the truth, once for each round.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flexkv.blocks import Tier
from flexkv.config import EventsConfig
from flexkv.events.log import EventLog
from flexkv.events.nats import NatsSink
from flexkv.events.types import BlockRemoved, BlockStored
from flexkv.hashing import blocks_of
from flexkv.replay.deployment import Router

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.blocks import Blocks

TOKENS_PER_BLOCK = 16
CHAIN_BLOCKS = 50
DEADLINE_S = 60.0


class Source:
    """So many blocks that are resident, in chains of 50, and their log; ``seed`` decides which."""

    def __init__(self, num_blocks: int, seed: int = 1) -> None:
        self._random = np.random.default_rng(seed)
        num_chains = num_blocks // CHAIN_BLOCKS
        width = CHAIN_BLOCKS * TOKENS_PER_BLOCK
        tokens = self._random.integers(60_000, size=(num_chains, width))
        self.chains = [blocks_of(row, TOKENS_PER_BLOCK) for row in tokens]
        self.held = dict.fromkeys(range(num_chains), CHAIN_BLOCKS)
        self.log = EventLog(ring=262_144, max_event_blocks=512, walk=self._walk)
        self.sink: NatsSink | None = None
        for blocks in self.chains:
            self.log.append([BlockStored(blocks, Tier.HOST)])

    def _walk(self) -> Iterator[BlockStored]:
        for i, blocks in enumerate(self.chains):
            if self.held[i]:
                yield BlockStored(blocks[: self.held[i]], Tier.HOST)

    def change(self, *, heard: bool = True) -> int:
        """Trim a whole chain to half of it, or store a half one whole; not ``heard``: lost."""
        i = int(self._random.integers(len(self.chains)))
        half = self.chains[i][CHAIN_BLOCKS // 2 :]
        is_whole = self.held[i] == CHAIN_BLOCKS
        self.held[i] = CHAIN_BLOCKS // 2 if is_whole else CHAIN_BLOCKS
        event = (BlockRemoved if is_whole else BlockStored)(half, Tier.HOST)
        self.log.append([event])
        assert self.sink is not None
        if heard:
            self.sink.wake()
        else:  # as if it had been sent
            self.sink._feed._cursor = self.log.last_id  # type: ignore[union-attr]  # noqa: SLF001
        return i

    async def until_true(self, router: Router, worker_id: int, *chains: int) -> None:
        """Until the router believes the truth about these chains and a few others."""
        last = len(self.chains) - 1
        some = {*chains, 0, last, *self._random.integers(last, size=8).tolist()}
        async with asyncio.timeout(DEADLINE_S):
            for i in some:
                await until_believed(router, worker_id, self.chains[i], self.held[i])


async def until_believed(router: Router, worker_id: int, blocks: Blocks, num_blocks: int) -> None:
    """Until the router believes that so many of ``blocks`` are there."""
    token_ids = blocks.token_ids.cast("I").tolist()
    while True:
        overlap = (await router.overlap(token_ids)).get(worker_id)
        if overlap is not None and overlap.host == num_blocks:
            return
        await asyncio.sleep(0.001)


def events_config(nats_url: str, folder: Path, worker_id: int) -> EventsConfig:
    """The settings of an engine's feed."""
    return EventsConfig(
        sink="nats",
        nats_servers=(nats_url,),
        namespace="flexkv",
        worker_id=worker_id,
        discovery_path=str(folder),
    )


class Engine:
    """The process ``engine``, until it is killed."""

    def __init__(self, *arguments: object) -> None:
        self._arguments = [sys.executable, __file__, "engine", *map(str, arguments)]

    async def start(self) -> float:
        """Return when it began to register, by ``time.perf_counter``, once it has."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments, stdin=pipe, stdout=pipe
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), DEADLINE_S)
        return float(line)

    async def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._process.kill()
        await self._process.wait()


async def rounds_of_a_router(*arguments: object) -> list[float]:
    """What the process ``router`` says."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, __file__, "router", *map(str, arguments)],
        stdout=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("DYN_TCP_")},
    )
    assert process.stdout is not None
    output = await process.stdout.read()
    await process.wait()
    return [float(line) for line in output.split()]


async def _engine(nats_url: str, folder: Path, worker_id: int, source: Source) -> None:
    sink = NatsSink(events_config(nats_url, folder, worker_id))
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        await sink.start(source.log, tasks)
        print(began_s, flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until who started this is gone
        await sink.close()


async def _router(
    nats_url: str, folder: Path, worker_id: int, source: Source, num_rounds: int
) -> None:
    for _ in range(num_rounds):
        async with Router(
            nats_url, folder, tokens_per_block=TOKENS_PER_BLOCK, tcp_host=None
        ) as router:
            started = time.perf_counter()
            await source.until_true(router, worker_id)
            print(time.perf_counter() - started, flush=True)
        await asyncio.sleep(0.3)  # for what it leaves behind


def main() -> None:
    """Be what the first argument says."""
    role, nats_url, folder, worker_id, num_blocks, seed, *num_rounds = sys.argv[1:]
    source = Source(int(num_blocks), int(seed))
    if role == "engine":
        asyncio.run(_engine(nats_url, Path(folder), int(worker_id), source))
    else:
        asyncio.run(_router(nats_url, Path(folder), int(worker_id), source, int(num_rounds[0])))


if __name__ == "__main__":
    main()
