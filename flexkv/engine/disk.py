"""The SSD tier: what is on it, its journal, and how it ends when a disk fails."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
from array import array
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.blocks import Tier
from flexkv.engine.disk_index import SharedDiskIndex
from flexkv.engine.disk_records import Recorder, num_ssd_slots
from flexkv.errors import ConfigError
from flexkv.events.types import BlockRemoved
from flexkv.tiers.memory import require_memory
from flexkv.tiers.ssd import SsdSettings, SsdStore
from flexkv.tiers.ssd_files import erase, failing
from flexkv.tiers.ssd_frames import cleared, removed
from flexkv.tiers.ssd_journal import DiskCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from flexkv.blocks import Blocks, KVLayout
    from flexkv.config import CacheConfig
    from flexkv.events.types import Event
    from flexkv.tiers.host import HostPool
    from flexkv.tiers.ssd_frames import Kept

_log = logging.getLogger(__name__)

_SLOT_NBYTES = 24  # of the index, at least, besides the token ids
_OUT_OF_MEMORY = {errno.ENOMEM, errno.EFAULT}  # the host pool is touched while it is in use


class Disk:
    """Slots on SSD under one index, with a journal of every change.

    Where a disk fails, everything on the tier is a miss at once, and is announced as removed piece
    by piece; with other folders left it then begins anew on those, empty; else it is off, and
    stays off. ``announce`` is told of every change in the step that makes it true.
    """

    def __init__(
        self,
        cache: CacheConfig,
        layout: KVLayout,
        identity: Mapping[str, object] | None,
        announce: Callable[[Sequence[Event]], None],
        calls: DiskCalls | None = None,
    ) -> None:
        self._cache = cache
        self._recorder = Recorder(cache, layout.tokens_per_block)
        self._announce = announce
        self._calls = calls or DiskCalls()
        self._about: dict[str, object] | None = None
        if identity is not None or cache.weights_id is not None:
            self._about = {"tokens_per_block": layout.tokens_per_block, **(identity or {})}
            self._about |= {"weights_id": cache.weights_id}
        self._folders = [Path(folder) for folder in cache.ssd_cache_dir]
        self._num_slots = num_ssd_slots(cache, layout)
        require_memory(
            self._num_slots * (_SLOT_NBYTES + 4 * layout.tokens_per_block),
            of="the index of the SSD tier",
            remedy="lower num_ssd_blocks or ssd_cache_gb",
        )
        self._devices: dict[Path, int] = {}
        self._records: list[bytes] = []
        self._failure: OSError | None = None
        self._clearing: list[asyncio.Future[bool]] = []
        self._renewed_nbytes = 0
        self._pool: HostPool
        self._tasks: asyncio.TaskGroup
        self._dropping: asyncio.Task[None] | None = None
        self.store: SsdStore
        self.is_on = False
        self.key_nbytes = 0
        self.changed = asyncio.Event()
        self._renew_index()

    @property
    def has_news(self) -> bool:
        """The journal does not know everything yet, or a disk has failed."""
        return bool(self._records or self._clearing) or self._failure is not None

    async def open(self, pool: HostPool, tasks: asyncio.TaskGroup) -> None:
        """Bring back what the journal knows; nobody is told. Where a disk fails: as later.

        ``tasks`` takes what announces the loss of a disk.

        Raises:
            ConfigError: a folder can't be used by this user, or another process uses it.
        """
        self._pool = pool
        self._tasks = tasks
        if self._about is None:
            _log.warning(
                "ssd: nothing says which weights the blocks are of, so none is kept across "
                "restarts: set weights_id"
            )
        try:
            await self._open_store()
        except OSError as error:
            await self._go_on(error, had_slots=False)

    async def flush(self) -> None:
        """On return the journal knows all that happened before; a failed disk is replaced."""
        if self._failure is not None:
            await self._start_over()
        records, self._records = self._records, []
        clearing, self._clearing = self._clearing, []
        if not self.is_on:
            _answer(clearing, is_empty=bool(clearing) and await self._erase())
            return
        store = self.store
        try:
            if records:
                await store.record(records)
            _answer(clearing, is_empty=True)
            num_resident, renewed_nbytes = self.index.num_resident, self._renewed_nbytes
            if store.journal_nbytes > self._recorder.max_nbytes(num_resident, renewed_nbytes):
                await self._renew_journal(store, self.index.placed())
        except OSError as error:
            self._clearing[:0] = (answer for answer in clearing if not answer.done())
            self.fail(store, error)

    def note_stored(self, blocks: Blocks, slots: Sequence[int], sums: Sequence[int]) -> None:
        """``blocks`` became resident in ``slots``, where their bytes have ``sums``."""
        self.key_nbytes = blocks.key_nbytes
        for slot, checksum in zip(slots, sums, strict=True):
            self.sums[slot] = checksum
        if self.is_on:
            self._records += self._recorder.records(blocks, slots, sums)

    def fail(self, store: SsdStore, error: OSError) -> None:
        """A disk of ``store`` has failed: all that was on it is lost, from now on."""
        if store is not self.store or not self.is_on:
            return
        self.is_on = False
        self._failure = error
        _log.error("ssd: %d blocks are lost, a disk failed: %s", self.index.num_resident, error)
        self._records.clear()
        if self.index.drop_some():
            self._dropping = self._tasks.create_task(_drop_all(self.index))
        self.changed.set()

    def fail_to_move(self, store: SsdStore, error: OSError) -> None:
        """Blocks were not moved: the disk has failed, unless it was memory that was missing."""
        if error.errno in _OUT_OF_MEMORY:
            _log.warning("ssd: blocks were not moved, host memory is short: %s", error)
        else:
            self.fail(store, error)

    def lose(self, blocks: Blocks) -> None:
        """The bytes of the last of ``blocks`` have rotted, so it and what follows it leave."""
        self.index.lose(blocks)
        self.changed.set()

    def clear(self) -> asyncio.Future[bool]:
        """Forget everything. Announces nothing.

        The answer comes when that is durable: whether a restart finds nothing of it.
        """
        self.index.forget()
        self._records.append(cleared())
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._clearing.append(answer)
        self.changed.set()
        return answer

    async def close(self) -> None:
        """Write a short journal that knows who was used last, and let go; nothing may move."""
        if not hasattr(self, "store"):
            return
        if self.is_on and self._about is not None:
            try:
                await self._renew_journal(self.store, self.index.ranked(), is_ranked=True)
            except OSError as error:
                self.fail(self.store, error)
        self.is_on = False
        await self.store.close()

    def _renew_index(self) -> None:
        num_slots = self._num_slots * len(self._folders) // len(self._cache.ssd_cache_dir)
        ratio = self._cache.evict_ratio
        self.index = SharedDiskIndex(Tier.SSD, num_slots, self._emit, ratio)
        self.sums = array("Q", bytes(8 * num_slots))

    def _emit(self, events: Sequence[Event]) -> None:
        """What leaves is recorded and announced in the step that made it true."""
        if self.is_on:
            self._records += [removed(e.blocks) for e in events if isinstance(e, BlockRemoved)]
        self._announce(events)

    async def _open_store(self) -> None:
        cache = self._cache
        settings = SsdSettings(
            folders=self._folders,
            num_slots=self.index.num_slots,
            about=self._about,
            num_readers=cache.ssd_read_threads,
            num_writers=cache.ssd_write_threads,
            uring_entries=cache.ssd_cache_iouring_entries,
            sync=cache.ssd_sync,
        )
        self.store = store = SsdStore(settings, self._pool, self._calls)
        with _without_gc():
            kept = await store.open()
            self._devices |= store.devices
            await asyncio.to_thread(self._restore, kept)
        self.is_on = True
        _log.info(
            "ssd: %d slots in %s by %s; %d blocks are back",
            self.index.num_slots,
            ", ".join(map(str, self._folders)),
            store.way,
            self.index.num_resident,
        )

    def _restore(self, kept: Sequence[Kept]) -> None:
        self.index.restore(kept)
        for run in kept:
            self.key_nbytes = run.blocks.key_nbytes
            for slot, checksum in zip(run.slots, run.sums, strict=True):
                self.sums[slot] = checksum

    async def _start_over(self) -> None:
        """Go on with the folders that still work, if there are any."""
        failure, self._failure = self._failure, None
        assert failure is not None
        if self._dropping is not None:  # what is stored anew is announced after that
            await asyncio.wait([self._dropping])
        await self.store.close()
        try:
            await self._go_on(failure, had_slots=True)
        except ConfigError as error:
            _log.error("ssd: off, %s", error)  # it says all

    async def _go_on(self, failure: OSError, *, had_slots: bool) -> None:
        """Open the folders that work, empty; none of them may be open."""
        while not self.is_on:
            broken = await asyncio.to_thread(failing, self._folders, failure, had_slots=had_slots)
            self._folders = [folder for folder in self._folders if folder not in broken]
            names = ", ".join(map(str, broken))
            if not self._folders:
                _log.error("ssd: off, %s can't be used: %s", names, failure)
                return
            _log.error("ssd: going on without %s, empty: %s", names, failure)
            self._renew_index()
            try:
                await self._open_store()
            except OSError as error:
                failure, had_slots = error, False

    async def _erase(self) -> bool:
        """Of a tier that is off, too, nothing may come back."""
        folders = [Path(folder) for folder in self._cache.ssd_cache_dir]
        try:
            await asyncio.to_thread(erase, folders, self._devices)
        except (OSError, ConfigError) as error:
            _log.error(  # it says all
                "ssd: what is on the disk can't be cleared; it may be back after a restart: %s",
                error,
            )
            return False
        return True

    async def _renew_journal(
        self,
        store: SsdStore,
        placed: Iterable[tuple[Blocks, array[int]]],
        *,
        is_ranked: bool = False,
    ) -> None:
        """Write what is resident into a new journal. What changes meanwhile is recorded later."""
        await store.start_snapshot()
        for records in self._recorder.batches(placed, self.sums, is_ranked=is_ranked):
            await store.append_snapshot(records)
        await store.finish_snapshot()
        self._renewed_nbytes = store.journal_nbytes  # extra keys may make entries longer


async def _drop_all(index: SharedDiskIndex) -> None:
    while index.drop_some():  # noqa: ASYNC110  # nothing to wait for: others have their turn
        await asyncio.sleep(0)  # at once it would hold up the loop for 0.1 s and more


def _answer(clearing: Iterable[asyncio.Future[bool]], *, is_empty: bool) -> None:
    for answer in clearing:
        if not answer.done():
            answer.set_result(is_empty)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Many small objects that stay: looking through them again and again takes seconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
