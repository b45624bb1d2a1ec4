"""No bytes on a wire make its reader crash, hang or believe what was not sent."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from typing import TYPE_CHECKING

import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.blocks import Tier
from flexkv.config import EventsConfig
from flexkv.events import audit
from flexkv.events.audit import Audit, AuditError, Collector, chunks
from flexkv.events.log import EventLog
from flexkv.events.types import BlockStored
from flexkv.events.zmq import ZmqSink
from flexkv.hashing import blocks_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DEADLINE_S = 20.0
END = b"\xff" * 8
HOST, SSD = blocks_of(range(12), 2), blocks_of(range(100, 300), 2)


def a_log() -> EventLog:
    resident = [BlockStored(HOST, Tier.HOST), BlockStored(SSD, Tier.SSD)]
    log = EventLog(ring=1000, max_event_blocks=512, walk=lambda: iter(resident))
    log.append(resident)
    return log


def an_answer(chunk_nbytes: int = audit.MAX_CHUNK_NBYTES) -> list[bytes]:
    log = a_log()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "MAX_CHUNK_NBYTES", chunk_nbytes)
        return [message for message in chunks(log, log.digests()) if message]


def collected(messages: list[bytes]) -> Audit | None:
    collector = Collector()
    for message in messages:
        if (whole := collector.take(message)) is not None:
            return whole
    return None


WHOLE = collected(an_answer())


@given(st.lists(st.binary(max_size=200), min_size=1))
def test_any_bytes_are_an_audit_or_an_error(messages: list[bytes]) -> None:
    with contextlib.suppress(AuditError):
        assert collected(messages) is None


@given(st.data())
def test_chunks_with_a_few_wrong_bytes_are_chunks_or_an_error(data: st.DataObject) -> None:
    messages = an_answer()
    i = data.draw(st.integers(0, len(messages) - 1))
    damaged = bytearray(messages[i])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    messages[i] = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with contextlib.suppress(AuditError):
        collected(messages)


@given(st.data())
def test_chunks_that_are_lost_repeated_or_overtaken_are_no_whole(data: st.DataObject) -> None:
    messages = an_answer()
    in_order = list(range(len(messages)))
    assert len(messages) == 5, "of two tiers the hashes and a sample, and the end"
    wrong = st.lists(st.integers(0, len(messages) - 1), max_size=7)
    numbers = data.draw(wrong | st.just(in_order))
    try:
        whole = collected([messages[number] for number in numbers])
    except AuditError:
        assert numbers != in_order
    else:
        assert (whole == WHOLE) if numbers[:5] == in_order else (whole is None)


@pytest.mark.parametrize("nested", [b"\x91" * 100_000, b"\x81\xa1x" * 100_000])
def test_a_chunk_without_a_bottom_is_an_error(nested: bytes) -> None:
    for message in (nested, b"\x81\xa1x" + nested):
        with pytest.raises(AuditError):
            Collector().take(message)


def test_the_answer_is_the_truth() -> None:
    assert WHOLE is not None
    assert {tier: held for tier, held in WHOLE.held.items() if held} == {
        "host_pinned": set(HOST.router_hashes()),
        "disk": set(SSD.router_hashes()),
    }


# Who asks the ZMQ sink to replay.


@contextlib.asynccontextmanager
async def replaying(folder: str) -> AsyncIterator[tuple[ZmqSink, zmq.asyncio.Context, str]]:
    endpoint = f"ipc://{folder}/replay"
    config = EventsConfig(zmq_endpoint=f"ipc://{folder}/pub", zmq_replay_endpoint=endpoint)
    sink = ZmqSink(config)
    context = zmq.asyncio.Context()
    try:
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            await sink.start(a_log(), tasks)
            try:
                yield sink, context, endpoint
            finally:
                await sink.close()
    finally:
        context.destroy(0)


async def replayed(context: zmq.asyncio.Context, endpoint: str) -> int:
    """How many batches come to one who asks for all of them."""
    asker = context.socket(zmq.DEALER)
    asker.connect(endpoint)
    await asker.send_multipart([b"", bytes(8)])
    count = 0
    while (await asker.recv_multipart())[2] != END:
        count += 1
    return count


def is_request(frames: list[bytes]) -> bool:
    return len(frames) == 2 and not frames[0] and len(frames[1]) == 8


frame = st.just(b"") | st.binary(max_size=20) | st.binary(min_size=8, max_size=8)
requests = st.lists(st.lists(frame, min_size=1, max_size=4), max_size=30)


@given(requests)
@settings(max_examples=20, deadline=None)
def test_any_frames_are_a_request_or_dropped_and_the_next_one_is_answered(
    requests: list[list[bytes]],
) -> None:
    async def check(folder: str) -> None:
        async with replaying(folder) as (sink, context, endpoint):
            asker = context.socket(zmq.DEALER)
            asker.connect(endpoint)
            for frames in [*requests, [b"", bytes(8)]]:
                await asker.send_multipart(frames)
            num_fine = sum(map(is_request, requests))
            for _ in range(num_fine + 1):
                while (await asker.recv_multipart())[2] != END:
                    pass
            assert await replayed(context, endpoint) == 1
            assert sink.counts().get("malformed", 0) == len(requests) - num_fine

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(check(folder))


async def test_a_request_of_any_length_takes_no_memory(tmp_path: Path) -> None:
    async with replaying(str(tmp_path)) as (sink, context, endpoint):
        for frames in ([b"", bytes(1 << 20)], [bytes(1 << 20), bytes(8)]):
            asker = context.socket(zmq.DEALER)
            asker.connect(endpoint)
            await asker.send_multipart(frames)
            assert not await asker.poll(50)
        assert await replayed(context, endpoint) == 1
        assert "malformed" not in sink.counts(), "it never got that far"
