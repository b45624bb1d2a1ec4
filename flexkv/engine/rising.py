"""Brings blocks up from SSD: into the host tier chunk by chunk, and on to the GPU meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from flexkv.engine.transfers import Lane
from flexkv.errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flexkv.blocks import Blocks
    from flexkv.config import Config
    from flexkv.engine.disk import Disk
    from flexkv.engine.runs import Lease, Reservation
    from flexkv.engine.shared_index import SharedIndex
    from flexkv.engine.stores import Stores
    from flexkv.engine.transfers import Transfers

_log = logging.getLogger(__name__)

_RETRY_EVERY = 64  # one in so many loads that look too slow is done all the same, to measure again
_ROOM_PERCENT = 75  # of the host tier; the rest takes stores
_LOOK_S = 0.005  # who lets go of host slots tells nobody
_MAX_LOOKS = 200
_MEASURED_NBYTES = 1 << 30  # older reads count half, and half again


class _Rate:
    """Bytes per second of all reads together, over the time in which there are any."""

    def __init__(self) -> None:
        self._num_running = 0
        self._nbytes = 0.0
        self._seconds = 0.0
        self._counted_s = 0.0

    def begin(self, now_s: float) -> None:
        """A read begins."""
        self._count(now_s)
        self._num_running += 1

    def end(self, nbytes: int, now_s: float) -> None:
        """A read of so many bytes has ended; 0: it failed."""
        self._count(now_s)
        self._num_running -= 1
        self._nbytes += nbytes
        if self._nbytes > _MEASURED_NBYTES:
            self._nbytes /= 2
            self._seconds /= 2

    def expected_s(self, nbytes: int) -> float:
        """How long ``nbytes`` are expected to take; 0: nothing has been read yet."""
        return nbytes * self._seconds / self._nbytes if self._nbytes else 0.0

    def _count(self, now_s: float) -> None:
        if self._num_running:
            self._seconds += now_s - self._counted_s
        self._counted_s = now_s


class Rising:
    """One chain's blocks on their way up.

    ``chunks`` arrive in order; each with a lease on all of the chain up to its end, or None.
    """

    def __init__(
        self,
        host: SharedIndex,
        deadline_s: float,
        leave: Callable[[], None],
    ) -> None:
        self._leave = leave
        self._num_held = 0  # chunks that hold host slots
        self.chunks: list[asyncio.Future[Lease | None]] = []
        self._host = host
        self._deadline_s = deadline_s

    async def load(
        self,
        transfers: Transfers,
        block_ids: Sequence[int],
        first: int,
        num_done: int,
        marks: Mapping[int, object],
    ) -> int:
        """Copy each chunk on as it arrives, behind ``num_done`` blocks. Returns how many came."""
        at = first + num_done
        for chunk in self.chunks:
            lease = await self._arrival(chunk)
            if lease is None:
                break
            stop = min(lease.num_blocks, first + len(block_ids))
            if stop > at:
                ids = block_ids[at - first : stop - first]
                num_copied = await transfers.load(lease.slots[at:stop], ids, marks)
                at += num_copied
                if num_copied < len(ids):
                    break
        return at - first - num_done

    async def finish(self) -> None:
        """Wait until all has arrived, or can't."""
        for chunk in self.chunks:
            if await self._arrival(chunk) is None:
                break

    def end(self) -> None:
        """Nobody waits any more; what is on its way arrives all the same, and then makes room."""
        self._num_held = len(self.chunks)
        if not self.chunks:
            self._leave()
        for chunk in self.chunks:
            if chunk.done():
                self._release(chunk)
            else:
                chunk.add_done_callback(self._release)

    async def _arrival(self, chunk: asyncio.Future[Lease | None]) -> Lease | None:
        await asyncio.wait([chunk], timeout=self._deadline_s)
        return chunk.result() if chunk.done() else None

    def _release(self, chunk: asyncio.Future[Lease | None]) -> None:
        lease = chunk.result()
        if lease is not None:
            self._host.release(lease)
        self._num_held -= 1
        if not self._num_held:
            self._leave()


