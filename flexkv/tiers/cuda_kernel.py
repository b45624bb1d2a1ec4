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
_PIECE_NBYTES = 16 << 10  # what one program moves before it looks for more
_FETCHED = 128  # numbers at a time
_MOST_FEW = 4  # blocks, as many as _move_few_pieces takes
_NUM_WARPS = 8


class KernelMover:
    """Moves blocks of ``paged`` to rows ``row_stride`` bytes apart, or back.

    Any memory that the GPU can reach may hold the rows: a staging buffer, or the pinned host pool.
    ``compile`` has to be called before the rest; streams are handles of CUDA's.
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
        self._most = triton.next_power_of_2(max(piece[3] for piece in pieces))
        self._align = unit // element
        self._kernels: dict[bool, _Kernel] = {}
        self._few: dict[bool, _Kernel] = {}
        self._fetch: _Kernel

    def place(self, address: int) -> int:
        """``address``, a row's first byte, as ``move`` takes it."""
        return (address - self._base) // self._element

    def compile(self, *, to_rows: bool) -> None:
        """Takes a second, for what is not in Triton's cache."""
        table = self._table
        with torch.cuda.device(table.device):
            self._fetch = _Kernel(_fetch, (table, table, 2), (_FETCHED,))
            constants = (to_rows, self._align, self._most)
            self._kernels[to_rows] = _Kernel(
                _move_pieces, (self._cache, table, table, table, 2, 2), constants
            )
            wide = [1 << 40] * (2 * _MOST_FEW)  # that is, numbers of 64 bits
            self._few[to_rows] = _Kernel(
                _move_few_pieces, (self._cache, table, 2, 2, *wide), constants
            )

    def fetch(self, source: int, target: int, number: int, *, stream: int) -> None:
        """Launch a copy of as many int64 from pinned memory to the GPU, between two addresses.

        No DMA, which would wait behind the large ones. ``move`` reads each number again and again,
        and each time over the link, if they are not on the GPU.
        """
        self._fetch.launch(1, stream, source, target, number)

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
        """Launch. At ``block_ids`` and ``places`` are as many int64, of blocks and their rows."""
        total = num_blocks * self._num_pieces
        self._kernels[to_rows].launch(
            min(total, num_programs),
            stream,
            self._base,
            self._table_address,
            block_ids,
            places,
            total,
            self._num_pieces,
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
        """Launch. ``most_few`` blocks at most; nothing has to be fetched."""
        total = len(block_ids) * self._num_pieces
        unused = (0,) * (_MOST_FEW - len(block_ids))
        self._few[to_rows].launch(
            min(total, num_programs),
            stream,
            self._base,
            self._table_address,
            total,
            self._num_pieces,
            *block_ids,
            *unused,
            *places,
            *unused,
        )


class _Kernel:
    """A compiled kernel, with its constants, for arguments like ``examples``.

    Tensors among these are addresses when it is launched: a tensor would be asked for its own, and
    CUDA whether it can be reached.
    """

    def __init__(
        self,
        function: Any,
        examples: tuple[object, ...],
        constants: tuple[object, ...],
    ) -> None:
        kernel = function.warmup(*examples, *constants, num_warps=_NUM_WARPS, grid=(1,))
        self._constants = constants
        kernel[1, 1, 1]  # loads it, and launches nothing
        self._kernel = kernel
        self._run: Any = (kernel.run, kernel.function, kernel.packed_metadata)
        try:  # with nothing to do
            self.launch(1, torch.cuda.current_stream().cuda_stream, *[0] * len(examples))
        except TypeError:  # another Triton than those we know
            self._run = None

    def launch(self, num_programs: int, stream: int, *arguments: int) -> None:
        """What ``kernel[grid](...)`` does, without the hooks for profilers: in two thirds of it."""
        grid = (num_programs, 1, 1)
        if self._run is None:
            self._kernel[grid](*arguments, *self._constants, stream=stream)
            return
        run, function, metadata = self._run
        hooks = (None, None, None)
        run(*grid, stream, function, metadata, *hooks, *arguments, *self._constants)


def _pieces(paged: PagedSegments, base: int) -> Iterator[list[int]]:
    """In bytes: where it is in block 0, from ``base`` on; from block to block; in a row; length."""
    in_row = 0
    for segment in paged.segments:
        address = paged.address(segment, 0) - base
        for at in range(0, segment.nbytes, _PIECE_NBYTES):
            nbytes = min(_PIECE_NBYTES, segment.nbytes - at)
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
    SIZE: tl.constexpr,  # noqa: N803
):
    in_cache = tl.multiple_of(tl.load(piece) + block_id * tl.load(piece + 1), ALIGN)
    in_row = tl.multiple_of(tl.load(piece + 2) + place, ALIGN)
    length = tl.multiple_of(tl.load(piece + 3), ALIGN)
    at = tl.arange(0, SIZE)
    # both from one pointer on: what is far away has a large, or a negative, offset
    here, there = cache + in_cache + at, cache + in_row + at
    if TO_ROWS:
        tl.store(there, tl.load(here, mask=at < length), mask=at < length)
    else:
        tl.store(here, tl.load(there, mask=at < length), mask=at < length)


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
    SIZE: tl.constexpr,  # noqa: N803
):
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        index = number // num_pieces
        piece = table + (number % num_pieces) * 4
        block_id = tl.load(block_ids + index)
        place = tl.load(places + index)
        _move_piece(cache, piece, block_id, place, TO_ROWS, ALIGN, SIZE)


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
    SIZE: tl.constexpr,  # noqa: N803
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
        _move_piece(cache, piece, block_id, place, TO_ROWS, ALIGN, SIZE)
