"""Stores: reserve, copy, commit; and what becomes of a store that relied on another's copies."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING

from flexkv.engine.results import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flexkv.blocks import Blocks
    from flexkv.engine.planner import StorePlan
    from flexkv.engine.runs import Reservation
    from flexkv.engine.shared_index import SharedIndex
    from flexkv.engine.transfers import Transfers


class _Joined(Enum):
    """What became of the copies that a store relied on."""

    ARRIVED = "arrived"
    FAILED = "failed"
    LATE = "late"


class Stores:
    """Stores into one tier. A store waits at most ``deadline_s`` for copies that others run."""

    def __init__(self, index: SharedIndex, transfers: Transfers, deadline_s: float) -> None:
        self._index = index
        self._transfers = transfers
        self._deadline_s = deadline_s
        self._copies: dict[Reservation, asyncio.Future[None]] = {}
        self._num_clears = 0
        self._closing = False

    def note_clear(self) -> None:
        """The index was cleared: what was on its way is lost, and is not stored again."""
        self._num_clears += 1

    def close(self) -> None:
        """A store whose copies fail does not begin once more."""
        self._closing = True

    def begin_copy(self, reservation: Reservation) -> None:
        """Bytes are on their way into ``reservation``'s slots; whoever joins waits for them."""
        self._copies[reservation] = asyncio.get_running_loop().create_future()

    def end_copy(self, reservation: Reservation) -> None:
        """They are there, or will not come; ``commit`` follows in the same step."""
        self._copies.pop(reservation).set_result(None)

    async def have_ended(self, reservations: Sequence[Reservation]) -> bool:
        """Wait for these copies; False where one still runs after ``deadline_s``."""
        copies = [self._copies[other] for other in reservations if other in self._copies]
        if not copies:
            return True
        _, late = await asyncio.wait(copies, timeout=self._deadline_s)
        return not late

    async def store(
        self,
        blocks: Blocks,
        block_ids: list[int],
        first: int,
        marks: Mapping[int, object],
        keep: Callable[[], bool] | None,
    ) -> Stored:
        """Store ``blocks[first:]`` from the GPU blocks ``block_ids``, after the work at ``marks``.

        ``keep`` is asked when copies have ended; where it says no, they count as failed.
        """
        num_clears = self._num_clears
        num_stored = num_there = 0
        for _ in range(2):  # a store that this one joined may fail: then once from our own blocks
            plan = self._index.plan_store(blocks, first)
            if plan.reservation is None:
                break
            await self._copy_in(plan, block_ids, marks, keep)
            joined = await self._joined(plan.reservation)
            num_stored += plan.reservation.num_stored
            num_there = plan.num_present + plan.reservation.num_stored
            is_cleared = self._num_clears != num_clears
            if joined is not _Joined.ARRIVED or is_cleared:
                num_there = max(0, self._index.match(blocks).num_blocks - first)
            if joined is not _Joined.FAILED or is_cleared or self._closing:
                break
            if keep is not None and not keep():
                break
        num_stored = min(num_stored, num_there)
        return Stored(num_stored, num_there - num_stored, len(block_ids) - num_there)

    async def _copy_in(
        self,
        plan: StorePlan,
        block_ids: list[int],
        marks: Mapping[int, object],
        keep: Callable[[], bool] | None,
    ) -> None:
        """Fill the reserved slots; commit the leading ones that are full."""
        reservation = plan.reservation
        assert reservation is not None
        if not len(reservation.slots):
            return
        self.begin_copy(reservation)
        num_full = 0
        try:
            num_full = await self._transfers.store(
                block_ids[plan.num_present :][: len(reservation.slots)], reservation.slots, marks
            )
        finally:
            self.end_copy(reservation)
            self._index.commit(reservation, num_full, keep)

    async def _joined(self, reservation: Reservation) -> _Joined:
        """Wait for the copies that a store joined, to see what became of them."""
        if not await self.have_ended(reservation.joined):
            return _Joined.LATE
        arrived = all(other.num_stored == len(other.slots) for other in reservation.joined)
        return _Joined.ARRIVED if arrived else _Joined.FAILED
