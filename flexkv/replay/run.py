"""Replays a workload: the router chooses, the workers serve, a bounded number at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from flexkv.hashing import blocks_of
from flexkv.replay.workload import tokens_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexkv.blocks import Blocks
    from flexkv.replay.deployment import Overlap
    from flexkv.replay.worker import SimulatedWorker
    from flexkv.replay.workload import Request, Workload


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


class Replay:
    """One replay: the workload, who serves it, and how far it is."""

    def __init__(
        self,
        workload: Workload,
        workers: Mapping[int, SimulatedWorker],
        router: RouterLike,
        *,
        pace: Pace,
        seed: int,
    ) -> None:
        self.workload = workload
        self.workers = workers
        self.router = router
        self.num_done = 0
        self._pace = pace
        self._seed = seed
        self._numbers = count()

    async def run(self) -> None:
        """Serve every request. On an error those in flight are cancelled and it is raised."""
        admitted = asyncio.Semaphore(self._pace.max_requests * len(self.workers))
        started_s = asyncio.get_running_loop().time()

        async def one(request: Request) -> None:
            try:
                await self.serve(request.block_ids)
            finally:
                admitted.release()
            self.num_done += 1

        async with asyncio.TaskGroup() as tasks:
            for request in self.workload.requests:
                await self._wait_until_due(request, started_s)
                await admitted.acquire()
                tasks.create_task(one(request))

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

    async def _wait_until_due(self, request: Request, started_s: float) -> None:
        if self._pace.speed is not None:
            due_s = started_s + request.arrival_s / self._pace.speed
            await asyncio.sleep(max(0.0, due_s - asyncio.get_running_loop().time()))


def tokens_in(blocks: Blocks) -> list[int]:
    """The token ids of blocks, as the router's bindings take them."""
    return blocks.token_ids.cast("I").tolist()
