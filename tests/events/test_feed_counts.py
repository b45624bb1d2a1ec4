"""What a feed counts is what its docstrings say."""

from __future__ import annotations

import pytest

from flexkv.blocks import Tier
from flexkv.config import EventsConfig
from flexkv.events.dynamo import DynamoCodec, WorkerRank
from flexkv.events.feed import RecoverableFeed
from flexkv.events.live import LiveFeed
from flexkv.events.log import EventLog
from flexkv.events.reqplane import Query
from flexkv.events.sinks import ListSink, counts_of
from flexkv.events.types import BlockStored
from flexkv.hashing import blocks_of

WORKER = WorkerRank(namespace="ns", component="backend", endpoint="generate", worker_id=7)
CODEC = DynamoCodec(worker_id=7, dp_rank=0, publisher_id=1)


class Counted(ListSink):
    def __init__(self, **counts: int) -> None:
        super().__init__()
        self._counts = counts

    def counts(self) -> dict[str, int]:
        return self._counts


class Line:
    """A link that takes nothing."""

    connected = True
    max_payload = 1 << 20

    async def publish(self, *_: object) -> bool:
        return False

    async def flush(self) -> bool:
        return False


def a_log() -> EventLog:
    return EventLog(ring=1000, max_event_blocks=100)


def stored(num_blocks: int) -> BlockStored:
    return BlockStored(blocks_of(range(4 * num_blocks), 4), Tier.HOST)


@pytest.mark.parametrize(("others", "connected"), [((1, 1), 1), ((1, 0), 0), ((0,), 0)])
def test_connected_is_0_or_1_whatever_the_number_of_sinks(
    others: tuple[int, ...], connected: int
) -> None:
    sinks = [Counted(connected=one, blocks=3) for one in others]
    counts = counts_of([ListSink(), Counted(blocks=1), *sinks])
    assert counts == {"connected": connected, "blocks": 1 + 3 * len(others)}
    assert counts_of([Counted(blocks=1)]) == {"blocks": 1}


async def test_only_answers_with_events_count_as_gaps_and_dumps() -> None:
    log = a_log()
    log.append([stored(3)])
    feed = RecoverableFeed(EventsConfig(), WORKER, CODEC, log, Line())
    for worker_id, start in ((8, 1), (7, 5)):  # another's, and one that has not been yet
        async with feed.answering(Query(worker_id=worker_id, dp_rank=0, start=start)):
            pass
    assert not {"gaps", "dumps"} & feed.counts.keys()
    for start in (1, None):
        async with feed.answering(Query(worker_id=7, dp_rank=0, start=start)):
            pass
    assert (feed.counts["gaps"], feed.counts["dumps"]) == (1, 1)


async def test_what_waits_when_a_recoverable_feed_loses_its_link_waits_no_more() -> None:
    log = a_log()
    feed = RecoverableFeed(EventsConfig(), WORKER, CODEC, log, Line())
    log.append([stored(3)])
    await feed._send_news()
    assert feed.counts["waiting"] == 3
    feed.on_loss()
    assert feed.counts["waiting"] == 0
    feed.on_connect(again=True)
    assert feed.counts["left_out"] == 3


async def test_what_waits_when_a_live_feed_loses_its_link_is_left_out() -> None:
    log = a_log()
    feed = LiveFeed(EventsConfig(), WORKER, CODEC, log, Line())
    feed._outbox.open(log.last_id)
    log.append([stored(3)])
    feed.wake()
    assert feed.counts["waiting"] == 3
    feed.on_loss()
    assert (feed.counts["left_out"], feed.counts["waiting"]) == (3, 0)
