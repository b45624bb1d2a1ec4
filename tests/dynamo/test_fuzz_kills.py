"""Kill NATS, the engine or a router at any time: in the end each router believes what is resident.

FLEXKV_FEED_FUZZ=nightly runs 200 seeds, FLEXKV_FEED_SEEDS=FIRST:LAST those.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from collections import Counter
from typing import TYPE_CHECKING, Self

import pytest

from flexkv.replay.deployment import FakeWorker, NatsServer, dynamo_variables
from tests.dynamo.stock import TOKENS_PER_BLOCK, Held
from tests.dynamo.test_fuzz import difference

if TYPE_CHECKING:
    from pathlib import Path

NUM_AT_ONCE = 5  # each takes several of the 128 inotify instances of a user
NUM_KILLS = 4
ANSWER_S = 60.0
PATIENCE_S = 45.0
ROLES = ("engine", "router 0", "router 1")


class Peer:
    """One process of ``tests.dynamo.peer``, until it is killed."""

    def __init__(self, variables: dict[str, str], *arguments: str) -> None:
        self._environment = os.environ | variables
        self._arguments = [sys.executable, "-m", "tests.dynamo.peer", *arguments]

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments, stdin=pipe, stdout=pipe, env=self._environment, limit=2**24
        )
        await self._line()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        transport = self._process._transport  # type: ignore[attr-defined]
        transport.close()

    async def held(self, question: str = "") -> Held:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n".encode())
        return {tier: set(hashes) for tier, hashes in (await self._line()).items()}

    async def _line(self) -> dict[str, list[int]]:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_S)
        answer: dict[str, list[int]] = json.loads(line)
        return answer


class Deployment:
    """Its own NATS, a worker, an engine and two routers: all of them processes."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._seed = seed
        self._folder = folder
        self._rng = random.Random(f"{seed} kills")
        self._nats = NatsServer()
        self._peers: dict[str, Peer] = {}
        self._num_started: Counter[str] = Counter()

    async def run(self) -> str:
        """What differs in the end."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._nats)
            size = TOKENS_PER_BLOCK
            worker = FakeWorker(self._nats.url, self._folder, tokens_per_block=size)
            await stack.enter_async_context(worker)
            self._worker_id = worker.worker_id
            stack.push_async_callback(self._kill_all)
            await asyncio.gather(*[self._start(role) for role in ROLES])
            for _ in range(NUM_KILLS):
                await asyncio.sleep(self._rng.uniform(0, 1))
                await self._kill(self._rng.choice(["nats", *ROLES]))
            await asyncio.sleep(0.5)
            truth = await self._peers["engine"].held("stop")
            return await self._difference(truth)

    async def _start(self, role: str) -> None:
        self._num_started[role] += 1
        arguments = ["router"]
        if role == "engine":
            seed = 1000 * self._seed + self._num_started[role]
            arguments = ["engine", str(seed), str(self._worker_id)]
        peer = Peer(dynamo_variables(self._nats.url, self._folder), *arguments)
        self._peers[role] = await peer.__aenter__()

    async def _kill(self, role: str) -> None:
        pause_s = self._rng.choice([0, self._rng.uniform(0, 2)])
        if role == "nats":
            await self._nats.stop()
            await asyncio.sleep(pause_s)
            await self._nats.start()
        else:
            await self._peers[role].kill()
            await asyncio.sleep(pause_s)
            await self._start(role)

    async def _kill_all(self) -> None:
        for peer in self._peers.values():
            await peer.kill()

    async def _difference(self, truth: Held) -> str:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + PATIENCE_S
        num_agreed = 0
        while True:
            beliefs = {role: await self._peers[role].held() for role in ROLES[1:]}
            wrong = [f"{role}: {difference(b, truth)}" for role, b in beliefs.items() if b != truth]
            num_agreed = 0 if wrong else num_agreed + 1
            if num_agreed > 1 or loop.time() > deadline_s:
                return "; ".join(wrong)
            await asyncio.sleep(1.0 if num_agreed else 0.2)


def seeds() -> range:
    if given := os.environ.get("FLEXKV_FEED_SEEDS"):
        first, _, last = given.partition(":")
        return range(int(first), int(last or first) + 1)
    return range(200 if os.environ.get("FLEXKV_FEED_FUZZ") == "nightly" else 10)


def rounds() -> list[range]:
    wanted = seeds()
    starts = range(wanted.start, wanted.stop, NUM_AT_ONCE)
    return [range(start, min(start + NUM_AT_ONCE, wanted.stop)) for start in starts]


@pytest.mark.timeout(240)  # the patience, and processes that start four times over
@pytest.mark.parametrize("seeds", rounds(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
async def test_killed_processes_leave_the_truth_behind(tmp_path: Path, seeds: range) -> None:
    differences = await asyncio.gather(
        *[Deployment(seed, tmp_path / f"{seed}").run() for seed in seeds]
    )
    wrong = {seed: what for seed, what in zip(seeds, differences, strict=True) if what}
    assert not wrong
