"""Events as the bytes that Dynamo 1.6's KV router reads from NATS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from flexkv.blocks import Tier
from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored, split
from flexkv.hashing import tokens_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flexkv.blocks import BlockKey, RouterHash
    from flexkv.events.types import Event

TOPIC = "kv-events"
MIN_PAYLOAD_NBYTES = 1024
"""A message of fewer bytes would not hold one event in every case."""

MAX_ID = 2**53 - 1
"""Dynamo keeps publisher ids in JSON: larger ones would lose their last bits."""

_ENVELOPE_NBYTES = 128  # more than an envelope takes around its payload
_EVENT_NBYTES = 192  # more than a router event takes around its blocks
_BLOCK_NBYTES = 57  # of one stored block; a removed one takes 9
_MESSAGE_WEIGHT = 768  # what is encoded in one go: about half a millisecond
_EVENT_WEIGHT = 12  # an event costs as much as so many more blocks
_TIERS = {
    Tier.GPU: "device",
    Tier.HOST: "host_pinned",
    Tier.SSD: "disk",
    Tier.REMOTE: "external",
}


class _Block(msgspec.Struct, gc=False):
    block_hash: int
    tokens_hash: int
    mm_extra_info: None = None


class _Stored(msgspec.Struct, gc=False):
    parent_hash: int | None
    start_position: None
    blocks: list[_Block]


class _StoredData(msgspec.Struct, gc=False):
    stored: _Stored


class _Removed(msgspec.Struct, gc=False):
    block_hashes: list[RouterHash]


class _RemovedData(msgspec.Struct, gc=False):
    removed: _Removed


class _KvEvent(msgspec.Struct, gc=False):
    event_id: int
    data: _StoredData | _RemovedData | str
    dp_rank: int


class _RouterEvent(msgspec.Struct, gc=False):
    worker_id: int
    storage_tier: str
    residency_domain: str
    event: _KvEvent


class _Envelope(msgspec.Struct, gc=False):
    publisher_id: int
    sequence: int
    published_at: int
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRank:
    """The Dynamo worker, and its data-parallel rank, that events speak for."""

    namespace: str
    component: str
    endpoint: str
    worker_id: int
    dp_rank: int = 0

    @property
    def subject(self) -> str:
        """Where routers listen for the events of the endpoint's workers."""
        where = f"namespace.{self.namespace}.component.{self.component}.endpoint.{self.endpoint}"
        return f"{where}.{TOPIC}"


class Batch(NamedTuple):
    """What goes into one message: encoded router events with consecutive ids."""

    events: list[bytes]
    num_blocks: int


class DynamoCodec:
    """Numbers and encodes the events of one source, for one worker and data-parallel rank.

    Ids and sequence numbers go up by one and never start again: the router drops an id that it
    has seen, and forgets everything at a gap (unless the next event is ``AllBlocksCleared``,
    where there is nothing to forget).
    """

    def __init__(self, *, worker_id: int, dp_rank: int, publisher_id: int) -> None:
        self._worker_id = worker_id
        self._dp_rank = dp_rank
        self._publisher_id = publisher_id
        self._encoder = msgspec.msgpack.Encoder()
        self._next_event_id = 1
        self._next_sequence = 0

    def router_event(self, event_id: int, event: Event) -> bytes:
        """One event, as the map that Dynamo calls a router event."""
        tier = Tier.HOST  # of a clear: it holds for every tier, and the router looks at none
        data: _StoredData | _RemovedData | str
        if isinstance(event, BlockStored):
            tier = event.tier
            pairs = zip(event.blocks.router_hashes(), tokens_hashes(event.blocks), strict=True)
            blocks = [_Block(block_hash, tokens_hash) for block_hash, tokens_hash in pairs]
            data = _StoredData(_Stored(_router_hash(event.blocks.parent), None, blocks))
        elif isinstance(event, BlockRemoved):
            tier = event.tier
            data = _RemovedData(_Removed(event.blocks.router_hashes()[::-1]))
        else:
            data = "cleared"
        kv_event = _KvEvent(event_id, data, self._dp_rank)
        router_event = _RouterEvent(self._worker_id, _TIERS[tier], "worker", kv_event)
        return self._encoder.encode(router_event)

    def batches(self, events: Iterable[Event], max_payload: int) -> Iterator[Batch]:
        """Number ``events`` and put as many as fit into each message.

        No message will be longer than ``max_payload`` (at least MIN_PAYLOAD_NBYTES): an event
        that would not fit goes out as several. Each step takes under a millisecond, and ``events``
        is read as far as needed.
        """
        assert max_payload >= MIN_PAYLOAD_NBYTES
        room = max_payload - _ENVELOPE_NBYTES
        limit = min((room - _EVENT_NBYTES) // _BLOCK_NBYTES, _MESSAGE_WEIGHT)
        batch: list[bytes] = []
        nbytes = weight = num_blocks = 0
        for event in events:
            for piece in split(event, limit):
                size = 0 if isinstance(piece, AllBlocksCleared) else len(piece.blocks)
                most = _EVENT_NBYTES + size * _BLOCK_NBYTES
                if batch and (nbytes + most > room or weight + size > _MESSAGE_WEIGHT):
                    yield Batch(batch, num_blocks)
                    batch, nbytes, weight, num_blocks = [], 0, 0, 0
                encoded = self.router_event(self._next_event_id, piece)
                self._next_event_id += 1
                batch.append(encoded)
                nbytes += len(encoded)
                weight += size + _EVENT_WEIGHT
                num_blocks += size
        if batch:
            yield Batch(batch, num_blocks)

    def message(self, events: list[bytes], published_at_ms: int) -> bytes:
        """The next message, with these router events in it."""
        payload = b"".join([_array_header(len(events)), *events])
        sequence = self._next_sequence
        self._next_sequence += 1
        return self._encoder.encode(
            _Envelope(self._publisher_id, sequence, published_at_ms, TOPIC, payload)
        )


def _router_hash(key: BlockKey | None) -> int | None:
    return None if key is None else int.from_bytes(key[-8:], "big")


def _array_header(length: int) -> bytes:
    if length < 16:  # noqa: PLR2004  # msgpack's own bounds
        return bytes((0x90 | length,))
    if length < 2**16:
        return b"\xdc" + length.to_bytes(2, "big")
    return b"\xdd" + length.to_bytes(4, "big")
