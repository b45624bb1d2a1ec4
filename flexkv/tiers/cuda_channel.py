"""One CUDA stream with its staging buffer: what the slices of a copy are launched on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexkv.tiers import cuda_dma
from flexkv.tiers.cuda_gather import TorchMover
from flexkv.tiers.cuda_lane import Submitted
from flexkv.tiers.cuda_slices import Way, slice_blocks

if TYPE_CHECKING:
    from flexkv.tiers.cuda_kernel import KernelMover
    from flexkv.tiers.cuda_slices import Shape, Slice, WayTable
    from flexkv.tiers.segments import PagedSegments


class CudaChannel:
    """Copies slices between the cache and the pool's slots, the first of which is at ``pool``.

    ``kernel`` is None where there is no Triton.
    """

    def __init__(
        self,
        paged: PagedSegments,
        pool: int,
        device: torch.device,
        *,
        is_store: bool,
        shape: Shape,
        table: WayTable,
        kernel: KernelMover | None,
    ) -> None:
        self._paged = paged
        self._pool = pool
        self._is_store = is_store
        self._stride = shape.slot_stride
        self._table = table
        self._on_device = torch.cuda.device(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._handle = self._stream.cuda_stream
        # for blocks that are whole as well: these may be too small to be copied one by one
        most = slice_blocks(shape, table)
        self._staging = torch.empty(most * self._stride, dtype=torch.uint8, device=device)
        # As many as there are slices in flight in both streams: the one before has ended then.
        self._ids = torch.empty((table.max_slices, 2, most), dtype=torch.int64, pin_memory=True)
        self._numbers = self._ids.numpy()
        self._addresses = [(ids[0].data_ptr(), ids[1].data_ptr()) for ids in self._ids]
        self._events: list[torch.cuda.Event] = [
            torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            for _ in range(table.max_slices)
        ]
        self._turn = 0
        self._kernel = kernel
        if kernel is None:
            self._gather = TorchMover(paged, self._staging, self._stride, device)
        else:
            first = self._staging.data_ptr()
            places = [kernel.place(first + row * self._stride) for row in range(most)]
            self._staging_places = torch.tensor(places, device=device)

    def warm_up(self) -> None:
        """Have the kernel compiled."""
        if self._kernel is not None:
            self._kernel.compile(to_rows=self._is_store)

    def submit(self, part: Slice, after: object) -> Submitted:
        """Launch the copy of ``part`` behind the event ``after``; see ``Channel``."""
        error: RuntimeError | None = None
        turn = self._turn
        self._turn = (turn + 1) % len(self._events)
        event = self._events[turn]
        with self._on_device:
            try:
                if isinstance(after, torch.cuda.Event):
                    self._stream.wait_event(after)
                self._launch(part, turn)
            except RuntimeError as failure:
                error = failure
            event.record(self._stream)
        return Submitted(event, error)

    def _launch(self, part: Slice, turn: int) -> None:
        if part.way is Way.WHOLE:
            self._copy_whole(part)
            return
        num_blocks = len(part.slots)
        self._numbers[turn, 0, :num_blocks] = part.block_ids
        if part.way is Way.DIRECT:
            self._move_directly(part, turn)
        elif self._is_store:
            self._move(turn, num_blocks)
            self._copy_staged(part)
        else:
            self._copy_staged(part)
            self._move(turn, num_blocks)

    def _move_directly(self, part: Slice, turn: int) -> None:
        kernel, pool, stride = self._kernel, self._pool, self._stride
        assert kernel is not None
        places = [kernel.place(pool + slot * stride) for slot in part.slots]
        self._numbers[turn, 1, : len(places)] = places
        kernel.move(
            *self._addresses[turn],
            len(places),
            to_rows=self._is_store,
            num_programs=self._table.direct_programs,
            stream=self._handle,
        )

    def _move(self, turn: int, num_blocks: int) -> None:
        """Between the cache and the staging buffer."""
        if self._kernel is None:
            # caches made in inference mode can be written in inference mode only
            with torch.cuda.stream(self._stream), torch.inference_mode():
                self._gather.move(self._ids[turn, 0, :num_blocks], to_rows=self._is_store)
            return
        self._kernel.move(
            self._addresses[turn][0],
            self._staging_places.data_ptr(),
            num_blocks,
            to_rows=self._is_store,
            num_programs=self._table.staged_programs,
            stream=self._handle,
        )

    def _copy_staged(self, part: Slice) -> None:
        stride, staging = self._stride, self._staging.data_ptr()
        for first, number in part.runs:
            self._copy(part.slots[first], staging + first * stride, number * stride)

    def _copy_whole(self, part: Slice) -> None:
        """A run of more than one block is as contiguous in the cache as it is in the pool."""
        segment = self._paged.segments[0]
        for first, number in part.runs:
            nbytes = (number - 1) * self._stride + segment.nbytes
            address = self._paged.address(segment, part.block_ids[first])
            self._copy(part.slots[first], address, nbytes)

    def _copy(self, slot: int, address: int, nbytes: int) -> None:
        host, stream = self._pool + slot * self._stride, self._handle
        if self._is_store:
            cuda_dma.copy(host, address, nbytes, to_host=True, stream=stream)
        else:
            cuda_dma.copy(address, host, nbytes, to_host=False, stream=stream)
