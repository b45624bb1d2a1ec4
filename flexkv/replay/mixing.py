"""A fast, fixed mixing of 64-bit words: what token ids and payloads are drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)


def mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Each word scrambled, one to one: equal for equal words, on every machine."""
    scrambled = words * _GOLDEN
    scrambled ^= scrambled >> _SHIFT
    scrambled *= _MULTIPLIER
    scrambled ^= scrambled >> _SHIFT
    return scrambled
