"""The same with discovery in a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from flexkv.blocks import Tier
from flexkv.errors import FeedError
from flexkv.events.dynamo import WorkerRank
from flexkv.events.etcd import Etcd, EtcdRecord
from flexkv.events.nats import NatsSink
from flexkv.events.ownership import this_process
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from flexkv.replay.verify import verify
from tests.dynamo.shelf import (
    TOKENS_PER_BLOCK,
    Shelf,
    chain,
    feeding,
    settings,
    until_it_believes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from flexkv.config import EventsConfig

WORKER = WorkerRank(namespace="ns", component="backend", endpoint="generate", worker_id=7)


def in_etcd(nats_url: str, etcd_url: str, folder: Path, worker_id: int) -> EventsConfig:
    return settings(nats_url, folder, worker_id, discovery="etcd", etcd_endpoints=[etcd_url])


async def test_late_routers_learn_everything_and_forget_it_when_the_source_leaves(
    nats_server: NatsServer, etcd_url: str, tmp_path: Path
) -> None:
    shelf = Shelf()
    chains = [chain(10) for _ in range(5)]
    for blocks in chains:
        shelf.store(blocks)
        shelf.store(blocks[:4], Tier.SSD)
    size = TOKENS_PER_BLOCK
    async with FakeWorker(nats_server.url, etcd_url, tokens_per_block=size) as worker:
        config = in_etcd(nats_server.url, etcd_url, tmp_path, worker.worker_id)
        router = Router(nats_server.url, etcd_url, tokens_per_block=size)
        async with contextlib.AsyncExitStack() as stack:
            async with feeding(shelf, config):
                await stack.enter_async_context(router)
                await router.wait_for_workers([worker.worker_id])
                await until_it_believes(router, worker.worker_id, shelf, *chains)
                shelf.trim(chains[0], to=2)
                await until_it_believes(router, worker.worker_id, shelf, *chains)
                (found,) = await verify(config, size)
                assert found.agrees
                assert found.num_held == {"host_pinned": 42, "disk": 20}
                second = NatsSink(config)
                async with asyncio.TaskGroup() as tasks:
                    with pytest.raises(FeedError, match="has its event source already: process"):
                        await second.start(Shelf().log, tasks)
            shelf.clear()
            shelf._held.clear()
            await until_it_believes(router, worker.worker_id, shelf, *chains)


async def test_a_lease_that_ended_is_renewed_and_the_dead_leave(etcd_url: str) -> None:
    etcd = Etcd(["http://127.0.0.1:1", etcd_url])  # the first one does not answer
    dead = EtcdRecord(etcd, WORKER, 1, None)
    dead._content = dead._content.replace(f'"{this_process()["started"]}"', '"1"')
    await dead.claim()
    mine = EtcdRecord(etcd, WORKER, 2, None)
    await mine.claim()
    assert not etcd.exists(dead._key)
    assert await mine.refresh()
    etcd.revoke(mine._lease_id)
    assert not await mine.refresh()
    assert etcd.exists(mine._key)
    await mine.remove()
    assert not etcd.exists(mine._key)


async def test_an_etcd_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(FeedError, match=r"events.etcd_endpoints.*127\.0\.0\.1:1"):
        await EtcdRecord(Etcd(["http://127.0.0.1:1"]), WORKER, 1, None).claim()


async def test_an_etcd_that_wants_to_know_who_asks_is_told(etcd_url: str) -> None:
    nobody = Etcd([etcd_url])
    for path, body in (
        ("auth/user/add", {"name": "root", "password": "secret"}),
        ("auth/role/add", {"name": "root"}),
        ("auth/user/grant", {"user": "root", "role": "root"}),
        ("auth/enable", {}),
    ):
        await asyncio.to_thread(nobody._posted, etcd_url, path, body)
    with pytest.raises(FeedError, match="etcd_password"):
        await EtcdRecord(nobody, WORKER, 1, None).claim()
    with pytest.raises(FeedError, match="etcd_password"):
        await EtcdRecord(Etcd([etcd_url], "root", "wrong"), WORKER, 1, None).claim()
    known = Etcd([etcd_url], "root", "secret")
    mine = EtcdRecord(known, WORKER, 2, None)
    await mine.claim()
    assert await mine.refresh()
    known._token = "expired"
    assert known.exists(mine._key)
    await mine.remove()
    assert not known.exists(mine._key)
