"""Fixtures of real servers: NATS for the session; etcd, worker and router for each test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from flexkv.errors import FeedError
from flexkv.events.etcd import Etcd
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from tests.dynamo.shelf import TOKENS_PER_BLOCK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_ANSWERS_S = 20.0


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_server() -> AsyncIterator[NatsServer]:
    async with NatsServer() as server:
        yield server


@pytest_asyncio.fixture
async def worker(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK) as worker:
        yield worker


@contextlib.asynccontextmanager
async def another_router(
    nats_server: NatsServer, worker: FakeWorker, folder: Path
) -> AsyncIterator[Router]:
    """It has seen the worker."""
    async with Router(nats_server.url, folder, tokens_per_block=TOKENS_PER_BLOCK) as router:
        await router.wait_for_workers([worker.worker_id])
        yield router


@pytest_asyncio.fixture
async def router(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> AsyncIterator[Router]:
    async with another_router(nats_server, worker, tmp_path) as router:
        yield router


@pytest_asyncio.fixture
async def etcd_url(tmp_path: Path) -> AsyncIterator[str]:
    program = shutil.which("etcd")
    if program is None:
        pytest.skip("no etcd (Debian's etcd-server has it)")
    with contextlib.ExitStack() as sockets:
        taken = [sockets.enter_context(socket.socket()) for _ in range(2)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        client, peer = (f"http://127.0.0.1:{each.getsockname()[1]}" for each in taken)
    process = await asyncio.create_subprocess_exec(
        program,
        *("--data-dir", str(tmp_path / "etcd"), "--log-level", "error"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}"),
    )
    try:
        async with asyncio.timeout(_ANSWERS_S):
            while True:
                with contextlib.suppress(FeedError):
                    await asyncio.to_thread(Etcd([client]).exists, "anything")
                    break
                await asyncio.sleep(0.05)
        yield client
    finally:
        process.kill()
        await process.wait()
