"""One tier's index for several threads; every change and its events are one step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from flexkv.engine.planner import plan_load, plan_store
from flexkv.engine.stats import TierStats
from flexkv.events.types import AllBlocksCleared, BlockStored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flexkv.blocks import BlockKey, Blocks
    from flexkv.engine.index import Prefix, TierIndex
    from flexkv.engine.planner import LoadPlan, StorePlan
    from flexkv.engine.runs import Lease, Reservation
    from flexkv.events.types import Event


class SharedIndex:
    """Puts a lock round each step of ``index``, and hands its events to ``emit`` within.

    ``match``, ``touch``, ``lease`` and ``release`` change nothing that is announced: any thread
    may call them. All else belongs to the loop that ``emit`` belongs to.
    """

    def __init__(self, index: TierIndex, emit: Callable[[Sequence[Event]], None]) -> None:
        self._index = index
        self._emit = emit
        self._lock = threading.RLock()  # a sink that is told of a change may look at it at once

    def match(self, blocks: Blocks) -> Prefix:
        """The longest resident prefix."""
        with self._lock:
            return self._index.match(blocks)

    def has_room(self, blocks: Blocks) -> bool:
        """Whether all of ``blocks`` are here or would find slots now."""
        index = self._index
        with self._lock:
            lease = index.lease(blocks)  # what is here is no room
            num_needed = len(blocks) - index.num_present(blocks)
            is_room = num_needed <= index.num_free + index.num_evictable
            index.release(lease)
        return is_room

    def touch(self, blocks: Blocks) -> None:
        """What is here of ``blocks`` was used just now."""
        with self._lock:
            self._index.touch(blocks)

    def lease(self, blocks: Blocks) -> Lease:
        """Protect the longest resident prefix until ``release``."""
        with self._lock:
            return self._index.lease(blocks)

    def release(self, lease: Lease) -> None:
        """End a lease; once more does nothing."""
        with self._lock:
            self._index.release(lease)

    def plan_load(self, blocks: Blocks, first: int) -> LoadPlan:
        """What to copy to load ``blocks[first:]``."""
        with self._lock:
            return plan_load(self._index, blocks, first)

    def plan_store(self, blocks: Blocks, first: int) -> StorePlan:
        """What to copy to store ``blocks[first:]``; what has to leave for it is announced."""
        with self._lock:
            plan = plan_store(self._index, blocks, first)
            self._emit(plan.removed)
        return plan

    def commit(
        self, reservation: Reservation, num_blocks: int, keep: Callable[[], bool] | None = None
    ) -> None:
        """The bytes of the first ``num_blocks`` reserved blocks are in place; none, unless keep."""
        with self._lock:
            if keep is not None and not keep():
                num_blocks = 0
            self._emit(self._index.commit(reservation, num_blocks))

    def clear(self) -> None:
        """Nothing is resident any more, and nothing on its way will be."""
        with self._lock:
            self._index.clear()
            self._emit([AllBlocksCleared()])

    def forget(self) -> None:
        """As ``clear``, when there is nobody to tell any more."""
        with self._lock:
            self._index.clear()

    def walk(self) -> Iterator[BlockStored]:
        """Everything resident, parents first, run by run; the index may change meanwhile."""
        runs = self._index.walk()
        while True:
            with self._lock:
                blocks = next(runs, None)
            if blocks is None:
                return
            yield BlockStored(blocks, self._index.tier)

    def residency(self) -> set[BlockKey]:
        """The keys of everything resident."""
        with self._lock:
            return self._index.residency()

    def stats(self, digest: object) -> TierStats:
        """The tier's numbers; ``digest`` is that of what is resident."""
        index = self._index
        with self._lock:
            return TierStats(
                num_slots=index.num_slots,
                num_resident=index.num_resident,
                num_free=index.num_free,
                digest=str(digest),
                num_stored=index.num_stored,
                num_evicted=index.num_evicted,
            )
