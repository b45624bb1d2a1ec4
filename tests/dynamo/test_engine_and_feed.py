"""An engine and its feed: what becomes of events is counted, and no request waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv import Blocks, Engine, blocks_of
from flexkv.events.nats import NatsSink
from flexkv.replay.deployment import NatsServer
from tests.dynamo.shelf import settings, until
from tests.engine.test_engine import LAYOUT, NUM_GPU_BLOCKS, TOKENS_PER_BLOCK, caches, config
from tests.integration.test_feed_metrics import values

if TYPE_CHECKING:
    from pathlib import Path


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
