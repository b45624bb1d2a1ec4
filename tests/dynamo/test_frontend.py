"""Dynamo's own frontend, killed and started again, routes known prompts to who has them.

It needs the package ai-dynamo, whose dependencies flexkv does not: make nightly PART=feed installs
it without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import socket
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Self

import pytest

from flexkv.hashing import blocks_of
from flexkv.replay.deployment import FakeWorker, NatsServer, dynamo_variables
from tests.dynamo.shelf import TOKENS_PER_BLOCK, Shelf, feeding, settings

if TYPE_CHECKING:
    from pathlib import Path

    from flexkv.blocks import Blocks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("dynamo.frontend") is None, reason="ai-dynamo is not installed"
)
NIGHTLY = os.environ.get("FLEXKV_FEED_FUZZ") == "nightly"
DEADLINE_S = 30.0
MODEL = "model"


class Frontend:
    """``python -m dynamo.frontend`` with a KV router, until it is killed."""

    def __init__(self, nats_url: str, folder: Path, port: int) -> None:
        self._environment = os.environ | dynamo_variables(nats_url, folder)
        self._url = f"http://127.0.0.1:{port}"
        self._arguments = [
            *("--router-mode", "kv", "--namespace", "flexkv"),
            *("--http-host", "127.0.0.1", "--http-port", str(port)),
            *("--discovery-backend", "file", "--event-plane", "nats", "--request-plane", "tcp"),
        ]

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dynamo.frontend", *self._arguments),
            env=self._environment,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self._process.kill()
        await self._process.wait()

    async def worker_of(self, blocks: Blocks) -> int:
        """Who was asked with the prompt; as soon as the frontend answers at all."""
        worker: int = (await self._answer(blocks))["worker_id"]["decode_worker_id"]
        return worker

    async def hit_rate_of(self, blocks: Blocks) -> float:
        """How much of the prompt the router believed that worker to have."""
        rate: float = (await self._answer(blocks))["timing"]["kv_hit_rate"]
        return rate

    async def _answer(self, blocks: Blocks) -> dict[str, Any]:
        tokens = blocks.token_ids.cast("I").tolist()
        request = {
            "model": MODEL,
            "prompt": tokens,
            "max_tokens": 1,
            "nvext": {"extra_fields": ["worker_id", "timing"]},
        }
        async with asyncio.timeout(DEADLINE_S):
            while True:
                answer = await asyncio.to_thread(self._ask, request)
                if answer is not None:
                    found: dict[str, Any] = answer["nvext"]
                    return found
                await asyncio.sleep(0.01)

    def _ask(self, body: dict[str, Any]) -> dict[str, Any] | None:
        head = {"content-type": "application/json"}
        raw = json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/v1/completions", raw, head)
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def prompt(rng: random.Random) -> Blocks:
    """Token ids that the fake model knows."""
    return blocks_of(
        [rng.randrange(3, 500) for _ in range(10 * TOKENS_PER_BLOCK)], TOKENS_PER_BLOCK
    )


async def until_it_knows(frontend: Frontend, blocks: Blocks) -> None:
    """Not by luck: a router that knows nothing takes either worker."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if await frontend.hit_rate_of(blocks) > 0:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("num_blocks", "after_s"),
    [
        (10_000, 0.3),
        pytest.param(
            100_000, 0.5, marks=pytest.mark.skipif(not NIGHTLY, reason="10 s: nightly only")
        ),
    ],
)
async def test_a_killed_frontend_comes_back_and_knows_the_prompts(
    nats_server: NatsServer, tmp_path: Path, num_blocks: int, after_s: float
) -> None:
    rng, shelf, size = random.Random(num_blocks), Shelf(), TOKENS_PER_BLOCK
    for _ in range(num_blocks // 10):
        shelf.store(prompt(rng))
    port, model = free_port(), tmp_path / MODEL
    async with (
        FakeWorker(nats_server.url, tmp_path, tokens_per_block=size, model=model) as other,
        FakeWorker(nats_server.url, tmp_path, tokens_per_block=size, model=model) as worker,
        feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)),
    ):
        assert other.worker_id != worker.worker_id
        known = rng.sample([*shelf._held.values()], 20)
        async with Frontend(nats_server.url, tmp_path, port) as frontend:
            await until_it_knows(frontend, known[0])
        for _ in range(10 if NIGHTLY else 2):
            async with Frontend(nats_server.url, tmp_path, port) as frontend:
                if (
                    NIGHTLY
                ):  # the time after which it has to know them is a promise on a quiet machine
                    await asyncio.sleep(after_s)  # and from then on until it answers at all
                else:
                    await until_it_knows(frontend, known[0])
                asked = [await frontend.worker_of(blocks) for blocks in known]
                hits = [asked_worker == worker.worker_id for asked_worker in asked]
                assert hits == [True] * 20
