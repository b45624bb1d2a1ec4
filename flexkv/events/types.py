"""What a router is told: values, in the order in which things became true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.blocks import Blocks, Tier


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
