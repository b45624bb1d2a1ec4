"""Touches and pins one rank's region of the host pool, chunk by chunk, in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flexkv.errors import ConfigError, TransferError
from flexkv.tiers.numa import stay_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from flexkv.tiers.host import HostPool

_log = logging.getLogger(__name__)

_CHUNK_NBYTES = 32 << 20
_MAX_THREADS = 8  # more of them wait for the kernel's lock on the file
_MAX_CHUNKS = 1024  # a larger region is pinned in larger chunks
_MAX_CHUNK_NBYTES = 64 << 30  # one registration of 512 GiB fails


class Pinner(Protocol):
    """Pins memory that is there. Errors are RuntimeErrors that say why."""

    def pin(self, address: int, nbytes: int) -> None:
        """The range can be read and written by the device."""
        ...

    def unpin(self, address: int) -> None:
        """Undo ``pin``."""
        ...


class Pinning:
    """The pinned part of ``rank``'s region of ``pool``: it grows until it is all.

    Each thread touches a chunk, on ``cpus`` (any, if there are none), then pins it. Chunks have
    ``chunk_nbytes`` (0: 32 MiB or more) and end at the end of a slot. First come those that
    somebody waits for; then those of the last slots, since an index hands these out first.

    Raises:
        ConfigError: less memory is available than the region still needs.
    """

    def __init__(
        self,
        pool: HostPool,
        rank: int,
        pinner: Pinner,
        *,
        cpus: set[int] | None = None,
        chunk_nbytes: int = 0,
    ) -> None:
        pool.require_memory(pool.num_slots * pool.slot_stride)
        self._pool = pool
        self._pinner = pinner
        self._cpus = cpus or set()
        self._region: torch.Tensor | None = pool.region(rank)  # keeps the memory mapped
        nbytes = pool.num_slots * pool.slot_stride
        chunk_nbytes = max(chunk_nbytes or _CHUNK_NBYTES, -(-nbytes // _MAX_CHUNKS))
        self.slots_per_chunk = max(1, min(chunk_nbytes, _MAX_CHUNK_NBYTES) // pool.slot_stride)
        num_chunks = -(-pool.num_slots // self.slots_per_chunk)
        self._is_pinned = np.zeros(num_chunks, bool)
        self._one_pins = threading.Lock()  # a copy that is launched then waits for one, not for all
        self._changed = threading.Lock()  # guards all that follows
        self._todo = dict.fromkeys(reversed(range(num_chunks)))
        self._wanted: deque[int] = deque()
        self._waiting: list[tuple[NDArray[np.int64], asyncio.Future[None]]] = []
        self._num_left = num_chunks
        self._failure: str | None = None
        self._started_s = time.perf_counter()
        self.seconds: float | None = None
        self._threads = [
            threading.Thread(target=self._serve, name="flexkv-pin", daemon=True)
            for _ in range(min(pool.num_touch_threads, num_chunks, _MAX_THREADS))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_threads(self) -> int:
        """How many threads touch and pin."""
        return len(self._threads)

    async def wait(self, slots: Sequence[int]) -> None:
        """Until all of ``slots`` are pinned.

        Raises:
            TransferError: they can't be.
        """
        if not self._num_left:
            return
        chunks = np.unique(np.array(slots, np.int64) // self.slots_per_chunk)
        with self._changed:
            if self._is_pinned[chunks].all():
                return
            if self._failure is not None:
                raise TransferError(self._failure)
            self._wanted.extend(chunk for chunk in chunks.tolist() if chunk in self._todo)
            pinned: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((chunks, pinned))
        await pinned
        with self._changed:
            if not self._is_pinned[chunks].all():
                raise TransferError(self._failure or "the host pool is not pinned any more")

    def close(self) -> None:
        """Let go of the memory; nothing may be copying. Blocks until that is done."""
        self._end("the host pool was let go of before it was all pinned")
        for thread in self._threads:
            thread.join()
        for chunk in np.flatnonzero(self._is_pinned).tolist():
            with contextlib.suppress(RuntimeError):  # a lost context: the driver has let go
                self._pinner.unpin(self._part(chunk).data_ptr())
        self._is_pinned[:] = False
        self._num_left = len(self._is_pinned)
        self._region = None

    def _part(self, chunk: int) -> torch.Tensor:
        """All bytes of the chunk, those between slots included."""
        region = self._region
        assert region is not None
        first = chunk * self.slots_per_chunk
        num_slots = min(self.slots_per_chunk, region.shape[0] - first)
        stride = region.stride(0)
        offset = int(region.storage_offset()) + first * stride
        return region.as_strided((num_slots * stride,), (1,), offset)

    # What follows runs in the threads.

    def _serve(self) -> None:
        try:
            stay_on(self._cpus)
            self._pin_all()
        except BaseException as bug:
            self._end(f"the host pool can't be pinned: {bug!r}")  # nobody may wait for ever
            raise

    def _pin_all(self) -> None:
        while (chunk := self._next()) is not None:
            try:
                part = self._part(chunk)
                self._pool.touch_part(part)
                with self._one_pins:
                    self._pinner.pin(part.data_ptr(), part.numel())
            except (ConfigError, RuntimeError) as error:
                _log.exception("the host pool can't be pinned")
                self._end(f"the host pool can't be pinned: {error}")
                return
            self._done(chunk)

    def _next(self) -> int | None:
        with self._changed:
            while self._wanted:
                chunk = self._wanted.popleft()
                if chunk in self._todo:
                    del self._todo[chunk]
                    return chunk
            chunk = next(iter(self._todo), -1)
            if chunk < 0:
                return None
            del self._todo[chunk]
            return chunk

    def _done(self, chunk: int) -> None:
        with self._changed:
            self._is_pinned[chunk] = True
            self._num_left -= 1
            is_all = not self._num_left
            waiting, self._waiting = self._waiting, []
            for chunks, pinned in waiting:
                if self._is_pinned[chunks].all():
                    _wake(pinned)
                else:
                    self._waiting.append((chunks, pinned))
        if is_all:
            self.seconds = time.perf_counter() - self._started_s
            _log.info(
                "the host pool is pinned: %.1f GiB in %.2f s by %d threads",
                self._is_pinned.size * self.slots_per_chunk * self._pool.slot_stride / 2**30,
                self.seconds,
                self.num_threads,
            )

    def _end(self, reason: str) -> None:
        """No more chunks; who waits for one gets ``reason``."""
        with self._changed:
            self._failure = self._failure or reason
            self._todo.clear()
            waiting, self._waiting = self._waiting, []
        for _, pinned in waiting:
            _wake(pinned)


def _wake(future: asyncio.Future[None]) -> None:
    def wake() -> None:
        if not future.done():
            future.set_result(None)

    with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits any more
        future.get_loop().call_soon_threadsafe(wake)
