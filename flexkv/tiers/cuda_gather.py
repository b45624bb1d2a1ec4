"""Moves paged blocks to and from a staging buffer with torch alone: where there is no Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from flexkv.tiers.segments import PagedSegments


class TorchMover:
    """Moves blocks of ``paged`` to the first rows of ``staging``, or back: a call per segment."""

    def __init__(
        self, paged: PagedSegments, staging: torch.Tensor, row_stride: int, device: torch.device
    ) -> None:
        num_rows = staging.numel() // row_stride
        self._device = device
        self._pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        in_row = 0
        for segment in paged.segments:
            flat = torch.empty(0, dtype=torch.uint8, device=device)
            flat.set_(paged.storages[segment.storage])
            shape = (paged.num_blocks, segment.nbytes)
            cache = flat.as_strided(shape, (segment.stride, 1), segment.offset)
            rows = staging.as_strided((num_rows, segment.nbytes), (row_stride, 1), in_row)
            self._pieces.append((cache, rows))
            in_row += segment.nbytes

    def move(self, block_ids: torch.Tensor, *, to_rows: bool) -> None:
        """Launch, on the current stream. ``block_ids[i]`` goes with row ``i``."""
        ids = block_ids.to(self._device, non_blocking=True)
        for cache, rows in self._pieces:
            if to_rows:
                torch.index_select(cache, 0, ids, out=rows[: len(ids)])
            else:
                cache.index_copy_(0, ids, rows[: len(ids)])
