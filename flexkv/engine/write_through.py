"""Copies what the host tier holds to SSD in the background, and keeps the journal up to date."""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexkv.blocks import BlockKey, Blocks
    from flexkv.engine.disk import Disk
    from flexkv.engine.runs import Lease, Reservation
    from flexkv.engine.shared_index import SharedIndex

_BATCH_NBYTES = 32 << 20  # written together, then made durable together
_MAX_BATCH_BLOCKS = 1024  # of one chain in one step: well below 1 ms
_SIGHTS_PER_SLOT = 2


@dataclass(slots=True)
class _Waiting:
    """A chain whose leading blocks are in host slots, leased until they are on the disk."""

    blocks: Blocks
    lease: Lease
    nbytes: int


class _Writing(NamedTuple):
    """What one chain adds to a batch; its own lease, for as long as the disk reads from host."""

    blocks: Blocks
    reservation: Reservation
    lease: Lease


class WriteThrough:
    """One task that writes chains to ``disk``, in the order in which they are offered.

    At most ``max_nbytes`` wait; what is offered beyond that is not written, and counted.
    """

    def __init__(
        self,
        disk: Disk,
        host: SharedIndex,
        *,
        block_nbytes: int,
        max_nbytes: int,
        second_sight: bool,
    ) -> None:
        self._disk = disk
        self._host = host
        self._block_nbytes = block_nbytes
        self._max_nbytes = max(max_nbytes, block_nbytes)
        self._num_batch_blocks = max(1, min(_BATCH_NBYTES // block_nbytes, _MAX_BATCH_BLOCKS))
        self._second_sight = second_sight
        self._seen: OrderedDict[BlockKey, bool] = OrderedDict()  # whether more than once
        self._queue: deque[_Waiting] = deque()
        self.nbytes = 0  # that wait
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self.num_dropped = 0

    def offer(self, blocks: Blocks, num_again: int = 0) -> None:
        """What the host tier holds of ``blocks`` may go to the disk; it counts as used there.

        The first ``num_again`` were offered before by the same request: no second sight of them.
        """
        disk = self._disk
        if not disk.is_on or self._closing:
            return
        disk.index.touch(blocks)
        lease = self._host.lease(blocks)
        num_wanted = lease.num_blocks
        if self._second_sight:
            num_wanted = min(num_wanted, self._num_seen(blocks, num_again))
        nbytes = (num_wanted - disk.index.num_present(blocks)) * self._block_nbytes
        if nbytes <= 0:
            self._host.release(lease)
        elif self.nbytes and self.nbytes + nbytes > self._max_nbytes:
            self.num_dropped += nbytes // self._block_nbytes
            self._host.release(lease)
        else:
            self.nbytes += nbytes
            self._queue.append(_Waiting(blocks.part(0, num_wanted), lease, nbytes))
            self._idle.clear()
            disk.changed.set()

    def clear(self) -> None:
        """Nothing that waits is written any more."""
        self._drop_all()
        self._idle.clear()  # there may be news for the journal
        self._disk.changed.set()

    async def run(self) -> None:
        """Write what is offered, until ``close``."""
        disk = self._disk
        while not self._closing:
            await disk.changed.wait()
            disk.changed.clear()
            while self._queue or disk.has_news:
                if not disk.is_on:
                    self._drop_all()
                await self._write_some()
            self._idle.set()
        await disk.flush()

    async def settled(self, timeout_s: float) -> bool:
        """Wait until all is written and recorded that was offered so far; False if it is not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def drop(self) -> None:
        """What waits is not written, and counts as dropped."""
        self.num_dropped += sum(waiting.nbytes for waiting in self._queue) // self._block_nbytes
        self.clear()

    def close(self) -> None:
        """End ``run`` after the batch at hand."""
        self._closing = True
        self.clear()
        self._disk.changed.set()

    def _drop_all(self) -> None:
        while self._queue:
            self._leave(self._queue.popleft())

    async def _write_some(self) -> None:
        """Write what goes together of what waits, and the journal."""
        disk = self._disk
        batch: deque[_Writing] = deque()
        complete: list[_Waiting] = []
        try:
            await self._fill(batch, complete)
            if disk.is_on or not batch:  # a disk that failed meanwhile: first give up the batch
                await disk.flush()  # the removals, before their slots are overwritten
            if batch:
                await self._write(batch)
        finally:  # cancelled: what is reserved and leased would stay so for ever
            for writing in batch:
                self._commit(writing, ())
            for waiting in complete:
                self._leave(waiting)

    async def _fill(self, batch: deque[_Writing], complete: list[_Waiting]) -> None:
        """Reserve slots for what waits, as much as goes together, and what is complete with it.

        Others have their turn after each chain; the queue may be dropped then.
        """
        room = self._num_batch_blocks
        index = self._disk.index
        while self._queue and room > 0:
            waiting = self._queue[0]
            stop = min(len(waiting.blocks), index.num_present(waiting.blocks) + room)
            lease = self._host.lease(waiting.blocks.part(0, stop))
            plan = index.plan_store(waiting.blocks.part(0, lease.num_blocks), 0)
            assert plan.reservation is not None, "a whole chain has no gap before it"
            start, num_new = plan.reservation.num_present, len(plan.reservation.slots)
            if num_new:
                room -= num_new
                blocks = waiting.blocks.part(start, start + num_new)
                batch.append(_Writing(blocks, plan.reservation, lease))
            else:
                self._host.release(lease)
            if start + num_new < stop or stop == len(waiting.blocks):
                complete.append(self._queue.popleft())
            await asyncio.sleep(0)

    async def _write(self, batch: deque[_Writing]) -> None:
        """Fill the reserved slots; take out and commit in order, so that parents come first."""
        disk = self._disk
        store = disk.store
        slots, host_slots = array("i"), array("i")
        for _, reservation, lease in batch:
            start = reservation.num_present
            slots += reservation.slots
            host_slots += lease.slots[start : start + len(reservation.slots)]
        sums: list[int] = []
        try:
            if disk.is_on:
                sums = await store.write(slots, host_slots)
        except OSError as error:
            disk.fail_to_move(store, error)
        at = 0
        while batch:
            stop = at + len(batch[0].reservation.slots)
            self._commit(batch.popleft(), sums[at:stop])
            at = stop
            await asyncio.sleep(0)  # the next chain is another step

    def _commit(self, writing: _Writing, sums: Sequence[int]) -> None:
        """What was written has ``sums``; without them it is given up."""
        disk = self._disk
        blocks, reservation, lease = writing
        # what was written to a disk that is lost meanwhile is lost as well
        disk.index.commit(reservation, len(sums) if disk.is_on else 0)
        if num_stored := reservation.num_stored:
            parts = (reservation.slots[:num_stored], sums[:num_stored])
            disk.note_stored(blocks.part(0, num_stored), *parts)
        self._host.release(lease)

    def _leave(self, waiting: _Waiting) -> None:
        self.nbytes -= waiting.nbytes
        self._host.release(waiting.lease)

    def _num_seen(self, blocks: Blocks, num_again: int) -> int:
        """How many of ``blocks`` more than one request has offered; this one has offered all."""
        seen = self._seen
        num_seen = 0
        for i, key in enumerate(blocks):
            seen[key] = seen.get(key, False) if i < num_again else key in seen
            seen.move_to_end(key)
            if seen[key]:
                num_seen = i + 1
        while len(seen) > _SIGHTS_PER_SLOT * self._disk.index.num_slots:
            seen.popitem(last=False)
        return num_seen
