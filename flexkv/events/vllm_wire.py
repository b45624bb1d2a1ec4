"""Events as the batches that vLLM's own publisher sends over ZMQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from flexkv.blocks import Tier
from flexkv.events.types import AllBlocksCleared, BlockStored, changes, num_named, split

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flexkv.events.types import Event

_BATCH_WEIGHT = 512  # blocks: about half a millisecond
_EVENT_WEIGHT = 8
_MEDIA = {Tier.GPU: "GPU", Tier.HOST: "CPU", Tier.SSD: "STORAGE", Tier.REMOTE: "STORAGE"}


class _Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class _Stored(_Event, tag="BlockStored", gc=False):
    block_hashes: list[Any]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None


class _Removed(_Event, tag="BlockRemoved", gc=False):
    block_hashes: list[Any]
    medium: str | None


class _Cleared(_Event, tag="AllBlocksCleared", gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[_Event]
    data_parallel_rank: int | None = None


class VllmCodec:
    """Encodes events for one data-parallel rank.

    A block is named by its router hash, as vLLM names its own. A clear holds for every tier.
    """

    def __init__(self, dp_rank: int) -> None:
        self._dp_rank = dp_rank
        self._encode = msgspec.msgpack.Encoder().encode

    def batches(self, events: Iterable[Event]) -> Iterator[list[_Event]]:
        """``events`` in pieces of under a millisecond; what names nothing is left out."""
        batch: list[_Event] = []
        weight = 0
        for event in events:
            for piece in split(event, _BATCH_WEIGHT) if changes(event) else ():
                size = num_named(piece) + _EVENT_WEIGHT
                if batch and weight + size > _BATCH_WEIGHT:
                    yield batch
                    batch, weight = [], 0
                batch.append(_wire(piece))
                weight += size
        if batch:
            yield batch

    def payload(self, batch: list[_Event], now_s: float) -> bytes:
        """One batch, as the third frame of a message."""
        return self._encode(_Batch(now_s, batch, self._dp_rank))


def num_blocks_of(batch: list[_Event]) -> int:
    """How many blocks a batch names."""
    return sum(len(event.block_hashes) for event in batch if isinstance(event, _Stored | _Removed))


def _wire(event: Event) -> _Event:
    if isinstance(event, AllBlocksCleared):
        return _Cleared()
    blocks, medium = event.blocks, _MEDIA[event.tier]
    if not isinstance(event, BlockStored):
        return _Removed(list(blocks.router_hashes()[::-1]), medium)
    parent = blocks.parent
    salt = blocks.namespace
    starts = parent is None and salt is not None
    return _Stored(
        list(blocks.router_hashes()),
        None if parent is None else int.from_bytes(parent[-8:], "big"),
        blocks.token_ids.cast("I").tolist(),
        blocks.tokens_per_block,
        None,
        medium,
        blocks.lora,
        [(str(salt),), *[None] * (len(blocks) - 1)] if starts else None,
    )
