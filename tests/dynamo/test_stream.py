"""What flexkv adds to vLLM's own stream, through Dynamo's own relay: the router knows the truth.

Stands in for vLLM: its classes of events, and the scheduler's steps. Relay and router are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest
import zmq
import zmq.asyncio

from flexkv.blocks import Tier
from flexkv.events import vllm_wire
from flexkv.integration.vllm import stream
from flexkv.integration.vllm.feed import Feed
from flexkv.integration.vllm.stream import StreamSink
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from tests.dynamo.lossy import LossyProxy
from tests.dynamo.shelf import TOKENS_PER_BLOCK, Shelf, chain, until, until_it_believes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from flexkv.blocks import BlockKey, Blocks


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, dict[str, Any]] = {
        "vllm.distributed.kv_events": {
            "BlockStored": vllm_wire._Stored,
            "BlockRemoved": vllm_wire._Removed,
        },
        "vllm.v1.core.kv_cache_utils": {"maybe_convert_block_hash": low_bits},
    }
    for path, members in names.items():
        parts = path.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
        module = ModuleType(path)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, path, module)


def low_bits(key: BlockKey) -> int:
    return int.from_bytes(key, "big") & (2**64 - 1)


class Pool:
    """Where vLLM's scheduler keeps the GPU's blocks; a reset replaces the index."""

    def __init__(self) -> None:
        self.block_pool = SimpleNamespace(cached_block_hash_to_block=object())

    def resolve_block_ids(self) -> None: ...

    def reset(self) -> None:
        self.block_pool.cached_block_hash_to_block = object()


class Scheduler:
    """Publishes a batch at the end of a step: its own events, then those of the connector."""

    def __init__(self, endpoint: str, shelf: Shelf) -> None:
        self._endpoint = endpoint
        self._context = zmq.asyncio.Context()
        self._number = 0
        self._codec = vllm_wire.VllmCodec(0)
        self._pool = Pool()
        self._own: list[Any] = []
        self.sink = StreamSink(512)
        self.feed = Feed([self.sink], self.sink)
        self.feed.attach(SimpleNamespace(call=lambda work: work()))  # type: ignore[arg-type]
        self.shelf = shelf
        self.told: list[Any] = []

    async def __aenter__(self) -> Self:
        self._socket = self._context.socket(zmq.PUB)
        self._socket.bind(self._endpoint)
        block_state = SimpleNamespace(resolve_block_ids=self._pool.resolve_block_ids)
        self.feed.watch(SimpleNamespace(kv_connector_block_state=block_state))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._context.destroy(0)

    def reset_prefix_cache(self) -> None:
        """As vLLM's ``reset_prefix_cache``: its event comes with the next step."""
        self._pool.reset()
        self._own.append(vllm_wire._Cleared())

    async def step(self) -> None:
        self.sink.wake()
        events = [*self._own, *self.feed.take_events()]
        self._own.clear()
        self.told += events
        if events:
            payload = self._codec.payload(events, time.time())
            number = self._number.to_bytes(8, "big")
            self._number += 1
            await self._socket.send_multipart([b"", number, payload])

    async def steps(self) -> None:
        """Until everything is told; the walk over what is resident runs beside."""
        for _ in range(5):
            await self.step()
            await asyncio.sleep(0.01)
        assert not self.feed.num_waiting


@contextlib.asynccontextmanager
async def deployed(
    nats_url: str, folder: Path, relay_nats_url: str | None = None
) -> AsyncIterator[tuple[Scheduler, Router, int]]:
    """All that is needed, once the router hears what a step tells."""
    endpoint, size = f"ipc://{folder}/pub", TOKENS_PER_BLOCK
    relay = FakeWorker(relay_nats_url or nats_url, folder, tokens_per_block=size, relayed=endpoint)
    async with (
        asyncio.TaskGroup() as tasks,
        Scheduler(endpoint, Shelf()) as scheduler,
        relay as worker,
        Router(nats_url, folder, tokens_per_block=size) as router,
    ):
        await scheduler.sink.start(scheduler.shelf.log, tasks)
        try:
            await router.wait_for_workers([worker.worker_id])
            await until_it_listens(scheduler, router, worker.worker_id)
            yield scheduler, router, worker.worker_id
        finally:
            await scheduler.sink.close()


