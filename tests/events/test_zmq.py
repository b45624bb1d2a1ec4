"""The ZMQ sink speaks as vLLM does, and replays what was missed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from flexkv.blocks import Blocks, Tier
from flexkv.config import EventsConfig
from flexkv.errors import FeedError
from flexkv.events.log import EventLog
from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored, Event
from flexkv.events.zmq import ZmqSink
from flexkv.hashing import blocks_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DEADLINE_S = 20.0
END = (-1).to_bytes(8, "big", signed=True)


class Stored(msgspec.Struct, tag="BlockStored", forbid_unknown_fields=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", forbid_unknown_fields=True):
    block_hashes: list[int]
    medium: str | None


class Cleared(msgspec.Struct, tag="AllBlocksCleared", forbid_unknown_fields=True):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


class Stage:
    """A sink on two ipc endpoints, the log behind it, and whoever listens."""

    def __init__(self, folder: Path, resident: list[BlockStored], **settings: Any) -> None:
        self.config = EventsConfig(
            sink="zmq",
            dp_rank=3,
            zmq_endpoint=f"ipc://{folder}/pub",
            zmq_replay_endpoint=f"ipc://{folder}/replay",
            zmq_topic="kv",
            **settings,
        )
        self.log = EventLog(ring=1000, max_event_blocks=512, walk=lambda: iter(resident))
        self.sink = ZmqSink(self.config)
        self.context = zmq.asyncio.Context()
        self.subscriber = self.context.socket(zmq.SUB)
        self.subscriber.subscribe("kv")
        self.subscriber.connect(self.config.zmq_endpoint)
        self.numbers: list[int] = []

    def tell(self, *events: Event) -> None:
        self.log.append(events)
        self.sink.wake()

    async def heard(self, num_events: int) -> list[Stored | Removed | Cleared]:
        found: list[Stored | Removed | Cleared] = []
        while len(found) < num_events:
            topic, number, payload = await self.subscriber.recv_multipart()
            batch = msgspec.msgpack.decode(payload, type=Batch)
            assert (topic, batch.data_parallel_rank) == (b"kv", 3)
            self.numbers.append(int.from_bytes(number, "big"))
            found += batch.events
        return found

    async def replayed(self, start: int) -> list[tuple[int, bytes]]:
        asker = self.context.socket(zmq.DEALER)
        asker.connect(self.config.zmq_replay_endpoint)
        await asker.send_multipart([b"", start.to_bytes(8, "big")])
        found = []
        while True:
            empty, _, number, payload = await asker.recv_multipart()
            assert empty == b""
            if number == END:
                return found
            found.append((int.from_bytes(number, "big"), payload))


@contextlib.asynccontextmanager
async def staged(folder: Path, *resident: BlockStored, **settings: Any) -> AsyncIterator[Stage]:
    stage = Stage(folder, list(resident), **settings)
    try:
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            await stage.sink.start(stage.log, tasks)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    while stage.log.last_id < 1000:  # until the subscription has arrived
                        stage.tell(AllBlocksCleared())
                        if await stage.subscriber.poll(20):
                            break
                mark = blocks_of([0], 1)  # where the test begins; what is resident may come before
                stage.tell(BlockStored(mark, Tier.REMOTE))
                while (
                    getattr((await stage.heard(1))[-1], "block_hashes", 0) != mark.router_hashes()
                ):
                    pass
                yield stage
            finally:
                await stage.sink.close()
    finally:
        stage.context.destroy(0)


def chain(**names: str) -> Blocks:
    return blocks_of(range(12), 2, **names)


async def test_a_batch_is_what_vllm_sends(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        blocks = chain(namespace="salt", lora="french")
        hashes = blocks.router_hashes()
        stage.tell(
            BlockStored(blocks[:2], Tier.HOST),
            BlockStored(blocks[2:], Tier.SSD),
            BlockRemoved(blocks[4:], Tier.SSD),
            AllBlocksCleared(),
        )
        stage.log.kick()  # a number, and nothing to tell
        assert await stage.heard(4) == [
            Stored(hashes[:2], None, [0, 1, 2, 3], 2, None, "CPU", "french", [("salt",), None]),
            Stored(hashes[2:], hashes[1], list(range(4, 12)), 2, None, "STORAGE", "french"),
            Removed(hashes[:3:-1], "STORAGE"),
            Cleared(),
        ]


async def test_who_missed_something_has_it_replayed_from_there(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        for _ in range(5):
            stage.tell(BlockStored(chain(), Tier.HOST))
            await stage.heard(1)
        whole = await stage.replayed(0)
        assert [number for number, _ in whole] == list(range(len(whole)))
        assert stage.numbers[-1] == whole[-1][0]
        assert await stage.replayed(len(whole) - 2) == whole[-2:]
        assert await stage.replayed(2**64 - 1) == []


async def test_the_buffer_keeps_the_last_batches_up_to_its_bytes(tmp_path: Path) -> None:
    async with staged(tmp_path, zmq_buffer_bytes=500) as stage:
        for _ in range(30):
            stage.tell(BlockStored(chain(), Tier.HOST))
            await stage.heard(1)
        kept = await stage.replayed(0)
        assert kept[-1][0] == stage.numbers[-1]
        assert 0 < sum(len(payload) for _, payload in kept) <= 500


async def test_what_is_resident_is_told_first_and_again_after_too_much_at_once(
    tmp_path: Path,
) -> None:
    stored = BlockStored(chain(), Tier.HOST)
    async with staged(tmp_path, stored) as stage:
        (_, first), *_ = await stage.replayed(0)
        assert msgspec.msgpack.decode(first, type=Batch).events[0].medium == "CPU"
        stage.tell(*[stored] * 1001)
        events = await stage.heard(2)
        assert events[0] == Cleared()
        assert events[1] == msgspec.msgpack.decode(first, type=Batch).events[0]
        assert stage.sink.counts()["dumps"] == 1


async def test_a_request_that_is_none_is_dropped_and_the_next_one_answered(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        asker = stage.context.socket(zmq.DEALER)
        asker.connect(stage.config.zmq_replay_endpoint)
        for frames in ([b""], [b"x", bytes(8)], [b"", b"1"], [b""] * 9):
            await asker.send_multipart(frames)
        assert await stage.replayed(0)
        assert stage.sink.counts()["malformed"] == 4


async def test_an_endpoint_that_is_taken_is_an_error_that_names_it() -> None:
    context = zmq.asyncio.Context()
    taken = context.socket(zmq.PUB)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    sink = ZmqSink(EventsConfig(zmq_endpoint=f"tcp://127.0.0.1:{port}"))
    async with asyncio.TaskGroup() as tasks:
        with pytest.raises(FeedError, match=rf"events.zmq_endpoint: can't bind.*{port}"):
            await sink.start(EventLog(ring=1, max_event_blocks=1), tasks)
    context.destroy(0)
