"""Moves the pieces of paged blocks to and from rows of memory with one Triton kernel."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.tiers.segments import PagedSegments

_DTYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_CHUNK_NBYTES = 16 << 10  # what one program moves at a time
_NUM_WARPS = 8


class KernelMover:
    """Moves blocks of ``paged`` to rows of ``row_stride`` bytes, or back.

    Any memory that the GPU can reach may hold the rows: a staging buffer, or the pinned host pool.
    """

    def __init__(self, paged: PagedSegments, row_stride: int, device: torch.device) -> None:
        bases = [storage.data_ptr() for storage in paged.storages]
        numbers = [number for segment in paged.segments for number in segment[1:]]
        unit = gcd(16, row_stride, *numbers, *bases)
        element = min(unit, 8)
        pieces = [
            [number // element for number in piece]
            for piece in _pieces(paged, min(bases), _CHUNK_NBYTES)
        ]
        most = max(piece[3] for piece in pieces)
        self._cache = torch.empty(0, dtype=_DTYPES[element], device=device).set_(
            paged.storages[bases.index(min(bases))]
        )
        self._num_pieces = len(pieces)
        self._table = torch.tensor(pieces, dtype=torch.int64, device=device)
        self._row_stride = row_stride // element
        self._constants = {
            "ALIGN": unit // element,
            "CHUNK": triton.next_power_of_2(most),
            "num_warps": _NUM_WARPS,
        }

    def view(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows``, a flat tensor of bytes, as ``move`` takes it."""
        return rows.view(self._cache.dtype)

    def move(
        self,
        block_ids: torch.Tensor,
        row_ids: torch.Tensor,
        rows: torch.Tensor,
        num_blocks: int,
        *,
        to_rows: bool,
        num_programs: int,
    ) -> None:
        """Launch, on the current stream. ``block_ids[i]`` goes with ``row_ids[i]``, both int64."""
        total = num_blocks * self._num_pieces
        _move_pieces[(max(1, min(total, num_programs)),)](
            self._cache,
            rows,
            self._table,
            block_ids,
            row_ids,
            total,
            self._num_pieces,
            self._row_stride,
            TO_ROWS=to_rows,
            **self._constants,
        )


def _pieces(paged: PagedSegments, base: int, chunk_nbytes: int) -> Iterator[list[int]]:
    """In bytes: where it is in block 0, from ``base`` on; from block to block; in a row; length."""
    in_row = 0
    for segment in paged.segments:
        address = paged.address(segment, 0) - base
        for at in range(0, segment.nbytes, chunk_nbytes):
            nbytes = min(chunk_nbytes, segment.nbytes - at)
            yield [address + at, segment.stride, in_row + at, nbytes]
        in_row += segment.nbytes


@triton.jit(do_not_specialize=["total", "num_pieces", "row_stride"])  # type: ignore[untyped-decorator]
def _move_pieces(  # type: ignore[no-untyped-def]  # noqa: ANN202
    cache,  # noqa: ANN001
    rows,  # noqa: ANN001
    table,  # noqa: ANN001
    block_ids,  # noqa: ANN001
    row_ids,  # noqa: ANN001
    total,  # noqa: ANN001
    num_pieces,  # noqa: ANN001
    row_stride,  # noqa: ANN001
    TO_ROWS: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
):
    lane = tl.arange(0, CHUNK)
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        index = number // num_pieces
        piece = table + (number % num_pieces) * 4
        block_id = tl.load(block_ids + index)
        row_id = tl.load(row_ids + index)
        in_cache = tl.multiple_of(tl.load(piece) + block_id * tl.load(piece + 1), ALIGN)
        in_rows = tl.multiple_of(tl.load(piece + 2) + row_id * row_stride, ALIGN)
        length = tl.multiple_of(tl.load(piece + 3), ALIGN)
        inside = lane < length
        if TO_ROWS:
            values = tl.load(cache + in_cache + lane, mask=inside)
            tl.store(rows + in_rows + lane, values, mask=inside)
        else:
            values = tl.load(rows + in_rows + lane, mask=inside)
            tl.store(cache + in_cache + lane, values, mask=inside)
