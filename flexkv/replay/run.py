"""Replays a workload: the router chooses, the workers serve, a bounded number at once."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, Self

from flexkv.hashing import blocks_of
from flexkv.replay.workload import tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flexkv.blocks import Blocks
    from flexkv.engine.engine import Engine
    from flexkv.replay.deployment import Overlap
    from flexkv.replay.worker import SimulatedWorker
    from flexkv.replay.workload import Request, Workload

_ALL = slice(None)


class RouterLike(Protocol):
    """What the replay asks of ``deployment.Router``; workers are named by their Dynamo ids."""

    async def best_worker(self, token_ids: Sequence[int], *, request_id: str) -> int:
        """The worker to send a request to, which counts as load there until ``free``."""
        ...

    async def free(self, request_id: str) -> None:
        """The request has ended."""
        ...

    async def overlap(self, token_ids: Sequence[int]) -> Mapping[int, Overlap]:
        """How many leading blocks each worker has, tier by tier, as the router believes."""
        ...

    async def dump_events(self) -> Sequence[Mapping[str, Any]]:
        """The router's whole index, as Dynamo's events that would build it again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How requests are sent: ``speed`` times as fast as they came, or as fast as possible."""

    speed: float | None = None
    max_requests: int = 4  # at once on each worker


class EngineAgain:
    """``now`` is an open engine, within; ``restart`` replaces it by another that ``make`` makes."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._open = AsyncExitStack()
        self.now: Engine

    async def __aenter__(self) -> Self:
        self.now = await self._open.enter_async_context(self._make())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def restart(self) -> None:
        """Close the engine, then open its successor."""
        await self._open.aclose()
        await self.__aenter__()


class Replay:
    """One replay: the workload, who serves it, and how far it is."""

    def __init__(
        self,
        workload: Workload,
        workers: Mapping[int, SimulatedWorker],
        router: RouterLike,
        *,
        engines: Mapping[int, EngineAgain],
        pace: Pace,
        seed: int,
    ) -> None:
        self._engines = engines
        self.workload = workload
        self.workers = workers
        self.router = router
        self.num_done = 0
        self._pace = pace
        self._seed = seed
        self._numbers = count()

    async def run(self, part: slice = _ALL) -> None:
        """Serve every request, or ``part`` of them.

        On an error those in flight are cancelled and it is raised.
        """
        requests = self.workload.requests[part]
        admitted = asyncio.Semaphore(self._pace.max_requests * len(self.workers))
        started_s = asyncio.get_running_loop().time()
        first_s = requests[0].arrival_s if part.start else 0.0

        async def one(request: Request) -> None:
            try:
                await self.serve(request.block_ids)
            finally:
                admitted.release()
            self.num_done += 1

        async with asyncio.TaskGroup() as tasks:
            for request in requests:
                await self._wait_until_due(request.arrival_s - first_s, started_s)
                await admitted.acquire()
                tasks.create_task(one(request))

    async def restart(self) -> None:
        """Close every worker's engine, and open it again. Nothing may be in flight."""
        for worker_id, worker in self.workers.items():
            worker.leave()
            await self._engines[worker_id].restart()
            worker.go_on(self._engines[worker_id].now)

    async def serve(self, block_ids: Sequence[int]) -> None:
        """Serve one request where the router sends it. A request of no full block is nothing."""
        if not block_ids:
            return
        blocks = self.blocks_of(block_ids)
        request_id = f"replay-{next(self._numbers)}"
        worker_id = await self.router.best_worker(tokens_in(blocks), request_id=request_id)
        try:
            await self.workers[worker_id].serve(blocks)
        finally:
            await self.router.free(request_id)

    def blocks_of(self, block_ids: Sequence[int]) -> Blocks:
        """The chain that some block ids stand for."""
        tokens_per_block = self.workload.tokens_per_block
        return blocks_of(tokens_of(block_ids, tokens_per_block, self._seed), tokens_per_block)

    async def _wait_until_due(self, after_s: float, started_s: float) -> None:
        if self._pace.speed is not None:
            due_s = started_s + after_s / self._pace.speed
            await asyncio.sleep(max(0.0, due_s - asyncio.get_running_loop().time()))


def tokens_in(blocks: Blocks) -> list[int]:
    """The token ids of blocks, as the router's bindings take them."""
    return blocks.token_ids.cast("I").tolist()
