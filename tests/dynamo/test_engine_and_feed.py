"""An engine and its feed: what becomes of events is counted, and no request waits for them."""

from __future__ import annotations

import asyncio
import os
import signal
from itertools import chain
from typing import TYPE_CHECKING, Any

from flexkv import Blocks, Engine, blocks_of
from flexkv.events.feed import RecoverableFeed
from flexkv.events.nats import NatsSink
from flexkv.events.reqplane import Query
from flexkv.replay.deployment import NatsServer
from tests.dynamo.shelf import DEADLINE_S, settings, until
from tests.engine.test_engine import LAYOUT, NUM_GPU_BLOCKS, TOKENS_PER_BLOCK, caches, config
from tests.integration.test_feed_metrics import values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

    from flexkv.events.types import Event


def some(number: int, num_blocks: int = 5) -> Blocks:
    return blocks_of([number] * num_blocks * TOKENS_PER_BLOCK, TOKENS_PER_BLOCK)


async def test_what_nats_missed_is_counted_in_statistics_and_metrics(tmp_path: Path) -> None:
    async with NatsServer() as nats:
        sink = NatsSink(settings(nats.url, tmp_path, 7, outbox=8))
        async with Engine(config(num_slots=32), LAYOUT, sinks=[sink]) as engine:
            engine.attach(caches())
            await engine.store(some(1), range(5))
            await until(lambda: engine.stats().feed.get("blocks") == 5)
            await nats.stop()
            await until(lambda: not engine.stats().feed["connected"])
            assert "NOT CONNECTED" in engine.stats().line()
            await engine.store(some(2), range(5))
            await nats.start()
            await until(lambda: engine.stats().feed["connected"])
            await until(lambda: engine.stats().feed.get("left_out") == 5)
            assert "1 reconnects" in engine.stats().line()
            ids = range(NUM_GPU_BLOCKS)
            await engine.store(some(3, len(ids)), ids)  # in one step, and more than the outbox
            await until(lambda: engine.stats().feed.get("overflows"))
            metrics = values(engine)
            assert metrics["flexkv_feed_left_out_blocks"] == 5 + len(ids)
            assert metrics["flexkv_feed_reconnects"] == metrics["flexkv_feed_connected"] == 1
            assert metrics["flexkv_feed_blocks"] == 5
            assert metrics["flexkv_feed_waiting_blocks"] == 0


async def use(engine: Engine, rounds: range) -> None:
    """Store, look up and load: each time something new."""
    for number in rounds:
        blocks = some(number)
        assert (await engine.store(blocks, range(5))).num_stored == 5
        assert engine.lookup(blocks).num_blocks == 5
        assert (await engine.load(blocks, range(5))).missing == ()


async def test_requests_go_on_while_nats_hangs(tmp_path: Path) -> None:
    async with NatsServer() as nats:
        sink = NatsSink(settings(nats.url, tmp_path, 7, close_timeout_s=0.5))
        async with Engine(config(num_slots=32), LAYOUT, sinks=[sink]) as engine:
            engine.attach(caches())
            await use(engine, range(3))
            assert nats.pid is not None
            os.kill(nats.pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await use(engine, range(3, 300))
                    await engine.clear()
                    await use(engine, range(10))
                assert isinstance(sink._feed, RecoverableFeed)
                assert engine._events.backlog(sink._feed._cursor) != 0, "the feed did stand still"
            finally:
                os.kill(nats.pid, signal.SIGCONT)
            await until(lambda: sink.stats().connected)


async def test_requests_go_on_while_a_dump_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def halting(numbered: Iterator[tuple[int, Event]]) -> Any:
        first = next(numbered)
        begun.set()
        await gate.wait()
        return await encoded(chain([first], numbered))

    async with NatsServer() as nats, asyncio.TaskGroup() as tasks:
        sink = NatsSink(settings(nats.url, tmp_path, 7))
        async with Engine(config(num_slots=32), LAYOUT, sinks=[sink]) as engine:
            engine.attach(caches())
            await use(engine, range(3))
            feed = sink._feed
            assert isinstance(feed, RecoverableFeed)
            encoded = feed._answers._encoded
            monkeypatch.setattr(feed._answers, "_encoded", halting)
            asked = tasks.create_task(dump(feed))
            async with asyncio.timeout(DEADLINE_S):
                await begun.wait()
                await use(engine, range(3, 50))
                await engine.clear()
                await use(engine, range(10))
                assert not asked.done(), "the dump was under way all the time"
                gate.set()
                assert b"TreeDump" in await asked


async def dump(feed: RecoverableFeed) -> bytes:
    """What a router is told that has nothing."""
    async with feed.answering(Query(7, 0, None)) as parts:
        return b"".join(parts)
