"""How soon a real Dynamo router believes the truth again after something went wrong.

Log, sink and routers run in this process, nats-server in its own. The times are set by the
protocol (a beat a second, the routers' own clients) more than by the machine: they are compared
with their targets as they are.
"""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import time
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from _report import Report, percentile

from flexkv.blocks import Tier
from flexkv.config import EventsConfig
from flexkv.events.answers import Answers
from flexkv.events.dynamo import DynamoCodec, WorkerRank
from flexkv.events.log import EventLog
from flexkv.events.nats import NatsSink
from flexkv.events.reqplane import Query
from flexkv.events.types import BlockRemoved, BlockStored
from flexkv.hashing import blocks_of
from flexkv.replay.deployment import FakeWorker, NatsServer, Router

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator


_TOKENS_PER_BLOCK = 16
_CHAIN_BLOCKS = 50
_DEADLINE_S = 60.0
_RANDOM = np.random.default_rng(1)


class _Source:
    """So many blocks that are resident, in chains of 50, and their log."""

    def __init__(self, num_blocks: int) -> None:
        num_chains = num_blocks // _CHAIN_BLOCKS
        width = _CHAIN_BLOCKS * _TOKENS_PER_BLOCK
        tokens = _RANDOM.integers(60_000, size=(num_chains, width))
        self.chains = [blocks_of(row, _TOKENS_PER_BLOCK) for row in tokens]
        self.held = dict.fromkeys(range(num_chains), _CHAIN_BLOCKS)
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
        i = int(_RANDOM.integers(len(self.chains)))
        half = self.chains[i][_CHAIN_BLOCKS // 2 :]
        is_whole = self.held[i] == _CHAIN_BLOCKS
        self.held[i] = _CHAIN_BLOCKS // 2 if is_whole else _CHAIN_BLOCKS
        event = (BlockRemoved if is_whole else BlockStored)(half, Tier.HOST)
        self.log.append([event])
        assert self.sink is not None
        if heard:
            self.sink.wake()
        else:  # as if it had been sent
            self.sink._feed._cursor = self.log.last_id  # type: ignore[union-attr]  # noqa: SLF001
        return i


class _Bench:
    """A deployment with one worker, its source and a router that listens."""

    def __init__(self, source: _Source, report: Report) -> None:
        self._source = source
        self._report = report
        self._label = f"{len(source.chains) * _CHAIN_BLOCKS // 1000}k blocks"
        self._stack = AsyncExitStack()
        self._nats = NatsServer("-m", "-1")

    async def run(self) -> None:
        async with self._stack as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            await stack.enter_async_context(self._nats)
            worker = FakeWorker(self._nats.url, self._folder, tokens_per_block=_TOKENS_PER_BLOCK)
            await stack.enter_async_context(worker)
            self._worker_id = worker.worker_id
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            await self._start_sink()
            await self._warm("new router", self._new_router)
            async with self._router() as self._listener:
                await self._until_true(self._listener)
                await self._measure("lost in mid-stream", self._lost_in_midstream, 2.0)
                await self._measure("lost last message", self._lost_last, 2.0)
                await self._warm("second router", self._new_router)
                await self._measure("engine restart", self._engine_restart, 2.0)
                await self._nats_restarts()
            assert self._source.sink is not None
            await self._source.sink.close()

    async def _measure(
        self, name: str, once: Callable[[], Coroutine[Any, Any, float]], target_s: float
    ) -> None:
        samples = [await once() for _ in range(5 if self._report.quick else 50)]
        self._add(name, samples, target_s)

    def _add(self, name: str, samples: list[float], target_s: float) -> None:
        title = f"{name}, {self._label}"
        self._report.add(f"{title}, p50", 1e3 * median(samples), "ms")
        self._report.add(
            f"{title}, p99", 1e3 * percentile(samples, 99), "ms", target=1e3 * target_s
        )

    async def _warm(self, name: str, once: Callable[[], Coroutine[Any, Any, float]]) -> None:
        await once()  # the first one loads the bindings
        await self._measure(name, once, 0.2)

    def _router(self) -> Router:
        return Router(self._nats.url, self._folder, tokens_per_block=_TOKENS_PER_BLOCK)

    async def _start_sink(self) -> None:
        config = EventsConfig(
            sink="nats",
            nats_servers=(self._nats.url,),
            namespace="flexkv",
            worker_id=self._worker_id,
            discovery_path=str(self._folder),
        )
        self._source.sink = NatsSink(config)
        await self._source.sink.start(self._source.log, self._tasks)

    async def _new_router(self) -> float:
        async with self._router() as router:
            started = time.perf_counter()
            await self._until_true(router)
            seconds = time.perf_counter() - started
        await asyncio.sleep(0.3)  # for what it leaves behind
        return seconds

    async def _lost_in_midstream(self) -> float:
        lost = self._source.change(heard=False)
        started = time.perf_counter()
        self._source.change()
        await self._until_true(self._listener, lost)
        return await self._pause(time.perf_counter() - started)

    async def _lost_last(self) -> float:
        lost = self._source.change(heard=False)
        started = time.perf_counter()
        await self._until_true(self._listener, lost)
        return await self._pause(time.perf_counter() - started)

    async def _pause(self, seconds: float) -> float:
        await asyncio.sleep(float(_RANDOM.uniform(0, 1)))  # not in step with beats and kicks
        return seconds

    async def _engine_restart(self) -> float:
        assert self._source.sink is not None
        await self._source.sink.close()
        await self._until_believed(self._listener, 0, 0)
        started = time.perf_counter()
        await self._start_sink()
        await self._until_true(self._listener)
        return time.perf_counter() - started

    async def _nats_restarts(self) -> None:
        since_return, since_subscribed = [], []
        for i in range(3 if self._report.quick else 50):
            await self._nats.stop()
            lost = self._source.change()
            await asyncio.sleep((0.2, 1, 3, 5)[i % 4])
            await self._nats.start()
            returned = time.perf_counter()
            subscribed = await asyncio.to_thread(self._when_subscribed)
            await self._until_true(self._listener, lost)
            now = time.perf_counter()
            since_return.append(now - returned)
            since_subscribed.append(max(0.0, now - subscribed))
        self._add("NATS restart, since its return", since_return, 6.0)
        self._add("NATS restart, since the router subscribed", since_subscribed, 1.5)

    def _when_subscribed(self) -> float:
        """When the server has a subscription to the events again."""
        url = f"{self._nats.monitoring_url}/connz?subs=1"
        deadline = time.perf_counter() + _DEADLINE_S
        while time.perf_counter() < deadline:
            with urllib.request.urlopen(url, timeout=5) as answer:
                connections = json.load(answer)["connections"] or []
            if any(
                subject.endswith("kv-events")
                for connection in connections
                for subject in connection.get("subscriptions_list") or []
            ):
                break
            time.sleep(0.01)
        return time.perf_counter()

    async def _until_true(self, router: Router, *chains: int) -> None:
        """Until the router believes the truth about these chains and a few others."""
        last = len(self._source.chains) - 1
        some = {*chains, 0, last, *_RANDOM.integers(last, size=8).tolist()}
        async with asyncio.timeout(_DEADLINE_S):
            for i in some:
                await self._until_believed(router, i, self._source.held[i])

    async def _until_believed(self, router: Router, i: int, num_blocks: int) -> None:
        while True:
            if await self._believed(router, i) == num_blocks:
                return
            await asyncio.sleep(0.001)

    async def _believed(self, router: Router, i: int) -> int:
        token_ids = self._source.chains[i].token_ids.cast("I").tolist()
        overlap = (await router.overlap(token_ids)).get(self._worker_id)
        return overlap.host if overlap is not None else -1


async def _dump(report: Report) -> None:
    """A dump of 256,000 blocks, and how long the loop could do nothing else meanwhile."""
    source = _Source(25_600 if report.quick else 256_000)
    worker = WorkerRank(namespace="n", component="c", endpoint="e", worker_id=1)
    codec = DynamoCodec(worker_id=1, dp_rank=0, publisher_id=1)
    answers = Answers(source.log, codec, worker)
    stalls: list[float] = []
    gc.collect()
    gc.freeze()  # the chains were made here, not by the dump
    done = asyncio.Event()

    async def tick() -> None:
        while not done.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.0005)
            stalls.append(time.perf_counter() - before - 0.0005)

    seconds = []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tick())
        for _ in range(20):
            started = time.perf_counter()
            await answers.to(Query(1, 0, None))
            seconds.append(time.perf_counter() - started)
        done.set()
    name = f"dump of {len(source.chains) * _CHAIN_BLOCKS} blocks"
    report.add(f"{name}, the first (hashes all tokens)", 1e3 * seconds[0], "ms", target=1500)
    report.add(f"{name}, p50 of the others", 1e3 * median(seconds[1:]), "ms", target=1500)
    report.add(f"{name}, loop stalls p99", 1e3 * percentile(stalls, 99), "ms", target=2)
    report.add(f"{name}, longest loop stall", 1e3 * max(stalls), "ms", target=10)


async def _main(report: Report) -> None:
    await _dump(report)
    gc.unfreeze()
    for num_blocks in (10_000, 100_000):
        await _Bench(_Source(num_blocks), report).run()


def main() -> None:
    """Measure and report."""
    report = Report(__doc__)
    asyncio.run(_main(report))
    report.finish()


if __name__ == "__main__":
    main()
