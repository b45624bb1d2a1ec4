"""A number for each tier that is equal for equal residency, however it came about."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flexkv.blocks import Tier
from flexkv.events.types import AllBlocksCleared, BlockStored, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flexkv.blocks import Blocks
    from flexkv.events.types import Event

_MODULUS = 2**64


class TierDigest(NamedTuple):
    """How many blocks a tier holds, and the sum of their router hashes modulo 2**64."""

    num_blocks: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"{self.num_blocks}:{self.total:016x}"

    def joined(self, other: TierDigest) -> TierDigest:
        """The digest of both together, which share no block."""
        return TierDigest(self.num_blocks + other.num_blocks, (self.total + other.total) % _MODULUS)


class Digests:
    """The digest of each tier, kept up with the events of one log: a step for each event."""

    def __init__(self) -> None:
        self._of: dict[Tier, TierDigest] = {}

    def follow(self, event: Event) -> None:
        """Take in what an event changes."""
        event = plain(event)
        if isinstance(event, AllBlocksCleared):
            self._of.clear()
        elif len(event.blocks):
            sign = 1 if isinstance(event, BlockStored) else -1
            num_blocks, total = self._of.get(event.tier, (0, 0))
            total = (total + sign * _sum(event.blocks)) % _MODULUS
            self._of[event.tier] = TierDigest(num_blocks + sign * len(event.blocks), total)

    def now(self) -> Mapping[Tier, TierDigest]:
        """The digest of every tier; one that holds nothing has two zeros."""
        return {tier: self._of.get(tier, TierDigest()) for tier in Tier}


def digest_of(router_hashes: Iterable[int]) -> TierDigest:
    """The digest of a tier that holds the blocks with these hashes, each once."""
    hashes = list(router_hashes)
    return TierDigest(len(hashes), sum(hashes) % _MODULUS)


def _sum(blocks: Blocks) -> int:
    width = blocks.key_nbytes
    if width % 8:
        return sum(blocks.router_hashes())
    words = np.frombuffer(blocks.packed_keys(), ">u8").reshape(-1, width // 8)
    return int(words[:, -1].sum(dtype=np.uint64))
