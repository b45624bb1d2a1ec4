"""Events as the bytes that Dynamo 1.6's KV router reads from NATS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from flexkv.blocks import Tier
from flexkv.events.types import HOLE, BlockRemoved, BlockStored, num_named, plain, split
from flexkv.hashing import tokens_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flexkv.blocks import BlockKey, Blocks, RouterHash
    from flexkv.events.log import Entry
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
_FEW = 16
_EVENT_WEIGHT = 12  # an event costs as much as so many more blocks
TIERS = {
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
    blocks: list[_Block] | msgspec.Raw


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
    """What goes into one message: encoded router events; ``last_id`` is the last one's id."""

    events: list[bytes]
    num_blocks: int
    last_id: int


class DynamoCodec:
    """Encodes the events of one source, for one worker and data-parallel rank.

    A router drops an id that it has seen. At a gap it asks a source that can be asked; of a source
    that can't it forgets everything (unless the next event is ``AllBlocksCleared``, where there is
    nothing to forget). ``num_too_long``: events that ``numbered`` left out.
    """

    def __init__(self, *, worker_id: int, dp_rank: int, publisher_id: int) -> None:
        self._worker_id = worker_id
        self._dp_rank = dp_rank
        self._publisher_id = publisher_id
        self._encoder = msgspec.msgpack.Encoder()
        self._next_event_id = 1
        self._next_sequence = 0
        self.num_too_long = 0
        self.num_opaque = 0  # blocks that no router can know of

    def router_event(self, event_id: int, event: Event) -> bytes:
        """One event, as the map that Dynamo calls a router event."""
        self._count_opaque(event)
        event = plain(event)
        tier = Tier.HOST  # of a clear: it holds for every tier, and the router looks at none
        data: _StoredData | _RemovedData | str
        if isinstance(event, BlockStored):
            pairs = zip(event.blocks.router_hashes(), tokens_hashes(event.blocks), strict=True)
            blocks = [_Block(block_hash, tokens_hash) for block_hash, tokens_hash in pairs]
            return self._stored(event_id, event, blocks)
        if isinstance(event, BlockRemoved):
            tier = event.tier
            data = _RemovedData(_Removed(event.blocks.router_hashes()[::-1]))
        else:
            data = "cleared"
        return self._encoded(event_id, tier, data)

    def recovered_event(self, event_id: int, event: Event) -> bytes:
        """The same for an answer, where blocks are arrays: a third of the bytes."""
        told = plain(event)
        if isinstance(told, BlockStored):
            return self._stored(event_id, told, msgspec.Raw(_block_rows(told.blocks)))
        return self.router_event(event_id, event)

    def _count_opaque(self, event: Event) -> None:
        if isinstance(event, BlockStored):
            self.num_opaque += len(event.blocks) - event.blocks.num_plain

    def batches(self, events: Iterable[Event], max_payload: int) -> Iterator[Batch]:
        """Number ``events`` on an own count, and put as many as fit into each message.

        No message will be longer than ``max_payload`` (at least MIN_PAYLOAD_NBYTES): an event
        that would not fit goes out as several. Each step takes under a millisecond, and ``events``
        is read as far as needed.
        """
        limit = min((_room(max_payload) - _EVENT_NBYTES) // _BLOCK_NBYTES, _MESSAGE_WEIGHT)
        return self._batches(self._counted(events, limit), max_payload)

    def numbered(self, entries: Iterable[Entry], max_payload: int) -> Iterator[Batch]:
        """Put as many entries of a log, under their own ids, as fit into each message.

        Holes are left out, and so is what is too long for one message.
        """
        return self._batches(self._that_fit(entries, _room(max_payload)), max_payload)

    def _counted(self, events: Iterable[Event], limit: int) -> Iterator[tuple[int, Event]]:
        for event in events:
            for piece in split(event, limit):
                yield self._next_event_id, piece
                self._next_event_id += 1

    def _that_fit(self, entries: Iterable[Entry], room: int) -> Iterator[tuple[int, Event]]:
        for entry in entries:
            if _most_nbytes(entry.event) > room:
                self.num_too_long += 1
            elif entry.event is not HOLE:
                yield entry

    def _batches(self, entries: Iterable[tuple[int, Event]], max_payload: int) -> Iterator[Batch]:
        room = _room(max_payload)
        batch: list[bytes] = []
        nbytes = weight = num_blocks = last_id = 0
        for event_id, event in entries:
            size = num_named(event)
            most = _most_nbytes(event)
            if batch and (nbytes + most > room or weight + size > _MESSAGE_WEIGHT):
                yield Batch(batch, num_blocks, last_id)
                batch, nbytes, weight, num_blocks = [], 0, 0, 0
            encoded = self.router_event(event_id, event)
            batch.append(encoded)
            nbytes += len(encoded)
            weight += size + _EVENT_WEIGHT
            num_blocks += size
            last_id = event_id
        if batch:
            yield Batch(batch, num_blocks, last_id)

    def message(self, events: list[bytes], published_at_ms: int) -> bytes:
        """The next message, with these router events in it."""
        payload = b"".join([array_header(len(events)), *events])
        sequence = self._next_sequence
        self._next_sequence += 1
        return self._encoder.encode(
            _Envelope(self._publisher_id, sequence, published_at_ms, TOPIC, payload)
        )

    def _stored(
        self, event_id: int, event: BlockStored, blocks: list[_Block] | msgspec.Raw
    ) -> bytes:
        stored = _Stored(_router_hash(event.blocks.parent), None, blocks)
        return self._encoded(event_id, event.tier, _StoredData(stored))

    def _encoded(self, event_id: int, tier: Tier, data: _StoredData | _RemovedData | str) -> bytes:
        event = _KvEvent(event_id, data, self._dp_rank)
        return self._encoder.encode(_RouterEvent(self._worker_id, TIERS[tier], "worker", event))


def array_header(length: int) -> bytes:
    """What msgpack writes before so many items."""
    if length < 16:  # noqa: PLR2004  # msgpack's own bounds
        return bytes((0x90 | length,))
    if length < 2**16:
        return b"\xdc" + length.to_bytes(2, "big")
    return b"\xdd" + length.to_bytes(4, "big")


def _block_rows(blocks: Blocks) -> bytes:
    """An array of [router hash, tokens hash, nil]."""
    if len(blocks) < _FEW:  # numpy would take longer
        tokens = tokens_hashes(blocks)
        row_parts = [array_header(len(blocks))]
        for i in range(len(blocks)):
            row_parts += (b"\x93\xcf", blocks.key(i)[-8:])
            row_parts += (b"\xcf", tokens[i].to_bytes(8, "big"), b"\xc0")
        return b"".join(row_parts)
    width = blocks.key_nbytes
    keys = np.frombuffer(blocks.packed_keys(), np.uint8).reshape(-1, width)
    rows = np.repeat(_BLOCK_ROW, len(blocks))
    rows["hash"] = keys[:, width - 8 :]
    rows["tokens"] = tokens_hashes(blocks)
    return array_header(len(blocks)) + rows.tobytes()


_BLOCK_ROW = np.array(
    [(b"\x93\xcf", [0] * 8, 0xCF, 0, 0xC0)],
    [("open", "S2"), ("hash", "u1", 8), ("tokens_is", "u1"), ("tokens", ">u8"), ("nil", "u1")],
)


def _room(max_payload: int) -> int:
    assert max_payload >= MIN_PAYLOAD_NBYTES
    return max_payload - _ENVELOPE_NBYTES


def _most_nbytes(event: Event) -> int:
    return _EVENT_NBYTES + num_named(event) * _BLOCK_NBYTES


def _router_hash(key: BlockKey | None) -> int | None:
    return None if key is None else int.from_bytes(key[-8:], "big")
