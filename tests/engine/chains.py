"""Short chains over a tiny alphabet, so that random steps meet each other often."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from flexkv.blocks import BlockKey, Blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS_PER_BLOCK = 2


def key_of(path: Sequence[int]) -> BlockKey:
    """The key of the last block of ``path``."""
    return BlockKey(hashlib.sha256(repr(tuple(path)).encode()).digest())


def chain(*path: int) -> Blocks:
    """One block for each number; equal beginnings give equal keys."""
    keys = b"".join(key_of(path[: i + 1]) for i in range(len(path)))
    tokens = np.repeat(np.array(path, "<u4"), TOKENS_PER_BLOCK)
    return Blocks(keys, tokens.tobytes(), tokens_per_block=TOKENS_PER_BLOCK)
