"""The index of a tier that outlives its process: comes back as it was, recency included."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from flexkv.engine.index import TierIndex
from flexkv.engine.runs import Run, State
from flexkv.engine.shared_index import SharedIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flexkv.blocks import Blocks, Tier
    from flexkv.events.types import Event
    from flexkv.tiers.ssd_frames import Kept


_NUM_RUNS_AT_ONCE = 64
_NUM_BLOCKS_AS_LONG_AS_A_RUN = 512  # to announce


class DiskIndex(TierIndex):
    """A ``TierIndex`` that can be filled from a journal."""

    def restore(self, kept: Sequence[Kept]) -> None:
        """Make ``kept``, parents before children, resident. Once, before anything else."""
        assert not self._num_used, "the index is in use"
        cuts = [{len(of.slots)} for of in kept]
        for of in kept:
            if of.parent >= 0:
                cuts[of.parent].add(of.parent_at)
        ends: dict[tuple[int, int], Run] = {(-1, 0): self._root}
        ages: dict[Run, int] = {}
        is_free = np.ones(self.num_slots, bool)
        for number, (blocks, slots, _, age, parent, parent_at) in enumerate(kept):
            above = ends[parent, parent_at]
            start = 0
            for stop in sorted(cuts[number]):
                part = blocks if stop - start == len(slots) else blocks.part(start, stop).compact()
                run = Run(part, slots[start:stop], above, State.RESIDENT)
                above.children[part.key(0)] = run
                ends[number, stop] = above = run
                ages[run] = age
                start = stop
            is_free[slots] = False
        self._free = array("i", np.flatnonzero(is_free).astype("i").tobytes())
        self._num_used = self.num_resident = self.num_slots - len(self._free)
        self._rank(ages)

    def ranked(self) -> list[tuple[Blocks, array[int]]]:
        """Everything resident and its slots, the most recently used first, parents first."""
        runs = reversed(self._policy.ranked())
        return [(run.blocks, run.slots) for run in runs if run.state is State.RESIDENT]

    def drop_some(self, num_runs: int) -> list[Event]:
        """All bytes are lost: at most so many runs leave, children first; fewer if they are long.

        What is on its way leaves as well.
        """
        events: list[Event] = []
        run: Run | None = self._root
        while run is not None and num_runs > 0:
            while run.children:
                run = next(reversed(run.children.values()))
            if run is self._root:
                break
            num_runs -= 1 + len(run.slots) // _NUM_BLOCKS_AS_LONG_AS_A_RUN
            leaf, run = run, run.parent
            events += self._detach(leaf)
        return events

    @property
    def is_empty(self) -> bool:
        """Nothing is here, or on its way."""
        return not self._root.children

    def _rank(self, ages: dict[Run, int]) -> None:
        """Touch all, the oldest first; a parent is at least as young as its children."""
        runs = list(ages)  # parents first
        runs.reverse()
        for run in runs:
            parent = run.parent
            if parent in ages and parent is not None:
                ages[parent] = min(ages[parent], ages[run])
        for run in sorted(runs, key=lambda run: -ages[run]):
            self._policy.touch(run)


class SharedDiskIndex(SharedIndex):
    """A ``DiskIndex`` for several threads."""

    def __init__(
        self,
        tier: Tier,
        num_slots: int,
        emit: Callable[[Sequence[Event]], None],
        evict_ratio: float,
    ) -> None:
        self.num_slots = num_slots
        self._disk = DiskIndex(tier, num_slots, evict_ratio=evict_ratio)
        super().__init__(self._disk, emit)

    @property
    def num_resident(self) -> int:
        """How many blocks can be read."""
        return self._disk.num_resident

    def restore(self, kept: Sequence[Kept]) -> None:
        """As ``DiskIndex.restore``; tells nobody."""
        with self._lock:
            self._disk.restore(kept)

    def num_present(self, blocks: Blocks) -> int:
        """How many blocks from the first are resident or on their way."""
        with self._lock:
            return self._disk.num_present(blocks)

    def lose(self, blocks: Blocks) -> None:
        """The bytes of the last of ``blocks`` are lost, and so is what follows it."""
        with self._lock:
            self._emit(self._disk.lose(blocks))

    def drop_some(self) -> bool:
        """All bytes are lost: go on to drop them, well below 1 ms. Whether some are left."""
        with self._lock:
            self._emit(self._disk.drop_some(_NUM_RUNS_AT_ONCE))
            return not self._disk.is_empty

    def ranked(self) -> list[tuple[Blocks, array[int]]]:
        """Everything resident and its slots, the most recently used first."""
        with self._lock:
            return self._disk.ranked()

    def placed(self) -> Iterator[tuple[Blocks, array[int]]]:
        """Everything resident and its slots, parents first; the index may change meanwhile."""
        runs = self._disk.runs()
        while True:
            with self._lock:
                run = next(runs, None)
                placed = None if run is None else (run.blocks, run.slots[:])
            if placed is None:
                return
            yield placed
