"""Our bytes are those that Dynamo's own publisher sent, and no message is too long."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.blocks import BlockKey, Blocks, Tier
from flexkv.events.dynamo import MIN_PAYLOAD_NBYTES, DynamoCodec, WorkerRank
from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored, Event
from flexkv.hashing import blocks_of, tokens_hashes

GOLDEN = Path(__file__).parent / "golden"
WORKER_ID = 17631559693740061531
PUBLISHER_ID = 3331816136264030


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


def codec(worker_id: int = WORKER_ID, dp_rank: int = 0) -> DynamoCodec:
    return DynamoCodec(worker_id=worker_id, dp_rank=dp_rank, publisher_id=PUBLISHER_ID)


def blocks_with(*router_hashes: int, parent: BlockKey | None = None) -> Blocks:
    keys = b"".join(router_hash.to_bytes(8, "big") for router_hash in router_hashes)
    token_ids = bytes(4 * len(router_hashes))
    return Blocks(keys, token_ids, tokens_per_block=1, key_nbytes=8, parent=parent)


def decoded(message: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    envelope = msgspec.msgpack.decode(message)
    return envelope, msgspec.msgpack.decode(envelope["payload"])


def test_a_removed_message_is_the_captured_one() -> None:
    ours = codec()
    event = ours.router_event(3, BlockRemoved(blocks_with(333), Tier.GPU))
    for _ in range(2):
        ours.message([event], 0)
    assert ours.message([event], 1795489339012) == golden("removed_message")


def test_a_stored_payload_is_the_golden_one() -> None:
    blocks = blocks_with(111)
    blocks._chain.tokens_hashes = array("Q", [14643705804678351452])
    event = codec().router_event(1, BlockStored(blocks, Tier.HOST))
    assert b"\x91" + event == golden("stored_payload")


def test_a_cleared_payload_is_the_golden_one() -> None:
    assert b"\x91" + codec().router_event(1, AllBlocksCleared()) == golden("cleared_payload")


def test_a_stored_event_says_where_it_hangs_and_what_the_router_matches() -> None:
    chain = blocks_of(range(32), 4, namespace="tenant")
    ours = codec(dp_rank=3)
    event = msgspec.msgpack.decode(ours.router_event(9, BlockStored(chain[2:5], Tier.SSD)))
    assert (event["worker_id"], event["storage_tier"]) == (WORKER_ID, "disk")
    assert (event["event"]["event_id"], event["event"]["dp_rank"]) == (9, 3)
    stored = event["event"]["data"]["stored"]
    assert stored["parent_hash"] == int.from_bytes(chain.key(1)[-8:], "big")
    assert [block["block_hash"] for block in stored["blocks"]] == [
        int.from_bytes(chain.key(i)[-8:], "big") for i in (2, 3, 4)
    ]
    tokens = [block["tokens_hash"] for block in stored["blocks"]]
    assert tokens == tokens_hashes(chain)[2:5].tolist()


def test_removed_blocks_are_named_last_first() -> None:
    event = msgspec.msgpack.decode(
        codec().router_event(1, BlockRemoved(blocks_with(1, 2, 3), Tier.HOST))
    )
    assert event["event"]["data"] == {"removed": {"block_hashes": [3, 2, 1]}}


@st.composite
def some_events(draw: st.DrawFn) -> list[Event]:
    sizes = st.integers(1, 40) | st.integers(1, 1500)
    kinds = st.lists(st.tuples(st.sampled_from("src"), sizes), max_size=30)
    chain = blocks_of(range(1500), 1)
    events: list[Event] = []
    for kind, size in draw(kinds):
        blocks = chain[len(chain) - size :]
        if kind == "c":
            events.append(AllBlocksCleared())
        else:
            events.append((BlockStored if kind == "s" else BlockRemoved)(blocks, Tier.HOST))
    return events


@given(some_events(), st.integers(MIN_PAYLOAD_NBYTES, 100_000))
def test_every_event_goes_out_once_and_no_message_is_too_long(
    events: list[Event], max_payload: int
) -> None:
    ours = codec(worker_id=2**64 - 1)
    sent: list[dict[str, Any]] = []
    sequences = []
    for batch in ours.batches(events, max_payload):
        message = ours.message(batch.events, 2**63)
        assert len(message) <= max_payload
        envelope, router_events = decoded(message)
        sequences.append(envelope["sequence"])
        sent += [router_event["event"] for router_event in router_events]
        assert batch.num_blocks == sum(len(named(event)) for event in router_events_of(message))
    assert sequences == list(range(len(sequences)))
    assert [event["event_id"] for event in sent] == list(range(1, len(sent) + 1))
    assert [pair for event in sent for pair in told(event)] == [
        pair for event in events for pair in meant(event)
    ]


def router_events_of(message: bytes) -> list[dict[str, Any]]:
    return [router_event["event"] for router_event in decoded(message)[1]]


def named(event: dict[str, Any]) -> list[int]:
    if event["data"] == "cleared":
        return []
    if "stored" in event["data"]:
        return [block["block_hash"] for block in event["data"]["stored"]["blocks"]]
    return list(event["data"]["removed"]["block_hashes"])


def told(event: dict[str, Any]) -> list[tuple[str, int]]:
    if event["data"] == "cleared":
        return [("cleared", 0)]
    (kind,) = event["data"]
    return [(kind, router_hash) for router_hash in named(event)]


def meant(event: Event) -> list[tuple[str, int]]:
    if isinstance(event, AllBlocksCleared):
        return [("cleared", 0)]
    if isinstance(event, BlockStored):
        return [("stored", router_hash) for router_hash in event.blocks.router_hashes()]
    return [("removed", router_hash) for router_hash in event.blocks.router_hashes()[::-1]]


def test_many_small_events_share_a_message() -> None:
    blocks = blocks_with(1)
    batches = list(codec().batches([BlockStored(blocks, Tier.HOST)] * 1000, 2**20))
    assert len(batches) < 20
    assert sum(len(batch.events) for batch in batches) == 1000


def test_events_are_read_only_as_far_as_a_message_reaches() -> None:
    """A dump yields what is resident while the index goes on changing: it must not be drained."""
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield BlockStored(blocks_with(*range(100)), Tier.HOST)

    next(codec().batches(endless(), 2**20))
    assert len(taken) < 20


def test_the_subject_is_the_endpoints() -> None:
    worker = WorkerRank(namespace="ns", component="backend", endpoint="generate", worker_id=1)
    assert worker.subject == "namespace.ns.component.backend.endpoint.generate.kv-events"


@pytest.mark.parametrize("length", [1, 15, 16, 2**16 - 1, 2**16])
def test_a_payload_is_an_array_of_any_length(length: int) -> None:
    message = codec().message([b"\xc0"] * length, 0)
    assert decoded(message)[1] == [None] * length


def test_blocks_that_no_router_can_know_are_left_out_and_counted() -> None:
    keys = b"".join(bytes([i]) * 32 for i in range(4))
    extra = (None, None, ("image", 0), None)
    blocks = Blocks(keys, bytes(4 * 4), tokens_per_block=1, extra_keys=extra)
    codec = DynamoCodec(worker_id=1, dp_rank=0, publisher_id=2)
    told = msgspec.msgpack.decode(codec.router_event(1, BlockStored(blocks, Tier.HOST)))
    assert len(told["event"]["data"]["stored"]["blocks"]) == 2
    assert codec.num_opaque == 2
    tail = msgspec.msgpack.decode(codec.router_event(2, BlockStored(blocks[2:], Tier.HOST)))
    assert tail["event"]["data"] == {"removed": {"block_hashes": []}}
    gone = msgspec.msgpack.decode(codec.router_event(3, BlockRemoved(blocks, Tier.HOST)))
    assert len(gone["event"]["data"]["removed"]["block_hashes"]) == 2
