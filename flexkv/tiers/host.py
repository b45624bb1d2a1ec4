"""The host pool: one piece of shared memory that the engine and its GPU workers map."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from flexkv.errors import ConfigError, InputError, LayoutError
from flexkv.tiers.memory import require_memory

_log = logging.getLogger(__name__)

_ALIGNMENT = 4096  # what direct I/O asks for
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_TOUCH_NBYTES = 4 << 20  # at a time: who wants to map memory meanwhile waits for the end
_MAX_TOUCH_THREADS = 16
_SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class HostPool:
    """Slots of host memory in one memfd, laid out ``[rank][slot]``, 4096-aligned.

    A slot is a rank's part of a block: ``slot_nbytes`` bytes, ``slot_stride`` apart. Memory is
    taken from the system when it is touched, not before. ``touch_threads`` is how many threads
    touch it (0: one per core, at most 16). ``huge_pages`` asks for pages of 2 MiB, where the system
    gives them to shared memory. ``source`` maps the pool of another process instead of making one;
    see ``open``.

    Raises:
        ConfigError: not Linux, or less memory is available than the pool needs.
    """

    def __init__(
        self,
        num_slots: int,
        slot_nbytes: int,
        num_ranks: int = 1,
        touch_threads: int = 0,
        *,
        huge_pages: bool = False,
        source: str | int | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise ConfigError(f"the host pool needs Linux (memfd), and this is {sys.platform}")
        sizes = {"num_slots": num_slots, "slot_nbytes": slot_nbytes, "num_ranks": num_ranks}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self.slot_stride = slot_stride(slot_nbytes)
        self.num_ranks = num_ranks
        # whole pages, so that each rank can touch and pin its region and nothing else
        self.region_nbytes = _rounded_up(num_slots * self.slot_stride, mmap.PAGESIZE)
        self.nbytes = num_ranks * self.region_nbytes
        self.num_touch_threads = touch_threads or min(os.cpu_count() or 1, _MAX_TOUCH_THREADS)
        self._touching: list[threading.Thread] = []
        self._pid = os.getpid()
        self.fd = _created(self.nbytes) if source is None else _opened(source, self.nbytes)
        # The array exports the mapping's buffer (torch.frombuffer would not), so it is unmapped
        # when the last view is gone, and never under one.
        mapping = mmap.mmap(self.fd, self.nbytes)
        if huge_pages:
            _ask_for_huge_pages(mapping)
        array = np.frombuffer(mapping, np.uint8)
        self._bytes: torch.Tensor | None = torch.from_numpy(array)

    @classmethod
    def open(
        cls,
        source: str | int,
        num_slots: int,
        slot_nbytes: int,
        num_ranks: int = 1,
        touch_threads: int = 0,
        *,
        huge_pages: bool = False,
    ) -> HostPool:
        """Map the pool of another process: the ``path()`` it told, or a descriptor it sent.

        Raises:
            ConfigError: there is no such file, or this process may not open it.
            LayoutError: the pool is of another size than these numbers say.
        """
        return cls(
            num_slots,
            slot_nbytes,
            num_ranks,
            touch_threads,
            huge_pages=huge_pages,
            source=source,
        )

    def path(self) -> str:
        """Where a process of the same user can open the pool, as long as this one keeps it."""
        return f"/proc/{self._pid}/fd/{self.fd}"

    def region(self, rank: int) -> torch.Tensor:
        """``rank``'s slots: uint8 of shape (num_slots, slot_nbytes), the pool's own memory."""
        _check("rank", rank, self.num_ranks)
        return self._mapped().as_strided(
            (self.num_slots, self.slot_nbytes), (self.slot_stride, 1), rank * self.region_nbytes
        )

    def slot(self, rank: int, slot: int) -> memoryview:
        """One slot: writable, ``slot_nbytes`` long, the pool's own memory."""
        _check("rank", rank, self.num_ranks)
        _check("slot", slot, self.num_slots)
        start = rank * self.region_nbytes + slot * self.slot_stride
        return self._mapped().numpy().data[start : start + self.slot_nbytes]

    def memory(self) -> memoryview:
        """All of the pool, as it is laid out: for I/O past the page cache, which moves padding."""
        return self._mapped().numpy().data

    def touch(self, rank: int) -> None:
        """Take the memory of ``rank``'s region, in threads; what is written there stays.

        Blocks the calling thread, but never the GIL. Ends early where the pool is closed.

        Raises:
            ConfigError: less memory is available than the region still needs.
        """
        _check("rank", rank, self.num_ranks)
        self._touch(rank * self.region_nbytes, self.region_nbytes)

    def touch_soon(self, rank: int) -> None:
        """``touch`` in the background; what goes wrong is logged."""

        def touch() -> None:
            try:
                self.touch(rank)
            except ConfigError:
                _log.exception("the host pool's memory can't all be taken")
            except (InputError, OSError):
                _log.debug("the host pool was closed before it was touched")

        _check("rank", rank, self.num_ranks)
        thread = threading.Thread(target=touch, name="flexkv-touch", daemon=True)
        self._touching.append(thread)
        thread.start()

    def touch_all(self) -> None:
        """``touch`` every region."""
        self._touch(0, self.nbytes)

    def touch_part(self, part: torch.Tensor) -> None:
        """``touch`` some of a region's bytes, in the calling thread; asks for no memory first."""
        for step in _parts(part, _TOUCH_NBYTES):
            if self._bytes is None:
                return
            _populate(step)

    def require_memory(self, nbytes: int) -> None:
        """See that ``nbytes`` of the pool can still be taken, as far as they are not yet.

        Raises:
            ConfigError: less memory is available.
        """
        untouched = max(0, self.nbytes - 512 * os.fstat(self.fd).st_blocks)
        require_memory(min(nbytes, untouched))

    def close(self) -> None:
        """Let go of the pool. Memory stays mapped for as long as a view of it lives."""
        if self._bytes is not None:
            self._bytes = None
            for thread in self._touching:  # within milliseconds: it looks at what we just did
                thread.join()
            os.close(self.fd)

    def _mapped(self) -> torch.Tensor:
        if self._bytes is None:
            raise InputError("the host pool is closed")
        return self._bytes

    def _touch(self, start: int, nbytes: int) -> None:
        region = self._mapped()[start : start + nbytes]
        self.require_memory(nbytes)
        share = _rounded_up(-(-nbytes // self.num_touch_threads), mmap.PAGESIZE)
        with ThreadPoolExecutor(self.num_touch_threads, "flexkv-touch") as threads:
            shares = [threads.submit(self.touch_part, part) for part in _parts(region, share)]
        for done in shares:
            done.result()


def _created(nbytes: int) -> int:
    require_memory(nbytes)
    fd = os.memfd_create("flexkv-pool", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    return fd


def _opened(source: str | int, nbytes: int) -> int:
    try:
        if isinstance(source, int):
            fd = os.dup(source)  # each side closes its own
        else:
            fd = os.open(source, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"the host pool {source} can't be opened: {error.strerror}") from error
    found = os.fstat(fd).st_size
    if found != nbytes:
        os.close(fd)
        raise LayoutError(
            f"the host pool {source} has {found} bytes, where {nbytes} are expected: num_slots, "
            "slot_nbytes and num_ranks must be those it was made with"
        )
    return fd


def _ask_for_huge_pages(mapping: mmap.mmap) -> None:
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        _log.warning("no huge pages for the host pool: %s", error.strerror)
        return
    try:
        setting = _SHMEM_HUGE_PAGES.read_text()
    except OSError:
        setting = ""
    if "[never]" in setting or "[deny]" in setting:
        _log.warning("no huge pages for the host pool: %s says never", _SHMEM_HUGE_PAGES)


def _populate(part: torch.Tensor) -> None:
    # through ctypes, which releases the GIL; mmap.madvise holds it
    libc = ctypes.CDLL(None, use_errno=True)
    address, nbytes = ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(part.numel())
    if libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) == 0:
        return
    if ctypes.get_errno() == errno.EINVAL:  # an older kernel
        pages = part.numpy()[:: mmap.PAGESIZE]
        np.bitwise_or(pages, 0, out=pages)  # writes what is there
        return
    raise ConfigError(
        f"the system refuses {part.numel()} bytes of the host pool "
        f"({os.strerror(ctypes.get_errno())}): lower num_cpu_blocks or cpu_cache_gb"
    )


def _parts(whole: torch.Tensor, nbytes: int) -> list[torch.Tensor]:
    return [whole[start : start + nbytes] for start in range(0, whole.numel(), nbytes)]


def _check(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise InputError(f"{name} {value} is not in the host pool, which has {limit}")


def slot_stride(slot_nbytes: int) -> int:
    """Bytes from one slot to the next."""
    return _rounded_up(slot_nbytes, _ALIGNMENT)


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
