"""A real router that has missed something asks for it, and believes the truth again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from typing import TYPE_CHECKING

import pytest

from flexkv.blocks import Tier
from flexkv.errors import FeedError
from flexkv.events import pulse
from flexkv.events.nats import NatsSink
from flexkv.events.recovery import RecoveryServer
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from tests.dynamo.servers import another_router
from tests.dynamo.shelf import (
    DEADLINE_S,
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

    from flexkv.blocks import Blocks


def filled(num_chains: int = 20) -> tuple[Shelf, list[Blocks]]:
    shelf = Shelf()
    chains = [chain(10) for _ in range(num_chains)]
    for i, blocks in enumerate(chains):
        shelf.store(blocks)
        shelf.store(blocks, Tier.SSD)
        if i % 3 == 0:
            shelf.trim(blocks, to=i % 10)
    return shelf, chains


def lose_what_waits(sink: NatsSink, shelf: Shelf) -> None:
    """As if the messages had been sent and got lost."""
    assert sink._feed is not None
    sink._feed._cursor = shelf.log.last_id


async def test_a_router_that_comes_late_is_told_everything(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf, chains = filled()
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)):
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        for _ in range(2):  # a restart beside the first one
            async with another_router(nats_server, worker, tmp_path) as late:
                await until_it_believes(late, worker.worker_id, shelf, *chains)
            await until_it_believes(router, worker.worker_id, shelf, *chains)
            shelf.store(chains[0])
        await until_it_believes(router, worker.worker_id, shelf, *chains)


async def test_a_router_at_the_address_that_dynamo_chooses_is_answered(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"):
        monkeypatch.delenv(name, raising=False)
    shelf, chains = filled()
    plain = Router(nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK, tcp_host=None)
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)), plain as late:
        await late.wait_for_workers([worker.worker_id])
        await until_it_believes(late, worker.worker_id, shelf, *chains)


async def test_lost_messages_are_asked_for_when_the_next_one_comes(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf, chains = filled()
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)) as sink:
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        shelf.trim(chains[1], to=3)
        shelf.store(chains[0])
        shelf.clear()
        shelf.store(chains[5])
        shelf.store(chains[6], Tier.SSD)
        lose_what_waits(sink, shelf)
        shelf.store(chains[2])
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        assert sink.stats().counts["gaps"]


async def test_a_lost_last_message_is_noticed_by_a_beat(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf, chains = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id, heartbeat_s=0.2)
    async with feeding(shelf, config) as sink:
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        shelf.trim(chains[1], to=0)
        lose_what_waits(sink, shelf)
        await until_it_believes(router, worker.worker_id, shelf, *chains)


async def test_a_kick_follows_a_filled_gap_and_brings_back_what_was_missed_meanwhile(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf, chains = filled()
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)) as sink:
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        shelf.trim(chains[1], to=0)
        lose_what_waits(sink, shelf)
        shelf.trim(chains[2], to=1)
        # A change that no message ever told: only a dump can.
        shelf._held.pop((Tier.HOST, chains[4].key(0)))
        await until(lambda: sink.stats().counts.get("kicks"))
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        assert sink.stats().counts["kicks"] == 1
        await asyncio.sleep(pulse.KICK_AFTER_S + 0.1)
        assert sink.stats().counts["kicks"] == 1, "a kick must not cause the next one"


async def test_what_fell_out_of_the_ring_is_recovered_by_a_dump(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf = Shelf(ring=500, max_event_blocks=64)
    chains = [chain(20) for _ in range(100)]
    config = settings(nats_server.url, tmp_path, worker.worker_id, outbox=300)
    async with feeding(shelf, config) as sink:
        shelf.store(chains[0])
        await until_it_believes(router, worker.worker_id, shelf, chains[0])
        for blocks in chains[1:]:  # in one go: the publisher has no chance to keep up
            shelf.store(blocks)
        shelf.trim(chains[0], to=5)
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        assert sink.stats().counts["overflows"]


async def test_after_a_restart_of_nats_the_router_believes_the_truth_again(tmp_path: Path) -> None:
    shelf, chains = filled()
    async with NatsServer() as nats, contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(
            FakeWorker(nats.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
        )
        router = await stack.enter_async_context(
            Router(nats.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
        )
        await router.wait_for_workers([worker.worker_id])
        config = settings(nats.url, tmp_path, worker.worker_id)
        sink = await stack.enter_async_context(feeding(shelf, config))
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        await nats.stop()
        await until(lambda: not sink.stats().connected)
        shelf.store(chains[0])
        shelf.trim(chains[1], to=4)
        await nats.start()
        await until_it_believes(router, worker.worker_id, shelf, *chains)


async def test_a_worker_that_registers_late_is_believed_once_it_has(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    shelf = Shelf()
    blocks = chain(8)
    shelf.store(blocks)
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    # A worker's id is known before its card is there, so the card is made elsewhere, and moved.
    async with FakeWorker(nats_server.url, elsewhere, tokens_per_block=TOKENS_PER_BLOCK) as worker:
        config = settings(nats_server.url, here, worker.worker_id)
        async with (
            Router(nats_server.url, here, tokens_per_block=TOKENS_PER_BLOCK) as router,
            feeding(shelf, config),
        ):
            await asyncio.sleep(0.5)
            for folder in ("instances", "mdc"):
                (card,) = (elsewhere / "v1" / folder).iterdir()
                draft = here / "draft"
                draft.write_bytes(card.read_bytes())
                (here / "v1" / folder).mkdir(exist_ok=True)
                draft.rename(here / "v1" / folder / card.name)
            await router.wait_for_workers([worker.worker_id])
            await until_it_believes(router, worker.worker_id, shelf, blocks, deadline_s=8)


async def test_two_ranks_of_one_worker_share_a_server_and_are_told_apart(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    shelves = [filled(5), filled(5)]
    size = TOKENS_PER_BLOCK
    async with (
        FakeWorker(nats_server.url, tmp_path, tokens_per_block=size, num_ranks=2) as worker,
        another_router(nats_server, worker, tmp_path) as router,
    ):
        await believes_both_ranks(nats_server, worker, router, tmp_path, shelves)


async def believes_both_ranks(
    nats_server: NatsServer,
    worker: FakeWorker,
    router: Router,
    tmp_path: Path,
    shelves: list[tuple[Shelf, list[Blocks]]],
) -> None:
    configs = [
        settings(nats_server.url, tmp_path, worker.worker_id, dp_rank=rank, recovery_port=0)
        for rank in range(2)
    ]
    server = RecoveryServer(configs[0])
    async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as stack:
        await server.start(tasks)
        stack.push_async_callback(server.close)
        for config, (shelf, _) in zip(configs, shelves, strict=True):
            sink = NatsSink(config, server)
            await sink.start(shelf.log, tasks)
            stack.push_async_callback(sink.close)
        for rank, (shelf, chains) in enumerate(shelves):
            held = {
                (tier, router_hash)
                for tier in ("host_pinned", "disk")
                for blocks in chains
                for router_hash in blocks[
                    : shelf.num_held(blocks, {"disk": Tier.SSD}.get(tier, Tier.HOST))
                ].router_hashes()
            }
            async with asyncio.timeout(DEADLINE_S):
                while await listed(router, rank) != held:  # noqa: ASYNC110  # it has no event
                    await asyncio.sleep(0.01)
        assert server.counts["answers"] >= 2


async def listed(router: Router, rank: int) -> set[tuple[str, int]]:
    """Tier and hash of every block that the router's index has of a rank."""
    return {
        (event["storage_tier"], block["block_hash"])
        for event in await router.dump_events()
        if event["event"]["dp_rank"] == rank
        for block in event["event"]["data"]["stored"]["blocks"]
    }


