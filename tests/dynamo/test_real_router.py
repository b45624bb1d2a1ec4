"""What a real Dynamo router believes is what a source holds."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from flexkv.blocks import Tier
from flexkv.errors import FeedError
from flexkv.events.nats import NatsSink
from flexkv.replay.deployment import FakeWorker, NatsServer, Overlap, Router
from tests.dynamo.shelf import (
    DEADLINE_S,
    Shelf,
    believed,
    chain,
    feeding,
    settings,
    until_it_believes,
)

if TYPE_CHECKING:
    from pathlib import Path


async def test_stored_trimmed_evicted_and_cleared_blocks_are_believed(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf()
    chains = [chain(random.randrange(1, 80)) for _ in range(30)]
    shelf.store(chains[0])  # before the sink starts
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)):
        for blocks in chains[1:]:
            shelf.store(blocks, of=(len(blocks) + 1) // 2)
            shelf.store(blocks)
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        for blocks in chains[::2]:
            shelf.trim(blocks, to=len(blocks) // 2)
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        for blocks in chains[::3]:
            if shelf.num_held(blocks, Tier.HOST):
                shelf.trim(blocks, to=0)
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        shelf.clear()
        shelf.store(chains[3])
        await until_it_believes(router, worker.worker_id, shelf, *chains)


async def test_ssd_counts_behind_host(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf()
    blocks = chain(40)
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)):
        shelf.store(blocks, Tier.HOST)
        shelf.store(blocks, Tier.SSD)
        await until_it_believes(router, worker.worker_id, shelf, blocks)
        shelf.trim(blocks, 10, Tier.HOST)
        await until_it_believes(router, worker.worker_id, shelf, blocks)
        assert await believed(router, worker.worker_id, blocks) == Overlap(gpu=0, host=10, ssd=30)


async def test_namespace_and_adapter_are_part_of_what_is_believed(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf()
    mine = chain(4, namespace="tenant-7", lora="french")
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)):
        shelf.store(mine)
        await until_it_believes(router, worker.worker_id, shelf, mine)
        token_ids = mine.token_ids.cast("I").tolist()
        for other in ({}, {"namespace": "tenant-7"}, {"lora": "french"}, {"namespace": "t"}):
            overlap = await router.overlap(token_ids, **other)
            assert overlap[worker.worker_id] == Overlap(0, 0, 0)


async def test_nats_down_at_start_is_an_error_within_the_deadline(tmp_path: Path) -> None:
    async with NatsServer() as nats:
        await nats.stop()
        sink = NatsSink(settings(nats.url, tmp_path, 7, connect_timeout_s=0.5))
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            with pytest.raises(FeedError, match=rf"{nats.url}.*start nats-server"):
                await sink.start(Shelf().log, tasks)
        assert not list((tmp_path / "v1" / "event_sources").iterdir())
        await sink.close()


async def test_a_discovery_folder_that_cannot_be_written_is_an_error_at_once(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"  # a folder can't be made below a file, not even by root
    in_the_way.touch()
    sink = NatsSink(settings(nats_server.url, in_the_way, 7))
    async with asyncio.TaskGroup() as tasks:
        with pytest.raises(FeedError, match=rf"{in_the_way}.*DYN_FILE_KV"):
            await sink.start(Shelf().log, tasks)
    await sink.close()


async def test_closing_makes_the_router_forget_the_source_and_keeps_the_worker(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf()
    blocks = chain(5)
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)):
        shelf.store(blocks)
        await until_it_believes(router, worker.worker_id, shelf, blocks)
    shelf.sinks.clear()
    shelf.clear()
    await until_it_believes(router, worker.worker_id, shelf, blocks)
    assert not list((tmp_path / "v1" / "event_sources").iterdir())
