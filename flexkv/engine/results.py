"""What the engine's calls answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexkv.blocks import Tier


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of a chain that could be loaded now."""

    num_blocks: int
    by_tier: Mapping[Tier, int]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load brought: the first ``num_blocks`` of the blocks asked for.

    ``missing``: the GPU block ids of the others, whose content is undefined now: recompute them.
    """

    num_blocks: int
    missing: tuple[int, ...]
    nbytes_by_tier: Mapping[Tier, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of the blocks of a store. They are readable when the call returns.

    ``num_stored`` were copied, ``num_present`` were there already or came from another store that
    ran at the same time, ``num_dropped`` did not fit, failed, or have no parent in the tier.
    """

    num_stored: int
    num_present: int
    num_dropped: int