async def test_a_second_source_of_the_same_rank_is_refused_and_the_first_goes_on(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf, chains = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    async with feeding(shelf, config), asyncio.TaskGroup() as tasks:
        second = NatsSink(config)
        with pytest.raises(FeedError, match="has its event source already: process"):
            await second.start(Shelf().log, tasks)
        await second.close()
        await until_it_believes(router, worker.worker_id, shelf, *chains)


async def test_a_router_elsewhere_is_refused_by_name_and_goes_on_with_what_is_new(
    nats_server: NatsServer,
    worker: FakeWorker,
    router: Router,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("flexkv.events.callbacks.CallbackPolicy.allows", lambda *_: False)
    shelf, _ = filled(1)
    with caplog.at_level(logging.ERROR, "flexkv.events.recovery"):
        async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)) as sink:
            await until(lambda: sink.stats().counts.get("refused"))
    assert "events.recovery_callback_hosts" in caplog.text
    assert "127.0.0.1" in caplog.text
    assert router is not None


async def test_silent_connections_shut_no_router_out(
    nats_server: NatsServer, worker: FakeWorker, router: Router, tmp_path: Path
) -> None:
    shelf, chains = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    async with feeding(shelf, config) as sink, contextlib.AsyncExitStack() as stack:
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        host, _, port = sink._recovery.address.rpartition(":")
        for _ in range(config.recovery_connections):  # in place of the router's own, too
            stack.enter_context(socket.create_connection((host, int(port))))
        await until(lambda: sink.stats().counts.get("evicted"))
        late = await stack.enter_async_context(another_router(nats_server, worker, tmp_path))
        await until_it_believes(late, worker.worker_id, shelf, *chains)
        shelf.trim(chains[1], to=0)
        lose_what_waits(sink, shelf)
        shelf.store(chains[0])
        for each in (router, late):  # the first has to connect again
            await until_it_believes(each, worker.worker_id, shelf, *chains)


async def test_the_record_appears_only_when_the_server_answers(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf, _ = filled(1)
    async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)):
        (record,) = (tmp_path / "v1" / "event_sources").iterdir()
        target = json.loads(record.read_text())["metadata"]["recovery_target"]
        host, _, rest = target["transport"]["tcp"].partition(":")
        _, writer = await asyncio.open_connection(host, int(rest.partition("/")[0]))
        writer.close()
        await writer.wait_closed()


async def test_a_dump_is_believed_whatever_changes_while_it_is_made(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = Shelf()
    chains = [chain(10) for _ in range(400)]
    for blocks in chains[:200]:
        shelf.store(blocks)
    async with (
        feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)),
        another_router(nats_server, worker, tmp_path) as router,
    ):
        for i, blocks in enumerate(chains[200:]):
            shelf.store(blocks)
            shelf.trim(chains[i], to=i % 4)
            await asyncio.sleep(0.0005)
        await until_it_believes(router, worker.worker_id, shelf, *chains)
        assert (await believed(router, worker.worker_id, chains[250])).host == 10
