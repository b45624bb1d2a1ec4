"""How a CUDA copy is cut up: which way its bytes go, and in which slices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


class Way(Enum):
    """How the bytes of a slice go between the paged cache and the host pool."""

    WHOLE = "whole"  # each block is one piece of memory: DMA between cache and pool
    DIRECT = "direct"  # a kernel reads or writes the pool: saves a hop, takes multiprocessors
    STAGED = "staged"  # a kernel and a staging buffer on the GPU, DMA between that and the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class WayTable:
    """Which way is the fastest; measured by ``benchmarks/gpu_copies.py``."""

    slice_nbytes: int = 32 << 20  # of a staging buffer too: two for each direction
    first_nbytes: int = 4 << 20  # a small slice at the end that does not overlap
    max_slices: int = 8  # in flight, in each direction
    direct_store_nbytes: int = 4 << 20  # up to this a store is one kernel
    direct_load_nbytes: int = 4 << 20
    dma_nbytes: int = 256 << 10  # smaller pieces of the pool are left to the kernel
    direct_programs: int = 64
    staged_programs: int = 1024


@dataclass(frozen=True, slots=True)
class Slice:
    """Blocks and their slots, with the runs of consecutive ones as (first index, how many)."""

    way: Way
    block_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    runs: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the cutting has to know of the cache and of the pool."""

    block_nbytes: int
    slot_stride: int
    slots_per_chunk: int  # no piece of DMA may reach beyond the end of a pinned chunk
    is_whole: bool  # a block is one segment
    blocks_touch: bool  # and consecutive blocks are laid out as consecutive slots are
    has_kernel: bool


def cut(
    block_ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    shape: Shape,
    table: WayTable,
    *,
    is_store: bool,
) -> Iterator[Slice]:
    """The slices of a copy, in their order."""
    if not len(slots):
        return
    breaks = np.diff(slots) != 1
    breaks |= slots[1:] % shape.slots_per_chunk == 0
    way = _way(len(slots), int(breaks.sum()) + 1, shape, table, is_store=is_store)
    if way is Way.WHOLE:
        breaks |= np.diff(block_ids) != 1 if shape.blocks_touch else True
    sizes = _sizes(len(slots), shape, table, is_ramp=way is Way.STAGED)
    at = 0
    for size in sizes if is_store else reversed(sizes):
        end = at + size
        runs = () if way is Way.DIRECT else _runs(breaks[at : end - 1])
        yield Slice(way, block_ids[at:end], slots[at:end], runs)
        at = end


def slice_blocks(shape: Shape, table: WayTable) -> int:
    """The most blocks of a slice."""
    return max(1, table.slice_nbytes // shape.slot_stride)


def _way(num_blocks: int, num_runs: int, shape: Shape, table: WayTable, *, is_store: bool) -> Way:
    nbytes = num_blocks * shape.block_nbytes
    if shape.is_whole and shape.block_nbytes >= table.dma_nbytes:
        return Way.WHOLE
    if not shape.has_kernel:
        return Way.STAGED
    most = table.direct_store_nbytes if is_store else table.direct_load_nbytes
    if nbytes <= most or nbytes < num_runs * table.dma_nbytes:
        return Way.DIRECT
    return Way.STAGED


def _sizes(num_blocks: int, shape: Shape, table: WayTable, *, is_ramp: bool) -> list[int]:
    """Slices in blocks, for a store: the first is small, since nothing overlaps its kernel."""
    most = slice_blocks(shape, table)
    size = max(1, min(most, table.first_nbytes // shape.slot_stride)) if is_ramp else most
    sizes = []
    while num_blocks:
        sizes.append(min(size, num_blocks))
        num_blocks -= sizes[-1]
        size = min(2 * size, most)
    return sizes


def _runs(breaks: NDArray[np.bool_]) -> list[tuple[int, int]]:
    ends = [*(np.flatnonzero(breaks) + 1).tolist(), len(breaks) + 1]
    starts = [0, *ends[:-1]]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]
