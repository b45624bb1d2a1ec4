"""How soon a real Dynamo router believes the truth again after something went wrong.

Log, sink and routers run in this process, nats-server in its own, and so do the engines that are
killed and the router without DYN_TCP_* variables. The times are set by the
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
from _feed_side import (
    CHAIN_BLOCKS,
    TOKENS_PER_BLOCK,
    Engine,
    Source,
    events_config,
    rounds_of_a_router,
    until_believed,
)
from _report import Report, percentile

from flexkv.events.answers import Answers
from flexkv.events.dynamo import DynamoCodec, WorkerRank
from flexkv.events.nats import NatsSink
from flexkv.events.reqplane import Query
from flexkv.replay.deployment import FakeWorker, NatsServer, Router

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_DEADLINE_S = 60.0
_EXPIRY_S = 10.0  # Dynamo's own, of the record of a dead process
_RANDOM = np.random.default_rng(1)


class _Bench:
    """A deployment with one worker, its source and a router that listens."""

    def __init__(self, source: Source, report: Report) -> None:
        self._source = source
        self._report = report
        self._num_blocks = len(source.chains) * CHAIN_BLOCKS
        self._label = f"{self._num_blocks // 1000}k blocks"
        self._stack = AsyncExitStack()
        self._nats = NatsServer("-m", "-1")

    async def run(self) -> None:
        async with self._stack as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            await stack.enter_async_context(self._nats)
            worker = FakeWorker(self._nats.url, self._folder, tokens_per_block=TOKENS_PER_BLOCK)
            await stack.enter_async_context(worker)
            self._worker_id = worker.worker_id
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            await self._start_sink()
            await self._warm("new router", self._new_router)
            await self._measure_plain_router()
            async with self._router() as self._listener:
                await self._until_true(self._listener)
                await self._measure("lost in mid-stream", self._lost_in_midstream, 2.0)
                await self._measure("lost last message", self._lost_last, 2.0)
                await self._warm("second router", self._new_router)
                await self._measure("engine restart", self._engine_restart, 2.0)
                await self._nats_restarts()
                assert self._source.sink is not None
                await self._source.sink.close()
                await self._measure_kills()

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
        return Router(self._nats.url, self._folder, tokens_per_block=TOKENS_PER_BLOCK)

    async def _start_sink(self) -> None:
        config = events_config(self._nats.url, self._folder, self._worker_id)
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
        await until_believed(self._listener, self._worker_id, self._source.chains[0], 0)
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
        await self._source.until_true(router, self._worker_id, *chains)

    async def _measure_kills(self) -> None:
        """Engines that are processes of their own, and are killed."""
        num_back, num_gone = (3, 2) if self._report.quick else (50, 10)
        samples = [await self._killed_and_back(i) for i in range(num_back)]
        self._add("engine killed, since the next one began", samples, 2.0)
        samples = [await self._killed_for_good(i) for i in range(num_gone)]
        self._add("engine killed and not back", samples, _EXPIRY_S + 2.0)

    async def _new_engine(self, seed: int) -> tuple[Engine, Source, float]:
        source = Source(self._num_blocks, seed)
        engine = Engine(self._nats.url, self._folder, self._worker_id, self._num_blocks, seed)
        return engine, source, await engine.start()

    async def _killed_and_back(self, i: int) -> float:
        """The next one holds other blocks: the old ones must go, and the new ones come."""
        engine, source, _ = await self._new_engine(100 + 2 * i)
        await source.until_true(self._listener, self._worker_id)
        await engine.kill()
        successor, new_source, began = await self._new_engine(101 + 2 * i)
        await new_source.until_true(self._listener, self._worker_id)
        await until_believed(self._listener, self._worker_id, source.chains[0], 0)
        seconds = time.perf_counter() - began
        await successor.kill()
        return seconds

    async def _killed_for_good(self, i: int) -> float:
        engine, source, _ = await self._new_engine(1000 + i)
        await source.until_true(self._listener, self._worker_id)
        await asyncio.sleep(float(_RANDOM.uniform(0, 3)))  # its record is refreshed at times
        await engine.kill()
        started = time.perf_counter()
        async with asyncio.timeout(_DEADLINE_S):
            for chain in (source.chains[0], source.chains[-1]):
                await until_believed(self._listener, self._worker_id, chain, 0)
        return time.perf_counter() - started

    async def _measure_plain_router(self) -> None:
        """A process without any variable that says where it can be reached."""
        num_rounds = 1 + (5 if self._report.quick else 50)
        arguments = (self._nats.url, self._folder, self._worker_id, self._num_blocks, 1)
        first, *samples = await rounds_of_a_router(*arguments, num_rounds)
        self._report.add(f"first router of a process, {self._label}", 1e3 * first, "ms")
        self._add("new router without DYN_TCP_*", samples, 0.2)


async def _dump(report: Report) -> None:
    """A dump of 256,000 blocks, and how long the loop could do nothing else meanwhile."""
    source = Source(25_600 if report.quick else 256_000)
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
    name = f"dump of {len(source.chains) * CHAIN_BLOCKS} blocks"
    report.add(f"{name}, the first (hashes all tokens)", 1e3 * seconds[0], "ms", target=1500)
    report.add(f"{name}, p50 of the others", 1e3 * median(seconds[1:]), "ms", target=1500)
    report.add(f"{name}, loop stalls p99", 1e3 * percentile(stalls, 99), "ms", target=2)
    report.add(f"{name}, longest loop stall", 1e3 * max(stalls), "ms", target=10)


async def _main(report: Report) -> None:
    await _dump(report)
    gc.unfreeze()
    for num_blocks in (10_000, 100_000):
        await _Bench(Source(num_blocks), report).run()


def main() -> None:
    """Measure and report."""
    report = Report(__doc__)
    asyncio.run(_main(report))
    report.finish()


if __name__ == "__main__":
    main()
