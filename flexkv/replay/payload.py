"""What stands in for KV bytes: derived from block keys, so that any byte can be checked later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flexkv.replay.mixing import mixed

if TYPE_CHECKING:
    import numpy.typing as npt

    from flexkv.blocks import Blocks

WORD_NBYTES = 8


def payload_of(blocks: Blocks, block_nbytes: int) -> npt.NDArray[np.uint8]:
    """The bytes of each block, of shape (len(blocks), block_nbytes).

    Every 8 bytes depend on the whole key and on their place: bytes of another block, or of
    another place in the same block, do not pass. ``block_nbytes`` is a multiple of 8.
    """
    width = blocks.key_nbytes // WORD_NBYTES
    rows = np.frombuffer(blocks.packed_keys(), np.uint8).reshape(len(blocks), blocks.key_nbytes)
    words = np.ascontiguousarray(rows[:, : width * WORD_NBYTES]).view("<u8").astype(np.uint64)
    roots = np.zeros(len(blocks), np.uint64)
    for column in words.T:
        roots = mixed(roots + column)
    places = np.arange(block_nbytes // WORD_NBYTES, dtype=np.uint64)
    drawn = mixed(roots[:, None] + places[None, :])
    return drawn.astype("<u8", copy=False).view(np.uint8)


def num_wrong(found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> int:
    """How many bytes differ."""
    return int(np.count_nonzero(found != expected))
