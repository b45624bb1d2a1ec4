"""One CUDA stream with its staging buffer: what the slices of a copy are launched on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexkv.tiers.cuda_gather import TorchMover
from flexkv.tiers.cuda_lane import Submitted
from flexkv.tiers.cuda_slices import Way, slice_blocks

if TYPE_CHECKING:
    from flexkv.tiers.cuda_kernel import KernelMover
    from flexkv.tiers.cuda_slices import Shape, Slice, WayTable
    from flexkv.tiers.segments import PagedSegments


class CudaChannel:
    """Copies slices between the cache and ``region``, all slots of a rank as one row of bytes.

    ``kernel`` is None where there is no Triton.
    """

    def __init__(
        self,
        paged: PagedSegments,
        region: torch.Tensor,
        device: torch.device,
        *,
        is_store: bool,
        shape: Shape,
        table: WayTable,
        kernel: KernelMover | None,
    ) -> None:
        self._is_store = is_store
        self._table = table
        self._shape = shape
        self._region = region
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        most = slice_blocks(shape, table)
        # for blocks that are whole as well: these may be too small to be copied one by one
        self._staging = torch.empty(most * shape.slot_stride, dtype=torch.uint8, device=device)
        self._row_ids = torch.arange(most, device=device)
        # As many as there are slices in flight in both streams: the one before has ended then.
        self._ids = torch.empty((table.max_slices, 2, most), dtype=torch.int64, pin_memory=True)
        self._ids_now = 0
        self._segment = paged.segments[0]
        self._cache = torch.empty(0, dtype=torch.uint8, device=device).set_(
            paged.storages[self._segment.storage]
        )
        self._kernel = kernel
        self._gather = TorchMover(paged, self._staging, shape.slot_stride, device)
        if kernel is not None:
            self._staging_rows = kernel.view(self._staging)
            self._region_rows = kernel.view(region)

    def warm_up(self) -> None:
        """Have the kernel compiled."""
        if self._kernel is not None:
            with torch.cuda.stream(self._stream):
                self._kernel.move(
                    self._ids[0, 0],
                    self._row_ids,
                    self._staging_rows,
                    0,
                    to_rows=self._is_store,
                    num_programs=1,
                )

    def submit(self, part: Slice, after: object) -> Submitted:
        """Launch the copy of ``part`` behind the event ``after``; see ``Channel``."""
        error: RuntimeError | None = None
        # caches made in inference mode can be written in inference mode only
        with torch.cuda.stream(self._stream), torch.inference_mode():
            try:
                if isinstance(after, torch.cuda.Event):
                    self._stream.wait_event(after)
                self._launch(part)
            except RuntimeError as failure:
                error = failure
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return Submitted(event, error)

    def _launch(self, part: Slice) -> None:
        if part.way is Way.WHOLE:
            self._copy_whole(part)
            return
        ids = self._ids[self._ids_now]
        self._ids_now = (self._ids_now + 1) % len(self._ids)
        num_blocks = len(part.slots)
        ids[0, :num_blocks] = torch.from_numpy(part.block_ids)
        if part.way is Way.DIRECT:
            assert self._kernel is not None
            ids[1, :num_blocks] = torch.from_numpy(part.slots)
            self._kernel.move(
                ids[0],
                ids[1],
                self._region_rows,
                num_blocks,
                to_rows=self._is_store,
                num_programs=self._table.direct_programs,
            )
        elif self._is_store:
            self._move(ids[0], num_blocks)
            self._copy_staged(part)
        else:
            self._copy_staged(part)
            self._move(ids[0], num_blocks)

    def _move(self, block_ids: torch.Tensor, num_blocks: int) -> None:
        if self._kernel is None:
            self._gather.move(block_ids[:num_blocks], to_rows=self._is_store)
            return
        self._kernel.move(
            block_ids,
            self._row_ids,
            self._staging_rows,
            num_blocks,
            to_rows=self._is_store,
            num_programs=self._table.staged_programs,
        )

    def _copy_staged(self, part: Slice) -> None:
        stride = self._shape.slot_stride
        for first, number in part.runs:
            nbytes = number * stride
            host = self._region.narrow(0, int(part.slots[first]) * stride, nbytes)
            self._copy(host, self._staging.narrow(0, first * stride, nbytes))

    def _copy_whole(self, part: Slice) -> None:
        """A run of more than one block is as contiguous in the cache as it is in the pool."""
        segment, stride = self._segment, self._shape.slot_stride
        for first, number in part.runs:
            nbytes = (number - 1) * stride + segment.nbytes
            host = self._region.narrow(0, int(part.slots[first]) * stride, nbytes)
            start = segment.offset + int(part.block_ids[first]) * segment.stride
            self._copy(host, self._cache.narrow(0, start, nbytes))

    def _copy(self, host: torch.Tensor, device: torch.Tensor) -> None:
        if self._is_store:
            host.copy_(device, non_blocking=True)
        else:
            device.copy_(host, non_blocking=True)
