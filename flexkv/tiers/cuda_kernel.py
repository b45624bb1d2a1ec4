"""Moves the pieces of paged blocks to and from rows of memory with one Triton kernel."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flexkv.tiers.segments import PagedSegments

_DTYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_CHUNK_NBYTES = 16 << 10  # what one program moves at a time
_NUM_WARPS = 8
_MOST_FEW = 4  # blocks, as many as _move_few_pieces takes
_FETCHED = 128  # numbers at a time


class KernelMover:
    """Moves blocks of ``paged`` to rows ``row_stride`` bytes apart, or back.

    Any memory that the GPU can reach may hold the rows: a staging buffer, or the pinned host pool.
    """

    most_few = _MOST_FEW  # blocks for ``move_few``

    def __init__(self, paged: PagedSegments, row_stride: int, device: torch.device) -> None:
        bases = [storage.data_ptr() for storage in paged.storages]
        self._base = min(bases)
        numbers = [number for segment in paged.segments for number in segment[1:]]
        unit = gcd(16, row_stride, *numbers, *bases)
        self._element = element = min(unit, 8)
        pieces = [[number // element for number in piece] for piece in _pieces(paged, self._base)]
        self._cache = torch.empty(0, dtype=_DTYPES[element], device=device).set_(
            paged.storages[bases.index(self._base)]
        )
        self._num_pieces = len(pieces)
        self._table = torch.tensor(pieces, dtype=torch.int64, device=device)
        self._table_address = self._table.data_ptr()
        most = max(piece[3] for piece in pieces)
        self._constants = (unit // element, triton.next_power_of_2(most))
        self._kernels: dict[bool, Any] = {}  # by whether it moves to rows
        self._few: dict[bool, Any] = {}
        self._fetch: Any = None

    def place(self, address: int) -> int:
        """``address``, a row's first byte, as ``move`` takes it."""
        return (address - self._base) // self._element

    def compile(self, *, to_rows: bool) -> None:
        """To be called before ``move``: takes a second, where it is not in Triton's cache."""
        with torch.cuda.device(self._table.device):
            kernel = _move_pieces.warmup(
                self._cache,
                self._table,
                self._table,
                self._table,
                2,
                2,
                to_rows,
                *self._constants,
                num_warps=_NUM_WARPS,
                grid=(1,),
            )
            few = _move_few_pieces.warmup(
                self._cache,
                self._table,
                2,
                2,
                *[1 << 40] * (2 * _MOST_FEW),  # so large that they are 64 bits wide
                to_rows,
                *self._constants,
                num_warps=_NUM_WARPS,
                grid=(1,),
            )
            fetch = _fetch.warmup(self._table, self._table, 2, _FETCHED, grid=(1,))
            for each in (kernel, few, fetch):
                each[1, 1, 1]  # loads it, and launches nothing
        self._fetch, self._few[to_rows], self._kernels[to_rows] = fetch, few, kernel

    def fetch(self, source: int, target: int, number: int, *, stream: int) -> None:
        """Launch a copy of as many int64 from pinned memory to the GPU, between two addresses.

        No DMA, which would wait behind the large ones. ``move`` reads each number again and again,
        and each time over the link, if they are not on the GPU.
        """
        self._fetch[1, 1, 1](source, target, number, _FETCHED, stream=stream)

    def move(
        self,
        block_ids: int,
        places: int,
        num_blocks: int,
        *,
        to_rows: bool,
        num_programs: int,
        stream: int,
    ) -> None:
        """Launch on ``stream``, a handle of CUDA's.

        ``block_ids`` and ``places`` are addresses of as many int64, of blocks and of their rows.
        """
        total = num_blocks * self._num_pieces
        self._kernels[to_rows][min(total, num_programs), 1, 1](
            self._base,  # as numbers: a tensor would be asked for its address, and CUDA for that
            self._table_address,
            block_ids,
            places,
            total,
            self._num_pieces,
            to_rows,
            *self._constants,
            stream=stream,
        )

    def move_few(
        self,
        block_ids: Sequence[int],
        places: Sequence[int],
        *,
        to_rows: bool,
        num_programs: int,
        stream: int,
    ) -> None:
        """As ``move``, of ``most_few`` blocks at most; nothing has to be fetched."""
        total = len(block_ids) * self._num_pieces
        unused = [0] * (_MOST_FEW - len(block_ids))
        self._few[to_rows][min(total, num_programs), 1, 1](
            self._base,
            self._table_address,
            total,
            self._num_pieces,
            *block_ids,
            *unused,
            *places,
            *unused,
            to_rows,
            *self._constants,
            stream=stream,
        )


