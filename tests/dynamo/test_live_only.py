"""Where routers can't ask, everything is told again whenever they may be wrong."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from flexkv.replay.deployment import FakeWorker, NatsServer, Overlap, Router
from tests.dynamo.shelf import (
    TOKENS_PER_BLOCK,
    Shelf,
    believed,
    chain,
    feeding,
    settings,
    until,
    until_it_believes,
)

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_router_that_came_late_learns_everything_by_a_resync(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = Shelf()
    chains = [chain(20) for _ in range(10)]
    config = settings(nats_server.url, tmp_path, worker.worker_id, request_plane="nats")
    async with feeding(shelf, config) as sink:
        for blocks in chains:
            shelf.store(blocks)
        await until(lambda: sink.stats().resyncs.get("settle"))
        async with Router(nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK) as late:
            await late.wait_for_workers([worker.worker_id])
            assert await believed(late, worker.worker_id, chains[0]) == Overlap(0, 0, 0)
            sink.resync()
            await until_it_believes(late, worker.worker_id, shelf, *chains)
            await until(lambda: sink.stats().resyncs.get("request"))


async def test_a_worker_that_registers_late_is_told_about_once_it_has(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    shelf = Shelf()
    blocks = chain(8)
    shelf.store(blocks)
    elsewhere = tmp_path / "elsewhere"
    here = tmp_path / "here"
    # A worker's id is known before its card is there, so the card is made elsewhere, and moved.
    async with FakeWorker(nats_server.url, elsewhere, tokens_per_block=TOKENS_PER_BLOCK) as worker:
        config = settings(nats_server.url, here, worker.worker_id, request_plane="nats")
        async with (
            Router(nats_server.url, here, tokens_per_block=TOKENS_PER_BLOCK) as router,
            feeding(shelf, config) as sink,
        ):
            await until(lambda: sink.stats().resyncs.get("settle"))
            for folder in ("instances", "mdc"):
                (card,) = (elsewhere / "v1" / folder).iterdir()
                draft = here / "draft"
                draft.write_bytes(card.read_bytes())
                (here / "v1" / folder).mkdir(exist_ok=True)
                draft.rename(here / "v1" / folder / card.name)
            await router.wait_for_workers([worker.worker_id])
            await until_it_believes(router, worker.worker_id, shelf, blocks, deadline_s=8)
            await until(lambda: sink.stats().resyncs.get("card"))


async def test_a_feed_that_falls_behind_tells_everything_again(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf(ring=500, max_event_blocks=64)
    chains = [chain(20) for _ in range(100)]
    config = settings(nats_server.url, tmp_path, worker.worker_id, outbox=300, request_plane="nats")
    async with feeding(shelf, config) as sink:
        shelf.store(chains[0])
        await until_it_believes(router, worker.worker_id, shelf, chains[0])
        for blocks in chains[1:]:  # in one go: the publisher has no chance to keep up
            shelf.store(blocks)
        shelf.trim(chains[0], to=5)
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        await until(lambda: sink.stats().resyncs.get("overflow"))


async def test_after_a_restart_of_nats_the_router_believes_the_truth_again(tmp_path: Path) -> None:
    shelf = Shelf()
    chains = [chain(10) for _ in range(10)]
    async with NatsServer() as nats, contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(
            FakeWorker(nats.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
        )
        router = await stack.enter_async_context(
            Router(nats.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
        )
        await router.wait_for_workers([worker.worker_id])
        config = settings(nats.url, tmp_path, worker.worker_id, request_plane="nats")
        sink = await stack.enter_async_context(feeding(shelf, config))
        for blocks in chains[:5]:
            shelf.store(blocks)
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        await nats.stop()
        await until(lambda: not sink.stats().connected)
        for blocks in chains[5:]:
            shelf.store(blocks)
        shelf.trim(chains[0], to=0)
        shelf.trim(chains[1], to=4)
        await nats.start()
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        await until(lambda: sink.stats().resyncs.get("reconnect"))


async def test_a_router_hears_everything_where_nats_comes_later(tmp_path: Path) -> None:
    shelf = Shelf()
    blocks = chain(12)
    shelf.store(blocks)
    async with NatsServer() as nats, contextlib.AsyncExitStack() as stack:
        worker = FakeWorker(nats.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
        await stack.enter_async_context(worker)
        router = Router(nats.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
        await stack.enter_async_context(router)
        await router.wait_for_workers([worker.worker_id])
        await nats.stop()
        config = settings(
            nats.url,
            tmp_path,
            worker.worker_id,
            connect_timeout_s=0.3,
            nats_required=False,
            request_plane="nats",
        )
        async with feeding(shelf, config) as sink:
            assert not sink.stats().connected
            await nats.start()
            await until_it_believes(router, worker.worker_id, shelf, blocks)
            await until(lambda: sink.stats().resyncs.get("reconnect"))


async def test_a_settling_snapshot_loses_no_removal(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf()
    chains = [chain(3) for _ in range(60)]
    for blocks in chains:
        shelf.store(blocks)
    async with feeding(
        shelf, settings(nats_server.url, tmp_path, worker.worker_id, request_plane="nats")
    ) as sink:
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        for blocks in chains:
            shelf.trim(blocks, to=1)
            sink._feed._plan("settle")  # due before the removal is sent
            await asyncio.sleep(0.002)
        await until_it_believes(router, worker.worker_id, shelf, *chains)


async def test_a_record_that_was_swept_away_is_written_again_and_all_told_again(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf()
    blocks = chain(5)
    async with feeding(
        shelf, settings(nats_server.url, tmp_path, worker.worker_id, request_plane="nats")
    ) as sink:
        shelf.store(blocks)
        await until_it_believes(router, worker.worker_id, shelf, blocks)
        for record in (tmp_path / "v1" / "event_sources").iterdir():
            record.unlink()
        await until(lambda: sink.stats().resyncs.get("record"))
        await until_it_believes(router, worker.worker_id, shelf, blocks)
