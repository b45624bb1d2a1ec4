"""A real deployment for the tests: NATS for the session, worker and router for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from tests.dynamo.shelf import TOKENS_PER_BLOCK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_server() -> AsyncIterator[NatsServer]:
    async with NatsServer() as server:
        yield server


@pytest_asyncio.fixture
async def worker(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK) as worker:
        yield worker


@pytest_asyncio.fixture
async def router(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> AsyncIterator[Router]:
    async with Router(nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK) as router:
        await router.wait_for_workers([worker.worker_id])
        yield router