async def until_it_listens(scheduler: Scheduler, router: Router, worker_id: int) -> None:
    """The relay connects when it likes."""
    while True:
        blocks = chain(1)
        scheduler.shelf.store(blocks)
        await scheduler.step()
        with contextlib.suppress(AssertionError):
            await until_it_believes(router, worker_id, scheduler.shelf, blocks, deadline_s=0.3)
            return


async def index_of(router: Router) -> dict[str, set[int]]:
    """Every hash in the router's index, by tier."""
    held: dict[str, set[int]] = {}
    for event in await router.dump_events():
        blocks = event["event"]["data"]["stored"]["blocks"]
        hashes = {block["block_hash"] for block in blocks}
        held[event["storage_tier"]] = held.get(event["storage_tier"], set()) | hashes
    return held


async def until_gone(router: Router, *chains: Blocks) -> None:
    """Nothing of ``chains`` is in the index, reachable or not."""
    hashes = {router_hash for blocks in chains for router_hash in blocks.router_hashes()}
    async with asyncio.timeout(20):
        while any(held & hashes for held in (await index_of(router)).values()):  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.SSD])
@pytest.mark.parametrize("who", ["vllm", "flexkv", "both"])
async def test_stored_cleared_stored_again_and_removed_once_is_gone(
    nats_server: NatsServer, tmp_path: Path, tier: Tier, who: str
) -> None:
    async with deployed(nats_server.url, tmp_path) as (scheduler, router, worker_id):
        shelf, blocks, other = scheduler.shelf, chain(6), chain(3, lora="french")

        async def truth() -> None:
            await scheduler.steps()
            await until_it_believes(router, worker_id, shelf, blocks, other)

        shelf.store(blocks, tier)
        shelf.store(other, tier)
        await truth()
        for _ in range(2):
            if who != "flexkv":  # the reader of the stream forgets every tier
                scheduler.reset_prefix_cache()
            if who != "vllm":
                shelf.clear()
                await truth()
                shelf.store(blocks, tier)
                shelf.store(other, tier)
            await truth()
        assert shelf.num_held(blocks, tier) == 6
        shelf.trim(blocks, to=2, tier=tier)
        await truth()
        shelf.trim(blocks, to=0, tier=tier)
        await truth()
        await until_gone(router, blocks)


async def test_the_removal_of_a_block_that_nobody_knows_changes_nothing(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with deployed(nats_server.url, tmp_path) as (scheduler, router, worker_id):
        shelf, blocks, marker = scheduler.shelf, chain(6), chain(1)
        shelf.store(blocks)
        shelf.store(blocks, Tier.SSD)
        await scheduler.steps()
        await until_it_believes(router, worker_id, shelf, blocks)
        before = await index_of(router)
        scheduler.told.clear()
        monkeypatch.setattr(stream, "_SIGN_S", 0.0)
        scheduler.sink._next_sign_s = 0.0
        for _ in range(20):
            await scheduler.step()
        nobody = vllm_wire._Removed([low_bits(stream._NOBODY)], "CPU")
        assert scheduler.told == [nobody] * 20
        shelf.store(marker)  # behind them all
        await scheduler.steps()
        await until_it_believes(router, worker_id, shelf, blocks, marker)
        before["host_pinned"] |= set(marker.router_hashes())
        assert await index_of(router) == before


async def test_the_sign_heals_the_loss_of_the_last_message(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Between relay and router: the router asks the relay when the next message comes."""
    async with (
        LossyProxy(nats_server.url, random.Random(1), 0.0) as proxy,
        deployed(nats_server.url, tmp_path, proxy.url) as (scheduler, router, worker_id),
    ):
        shelf, blocks = scheduler.shelf, chain(6)
        scheduler.sink._next_sign_s = time.monotonic() + 3600
        num_lost = proxy.fates["lost"]
        proxy.loss = 1.0
        shelf.store(blocks)
        await scheduler.steps()
        await until(lambda: proxy.fates["lost"] > num_lost)
        proxy.calm()
        assert not set(blocks.router_hashes()) & (await index_of(router))["host_pinned"]
        scheduler.sink._next_sign_s = 0.0
        scheduler.told.clear()
        await scheduler.step()
        assert scheduler.told == [vllm_wire._Removed([low_bits(stream._NOBODY)], "CPU")]
        await until_it_believes(router, worker_id, shelf, blocks)
