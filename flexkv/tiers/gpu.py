"""Copies blocks between a paged KV cache and the host pool; this is the CPU edition."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING

import torch

from flexkv.errors import EngineClosedError, InputError, LayoutError, TransferError
from flexkv.tiers.segments import segments_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flexkv.tiers.base import PagedCopier
    from flexkv.tiers.host import HostPool
    from flexkv.tiers.segments import PagedSegments, Segment

_DTYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# torch hands a copy of 32768 elements or more to a team of OpenMP threads, which stalls the model.
_MAX_ELEMENTS = 32767
# Copies in one call of torch. Each call takes the GIL back once, which costs 5 ms beside a busy
# thread; more would hold it for over 1 ms while the call is put together.
_MAX_COPIES = 256


def make_copier(
    kv_caches: Mapping[str, torch.Tensor],
    tokens_per_block: int,
    block_nbytes: int,
    block_axis: int | None = None,
) -> PagedCopier:
    """The copier for ``kv_caches``, by the device that they are on.

    Raises:
        LayoutError: they can't be cut into blocks of ``tokens_per_block`` tokens and
            ``block_nbytes`` bytes, or this version has no copier for the device.
    """
    devices = _devices_of(kv_caches)
    if unknown := {device.type for device in devices} - {"cpu", "cuda"}:
        names = " and ".join(sorted(name.upper() for name in unknown))
        raise LayoutError(f"{names} caches are not in this version: CPU and CUDA tensors only")
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise LayoutError(f"the caches are on {names}: one rank has them all on one device")
    paged = segments_of(kv_caches, tokens_per_block, block_axis)
    if paged.block_nbytes != block_nbytes:
        raise LayoutError(
            f"a block of these {paged.num_layers} layers has {paged.block_nbytes} bytes, but the "
            f"layout says block_nbytes={block_nbytes}: give KVLayout.of_model the layers, heads, "
            "head size and data type that this rank's tensors have"
        )
    device = next(iter(devices))
    if device.type == "cuda":
        from flexkv.tiers.cuda import CudaPagedCopier  # noqa: PLC0415  # whom it concerns

        return CudaPagedCopier(paged, device)
    return CpuPagedCopier(paged)


def _devices_of(kv_caches: Mapping[str, torch.Tensor]) -> set[torch.device]:
    if not isinstance(kv_caches, Mapping):
        raise LayoutError(f"kv_caches is {type(kv_caches).__name__}: give {{layer name: tensor}}")
    for name, cache in kv_caches.items():  # a NumPy array's device is a text
        if not isinstance(getattr(cache, "device", None), torch.device):
            raise LayoutError(f"layer {name!r} is {type(cache).__name__}: give a torch tensor")
    return {cache.device for cache in kv_caches.values()}


@dataclass(frozen=True, slots=True)
class _Piece:
    """The same bytes of every block, on both sides: tensors of shape (blocks, rows, elements)."""

    cache: torch.Tensor
    host: torch.Tensor


@dataclass(eq=False, slots=True)
class _Copy:
    pieces: Sequence[_Piece]
    runs: Sequence[tuple[int, int, int]]  # block id, slot, how many of both
    is_store: bool
    done: asyncio.Future[TransferError | None]


class CpuPagedCopier:
    """Copies with one thread, loads before stores. For callers of one event loop.

    At most ``max_queued`` loads and as many stores wait for the thread; more wait to be queued.
    """

    def __init__(self, paged: PagedSegments, *, max_queued: int = 64) -> None:
        self._paged = paged
        self._pieces: list[_Piece] = []
        self._num_slots = 0
        self._max_run = 1
        self._load_places = asyncio.Semaphore(max_queued)
        self._store_places = asyncio.Semaphore(max_queued)
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards all that follows
        self._loads: deque[_Copy] = deque()
        self._stores: deque[_Copy] = deque()
        self._ended: list[tuple[_Copy, TransferError | None]] = []
        self._closing = False

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return self._paged.num_blocks

    def attach_pool(self, pool: HostPool, rank: int) -> None:
        """Copy to and from ``pool``'s region of ``rank`` from now on; touches it in the background.

        Raises:
            LayoutError: a slot is smaller than a block.
        """
        if pool.slot_nbytes < self._paged.block_nbytes:
            raise LayoutError(
                f"a slot of the host pool has {pool.slot_nbytes} bytes, but a block of the caches "
                f"{self._paged.block_nbytes}"
            )
        self._pieces = list(_pieces_of(self._paged, pool.region(rank)))
        pool.touch_soon(rank)
        self._num_slots = pool.num_slots
        largest = max(piece.cache[0].numel() for piece in self._pieces)
        self._max_run = _MAX_ELEMENTS // largest

    def mark(self) -> object:
        """Nothing: on a CPU the caller's work on the cache is done by now."""
        return None

    async def gather(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        after: object,  # noqa: ARG002  # on a CPU the work before is done
    ) -> None:
        """Copy blocks of the cache into slots.

        Raises:
            InputError: ids or slots out of range, or not as many; nothing was copied.
            TransferError: the slots' bytes are undefined.
            EngineClosedError: the copier is closed; nothing was copied.
        """
        await self._run(block_ids, slots, is_store=True)

    async def scatter(
        self,
        slots: Sequence[int],
        block_ids: Sequence[int],
        after: object = None,  # noqa: ARG002  # as in gather
    ) -> None:
        """Copy slots into blocks of the cache; overtakes every ``gather`` that is under way.

        Raises:
            InputError: ids or slots out of range, or not as many; nothing was copied.
            TransferError: the blocks' bytes are undefined.
            EngineClosedError: the copier is closed; nothing was copied.
        """
        await self._run(block_ids, slots, is_store=False)

    def abandon(self) -> None:
        """Begin no copy any more, and return when none runs: for when the loop has died."""
        self._turn_away("the copier was abandoned")
        if self._thread is not None:
            self._thread.join()

    async def close(self) -> None:
        """End the thread and let go of the cache and the pool; nothing may be copying."""
        last = _Copy((), (), is_store=True, done=asyncio.get_running_loop().create_future())
        with self._changed:
            is_running = self._thread is not None and not self._closing
            self._closing = True
            if is_running:
                self._stores.append(last)
                self._changed.notify()
        if is_running:
            await self._end_of(last)
        if self._thread is not None:
            self._thread.join()  # it has nothing left to do
        self._pieces = []
        self._paged = replace(self._paged, storages=())

    async def _run(self, block_ids: Sequence[int], slots: Sequence[int], *, is_store: bool) -> None:
        if self._closing:
            raise EngineClosedError("the copier is closed")
        if not self._pieces:
            raise InputError("no host pool is attached: call attach_pool first")
        runs = self._runs_of(block_ids, slots)
        if not runs:
            return
        async with self._store_places if is_store else self._load_places:
            done = asyncio.get_running_loop().create_future()
            copy = _Copy(self._pieces, runs, is_store, done)
            with self._changed:
                if self._closing:
                    raise EngineClosedError("the copier was closed before the copy began")
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._serve, name="flexkv-copy", daemon=True
                    )
                    self._thread.start()
                (self._stores if is_store else self._loads).append(copy)
                self._changed.notify()
            await self._end_of(copy)

    def _runs_of(
        self, block_ids: Sequence[int], slots: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        """What to copy as (block id, slot, how many of both from there on)."""
        if len(block_ids) != len(slots):
            raise InputError(f"{len(block_ids)} block ids do not go with {len(slots)} slots")
        block_ids = checked_ids("block id", block_ids, self._paged.num_blocks)
        slots = checked_ids("slot", slots, self._num_slots)
        runs: list[tuple[int, int, int]] = []
        first_id = first_slot = length = 0
        for block_id, slot in zip(block_ids, slots, strict=True):
            goes_on = block_id == first_id + length and slot == first_slot + length
            if goes_on and 0 < length < self._max_run:
                length += 1
                runs[-1] = (first_id, first_slot, length)
            else:
                first_id, first_slot, length = block_id, slot, 1
                runs.append((block_id, slot, 1))
        return runs

    async def _end_of(self, copy: _Copy) -> None:
        """Wait for the end of ``copy``; a cancelled caller too, unless it had not begun."""
        cancelled: asyncio.CancelledError | None = None
        while not copy.done.done():
            try:
                await asyncio.wait([copy.done])
            except asyncio.CancelledError as error:
                if self._withdraw(copy):
                    raise
                cancelled = error
        if cancelled is not None:
            raise cancelled
        if failure := copy.done.result():
            raise failure

    def _withdraw(self, copy: _Copy) -> bool:
        with self._changed:
            queue = self._stores if copy.is_store else self._loads
            if copy in queue:
                queue.remove(copy)
                return True
        return False

    def _wake(self) -> None:
        with self._changed:
            ended, self._ended = self._ended, []
        for copy, failure in ended:
            copy.done.set_result(failure)

    # What follows runs in the copy thread.

    def _serve(self) -> None:
        try:
            # caches made in inference mode can be written in inference mode only
            with torch.inference_mode():
                while (copy := self._next()) is not None:
                    self._perform(copy)
        finally:  # after a bug too, nobody may wait for ever
            self._turn_away("the copy thread has ended")

    def _turn_away(self, reason: str) -> None:
        """Whatever waits has failed, and nothing comes any more."""
        with self._changed:
            self._closing = True
            left = [*self._loads, *self._stores]
            self._loads.clear()
            self._stores.clear()
            self._changed.notify()
        for copy in left:
            self._report(copy, TransferError(reason))

    def _next(self) -> _Copy | None:
        """Wait for a copy; None when the copier is closed and there are no more."""
        with self._changed:
            while not (self._loads or self._stores or self._closing):
                self._changed.wait()
            if self._loads:
                return self._loads.popleft()
            return self._stores.popleft() if self._stores else None

    def _next_load(self) -> _Copy | None:
        with self._changed:
            return self._loads.popleft() if self._loads else None

    def _perform(self, copy: _Copy) -> None:
        failure: TransferError | None = TransferError("the copy thread has failed")
        try:
            self._copy(copy)
            failure = None
        except (RuntimeError, MemoryError) as error:  # torch's errors
            failure = TransferError(f"a copy failed: {error}")
            failure.__cause__ = error
        finally:
            self._report(copy, failure)

    def _copy(self, copy: _Copy) -> None:
        step = max(1, _MAX_COPIES // max(1, len(copy.pieces)))
        for start in range(0, len(copy.runs), step):
            if copy.is_store:
                while (load := self._next_load()) is not None:
                    self._perform(load)
            runs = copy.runs[start : start + step]
            cache = [p.cache[b : b + n] for p in copy.pieces for b, _, n in runs]
            host = [p.host[s : s + n] for p in copy.pieces for _, s, n in runs]
            if copy.is_store:
                self._move(host, cache)
            else:
                self._move(cache, host)

    def _move(self, to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
        torch._foreach_copy_(to, source)  # one call, so the GIL goes and comes once

    def _report(self, copy: _Copy, failure: TransferError | None) -> None:
        with self._changed:
            self._ended.append((copy, failure))
            is_first = len(self._ended) == 1
        if is_first:
            with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits any more
                copy.done.get_loop().call_soon_threadsafe(self._wake)


def checked_ids(name: str, ids: Sequence[int], limit: int) -> list[int]:
    """``ids`` as integers: 0 to ``limit`` - 1.

    Raises:
        InputError: there are others.
    """
    try:
        whole = list(map(operator.index, ids))
    except TypeError as error:
        raise InputError(f"a {name} is not a whole number: {error}") from error
    if whole and not 0 <= min(whole) <= max(whole) < limit:
        wrong = next(i for i in whole if not 0 <= i < limit)
        raise InputError(f"{name} {wrong} is out of range: there are {limit}")
    return whole


def _pieces_of(paged: PagedSegments, region: torch.Tensor) -> Iterator[_Piece]:
    """Cut caches and pool alike, so that no copy is large enough for a team of threads."""
    numbers = [number for segment in paged.segments for number in segment[1:]]
    bases = [storage.data_ptr() for storage in paged.storages]
    unit = gcd(8, region.data_ptr(), region.stride(0), *numbers, *bases)
    caches = [torch.empty(0, dtype=_DTYPES[unit]).set_(storage) for storage in paged.storages]
    host = torch.empty(0, dtype=_DTYPES[unit]).set_(region.untyped_storage())
    slot_offset = int(region.storage_offset())
    for first, num_rows, step in rows_of(paged.segments):
        num_elements = first.nbytes // unit
        cache = caches[first.storage].as_strided(
            (paged.num_blocks, num_rows, num_elements),
            (first.stride // unit, step // unit, 1),
            first.offset // unit,
        )
        slots = host.as_strided(
            (region.shape[0], num_rows, num_elements),
            (region.stride(0) // unit, num_elements, 1),
            slot_offset // unit,
        )
        slot_offset += num_rows * first.nbytes
        yield from _cut(cache, slots)


def rows_of(segments: Sequence[Segment]) -> list[tuple[Segment, int, int]]:
    """Segments at equal distances as (the first, how many, the distance)."""
    rows: list[tuple[Segment, int, int]] = []
    for segment in segments:
        first, number, step = rows[-1] if rows else (segment, 0, 0)
        step = step or segment.offset - first.offset
        if number and segment == first._replace(offset=first.offset + number * step):
            rows[-1] = (first, number + 1, step)
        else:
            rows.append((segment, 1, 0))
    return rows


def _cut(cache: torch.Tensor, host: torch.Tensor) -> Iterator[_Piece]:
    _, num_rows, num_elements = cache.shape
    height = max(1, _MAX_ELEMENTS // num_elements)
    width = -(-num_elements // -(-num_elements // _MAX_ELEMENTS))  # equal parts
    for top in range(0, num_rows, height):
        for left in range(0, num_elements, width):
            part = (slice(None), slice(top, top + height), slice(left, left + width))
            yield _Piece(cache[part], host[part])
