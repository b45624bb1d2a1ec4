"""A program: an engine's feed or a router, as a process of its own that can be killed.

``engine SEED WORKER_ID`` changes its content until it is told to stop; ``router`` listens. Each
line on standard input is a question, answered by one line of JSON: what is held, by tier.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if __name__ == "__main__":  # the package without its __init__, which takes a second for torch
    sys.modules["flexkv"] = package = ModuleType("flexkv")
    spec = importlib.util.find_spec("tests")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package.__path__ = [str(Path(spec.submodule_search_locations[0]).parent / "flexkv")]

from flexkv.events.nats import NatsSink
from flexkv.replay.deployment import Router
from tests.dynamo.shelf import settings
from tests.dynamo.stock import TOKENS_PER_BLOCK, Held, Stock, held_by_rank

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def answer_questions(answer: Callable[[str], Awaitable[Held]]) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say({})
    while question := await reader.readline():
        held = await answer(question.decode().strip())
        say({tier: sorted(hashes) for tier, hashes in held.items()})


def say(answer: dict[str, list[int]]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def engine(seed: int, worker_id: int) -> None:
    stock = Stock(seed)
    nats_url, folder = os.environ["NATS_SERVER"], Path(os.environ["DYN_FILE_KV"])
    config = settings(nats_url, folder, worker_id, heartbeat_s=0.5, nats_required=False)
    stock.sink = NatsSink(config)
    async with asyncio.TaskGroup() as tasks:
        await stock.sink.start(stock.log, tasks)
        busy = tasks.create_task(stock.keep_busy())

        async def answer(question: str) -> Held:
            if question == "stop":
                busy.cancel()
            return stock.held()

        await answer_questions(answer)
        busy.cancel()
        await stock.sink.close()


async def router() -> None:
    nats_url, folder = os.environ["NATS_SERVER"], Path(os.environ["DYN_FILE_KV"])
    async with Router(nats_url, folder, tokens_per_block=TOKENS_PER_BLOCK) as real:

        async def answer(_question: str) -> Held:
            ranks = held_by_rank(await real.dump_events())
            return ranks.get(0, {"host_pinned": set(), "disk": set()})

        await answer_questions(answer)


if __name__ == "__main__":
    role, *numbers = sys.argv[1:]
    asyncio.run(engine(*map(int, numbers)) if role == "engine" else router())