class Risings:
    """Begins them: reads in chunks, bounded in bytes, each a task of ``tasks``, run to its end.

    Together they take three quarters of ``num_host_slots``, so that each gets what it needs. Where
    reading is expected to take longer than computing, nothing rises.
    """

    def __init__(
        self,
        disk: Disk,
        host: SharedIndex,
        stores: Stores,
        config: Config,
        block_nbytes: int,
        tasks: asyncio.TaskGroup,
        num_host_slots: int,
    ) -> None:
        cache, settings = config.cache, config.transfers
        self._disk = disk
        self._host = host
        self._stores = stores
        self._lane = Lane(cache.ssd_read_bytes, settings.deadline_s)
        self._num_host_slots = num_host_slots
        room = num_host_slots * _ROOM_PERCENT // 100 * block_nbytes
        self._room = Lane(room, settings.deadline_s)
        self._deadline_s = settings.deadline_s
        self._block_nbytes = block_nbytes
        self._num_chunk_blocks = max(1, settings.chunk_bytes // block_nbytes)
        self._tokens_per_s = cache.recompute_tokens_per_s
        self._tasks = tasks
        self._rate = _Rate()
        self._num_slow = 0
        self._running: set[asyncio.Task[None]] = set()
        self.num_risen = 0  # blocks, ever
        self.num_lost = 0

    @property
    def nbytes_in_flight(self) -> int:
        """Bytes on their way from SSD to host."""
        return self._lane.nbytes_in_flight

    def num_usable(self, blocks: Blocks, num_host: int) -> int:
        """How many of ``blocks`` host and SSD could bring together; any thread may ask."""
        if not self._disk.is_on:
            return num_host
        num_disk = self._disk.index.match(blocks).num_blocks
        num_new = num_disk - num_host
        if num_new <= 0 or not self._tokens_per_s:
            return max(num_host, num_disk)
        nbytes = self._lane.nbytes_in_flight + num_new * self._block_nbytes
        expected_s = self._rate.expected_s(nbytes)
        if expected_s * self._tokens_per_s <= num_new * blocks.tokens_per_block:
            return num_disk
        self._num_slow += 1
        return num_host if self._num_slow % _RETRY_EVERY else num_disk

    def has_room(self, blocks: Blocks) -> bool:
        """Whether ``begin`` would not wait for others."""
        nbytes = len(blocks) * self._block_nbytes
        return self._room.has_room(nbytes) and self._host.has_room(blocks)

    async def begin(self, blocks: Blocks) -> Rising | None:
        """Start to bring up what of ``blocks`` is on SSD and not in host; None: there is nothing.

        Waits for others to end, so as to find host slots; goes as far as there are some. Whoever
        begins a rising has to ``end`` it. Where ``has_room``, it is begun without a pause.
        """
        nbytes = len(blocks) * self._block_nbytes
        try:
            await self._room.enter(nbytes)
        except TransferError as error:
            _log.warning("ssd: a load did not begin, its blocks count as missing: %s", error)
            return None
        try:
            await self._find_slots(blocks)
        except BaseException:
            self._room.leave(nbytes)
            raise
        num_host = self._host.match(blocks).num_blocks
        num_blocks = self._disk.index.match(blocks).num_blocks if self._disk.is_on else 0
        leave = partial(self._room.leave, nbytes)
        if num_blocks <= num_host:
            leave()
            return None
        rising = Rising(self._host, self._deadline_s, leave)
        try:
            self._begin_chunks(rising, blocks.part(0, num_blocks), num_host)
        except BaseException:
            rising.end()
            raise
        return rising

    async def settle(self, timeout_s: float) -> int:
        """Begin no more reads; wait for those that run. How many still do."""
        self._room.turn_away()
        self._lane.turn_away()
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)
        return len(self._running)

    async def _find_slots(self, blocks: Blocks) -> None:
        """Wait for loads that copy from host: they let go of their slots soon."""
        if len(blocks) > self._num_host_slots:
            return
        for _ in range(_MAX_LOOKS):
            if self._host.has_room(blocks):
                return
            await asyncio.sleep(_LOOK_S)

    def _begin_chunks(self, rising: Rising, blocks: Blocks, num_host: int) -> None:
        previous: asyncio.Future[Lease | None] | None = None
        for start in range(num_host, len(blocks), self._num_chunk_blocks):
            stop = min(start + self._num_chunk_blocks, len(blocks))
            plan = self._host.plan_store(blocks.part(0, stop), 0)
            assert plan.reservation is not None, "a whole chain has no gap before it"
            reach = plan.reservation.num_present + len(plan.reservation.slots)
            previous = self._begin_chunk(blocks.part(0, reach), plan.reservation, previous)
            rising.chunks.append(previous)
            if reach < stop:  # the host tier is full
                break

    def _begin_chunk(
        self,
        blocks: Blocks,
        reservation: Reservation,
        previous: asyncio.Future[Lease | None] | None,
    ) -> asyncio.Future[Lease | None]:
        """The last of ``blocks`` go into ``reservation``'s slots."""
        chunk: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()
        self._stores.begin_copy(reservation)
        bringing = self._bring(blocks, reservation, previous, chunk)
        try:
            task = self._tasks.create_task(bringing)
        except BaseException:
            bringing.close()
            self._give_up(reservation, chunk)
            raise
        self._running.add(task)

        def on_end(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            if not chunk.done():  # cancelled before its first step
                self._give_up(reservation, chunk)

        task.add_done_callback(on_end)
        return chunk

    def _give_up(self, reservation: Reservation, chunk: asyncio.Future[Lease | None]) -> None:
        """Nothing has begun to bring the chunk, and nothing will."""
        self._stores.end_copy(reservation)
        self._host.commit(reservation, 0)
        chunk.set_result(None)

    async def _bring(
        self,
        blocks: Blocks,
        reservation: Reservation,
        previous: asyncio.Future[Lease | None] | None,
        chunk: asyncio.Future[Lease | None],
    ) -> None:
        """Read, commit behind the chunk before, lease."""
        num_read, lease = 0, None
        try:
            if len(reservation.slots):
                num_read = await self._read(blocks, reservation)
            if previous is not None:
                await asyncio.wait([previous])
        finally:
            try:
                self._stores.end_copy(reservation)
                self._host.commit(reservation, num_read)
                if await self._stores.have_ended(reservation.joined):
                    lease = self._host.lease(blocks)
            finally:
                chunk.set_result(lease)

    async def _read(self, blocks: Blocks, reservation: Reservation) -> int:
        """Fill the reserved slots. Returns how many of the leading ones are right."""
        disk = self._disk
        index, store, sums = disk.index, disk.store, disk.sums
        start = reservation.num_present
        lease = index.lease(blocks)
        slots = lease.slots[start:]
        num_blocks = len(slots)
        if not num_blocks:  # evicted meanwhile
            index.release(lease)
            return 0
        nbytes = num_blocks * self._block_nbytes
        try:
            await self._lane.enter(nbytes)
        except TransferError as error:
            _log.warning("ssd: a read did not begin, its blocks count as missing: %s", error)
            index.release(lease)
            return 0
        nbytes_read = 0
        self._rate.begin(time.perf_counter())
        try:
            if disk.store is not store or not disk.is_on:
                return 0
            host_slots = reservation.slots[:num_blocks]
            lost = await store.read(slots, host_slots, [sums[slot] for slot in slots])
            nbytes_read = nbytes
        except OSError as error:
            disk.fail_to_move(store, error)
            return 0
        finally:
            self._rate.end(nbytes_read, time.perf_counter())
            self._lane.leave(nbytes)
            index.release(lease)
        if lost:
            self.num_lost += len(lost)
            _log.warning("ssd: %d blocks have rotted and are lost", len(lost))
            if disk.index is index:
                disk.lose(blocks.part(0, start + lost[0] + 1))
            num_blocks = lost[0]
        self.num_risen += num_blocks
        return num_blocks
