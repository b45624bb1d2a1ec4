"""What one tier holds: which blocks, in which slots, and who may leave."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flexkv.blocks import Blocks
from flexkv.engine.eviction import LeastRecentlyUsed
from flexkv.engine.runs import Lease, Reservation, Run, State
from flexkv.errors import TierFullError
from flexkv.events.types import BlockRemoved, BlockStored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.blocks import BlockKey, Tier
    from flexkv.engine.eviction import EvictionPolicy
    from flexkv.events.types import Event


class Prefix(NamedTuple):
    """The longest resident prefix of a chain. ``slots`` hold until the next change or await."""

    num_blocks: int
    slots: array[int]


class TierIndex:
    """The one owner of the truth about a tier: plain state, without I/O, clock or events loop.

    Every chain handed in begins with its first block. Along every path of the tree come resident
    runs first, then runs whose bytes are on their way. A method that changes what is resident
    returns the events to emit in the same step, in order.
    """

    def __init__(
        self,
        tier: Tier,
        num_slots: int,
        *,
        evict_ratio: float = 0.0,
        policy: EvictionPolicy | None = None,
    ) -> None:
        self.tier = tier
        self.num_slots = num_slots
        self.num_resident = 0
        self.num_stored = 0  # ever
        self.num_evicted = 0  # ever
        self._min_evicted = math.ceil(round(evict_ratio * num_slots, 6))
        self._policy: EvictionPolicy = policy or LeastRecentlyUsed()
        self._free = array("i", np.arange(num_slots, dtype=np.intc).tobytes())  # a stack
        self._num_used = 0  # blocks in the tree
        self._num_pinned = 0  # of these, how many can't leave
        self._root = Run(Blocks(b"", b"", tokens_per_block=1), array("i"), None, State.RESIDENT)
        self._walks: list[_Walk] = []

    @property
    def num_free(self) -> int:
        """Slots that nobody uses."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Blocks that could make room now."""
        return self._num_used - self._num_pinned

    def match(self, blocks: Blocks) -> Prefix:
        """The longest resident prefix. Changes nothing, recency included."""
        path, last, _ = self._descend(blocks)
        slots = array("i")
        for run in path:
            if run.state is not State.RESIDENT:
                break
            slots += run.slots if run is not path[-1] else run.slots[:last]
        return Prefix(len(slots), slots)

    def num_present(self, blocks: Blocks) -> int:
        """How many blocks from the first are resident or on their way."""
        return self._descend(blocks)[2]

    def touch(self, blocks: Blocks) -> None:
        """What is here of ``blocks`` was used just now."""
        path, last, _ = self._descend(blocks)
        if path:
            self._refresh(self._end_path(path, last))

    def lease(self, blocks: Blocks) -> Lease:
        """Protect the longest resident prefix until ``release``. Does not touch."""
        path, last, _ = self._descend(blocks)
        slots = array("i")
        deepest, reach = None, 0
        for run in path:
            if run.state is not State.RESIDENT:
                break
            deepest, reach = run, last if run is path[-1] else len(run.slots)
            slots += run.slots[:reach]
        lease = Lease(deepest, reach, slots)
        if deepest is not None:
            deepest.leases.append(lease)
            self._repin(deepest)
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease; once more does nothing."""
        run, lease.run = lease.run, None
        if run is not None:
            run.leases.remove(lease)
            self._repin(run)

    def reserve(self, blocks: Blocks) -> tuple[Reservation, list[Event]]:
        """Give slots to those of ``blocks`` that are neither resident nor on their way.

        All or none. Evicts when there is no room: what is missing, or ``evict_ratio`` of the tier
        if that is more. The events tell of the evicted, and come before any use of the slots.

        Raises:
            TierFullError: nothing changed.
        """
        path, last, num_present = self._descend(blocks)
        num_needed = len(blocks) - num_present
        num_short = num_needed - len(self._free)
        num_evictable = self.num_evictable
        for run in path:  # the prefix must stay, so it is no room
            num_shared = last if run is path[-1] else len(run.slots)
            num_evictable -= max(0, num_shared - run.num_pinned)
        if num_short > num_evictable:
            num_available = len(self._free) + num_evictable
            raise TierFullError(self.tier, needed=num_needed, available=num_available)

        writing = (run.reservation for run in path if run.state is not State.RESIDENT)
        joined = tuple(dict.fromkeys(other for other in writing if other is not None))
        reservation = Reservation(num_present, joined)
        end = self._end_path(path, last) if path else self._root
        if not num_needed:
            self._refresh(end)
            return reservation, []
        new = blocks.part(num_present, len(blocks)).compact()
        run = Run(new, array("i"), end, State.WRITING)
        run.reservation = reservation
        self._refresh(run)  # before anything is evicted: now the prefix is the last to leave
        removed: list[Event] = []
        if num_short > 0:
            removed = self._evict(min(max(num_short, self._min_evicted), num_evictable))
        run.slots = reservation.slots = self._take(num_needed)
        reservation.run = run
        end.children[new.key(0)] = run
        self._num_used += num_needed
        self._repin(run)
        return reservation, removed

    def commit(self, reservation: Reservation, num_blocks: int | None = None) -> list[Event]:
        """The bytes of the first ``num_blocks`` reserved blocks (default: all) are in place.

        The rest, and whatever was to follow it, is given up; then what comes before counts as used
        just now. Blocks whose parent is not resident yet wait for it. A reservation that the index
        gave up meanwhile only returns its slots.
        """
        runs = reservation.runs()
        reservation.run = None
        if not runs:
            return []
        if not runs[0].attached:
            self._end_writing(runs)
            return []
        num_left = len(reservation.slots) if num_blocks is None else num_blocks
        for i, run in enumerate(runs):
            if len(run.slots) > num_left:
                given_up = runs[i:]
                runs = [*runs[:i], self._split(run, num_left)] if num_left else runs[:i]
                self._cut(run)  # nothing of it is resident: no events
                self._end_writing(given_up)
                break
            num_left -= len(run.slots)
        events: list[Event] = []
        for run in runs:
            run.state = State.WRITTEN
        if runs and runs[0].parent is not None and runs[0].parent.state is State.RESIDENT:
            self._settle(runs[0], events)
        return events

    def abort(self, reservation: Reservation) -> None:
        """None of the reserved blocks will come; what was to follow them is given up as well."""
        events = self.commit(reservation, 0)
        assert not events, "nothing was readable"

    def lose(self, blocks: Blocks) -> list[Event]:
        """The bytes of the last of ``blocks`` are lost: it and all that follows it leave.

        What came before it counts as used just now.
        Slots that are still being read or written return when that ends.
        """
        path, last, num_present = self._descend(blocks)
        if not path or num_present < len(blocks) or path[-1].state is not State.RESIDENT:
            return []
        if last > 1:
            self._split(path[-1], last - 1)
        return self._cut(path[-1])

    def clear(self) -> None:
        """Nothing is resident any more, and nothing on its way will be."""
        for run in list(self._root.children.values()):
            self._detach(run)

    def walk(self) -> Iterator[Blocks]:
        """Everything resident, parents first, a run at a time; the index may change meanwhile.

        What is resident during the whole walk comes at least once.
        """
        return (run.blocks for run in self.runs())

    def runs(self) -> Iterator[Run]:
        """As ``walk``, the runs themselves: they hold until the next change."""
        walk = _Walk(self._root)
        self._walks.append(walk)
        try:
            while (run := walk.next_run()) is not None:
                yield run
        finally:
            self._walks.remove(walk)

    def residency(self) -> set[BlockKey]:
        """The keys of everything resident."""
        return {key for blocks in self.walk() for key in blocks}

    def _descend(self, blocks: Blocks) -> tuple[list[Run], int, int]:
        """The runs that ``blocks`` share, how many blocks of the last one, and how many in all."""
        path: list[Run] = []
        at = last = 0
        end = len(blocks)
        children = self._root.children
        while at < end:
            run = children.get(blocks.key(at))
            if run is None:
                break
            path.append(run)
            last = run.blocks.num_common(blocks, at)
            at += last
            if last < len(run.slots):
                break
            children = run.children
        return path, last, at

    def _end_path(self, path: list[Run], last: int) -> Run:
        """The run that ends where ``path`` does; splits one if none does."""
        run = path[-1]
        return run if last == len(run.slots) else self._split(run, last)

    def _split(self, run: Run, at: int) -> Run:
        """Returns the new head, which is to be touched; ``run`` keeps the tail."""
        head = run.split(at)
        for walk in self._walks:
            walk.note_split(head, run)
        return head

    def _cut(self, run: Run) -> list[Event]:
        """Take ``run`` and all below it out; what is above counts as used just now."""
        self._refresh(run.parent)
        return self._detach(run)

    def _refresh(self, run: Run | None) -> None:
        """Touch ``run`` and its ancestors, children first."""
        touch, root = self._policy.touch, self._root
        while run is not root and run is not None:
            touch(run)
            run = run.parent

    def _repin(self, run: Run) -> None:
        """Bring the counts of pinned blocks of ``run`` and its ancestors up to date."""
        while run.parent is not None:
            before, pinned = run.num_pinned, run.wanted_pins()
            if pinned == before:
                return
            run.num_pinned = pinned
            if run.attached:
                self._num_pinned += pinned - before
            else:
                self._free += run.slots[pinned:before]  # their last reader or writer has ended
            if before and pinned:
                return
            run.parent.num_pinned_children += 1 if pinned else -1
            run = run.parent

    def _take(self, num_slots: int) -> array[int]:
        slots = self._free[-num_slots:]
        del self._free[-num_slots:]
        return slots  # what was freed together comes back in its order: neighbours stay neighbours

    def _evict(self, num_blocks: int) -> list[Event]:
        """Evict exactly so many; the caller knows that so many can leave."""
        events: list[Event] = []
        policy = self._policy
        num_left = num_blocks
        while num_left > 0:
            run = policy.next_victim()
            size = len(run.slots)
            num_gone = min(size - run.num_pinned, num_left)
            if not num_gone:
                self._refresh(run)
                continue
            num_left -= num_gone
            parent = run.parent
            assert parent is not None
            assert not run.children, "a victim is a leaf"
            keep = size - num_gone
            self._free += run.slots[keep:]
            if keep:
                events.append(BlockRemoved(run.blocks.part(keep, size).compact(), self.tier))
                run.blocks = run.blocks.part(0, keep).compact()
                del run.slots[keep:]
            else:
                events.append(BlockRemoved(run.blocks, self.tier))
                del parent.children[run.blocks.key(0)]
                policy.forget(run)
                run.attached = False
        self._num_used -= num_blocks
        self.num_resident -= num_blocks
        self.num_evicted += num_blocks
        return events

    def _settle(self, run: Run, events: list[Event]) -> None:
        """``run`` and what waited for it below become resident, parents first."""
        stack = [run]
        while stack:
            run = stack.pop()
            run.state = State.RESIDENT
            assert run.reservation is not None
            run.reservation.num_stored += len(run.slots)
            run.reservation = None
            self.num_resident += len(run.slots)
            self.num_stored += len(run.slots)
            self._repin(run)
            events.append(BlockStored(run.blocks, self.tier))
            stack += [c for c in run.children.values() if c.state is State.WRITTEN]

    def _end_writing(self, runs: list[Run]) -> None:
        """No bytes come any more for ``runs``, parents first, which are detached."""
        for run in reversed(runs):
            run.state = State.RESIDENT  # no longer a reason to keep the slots
            self._repin(run)

    def _detach(self, top: Run) -> list[Event]:
        """Take ``top`` and all below it out of the tree. Returns the events, children first."""
        parent = top.parent
        assert parent is not None
        del parent.children[top.blocks.key(0)]
        order: list[Run] = []
        stack = [top]
        while stack:
            run = stack.pop()
            order.append(run)
            stack.extend(run.children.values())
        events: list[Event] = []
        for run in reversed(order):
            size = len(run.slots)
            run.attached = False
            run.children = {}
            self._policy.forget(run)
            self._num_used -= size
            self._num_pinned -= run.num_pinned
            if run.state is State.RESIDENT:
                self.num_resident -= size
                events.append(BlockRemoved(run.blocks, self.tier))
            self._free += run.slots[run.num_pinned :]
            if run.state is State.WRITTEN:  # its writer has ended already
                self._end_writing([run])
        return events


class _Walk:
    """A depth-first walk that goes on while the tree changes."""

    def __init__(self, root: Run) -> None:
        self._visited: set[Run] = {root}
        self._stack = [list(root.children.values())]

    def next_run(self) -> Run | None:
        """The next resident run, or None at the end."""
        while self._stack:
            if not self._stack[-1]:
                self._stack.pop()
                continue
            run = self._stack[-1].pop()
            if run in self._visited or not run.attached or run.state is not State.RESIDENT:
                continue
            self._visited.add(run)
            if run.children:
                self._stack.append(list(run.children.values()))
            return run
        return None

    def note_split(self, head: Run, tail: Run) -> None:
        """``head`` is new, above ``tail``: whoever was to visit ``tail`` visits ``head`` first."""
        if tail in self._visited:
            self._visited.add(head)
        elif head.parent in self._visited:
            self._stack.append([head])
