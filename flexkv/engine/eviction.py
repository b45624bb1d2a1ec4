"""Who leaves first: the policy's protocol, and least-recently-used."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from flexkv.engine.runs import Run


class EvictionPolicy(Protocol):
    """Ranks runs. The index tells it what is used, children before parents.

    ``next_victim`` must name a run that ranks below all its ancestors: a leaf.
    """

    def touch(self, run: Run) -> None:
        """``run`` was used just now; it is new if it was not known."""
        ...

    def forget(self, run: Run) -> None:
        """``run`` left the index; it may never have been touched."""
        ...

    def next_victim(self) -> Run:
        """The run to evict first; at least one is known."""
        ...

    def ranked(self) -> list[Run]:
        """All runs, who is to be evicted first first: children before parents."""
        ...


class LeastRecentlyUsed:
    """Evicts what was not used for the longest time.

    A touch covers a path from its deepest run to its first, so a parent is always younger than
    its children, and the oldest run of all is a leaf. Every call takes constant time.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[Run, None] = OrderedDict()  # oldest first

    def touch(self, run: Run) -> None:
        """Make ``run`` the youngest."""
        self._order[run] = None
        self._order.move_to_end(run)

    def forget(self, run: Run) -> None:
        """Rank ``run`` no longer."""
        self._order.pop(run, None)

    def next_victim(self) -> Run:
        """The oldest run."""
        return next(iter(self._order))

    def ranked(self) -> list[Run]:
        """All runs, oldest first."""
        return list(self._order)
