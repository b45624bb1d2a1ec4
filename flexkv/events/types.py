"""What a router is told: values, in the order in which things became true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from flexkv.blocks import Blocks, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class BlockStored:
    """``blocks``, a slice of one chain, can now be read from ``tier``: parents before children."""

    blocks: Blocks
    tier: Tier


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """``blocks`` can no longer be read from ``tier``; the last of them left first."""

    blocks: Blocks
    tier: Tier


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing can be read from any tier."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared

NOTHING = BlockRemoved(Blocks(b"", b"", tokens_per_block=1), Tier.HOST)
"""An event that takes a number and changes nothing."""

HOLE = BlockRemoved(Blocks(b"", b"", tokens_per_block=1), Tier.HOST)
"""As NOTHING, and never sent. Known by identity."""


def num_named(event: Event) -> int:
    """How many blocks ``event`` names; a clear names none."""
    return 0 if isinstance(event, AllBlocksCleared) else len(event.blocks)


def changes(event: Event) -> bool:
    """Whether ``event`` names a block, or all of them."""
    return isinstance(event, AllBlocksCleared) or len(event.blocks) > 0


def plain(event: Event) -> Event:
    """What of ``event`` tokens, tenant and adapter tell: all that a router can know of.

    It ends before the first block with multimodal inputs or prompt embeddings.
    """
    if isinstance(event, AllBlocksCleared) or event.blocks.num_plain == len(event.blocks):
        return event
    if not event.blocks.num_plain:
        return NOTHING
    return type(event)(event.blocks[: event.blocks.num_plain], event.tier)


def split(event: Event, limit: int) -> Iterator[Event]:
    """``event`` as events of at most ``limit`` blocks, in an order that may be told."""
    if isinstance(event, AllBlocksCleared) or len(event.blocks) <= limit:
        yield event
    elif isinstance(event, BlockStored):
        for start in range(0, len(event.blocks), limit):
            yield BlockStored(event.blocks[start : start + limit], event.tier)
    else:  # the tail leaves first
        for stop in range(len(event.blocks), 0, -limit):
            yield BlockRemoved(event.blocks[max(0, stop - limit) : stop], event.tier)
