"""Whatever becomes of messages and queries, in the end each router believes what is resident.

Each seed is one source: a rank of one worker. It decides what is stored and evicted, and the fate
of each message. FLEXKV_FEED_SEEDS=FIRST:LAST runs others; FLEXKV_FEED_FUZZ=nightly 2,000.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from typing import TYPE_CHECKING

import pytest

from flexkv.events import reqplane
from flexkv.events.nats import NatsSink
from flexkv.events.recovery import RecoveryServer
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from tests.dynamo.lossy import LossyProxy
from tests.dynamo.shelf import Shelf, chain, feeding, settings, until_it_believes
from tests.dynamo.stock import TOKENS_PER_BLOCK, Held, Stock, held_by_rank

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flexkv.config import EventsConfig
    from flexkv.events.reqplane import Request

NUM_AT_ONCE = 50
ROUND_S = 2.0
PATIENCE_S = 45.0  # a router waits 30 for an answer that is lost once it was promised
NOTHING: Held = {"host_pinned": set(), "disk": set()}


def seeds() -> range:
    if given := os.environ.get("FLEXKV_FEED_SEEDS"):
        first, _, last = given.partition(":")
        return range(int(first), int(last or first) + 1)
    return range(2000 if os.environ.get("FLEXKV_FEED_FUZZ") == "nightly" else 200)


class CuttingServer(RecoveryServer):
    """Breaks one in ten queries off: before it is accepted, or in the middle of the answer."""

    def __init__(self, settings: EventsConfig, rng: random.Random) -> None:
        super().__init__(settings)
        self._rng = rng
        self.is_calm = False
        self.num_cut = 0

    def _cuts(self) -> bool:
        cut = not self.is_calm and self._rng.random() < 0.05
        self.num_cut += cut
        return cut

    def _accepts(self, request: Request) -> bool:
        return not self._cuts() and super()._accepts(request)

    async def _answer(self, path: str, request: Request) -> None:
        if not self._cuts():
            await super()._answer(path, request)
            return
        self._num_answers -= 1
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*request.address)
            try:
                writer.write(reqplane.greeting(request.subject) + reqplane.LENGTHS.pack(0, 1000, 0))
                await writer.drain()
            finally:  # the end of the round may come in between
                writer.close()


class Round:
    """Some seeds at once, on one worker with as many ranks and on two routers."""

    def __init__(self, nats_url: str, folder: Path, seeds: range) -> None:
        self._nats_url = nats_url
        self._folder = folder
        self._rng = random.Random(f"{seeds} round")
        self._seeds = seeds
        self.stocks = [Stock(seed) for seed in seeds]
        self._proxies: list[LossyProxy] = []

    async def run(self) -> Mapping[int, str]:
        """What differs in the end, by seed."""
        size, num_ranks = TOKENS_PER_BLOCK, len(self._seeds)
        async with contextlib.AsyncExitStack() as stack:
            worker = FakeWorker(
                self._nats_url, self._folder, tokens_per_block=size, num_ranks=num_ranks
            )
            await stack.enter_async_context(worker)
            routers = [Router(self._nats_url, self._folder, tokens_per_block=size)]
            await stack.enter_async_context(routers[0])
            await routers[0].wait_for_workers([worker.worker_id])
            server = await self._feed(stack, worker.worker_id)
            restarts = [self._restarting_router() for _ in range(2)]
            async with asyncio.TaskGroup() as tasks:
                for stock in self.stocks:
                    tasks.create_task(_busy(stock))
                for restart in restarts:
                    tasks.create_task(restart)
            routers.append(Router(self._nats_url, self._folder, tokens_per_block=size))
            await stack.enter_async_context(routers[1])
            for proxy in self._proxies:
                proxy.calm()
            server.is_calm = True
            assert any(proxy.fates["lost"] for proxy in self._proxies) or num_ranks < NUM_AT_ONCE
            return await self._differences(routers)

    async def _feed(self, stack: contextlib.AsyncExitStack, worker_id: int) -> CuttingServer:
        base = settings(self._nats_url, self._folder, worker_id)
        server = CuttingServer(base, random.Random(f"{self._seeds} cuts"))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        await server.start(tasks)
        stack.push_async_callback(server.close)
        for rank, (seed, stock) in enumerate(zip(self._seeds, self.stocks, strict=True)):
            rng = random.Random(f"{seed} fates")
            proxy = LossyProxy(self._nats_url, rng, loss=rng.uniform(0, 0.1))
            self._proxies.append(await stack.enter_async_context(proxy))
            config = settings(proxy.url, self._folder, worker_id, dp_rank=rank, heartbeat_s=0.5)
            stock.sink = sink = NatsSink(config, server)
            await sink.start(stock.log, tasks)
            stack.push_async_callback(sink.close)
        return server

    async def _restarting_router(self) -> None:
        await asyncio.sleep(self._rng.uniform(0, ROUND_S / 2))
        async with Router(self._nats_url, self._folder, tokens_per_block=TOKENS_PER_BLOCK):
            await asyncio.sleep(self._rng.uniform(0, ROUND_S / 2))

    async def _differences(self, routers: list[Router]) -> Mapping[int, str]:
        """Empty once every router agrees twice, a second apart; else what is left at the end."""
        loop = asyncio.get_running_loop()
        deadline_s, num_agreed = loop.time() + PATIENCE_S, 0
        truths = [stock.held() for stock in self.stocks]
        while True:
            wrong: dict[int, str] = {}
            for i, router in enumerate(routers):
                ranks = held_by_rank(await router.dump_events())
                for rank, truth in enumerate(truths):
                    if (belief := ranks.get(rank, NOTHING)) != truth:
                        wrong[self._seeds[rank]] = f"router {i}: {difference(belief, truth)}"
            num_agreed = 0 if wrong else num_agreed + 1
            if num_agreed > 1 or loop.time() > deadline_s:
                return wrong
            await asyncio.sleep(1.0 if num_agreed else 0.2)


async def _busy(stock: Stock) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ROUND_S):
            await stock.keep_busy()


def difference(belief: Held, truth: Held) -> str:
    return ", ".join(
        f"{tier}: {len(truth[tier] - belief[tier])} missing, {len(belief[tier] - truth[tier])} more"
        for tier in truth
        if truth[tier] != belief[tier]
    )


def rounds() -> list[range]:
    wanted = seeds()
    starts = range(wanted.start, wanted.stop, NUM_AT_ONCE)
    return [range(start, min(start + NUM_AT_ONCE, wanted.stop)) for start in starts]


@pytest.mark.parametrize("seeds", rounds(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
async def test_lost_repeated_and_reordered_messages_end_in_the_truth(
    nats_server: NatsServer, tmp_path: Path, seeds: range
) -> None:
    round_ = Round(nats_server.url, tmp_path, seeds)
    differences = await round_.run()
    assert not differences


async def test_a_flood_of_losses_ends_in_the_truth(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    """Holes open while the router recovers: what holding back does not prevent, a kick closes."""
    shelf = Shelf()
    for _ in range(1000):
        shelf.store(chain(10))  # so that a dump takes a while
    num_rounds = 20 if os.environ.get("FLEXKV_FEED_FUZZ") == "nightly" else 2
    async with LossyProxy(nats_server.url, random.Random(1), 0.0) as proxy:
        config = settings(proxy.url, tmp_path, worker.worker_id, heartbeat_s=0.5)
        async with feeding(shelf, config):
            for _ in range(num_rounds):
                proxy.loss = 0.1
                chains = [chain(1) for _ in range(2000)]
                for blocks in chains:
                    shelf.store(blocks)
                    await asyncio.sleep(0)
                proxy.calm()
                await until_it_believes(router, worker.worker_id, shelf, *chains)
