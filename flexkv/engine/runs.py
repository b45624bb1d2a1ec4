"""Runs: the nodes of an index, and what holds them."""

from __future__ import annotations

from array import array
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexkv.blocks import BlockKey, Blocks


class State(Enum):
    """What is true of the bytes of a run."""

    WRITING = "writing"  # on their way
    WRITTEN = "written"  # all there, but the parent is not resident yet
    RESIDENT = "resident"  # readable


class Run:
    """Blocks that were stored together and never diverged, and where their bytes are.

    ``num_pinned``: how many of its blocks, from the first, must stay: because they are leased,
    because a descendant's are, or because their bytes are still on their way. ``attached``: part
    of the index; a run that was taken out keeps its slots while anybody reads or writes them.
    """

    __slots__ = (
        "attached",
        "blocks",
        "children",
        "leases",
        "num_pinned",
        "num_pinned_children",
        "parent",
        "reservation",
        "slots",
        "state",
    )

    def __init__(self, blocks: Blocks, slots: array[int], parent: Run | None, state: State) -> None:
        self.blocks = blocks
        self.slots = slots
        self.parent = parent
        self.state = state
        self.children: dict[BlockKey, Run] = {}
        self.leases: list[Lease] = []
        self.reservation: Reservation | None = None
        self.num_pinned = 0
        self.num_pinned_children = 0
        self.attached = True

    def wanted_pins(self) -> int:
        """How many leading blocks ``num_pinned`` should say."""
        if self.state is not State.RESIDENT or self.num_pinned_children:
            return len(self.slots)
        return max((lease.reach for lease in self.leases), default=0)

    def split(self, at: int) -> Run:
        """Put the first ``at`` blocks into a new run above this one, and return it.

        This object keeps the tail: its place in the recency order, its children, and the leases
        that reach past the cut.
        """
        parent = self.parent
        assert parent is not None, "the root is never split"
        head = Run(self.blocks.part(0, at).compact(), self.slots[:at], parent, self.state)
        head.reservation = self.reservation
        parent.children[head.blocks.key(0)] = head
        self.blocks = self.blocks.part(at, len(self.slots)).compact()
        self.slots = self.slots[at:]
        self.parent = head
        head.children[self.blocks.key(0)] = self
        for lease in self.leases:
            if lease.reach > at:
                lease.reach -= at
            else:
                lease.run = head
                head.leases.append(lease)
        self.leases = [lease for lease in self.leases if lease.run is self]
        head.num_pinned = min(self.num_pinned, at)
        self.num_pinned = max(0, self.num_pinned - at)
        head.num_pinned_children = 1 if self.num_pinned else 0
        return head


class Lease:
    """Protects the first ``num_blocks`` blocks of a chain from eviction until it is released.

    ``slots`` are theirs, in order.
    """

    __slots__ = ("num_blocks", "reach", "run", "slots")

    def __init__(self, run: Run | None, reach: int, slots: array[int]) -> None:
        self.run = run
        self.reach = reach
        self.slots = slots
        self.num_blocks = len(slots)


class Reservation:
    """Slots for blocks whose bytes are on their way; it ends with one commit or abort.

    ``num_present``: how many blocks of the chain before these were resident or on their way.
    ``joined``: the reservations that bring those. ``num_stored``: how many of these blocks became
    resident, so far.
    """

    __slots__ = ("joined", "num_present", "num_stored", "run", "slots")

    def __init__(self, num_present: int, joined: tuple[Reservation, ...]) -> None:
        self.num_present = num_present
        self.joined = joined
        self.num_stored = 0
        self.slots: array[int] = array("i")
        self.run: Run | None = None

    def runs(self) -> list[Run]:
        """The runs that hold these blocks, parents first: one, or more where others diverged."""
        found: list[Run] = []
        run, num_missing = self.run, len(self.slots)
        while run is not None and num_missing > 0:
            found.append(run)
            num_missing -= len(run.slots)
            run = run.parent
        found.reverse()
        return found
