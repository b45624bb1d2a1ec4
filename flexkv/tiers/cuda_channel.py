"""One CUDA stream with its staging buffer: what the slices of a copy are launched on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexkv.tiers import cuda_dma
from flexkv.tiers.cuda_gather import TorchMover
from flexkv.tiers.cuda_lane import Submitted
from flexkv.tiers.cuda_slices import Way, needs_staging, slice_blocks
from flexkv.tiers.gpu import rows_of

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
        self._first = paged.address(paged.segments[0], 0)
        self._rows = rows_of(paged.segments)
        self._pool = pool
        self._is_store = is_store
        self._stride = shape.slot_stride
        self._table = table
        self._on_device = torch.cuda.device(device)
        # Of the model's own priority it may share a queue with it, and wait for all that is in it.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._handle = self._stream.cuda_stream
        most = slice_blocks(shape, table)
        num_staged = most if needs_staging(shape, table) else 0
        self._staging = torch.empty(num_staged * self._stride, dtype=torch.uint8, device=device)
        # As many as there are slices in flight in both streams: the one before has ended then.
        number = table.max_slices
        self._ids = torch.empty((number, 2, most + most % 2), dtype=torch.int64, pin_memory=True)
        self._gpu_ids = torch.empty_like(self._ids, device=device)
        self._numbers = self._ids.numpy()
        self._row_nbytes = 8 * self._ids.shape[2]
        self._events = [_new_event(blocking=True) for _ in range(number)]
        self._spinning_events = [_new_event(blocking=False) for _ in range(number)]
        self._turn = 0
        self._kernel = kernel
        self._most_few = 0
        if kernel is None:
            self._gather = TorchMover(paged, self._staging, self._stride, device)
        else:
            first = self._staging.data_ptr()
            places = [kernel.place(first + row * self._stride) for row in range(num_staged)]
            self._staging_places = torch.tensor(places, device=device)
            self._first_places = places[: kernel.most_few]
            self._most_few = kernel.most_few

    def warm_up(self) -> None:
        """Have the kernel compiled."""
        if self._kernel is not None:
            self._kernel.compile(to_rows=self._is_store)

    def submit(self, part: Slice, after: object) -> Submitted:
        """Launch the copy of ``part`` behind the event ``after``; see ``Channel``."""
        error: RuntimeError | None = None
        turn = self._turn
        self._turn = (turn + 1) % len(self._events)
        with self._on_device:
            event = self._events[turn]
            try:
                # one who spins must not have to wait for the model
                if not isinstance(after, torch.cuda.Event) or after.query():  # type: ignore[no-untyped-call]
                    if part.is_last and self._nbytes(part) <= self._table.spin_nbytes:
                        event = self._spinning_events[turn]
                else:
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
        if part.way is Way.ROWS:
            self._copy_rows(part)
            return
        if part.way is Way.DIRECT:
            self._move_directly(part, turn)
            return
        if not self._is_few(part):
            self._numbers[turn, 0, : len(part.slots)] = part.block_ids
            self._fetch_ids(turn, len(part.slots))
        if self._is_store:
            self._move(part, turn)
            self._copy_staged(part)
        else:
            self._copy_staged(part)
            self._move(part, turn)

    def _move_directly(self, part: Slice, turn: int) -> None:
        kernel, pool, stride = self._kernel, self._pool, self._stride
        assert kernel is not None
        places = [kernel.place(pool + slot * stride) for slot in part.slots]
        number, programs = len(places), self._table.direct_programs
        if self._is_few(part):
            kernel.move_few(
                part.block_ids,
                places,
                to_rows=self._is_store,
                num_programs=programs,
                stream=self._handle,
            )
            return
        self._numbers[turn, 0, :number] = part.block_ids
        self._numbers[turn, 1, :number] = places
        self._fetch_ids(turn, self._row_nbytes // 8 + number)
        first = self._gpu_ids.data_ptr() + 2 * turn * self._row_nbytes
        kernel.move(
            first,
            first + self._row_nbytes,
            number,
            to_rows=self._is_store,
            num_programs=programs,
            stream=self._handle,
        )

    def _fetch_ids(self, turn: int, number: int) -> None:
        if self._kernel is not None:
            at = 2 * turn * self._row_nbytes
            source, target = self._ids.data_ptr() + at, self._gpu_ids.data_ptr() + at
            self._kernel.fetch(source, target, number, stream=self._handle)

    def _move(self, part: Slice, turn: int) -> None:
        """Between the cache and the staging buffer."""
        number, programs = len(part.slots), self._table.staged_programs
        if self._kernel is None:
            # caches made in inference mode can be written in inference mode only
            with torch.cuda.stream(self._stream), torch.inference_mode():
                self._gather.move(self._ids[turn, 0, :number], to_rows=self._is_store)
        elif self._is_few(part):
            self._kernel.move_few(
                part.block_ids,
                self._first_places[:number],
                to_rows=self._is_store,
                num_programs=programs,
                stream=self._handle,
            )
        else:
            self._kernel.move(
                self._gpu_ids.data_ptr() + 2 * turn * self._row_nbytes,
                self._staging_places.data_ptr(),
                number,
                to_rows=self._is_store,
                num_programs=programs,
                stream=self._handle,
            )

    def _is_few(self, part: Slice) -> bool:
        return len(part.slots) <= self._most_few

    def _nbytes(self, part: Slice) -> int:
        return len(part.slots) * self._stride

    def _copy_staged(self, part: Slice) -> None:
        stride, staging = self._stride, self._staging.data_ptr()
        for first, number in part.runs:
            self._copy(part.slots[first], staging + first * stride, number * stride)

    def _copy_whole(self, part: Slice) -> None:
        """A run of more than one block is as contiguous in the cache as it is in the pool."""
        (segment, _, _), *_ = self._rows
        for first, number in part.runs:
            nbytes = (number - 1) * self._stride + segment.nbytes
            address = self._first + part.block_ids[first] * segment.stride
            self._copy(part.slots[first], address, nbytes)

    def _copy_rows(self, part: Slice) -> None:
        (first, number, step), *_ = self._rows
        for block_id, slot in zip(part.block_ids, part.slots, strict=True):
            cuda_dma.copy_rows(
                self._pool + slot * self._stride,
                self._first + block_id * first.stride,
                step=step,
                nbytes=first.nbytes,
                number=number,
                to_host=self._is_store,
                stream=self._handle,
            )

    def _copy(self, slot: int, address: int, nbytes: int) -> None:
        host, stream = self._pool + slot * self._stride, self._handle
        if self._is_store:
            cuda_dma.copy(host, address, nbytes, to_host=True, stream=stream)
        else:
            cuda_dma.copy(address, host, nbytes, to_host=False, stream=stream)


def _new_event(*, blocking: bool) -> torch.cuda.Event:
    return torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]