def _pieces(paged: PagedSegments, base: int) -> Iterator[list[int]]:
    """In bytes: where it is in block 0, from ``base`` on; from block to block; in a row; length."""
    in_row = 0
    for segment in paged.segments:
        address = paged.address(segment, 0) - base
        for at in range(0, segment.nbytes, _CHUNK_NBYTES):
            nbytes = min(_CHUNK_NBYTES, segment.nbytes - at)
            yield [address + at, segment.stride, in_row + at, nbytes]
        in_row += segment.nbytes


@triton.jit(do_not_specialize=["number"])  # type: ignore[untyped-decorator]
def _fetch(  # type: ignore[no-untyped-def]  # noqa: ANN202
    source,  # noqa: ANN001
    target,  # noqa: ANN001
    number,  # noqa: ANN001
    STEP: tl.constexpr,  # noqa: N803
):
    for first in range(0, number, STEP):
        at = first + tl.arange(0, STEP)
        tl.store(target + at, tl.load(source + at, mask=at < number), mask=at < number)


@triton.jit  # type: ignore[untyped-decorator]
def _move_piece(  # type: ignore[no-untyped-def]  # noqa: ANN202
    cache,  # noqa: ANN001
    piece,  # noqa: ANN001
    block_id,  # noqa: ANN001
    place,  # noqa: ANN001
    TO_ROWS: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
):
    lane = tl.arange(0, CHUNK)
    in_cache = tl.multiple_of(tl.load(piece) + block_id * tl.load(piece + 1), ALIGN)
    in_row = tl.multiple_of(tl.load(piece + 2) + place, ALIGN)
    length = tl.multiple_of(tl.load(piece + 3), ALIGN)
    inside = lane < length
    # both from one pointer on: what is far away has a large, or a negative, offset
    if TO_ROWS:
        values = tl.load(cache + in_cache + lane, mask=inside)
        tl.store(cache + in_row + lane, values, mask=inside)
    else:
        values = tl.load(cache + in_row + lane, mask=inside)
        tl.store(cache + in_cache + lane, values, mask=inside)


@triton.jit(do_not_specialize=["total", "num_pieces"])  # type: ignore[untyped-decorator]
def _move_pieces(  # type: ignore[no-untyped-def]  # noqa: ANN202
    cache,  # noqa: ANN001
    table,  # noqa: ANN001
    block_ids,  # noqa: ANN001
    places,  # noqa: ANN001
    total,  # noqa: ANN001
    num_pieces,  # noqa: ANN001
    TO_ROWS: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
):
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        index = number // num_pieces
        piece = table + (number % num_pieces) * 4
        block_id = tl.load(block_ids + index)
        place = tl.load(places + index)
        _move_piece(cache, piece, block_id, place, TO_ROWS, ALIGN, CHUNK)


_IDS = [f"{kind}_{i}" for kind in ("block", "place") for i in range(_MOST_FEW)]


@triton.jit(do_not_specialize=["total", "num_pieces", *_IDS])  # type: ignore[untyped-decorator]
def _move_few_pieces(  # type: ignore[no-untyped-def]  # noqa: ANN202
    cache,  # noqa: ANN001
    table,  # noqa: ANN001
    total,  # noqa: ANN001
    num_pieces,  # noqa: ANN001
    block_0,  # noqa: ANN001
    block_1,  # noqa: ANN001
    block_2,  # noqa: ANN001
    block_3,  # noqa: ANN001
    place_0,  # noqa: ANN001
    place_1,  # noqa: ANN001
    place_2,  # noqa: ANN001
    place_3,  # noqa: ANN001
    TO_ROWS: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
):
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        index = number // num_pieces
        piece = table + (number % num_pieces) * 4
        block_id = tl.where(index == 0, block_0, block_1)
        block_id = tl.where(index == 2, block_2, block_id)  # noqa: PLR2004
        block_id = tl.where(index == 3, block_3, block_id)  # noqa: PLR2004
        place = tl.where(index == 0, place_0, place_1)
        place = tl.where(index == 2, place_2, place)  # noqa: PLR2004
        place = tl.where(index == 3, place_3, place)  # noqa: PLR2004
        _move_piece(cache, piece, block_id, place, TO_ROWS, ALIGN, CHUNK)
