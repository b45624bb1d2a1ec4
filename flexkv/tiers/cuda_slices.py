"""How a CUDA copy is cut up: which way its bytes go, and in which slices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Way(Enum):
    """How the bytes of a slice go between the paged cache and the host pool."""

    WHOLE = "whole"  # each block is one piece of memory: DMA between cache and pool
    ROWS = "rows"  # each block is rows at equal distances: DMA, a call for each block
    DIRECT = "direct"  # a kernel reads or writes the pool: saves a hop, takes multiprocessors
    STAGED = "staged"  # a kernel and a staging buffer on the GPU, DMA between that and the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class WayTable:
    """Which way is the fastest; measured by ``benchmarks/gpu_copies.py``."""

    slice_nbytes: int = 32 << 20  # of a staging buffer too: two for each direction
    first_nbytes: int = 8 << 20  # the first slices of a store, whose kernel nothing overlaps
    max_slices: int = 8  # in flight, in each direction
    direct_store_nbytes: int = 8 << 20  # up to this a store is one kernel
    direct_load_nbytes: int = 8 << 20
    dma_nbytes: int = 256 << 10  # smaller pieces of the pool are left to the kernel
    row_nbytes: int = 256 << 10  # shorter rows are left to the kernel, which is faster
    few_rows_nbytes: int = 4 << 20  # but for copies up to this, whose launch counts more:
    short_row_nbytes: int = 64 << 10  # there these are left to it
    spin_nbytes: int = 8 << 20  # the end of a last slice up to this is waited for by spinning
    direct_programs: int = 64
    staged_programs: int = 264


class Slice(NamedTuple):
    """Blocks and their slots, with what moves as one as (first index, how many)."""

    way: Way
    block_ids: Sequence[int]
    slots: Sequence[int]
    runs: Sequence[tuple[int, int]]
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the cutting has to know of the cache and of the pool."""

    block_nbytes: int
    slot_stride: int
    slots_per_chunk: int  # no piece of DMA may reach beyond the end of a pinned chunk
    is_whole: bool  # a block is one segment
    row_nbytes: int  # a block is rows of this length, or 0
    blocks_touch: bool  # and consecutive blocks are laid out as consecutive slots are
    has_kernel: bool


def cut(
    block_ids: Sequence[int],
    slots: Sequence[int],
    shape: Shape,
    table: WayTable,
    *,
    is_store: bool,
) -> Iterator[Slice]:
    """The slices of a copy, in their order."""
    way = _way(block_ids, slots, shape, table, is_store=is_store)
    sizes = _sizes(len(slots), shape, table, is_ramp=way is Way.STAGED)
    at = 0
    for size in sizes if is_store else reversed(sizes):
        ids, places = block_ids[at : at + size], slots[at : at + size]
        runs = () if way in {Way.DIRECT, Way.ROWS} else _runs(ids, places, shape, way)
        at += size
        yield Slice(way, ids, places, runs, is_last=at == len(slots))


def needs_staging(shape: Shape, table: WayTable) -> bool:
    """Is there a copy that takes the way of the staging buffer?"""
    return not (_is_whole(shape, table) or _is_rows(shape, table))


def described(shape: Shape, table: WayTable) -> str:
    """Which ways copies go, for the log."""
    if _is_whole(shape, table):
        return "whole blocks by DMA"
    if _is_rows(shape, table):
        return f"blocks by DMA in rows of {shape.row_nbytes >> 10} KiB"
    staged = f"slices of {table.slice_nbytes >> 20} MiB staged on the GPU"
    if not shape.has_kernel:
        return f"{staged} by torch alone"
    loads, stores = table.direct_load_nbytes >> 20, table.direct_store_nbytes >> 20
    kernel = f"loads up to {loads} MiB and stores up to {stores} MiB by one kernel, else {staged}"
    if _is_rows(shape, table, shape.block_nbytes):
        return f"up to {table.few_rows_nbytes >> 20} MiB by DMA in rows, else {kernel}"
    return kernel


def slice_blocks(shape: Shape, table: WayTable) -> int:
    """The most blocks of a slice."""
    return max(1, table.slice_nbytes // shape.slot_stride)


def _way(
    block_ids: Sequence[int], slots: Sequence[int], shape: Shape, table: WayTable, *, is_store: bool
) -> Way:
    if _is_whole(shape, table):
        return Way.WHOLE
    nbytes = len(slots) * shape.block_nbytes
    if _is_rows(shape, table, nbytes):
        return Way.ROWS
    most = table.direct_store_nbytes if is_store else table.direct_load_nbytes
    if shape.has_kernel and nbytes <= most:
        return Way.DIRECT
    if not shape.has_kernel:
        return Way.STAGED
    if shape.block_nbytes < table.dma_nbytes:
        num_runs = len(_runs(block_ids, slots, shape, Way.STAGED))
        if nbytes < num_runs * table.dma_nbytes:
            return Way.DIRECT
    return Way.STAGED


def _is_whole(shape: Shape, table: WayTable) -> bool:
    return shape.is_whole and shape.block_nbytes >= table.dma_nbytes


def _is_rows(shape: Shape, table: WayTable, nbytes: int | None = None) -> bool:
    """Does a copy of ``nbytes`` go in rows? None: does every one?"""
    least = table.row_nbytes
    if nbytes is not None and nbytes <= table.few_rows_nbytes:
        least = min(least, table.short_row_nbytes)  # or few would need what many do without
    return shape.block_nbytes >= table.dma_nbytes and shape.row_nbytes >= max(1, least)


def _sizes(num_blocks: int, shape: Shape, table: WayTable, *, is_ramp: bool) -> list[int]:
    """Slices in blocks, as a store has them; a load turns them round."""
    most = slice_blocks(shape, table)
    size = max(1, min(most, table.first_nbytes // shape.slot_stride)) if is_ramp else most
    sizes = []
    while num_blocks:
        sizes.append(min(size, num_blocks))
        num_blocks -= sizes[-1]
        size = min(2 * size, most)
    return sizes


def _runs(
    block_ids: Sequence[int], slots: Sequence[int], shape: Shape, way: Way
) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    next_id = next_slot = -1
    for index, (block_id, slot) in enumerate(zip(block_ids, slots, strict=True)):
        goes_on = slot == next_slot and slot % shape.slots_per_chunk
        if way is Way.WHOLE:
            goes_on = goes_on and shape.blocks_touch and block_id == next_id
        if goes_on and runs:
            first, number = runs[-1]
            runs[-1] = (first, number + 1)
        else:
            runs.append((index, 1))
        next_id, next_slot = block_id + 1, slot + 1
    return runs
