"""Copies blocks between paged KV caches on a GPU and the host pool: the CUDA edition."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from flexkv.errors import ConfigError, EngineClosedError, InputError, LayoutError, TransferError
from flexkv.tiers.cuda_channel import CudaChannel
from flexkv.tiers.cuda_dma import MAX_STEP
from flexkv.tiers.cuda_host import CudaPinner, cpus_of
from flexkv.tiers.cuda_lane import Lane
from flexkv.tiers.cuda_slices import Shape, WayTable, cut, described
from flexkv.tiers.gpu import checked_ids, rows_of
from flexkv.tiers.pinning import Pinning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexkv.tiers.cuda_kernel import KernelMover
    from flexkv.tiers.host import HostPool
    from flexkv.tiers.segments import PagedSegments

_log = logging.getLogger(__name__)

_LEAST_SLICE_NBYTES = 1 << 20


class CudaPagedCopier:
    """Copies on two streams for each direction. For callers of one event loop.

    The first copies run as soon as their slots are pinned. After a CUDA error that ends the
    context, or where the kernel can't be made, ``loss`` says so, and every copy fails.
    """

    def __init__(
        self, paged: PagedSegments, device: torch.device, *, table: WayTable | None = None
    ) -> None:
        self.loss: str | None = None
        self._paged = paged
        self._device = device
        self._table = table or WayTable()
        self._num_slots = 0
        self._shape: Shape | None = None
        self._lanes: dict[bool, Lane] = {}  # by whether they store
        self._pinning: Pinning | None = None
        self._warm: Future[None] = Future()  # done: the kernel is compiled
        self._warm.set_result(None)
        self._closed = False

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return self._paged.num_blocks

    @property
    def pinning(self) -> Pinning | None:
        """How far the pool is pinned, if there is one."""
        return self._pinning

    def attach_pool(self, pool: HostPool, rank: int) -> None:
        """Copy to and from ``pool``'s region of ``rank`` from now on; pins it in the background.

        Raises:
            LayoutError: a slot is smaller than a block.
            ConfigError: too little memory, on the host for the pool or on the GPU for staging.
        """
        paged = self._paged
        if pool.slot_nbytes < paged.block_nbytes:
            raise LayoutError(
                f"a slot of the host pool has {pool.slot_nbytes} bytes, but a block of the caches "
                f"{paged.block_nbytes}"
            )
        self._detach()
        pinner = CudaPinner(self._device)
        self._pinning = pinning = Pinning(pool, rank, pinner, cpus=cpus_of(self._device))
        try:
            self._make_lanes(pool, rank, pinning)
        except BaseException:
            self._detach()
            raise

    def mark(self) -> object:
        """The end of what is on the current stream by now: an event; None if that has ended."""
        stream = torch.cuda.current_stream(self._device)
        return None if stream.query() else stream.record_event()  # a new event takes 20 us

    async def gather(self, block_ids: Sequence[int], slots: Sequence[int], after: object) -> None:
        """Copy blocks of the cache into slots, after the work marked by ``after``.

        Raises:
            InputError: ids or slots out of range, or not as many; nothing was copied.
            TransferError: the slots' bytes are undefined.
            EngineClosedError: the copier is closed; nothing was copied.
        """
        await self._copy(block_ids, slots, after, is_store=True)

    async def scatter(
        self, slots: Sequence[int], block_ids: Sequence[int], after: object = None
    ) -> None:
        """Copy slots into blocks of the cache, after the work marked by ``after``.

        On return every stream sees the bytes.

        Raises:
            InputError: ids or slots out of range, or not as many; nothing was copied.
            TransferError: the blocks' bytes are undefined.
            EngineClosedError: the copier is closed; nothing was copied.
        """
        await self._copy(block_ids, slots, after, is_store=False)

    def abandon(self) -> None:
        """Begin no copy any more, and return when none runs: for when the loop has died."""
        self._closed = True
        for lane in list(self._lanes.values()):
            lane.close()

    async def close(self) -> None:
        """Let go of threads, the cache and the pool; nothing may be copying."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._detach)
            self._paged = replace(self._paged, storages=())

    async def _copy(
        self, block_ids: Sequence[int], slots: Sequence[int], after: object, *, is_store: bool
    ) -> None:
        if self._closed:
            raise EngineClosedError("the copier is closed")
        if self._shape is None or self._pinning is None:
            raise InputError("no host pool is attached: call attach_pool first")
        if len(block_ids) != len(slots):
            raise InputError(f"{len(block_ids)} block ids do not go with {len(slots)} slots")
        block_ids = checked_ids("block id", block_ids, self._paged.num_blocks)
        slots = checked_ids("slot", slots, self._num_slots)
        self._check_loss()
        if not self._warm.done():
            await asyncio.shield(asyncio.wrap_future(self._warm))
        await self._pinning.wait(slots)
        self._check_loss()
        slices = cut(block_ids, slots, self._shape, self._table, is_store=is_store)
        await self._lanes[is_store].copy(slices, after)

    def _check_loss(self) -> None:
        if self.loss is not None:
            raise TransferError(self.loss)

    def _lose(self, error: RuntimeError) -> None:
        self._fail(f"the CUDA context of {self._device} is lost: {error}")

    def _fail(self, reason: str) -> None:
        if self.loss is None:
            self.loss = reason
            _log.error("%s; nothing is copied from now on", reason)

    def _make_lanes(self, pool: HostPool, rank: int, pinning: Pinning) -> None:
        paged = self._paged
        kernel = _kernel_of(paged, pool.slot_stride, self._device)
        self._shape = Shape(
            block_nbytes=paged.block_nbytes,
            slot_stride=pool.slot_stride,
            slots_per_chunk=pinning.slots_per_chunk,
            is_whole=len(paged.segments) == 1,
            row_nbytes=_row_nbytes(paged),
            blocks_touch=_blocks_touch(paged, pool.slot_stride),
            has_kernel=kernel is not None,
        )
        self._num_slots = pool.num_slots
        channels = self._new_channels(pool.region(rank).data_ptr(), kernel)
        for is_store, name in ((False, "flexkv-load"), (True, "flexkv-store")):
            self._lanes[is_store] = Lane(
                name,
                channels[is_store],
                max_slices=self._table.max_slices,
                on_loss=self._lose,
            )
        self._begin_warm_up([channel for both in channels.values() for channel in both])

    def _new_channels(
        self, region: int, kernel: KernelMover | None
    ) -> dict[bool, list[CudaChannel]]:
        """Two for each direction, with as large staging buffers as there is memory for."""
        assert self._shape is not None
        while True:
            try:
                return {
                    is_store: [
                        CudaChannel(
                            self._paged,
                            region,
                            self._device,
                            is_store=is_store,
                            shape=self._shape,
                            table=self._table,
                            kernel=kernel,
                        )
                        for _ in range(2)
                    ]
                    for is_store in (False, True)
                }
            except torch.OutOfMemoryError as error:
                slice_nbytes = self._table.slice_nbytes // 2
                if slice_nbytes < _LEAST_SLICE_NBYTES:
                    raise ConfigError(
                        f"no memory is left on {self._device} for staging buffers: give vLLM a "
                        f"lower --gpu-memory-utilization ({error})"
                    ) from error
                self._table = replace(self._table, slice_nbytes=slice_nbytes)

    def _begin_warm_up(self, channels: list[CudaChannel]) -> None:
        """Compile what has to be, beside the loop; copies wait for it."""
        warm: Future[None] = Future()
        self._warm = warm

        def warm_up() -> None:
            try:
                for channel in channels:
                    channel.warm_up()
            except BaseException as error:  # whatever it is: without the kernel nothing moves
                self._fail(f"the kernel for {self._device} can't be made: {error!r}")
                raise
            finally:
                warm.set_result(None)

        threading.Thread(target=warm_up, name="flexkv-warm-up", daemon=True).start()
        assert self._shape is not None
        name = torch.cuda.get_device_name(self._device)
        _log.info("copies on %s: %s", name, described(self._shape, self._table))

    def _detach(self) -> None:
        if self._pinning is not None:
            self._warm.result()
            for lane in self._lanes.values():
                lane.close()
            self._pinning.close()
        self._lanes.clear()
        self._pinning = None
        self._shape = None


def _blocks_touch(paged: PagedSegments, slot_stride: int) -> bool:
    """Are blocks laid out as slots are, without a gap? One in the cache may be somebody's."""
    return paged.segments[0].stride == slot_stride == paged.block_nbytes


def _row_nbytes(paged: PagedSegments) -> int:
    """How long the rows are that make a block, if one DMA takes them all; else 0."""
    (first, number, step), *others = rows_of(paged.segments)
    is_one = number > 1 and not others and step <= MAX_STEP
    return first.nbytes if is_one else 0


def _kernel_of(paged: PagedSegments, row_stride: int, device: torch.device) -> KernelMover | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from flexkv.tiers.cuda_kernel import KernelMover  # noqa: PLC0415  # not everybody has Triton

    return KernelMover(paged, row_stride, device)
