"""What a router is told: values, in the order in which things became true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
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
