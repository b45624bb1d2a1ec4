"""Asks a router about chains by their tokens, as a request does, and compares with what is held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from flexkv.errors import FeedError
from flexkv.replay.deployment import Overlap

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from flexkv.events.audit import Audit, Held
    from flexkv.replay.deployment import Router

_NOTHING = Overlap(0, 0, 0)
_NAMES = ("device", "host_pinned", "disk")


class Misjudged(NamedTuple):
    """A chain of ``num_blocks`` blocks, ``last`` the hash of its last, and its blocks by tier.

    ``first_wrong``: from where on the two differ, the tier and the hash of its block there. It
    stays the same while the chain grows or loses its end.
    """

    last: int
    num_blocks: int
    held: Overlap
    believed: Overlap
    first_wrong: tuple[str, int]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "last_block": f"{self.last:016x}",
            "blocks": self.num_blocks,
            "held": dict(zip(_NAMES, self.held, strict=True)),
            "believed": dict(zip(_NAMES, self.believed, strict=True)),
        }

    def __str__(self) -> str:
        wrong = [
            f"{believed} blocks in {name} where {held} are held"
            for name, held, believed in zip(_NAMES, self.held, self.believed, strict=True)
            if held != believed
        ]
        head = f"the prompt of {self.num_blocks} blocks up to {self.last:016x}"
        return f"{head}: the router counts {' and '.join(wrong)}"


async def misjudged(
    router: Router, source: tuple[int, int], audit: Audit, tokens_per_block: int
) -> set[Misjudged]:
    """The chains of the sample that the router's scores are wrong about.

    The GPU's blocks are not ours: what the router says of them is taken as true.

    Raises:
        FeedError: the engine's blocks have another number of tokens.
    """
    found: set[Misjudged] = set()
    for chain in audit.sample:
        hashes, tokens = chain.router_hashes(), chain.tokens()
        if len(tokens) != tokens_per_block * len(hashes):
            raise FeedError(
                f"the blocks of worker {source[0]}, rank {source[1]} have "
                f"{len(tokens) // len(hashes)} tokens, the settings say {tokens_per_block}: "
                "correct cache_config.tokens_per_block"
            )
        of_ranks = await router.overlap_of_ranks(tokens, namespace=chain.namespace, lora=chain.lora)
        believed = of_ranks.get(source, _NOTHING)
        held = overlap_of(hashes, audit.held, believed.gpu)
        if held != believed:
            at = first_wrong(hashes, held, believed)
            found.add(Misjudged(hashes[-1], len(hashes), held, believed, at))
    return found


def overlap_of(hashes: Sequence[int], held: Held, num_gpu: int) -> Overlap:
    """What the scores should be, of a chain whose first ``num_gpu`` blocks the GPU has."""
    num_host = _num_leading(hashes[num_gpu:], held["host_pinned"])
    num_ssd = _num_leading(hashes[num_gpu + num_host :], held["disk"])
    return Overlap(num_gpu, num_host, num_ssd)


def first_wrong(hashes: Sequence[int], held: Overlap, believed: Overlap) -> tuple[str, int]:
    """The tier in which the two differ first, and the hash of the block where they do."""
    i = next(i for i in range(len(_NAMES)) if held[i] != believed[i])
    at = sum(held[:i]) + min(held[i], believed[i])
    return _NAMES[i], hashes[min(at, len(hashes) - 1)]


def _num_leading(hashes: Sequence[int], held: Collection[int]) -> int:
    return next((i for i, each in enumerate(hashes) if each not in held), len(hashes))
