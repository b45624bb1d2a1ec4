"""A stage without NATS and Dynamo: real engines, and a router that believes their event lists."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from flexkv.config import Config
from flexkv.engine.engine import Engine
from flexkv.events.sinks import ListSink
from flexkv.events.types import AllBlocksCleared, BlockStored
from flexkv.hashing import blocks_of
from flexkv.replay.deployment import Overlap
from flexkv.replay.payload import payload_of
from flexkv.replay.run import EngineAgain, Replay
from flexkv.replay.stage import Settings, cache_of
from flexkv.replay.worker import SimulatedWorker, layout_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from flexkv.blocks import BlockKey
    from flexkv.events.types import Event
    from flexkv.replay.workload import Workload


def replayed(events: Sequence[Event]) -> set[BlockKey]:
    """What is readable, to who has heard all these events."""
    readable: set[BlockKey] = set()
    for event in events:
        if isinstance(event, AllBlocksCleared):
            readable.clear()
        elif isinstance(event, BlockStored):
            readable |= set(event.blocks)
        else:
            readable -= set(event.blocks)
    return readable


class DeafToStored(ListSink):
    """Misses the first BlockStored."""

    def __init__(self) -> None:
        super().__init__()
        self.num_missed = 0

    def wake(self) -> None:
        super().wake()
        stored = [event for event in self.events if isinstance(event, BlockStored)]
        if stored and not self.num_missed:
            self.events.remove(stored[0])
            self.num_missed += 1


class DeafToRemoved(ListSink):
    """Misses every BlockRemoved."""

    def wake(self) -> None:
        super().wake()
        self.events = [event for event in self.events if isinstance(event, BlockStored)]


class BelievingRouter:
    """Sends a request where most of it is; where that is nowhere, to the least asked worker."""

    def __init__(self, sinks: Mapping[int, ListSink], tokens_per_block: int) -> None:
        self._sinks = sinks
        self._tokens_per_block = tokens_per_block
        self._num_sent = Counter(dict.fromkeys(sinks, 0))
        self.running: set[str] = set()

    async def best_worker(self, token_ids: Sequence[int], *, request_id: str) -> int:
        overlap = await self.overlap(token_ids)
        best = max(overlap, key=lambda wid: (overlap[wid].host, -self._num_sent[wid]))
        self._num_sent[best] += 1
        self.running.add(request_id)
        return best

    async def free(self, request_id: str) -> None:
        self.running.remove(request_id)

    async def overlap(self, token_ids: Sequence[int]) -> dict[int, Overlap]:
        keys = list(blocks_of(token_ids, self._tokens_per_block))
        believed = {wid: replayed(sink.events) for wid, sink in self._sinks.items()}
        return {
            wid: Overlap(0, next((i for i, k in enumerate(keys) if k not in held), len(keys)), 0)
            for wid, held in believed.items()
        }

    async def dump_events(self) -> list[dict[str, Any]]:
        return [
            {
                "worker_id": wid,
                "storage_tier": "host_pinned",
                "event": {"data": {"stored": {"blocks": [{"block_hash": router_hash(key)}]}}},
            }
            for wid, sink in self._sinks.items()
            for key in replayed(sink.events)
        ]


def router_hash(key: BlockKey) -> int:
    return int(key[-8:].hex(), 16)


@asynccontextmanager
async def local_stage(
    workload: Workload, settings: Settings, make_sink: Callable[[], ListSink] = ListSink
) -> AsyncIterator[Replay]:
    """Like ``stage.staged``, in one process and at once."""
    layout = layout_of(settings.block_nbytes, workload.tokens_per_block)
    config = Config(num_log_interval_requests=0, cache=cache_of(workload, settings))
    sinks = {wid: make_sink() for wid in range(settings.num_workers)}
    async with AsyncExitStack() as stack:
        workers, engines = {}, {}
        for wid, sink in sinks.items():
            engines[wid] = EngineAgain(partial(Engine, config, layout, sinks=[sink]))
            await stack.enter_async_context(engines[wid])
            workers[wid] = SimulatedWorker(
                f"{wid}",
                engines[wid].now,
                layout,
                num_longest=workload.num_longest,
                max_requests=settings.pace.max_requests,
            )
        router = BelievingRouter(sinks, workload.tokens_per_block)
        yield Replay(
            workload, workers, router, engines=engines, pace=settings.pace, seed=settings.seed
        )


def flip_a_bit(stage: Replay, block_ids: tuple[int, ...]) -> None:
    """Break the last byte of a chain's second block, wherever a host pool holds it."""
    nbytes = next(iter(stage.workers.values()))._layout.block_nbytes
    payload = payload_of(stage.blocks_of(block_ids), nbytes)[1]
    for worker in stage.workers.values():
        slots = worker.engine._pool.region(0).numpy()
        held = (slots == payload).all(axis=1).nonzero()[0]
        slots[held, -1] ^= 1
