"""The SSD tier's bytes, addressed by slot, and the journal that knows them after a restart."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from aiofiles.os import wrap

from flexkv.tiers.ssd_files import FolderLock, SlotFiles
from flexkv.tiers.ssd_frames import is_addition
from flexkv.tiers.ssd_journal import DiskCalls, Journal
from flexkv.tiers.ssd_moving import RING_DEPTH, Move, Mover, UringMover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flexkv.tiers.host import HostPool
    from flexkv.tiers.ssd_frames import Kept

_T = TypeVar("_T")
_OS = DiskCalls()
_MIN_JOB_NBYTES = 128 << 10  # a thread's wake-up is not worth less
_NUM_WRITERS_BESIDE_READS = 2
_NUM_RINGS = 2  # in each direction, so that one request's tail overlaps the next one's head


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdSettings:
    """How an SSD tier works.

    ``about``: what its bytes depend on; what was kept under anything else is thrown away. None:
    nothing says so, hence nothing is kept across restarts.
    """

    folders: Sequence[Path]
    num_slots: int
    about: Mapping[str, object] | None
    num_readers: int = 8
    num_writers: int = 8
    uring_entries: int = 0
    """io_uring's requests in flight, all rings together; 0: threads."""
    sync: bool = True
    has_sums: bool = True


