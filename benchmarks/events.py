"""How soon, and how much, a real Dynamo router hears of what is resident.

An event goes the whole way: event log, NATS sink, a nats-server, Dynamo's KvRouter; all but the
server run in this process. Every block that was announced is asked for: none may be missing.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from _report import Report, percentile

from flexkv.blocks import Tier
from flexkv.config import EventsConfig
from flexkv.events.log import EventLog
from flexkv.events.nats import NatsSink
from flexkv.events.types import BlockStored
from flexkv.hashing import blocks_of
from flexkv.replay.deployment import FakeWorker, NatsServer, Router

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from flexkv.blocks import Blocks

    _Measure = Callable[["_Feed", Report, int], Awaitable[None]]

_TOKENS_PER_BLOCK = 16
_DEADLINE_S = 60.0
_RANDOM = np.random.default_rng(1)
_OUTBOX = 65_536  # the default of events.outbox
_STEADY_RATE = 20_000  # blocks per second
_ONE_IN = 400  # blocks, whose way is measured: 50 times a second


class _Source:
    """An event log of chains that are stored and never removed."""

    def __init__(self) -> None:
        self._stored: list[BlockStored] = []
        self.log = EventLog(ring=4 * _OUTBOX, max_event_blocks=512, walk=self._walk)

    def store(self, blocks: Blocks) -> None:
        event = BlockStored(blocks, Tier.HOST)
        self._stored.append(event)
        self.log.append([event])

    def _walk(self) -> Iterator[BlockStored]:
        return iter(list(self._stored))


class _Feed:
    """A deployment with one worker, and the way of its events to the router."""

    def __init__(self, source: _Source, sink: NatsSink, router: Router, worker_id: int) -> None:
        self._source = source
        self._sink = sink
        self._router = router
        self._worker_id = worker_id

    async def num_visible(self, blocks: Blocks) -> int:
        token_ids = blocks.token_ids.cast("I").tolist()
        return (await self._router.overlap(token_ids))[self._worker_id].host

    async def until_visible(self, blocks: Blocks) -> None:
        async with asyncio.timeout(_DEADLINE_S):
            while True:
                if await self.num_visible(blocks) == len(blocks):
                    return
                await asyncio.sleep(0)

    async def latency_s(self, blocks: Blocks) -> float:
        """From the change until a question to the router is answered with it."""
        started = time.perf_counter()
        self._source.store(blocks)
        self._sink.wake()
        await self.until_visible(blocks)
        return time.perf_counter() - started

    async def flood_s(self, chains: list[Blocks]) -> float:
        """Seconds to tell of all chains, never more than half an outbox ahead of the sink."""
        goal = self._sink.stats().num_blocks
        started = time.perf_counter()
        for blocks in chains:
            self._source.store(blocks)
            goal += len(blocks)
            if goal % 512 < len(blocks):
                self._sink.wake()
                await self._until_sent(goal - _OUTBOX // 2)
        self._sink.wake()
        await self.until_visible(chains[-1])
        return time.perf_counter() - started

    async def _until_sent(self, num_blocks: int) -> None:
        async with asyncio.timeout(_DEADLINE_S):
            while True:
                await asyncio.sleep(0)
                if self._sink.stats().num_blocks >= num_blocks:
                    return

    async def steady(self, chains: list[Blocks], rate: float) -> tuple[list[float], float]:
        """Tell of ``rate`` blocks per second. Latencies of some chains, and the rate reached.

        One question at a time, about the oldest: the router is not to be busy with questions.
        """
        latencies: list[float] = []
        told: asyncio.Queue[tuple[Blocks, float]] = asyncio.Queue()

        async def ask() -> None:
            for _ in range(0, len(chains), one_in):
                blocks, started = await told.get()
                await self.until_visible(blocks)
                latencies.append(time.perf_counter() - started)

        one_in = _ONE_IN // len(chains[0])
        began = time.perf_counter()
        num_blocks = 0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ask())
            for i, blocks in enumerate(chains):
                await asyncio.sleep(max(0.0, began + num_blocks / rate - time.perf_counter()))
                if i % one_in == 0:
                    told.put_nowait((blocks, time.perf_counter()))
                self._source.store(blocks)
                self._sink.wake()
                num_blocks += len(blocks)
            seconds = time.perf_counter() - began
        return latencies, num_blocks / seconds

    async def num_missing(self, chains: list[Blocks]) -> int:
        return sum([len(blocks) - await self.num_visible(blocks) for blocks in chains])

    async def until_settled(self) -> None:
        """The router has asked for what was before it."""
        async with asyncio.timeout(_DEADLINE_S):
            while True:
                if self._sink.stats().counts.get("dumps"):
                    return
                await asyncio.sleep(0.1)

    def num_gaps(self) -> int:
        counts = self._sink.stats().counts
        return counts.get("gaps", 0) + counts.get("overflows", 0)


def _chains(num_chains: int, num_blocks: int) -> list[Blocks]:
    token_ids = _RANDOM.integers(60_000, size=(num_chains, num_blocks * _TOKENS_PER_BLOCK))
    return [blocks_of(row, _TOKENS_PER_BLOCK) for row in token_ids]


async def _measure(feed: _Feed, report: Report, num_blocks: int) -> None:
    label = f"{num_blocks} blocks per event"
    num_samples, num_repeats = (100, 1) if report.quick else (1000, 5)
    latencies = [await feed.latency_s(blocks) for blocks in _chains(num_samples, num_blocks)]
    report.add(f"publish to visible, {label}, p50", 1e3 * median(latencies), "ms")
    report.add(f"publish to visible, {label}, p99", 1e3 * percentile(latencies, 99), "ms")
    num_chains = (5_000 if report.quick else 20_000) // (1 if num_blocks == 1 else 4)
    rates = []
    num_missing = 0
    before = feed.num_gaps()
    for _ in range(num_repeats):
        chains = _chains(num_chains, num_blocks)
        rates.append(num_chains * num_blocks / await feed.flood_s(chains))
        num_missing += await feed.num_missing(chains)
    report.add(f"sustained, {label}", median(rates), "blocks/s", better="higher")
    report.add(f"missing, {label}", num_missing, "blocks", target=0)
    report.add(f"gaps, {label}", feed.num_gaps() - before, "", target=0)


async def _measure_steady(feed: _Feed, report: Report, num_blocks: int) -> None:
    label = f"steady {_STEADY_RATE} blocks/s, {num_blocks} per event"
    num_samples = 100 if report.quick else 1000
    chains = _chains(_ONE_IN // num_blocks * num_samples, num_blocks)
    gc.collect()
    gc.freeze()  # the chains were made here, not by an engine
    latencies, rate = await feed.steady(chains, _STEADY_RATE)
    gc.unfreeze()
    report.add(f"publish to visible, {label}, p50", 1e3 * median(latencies), "ms")
    report.add(f"publish to visible, {label}, p99", 1e3 * percentile(latencies, 99), "ms", target=5)
    least = 0.99 * _STEADY_RATE
    report.add(f"rate, {label}", rate, "blocks/s", better="higher", target=least)
    report.add(f"missing, {label}", await feed.num_missing(chains), "blocks", target=0)


async def _deployed(report: Report, measure: _Measure, sizes: Sequence[int]) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nats = await stack.enter_async_context(NatsServer())
        size = _TOKENS_PER_BLOCK
        worker = await stack.enter_async_context(
            FakeWorker(nats.url, folder, tokens_per_block=size)
        )
        router = await stack.enter_async_context(Router(nats.url, folder, tokens_per_block=size))
        await router.wait_for_workers([worker.worker_id])
        sink = NatsSink(
            EventsConfig(
                sink="nats",
                nats_servers=(nats.url,),
                namespace="flexkv",
                worker_id=worker.worker_id,
                discovery_path=str(folder),
                outbox=_OUTBOX,
            )
        )
        source = _Source()
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        await sink.start(source.log, tasks)
        stack.push_async_callback(sink.close)
        feed = _Feed(source, sink, router, worker.worker_id)
        await feed.until_settled()
        for num_blocks in sizes:
            await measure(feed, report, num_blocks)


def main() -> None:
    """Measure and report."""
    report = Report(__doc__)
    asyncio.run(_deployed(report, _measure_steady, (4, 16)))
    asyncio.run(_deployed(report, _measure, (1, 16, 64)))
    report.finish()


if __name__ == "__main__":
    main()
