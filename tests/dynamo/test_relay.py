"""Dynamo's own relay of vLLM's stream understands the ZMQ sink."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from flexkv.blocks import Tier
from flexkv.config import EventsConfig
from flexkv.events.zmq import ZmqSink
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from tests.dynamo.shelf import TOKENS_PER_BLOCK, Shelf, chain, until_it_believes

if TYPE_CHECKING:
    from pathlib import Path


async def test_what_the_relay_hears_reaches_the_router(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/pub"
    shelf = Shelf()
    sink: Any = ZmqSink(EventsConfig(sink="zmq", zmq_endpoint=endpoint))
    worker = FakeWorker(
        nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK, relayed=endpoint
    )
    async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as stack:
        await sink.start(shelf.log, tasks)
        stack.push_async_callback(sink.close)
        shelf.sinks.append(sink)
        await stack.enter_async_context(worker)
        router = Router(nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
        await stack.enter_async_context(router)
        await router.wait_for_workers([worker.worker_id])
        await until_it_listens(router, worker.worker_id, shelf)
        chains = [chain(6, lora="french" if i % 2 else None) for i in range(6)]
        for blocks in chains:
            shelf.store(blocks)
            shelf.store(blocks, Tier.SSD)
        shelf.trim(chains[0], to=2)
        shelf.trim(chains[1], to=0, tier=Tier.SSD)
        await until_it_believes(router, worker.worker_id, shelf, *chains)


async def until_it_listens(router: Router, worker_id: int, shelf: Shelf) -> None:
    """The relay connects when it likes."""
    while True:
        blocks = chain(1)
        shelf.store(blocks)
        with contextlib.suppress(AssertionError):
            return await until_it_believes(router, worker_id, shelf, blocks, deadline_s=0.3)