class SsdStore:
    """Slots on one or several disks. For callers of one event loop.

    No call of ``read`` or ``write`` ends - by return, error or cancellation - while bytes are
    still moving, so that the caller may reuse slots at once.

    Raises, by every method:
        OSError: a disk failed. Nothing more can be expected of the store but ``close``.
    """

    def __init__(self, settings: SsdSettings, pool: HostPool, calls: DiskCalls = _OS) -> None:
        self._settings = settings
        self._pool = pool
        self._calls = calls
        self._exits = ExitStack()  # what is open, in the order of opening
        self._files: SlotFiles
        self._journal: Journal
        self._mover: Mover
        self._num_jobs = (0, 0)  # of one call to read or write
        self._is_closed = False
        self.way = "closed"
        self._readers: ThreadPoolExecutor
        self._writers: ThreadPoolExecutor
        self._keeper = ThreadPoolExecutor(1, "flexkv-ssd-journal")

    @property
    def journal_nbytes(self) -> int:
        """The size of the journal now."""
        return self._journal.nbytes

    @property
    def devices(self) -> dict[Path, int]:
        """Which file system each folder is on."""
        return self._files.devices()

    async def open(self) -> list[Kept]:
        """Lock the folders, make the files, read the journal: what is there already.

        Raises:
            ConfigError: another process uses a folder.
            OSError: a folder can't be used; nothing of it is held.
        """
        try:
            (kept,) = await _in_threads(self._keeper, [self._open])
        except BaseException:
            await self.close()
            raise
        return kept

    async def read(
        self, slots: Sequence[int], host_slots: Sequence[int], sums: Sequence[int]
    ) -> list[int]:
        """Fill ``host_slots[i]`` from ``slots[i]``. Returns which i are lost, ascending.

        What is lost was short or does not have ``sums[i]``; the bytes in its host slot are
        undefined.
        """
        mover = self._mover
        moves = self._moves(slots, host_slots, sums, self._num_jobs[0])
        mover.num_reading += len(moves)
        try:
            lost = await _in_threads(self._readers, [partial(mover.read, m) for m in moves])
        finally:
            mover.num_reading -= len(moves)
        return sorted(i for part in lost for i in part)

    async def write(self, slots: Sequence[int], host_slots: Sequence[int]) -> list[int]:
        """Fill ``slots[i]`` from ``host_slots[i]``. Returns the sums of what was written.

        Readable on return; durable after the next ``record`` that tells of it.
        """
        mover, num_jobs = self._mover, self._num_jobs[1]
        if mover.num_reading:  # readers keep their bandwidth
            num_jobs = min(num_jobs, _NUM_WRITERS_BESIDE_READS)
        moves = self._moves(slots, host_slots, (), num_jobs)
        mover.num_writing += len(moves)
        try:
            written = await _in_threads(self._writers, [partial(mover.write, m) for m in moves])
        finally:
            mover.num_writing -= len(moves)
        sums = [0] * len(slots)
        for move, part in zip(moves, written, strict=True):
            for i, checksum in zip(move.order, part, strict=True):
                sums[i] = checksum
        return sums

    async def record(self, records: Sequence[bytes]) -> None:
        """Write records into the journal, durable on return; first the bytes that they tell of."""
        await _in_threads(self._keeper, [partial(self._record, records)])

    async def start_snapshot(self) -> None:
        """Begin to replace the journal by a shorter one; ``record`` goes into both."""
        await _in_threads(self._keeper, [self._journal.start_snapshot])

    async def append_snapshot(self, records: Sequence[bytes]) -> None:
        """Write records into the shorter journal only."""
        await _in_threads(self._keeper, [partial(self._journal.append_snapshot, records)])

    async def finish_snapshot(self) -> None:
        """The shorter journal replaces the other."""
        await _in_threads(self._keeper, [self._journal.finish_snapshot])

    async def close(self) -> None:
        """Let go of the disks, once nothing moves any more; once more does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        await _in_threads(self._keeper, [self._exits.close])
        self._keeper.shutdown()

    def _open(self) -> list[Kept]:
        settings, pool, exits = self._settings, self._pool, self._exits
        for folder in settings.folders:
            exits.callback(FolderLock(folder).release)
        slot_nbytes = pool.num_ranks * pool.slot_stride
        self._files = SlotFiles(settings.folders, settings.num_slots, slot_nbytes, self._calls)
        exits.callback(self._files.close)
        self._mover = self._chosen_mover()
        exits.callback(self._mover.close)
        num_readers, num_writers = self._num_jobs
        self._readers = ThreadPoolExecutor(num_readers, "flexkv-ssd-read")
        self._writers = ThreadPoolExecutor(num_writers, "flexkv-ssd-write")
        exits.callback(self._readers.shutdown)
        exits.callback(self._writers.shutdown)
        about = {
            "block_nbytes": pool.slot_nbytes,
            "num_ranks": pool.num_ranks,
            **(settings.about or {}),
        }
        folder = settings.folders[0]
        self._journal = Journal(folder, about, self._calls, sync=settings.sync)
        exits.callback(self._journal.close)
        can_keep = self._files.had_all and settings.about is not None
        return self._journal.load(settings.num_slots, can_keep=can_keep)

    def _chosen_mover(self) -> Mover:
        """How blocks are moved; ``way`` says it, and why."""
        settings, files = self._settings, self._files
        how = "direct I/O" if files.is_direct else "buffered I/O"
        self._num_jobs = (settings.num_readers, settings.num_writers)
        self.way = f"{how}, {settings.num_readers} reader and {settings.num_writers} writer threads"
        if settings.uring_entries:
            num_each_way = min(_NUM_RINGS, settings.uring_entries // 2)
            num_rings = max(1, 2 * num_each_way)  # a single one is for both ways
            depth = min(RING_DEPTH, settings.uring_entries // num_rings)
            try:
                mover = UringMover(
                    files,
                    self._pool,
                    self._calls,
                    has_sums=settings.has_sums,
                    num_rings=num_rings,
                    depth=depth,
                )
            except ImportError:
                self.way += ", because the extra flexkv[uring] is not installed"
            except OSError as error:
                self.way += f", because the kernel forbids io_uring: {error.strerror}"
            else:
                self._num_jobs = (max(1, num_each_way), max(1, num_each_way))
                self.way = f"{how}, {num_rings} io_urings of {depth} requests in flight"
                return mover
        return Mover(files, self._pool, self._calls, has_sums=settings.has_sums)

    def _record(self, records: Sequence[bytes]) -> None:
        self._files.check()
        if self._settings.sync and any(map(is_addition, records)):
            self._files.sync()
        self._journal.append(records)

    def _moves(
        self,
        slots: Sequence[int],
        host_slots: Sequence[int],
        sums: Sequence[int],
        num_jobs: int,
    ) -> list[Move]:
        """One share for each thread: neighbours on the disk stay together."""
        order = sorted(range(len(slots)), key=lambda i: self._files.place(slots[i]))
        least = max(1, _MIN_JOB_NBYTES // self._files.slot_nbytes)
        size = max(least, -(-len(order) // num_jobs))
        return [
            Move(slots, host_slots, sums, order[at : at + size])
            for at in range(0, len(order), size)
        ]


async def _in_threads(threads: ThreadPoolExecutor, jobs: Sequence[Callable[[], _T]]) -> list[_T]:
    """Run ``jobs`` to the end of all, through cancellation and failures too."""
    # tasks that this call alone owns; nobody can cancel them, for what they began goes on
    running = asyncio.gather(*(wrap(job)(executor=threads) for job in jobs), return_exceptions=True)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    results: list[_T] = []
    for result in running.result():
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results
