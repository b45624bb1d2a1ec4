"""A few resident chains with their tokens: what a router can be asked about as by a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from flexkv.events.dynamo import TIERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.blocks import BlockKey, Blocks, Tier
    from flexkv.events.types import BlockStored

NUM_CHAINS = 32
"""Of each tier."""

_HASH = np.dtype(">u8")


class SampledChain(msgspec.Struct):
    """A chain from its first block on, of which ``tier`` has all blocks.

    ``hashes``: the blocks' router hashes, as big-endian uint64; ``token_ids``: little-endian
    uint32.
    """

    tier: str
    hashes: bytes
    token_ids: bytes
    namespace: str | None
    lora: str | None

    def router_hashes(self) -> list[int]:
        """One for each block.

        Raises:
            ValueError: bytes are missing.
        """
        hashes: list[int] = np.frombuffer(self.hashes, _HASH).tolist()
        return hashes

    def tokens(self) -> list[int]:
        """The prompt.

        Raises:
            ValueError: bytes are missing.
        """
        tokens: list[int] = np.frombuffer(self.token_ids, "<u4").tolist()
        return tokens


class _Node(NamedTuple):
    """A run, and what is above it."""

    blocks: Blocks
    above: _Node | None


class Sampler:
    """Chooses by hash, so the same chains as long as they are there, each as deep as it goes."""

    def __init__(self) -> None:
        self._path: _Node | None = None
        self._tier: Tier | None = None
        self._chosen: dict[tuple[Tier, BlockKey], tuple[int, _Node]] = {}
        self._limits: dict[Tier, int] = {}  # the highest hash of a tier that has all its chains

    def follow(self, event: BlockStored) -> None:
        """The next run of a walk that goes tier by tier, depth first.

        What follows on no known one of its tier is left out. A step of a few microseconds.
        """
        blocks, tier = event.blocks, event.tier
        parent, last = blocks.parent, blocks.key(len(blocks) - 1)
        if tier != self._tier:
            self._tier, self._path = tier, None
        above = self._path
        while above is not None and _last(above) != parent:
            above = above.above
        if above is None and parent is not None:
            return
        self._path = node = _Node(blocks, above)
        chosen = self._chosen
        if parent is not None and (tier, parent) in chosen:
            rank, _ = chosen.pop((tier, parent))
            chosen[tier, last] = rank, node
            return
        rank = int.from_bytes(last[-8:])
        if rank < self._limits.get(tier, 2**64):
            chosen[tier, last] = rank, node
            self._bound(tier)

    def _bound(self, tier: Tier) -> None:
        ranks = sorted((held[0], where) for where, held in self._chosen.items() if where[0] == tier)
        if len(ranks) > NUM_CHAINS:
            del self._chosen[ranks.pop()[1]]
        if len(ranks) == NUM_CHAINS:
            self._limits[tier] = ranks[-1][0]

    def chains(self, max_nbytes: int) -> Iterator[SampledChain]:
        """What was chosen; of a chain of more bytes its head."""
        for (tier, _), (_, node) in self._chosen.items():
            yield _whole(tier, node, max_nbytes)


def _last(node: _Node) -> BlockKey:
    return node.blocks.key(len(node.blocks) - 1)


def _whole(tier: Tier, node: _Node, max_nbytes: int) -> SampledChain:
    runs = [node.blocks]
    while (above := node.above) is not None:
        node = above
        runs.append(node.blocks)
    first = runs[-1]
    most = max(1, max_nbytes // (4 * first.tokens_per_block + _HASH.itemsize))
    hashes: list[int] = []
    token_ids = bytearray()
    while runs and len(hashes) < most:  # a long chain would hold up the loop for milliseconds
        run = runs.pop()[: most - len(hashes)]
        hashes += run.router_hashes()
        token_ids += run.token_ids
    return SampledChain(
        TIERS[tier],
        np.array(hashes, _HASH).tobytes(),
        bytes(token_ids),
        first.namespace,
        first.lora,
    )
