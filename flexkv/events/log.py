"""Numbers what happens and keeps the last of it, so that who fell behind can catch up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from flexkv.events.digest import Digests
from flexkv.events.types import HOLE, NOTHING, num_named, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from flexkv.blocks import Tier
    from flexkv.events.digest import TierDigest
    from flexkv.events.types import BlockStored, Event


class Entry(NamedTuple):
    """One event and its number; numbers increase by one."""

    event_id: int
    event: Event


class EventSource(Protocol):
    """What a sink reads from: events since a number, or everything as of a number.

    Several sinks may read from one; NOTHING and HOLE, which one of them had entered, are nothing
    to the others.
    """

    @property
    def last_id(self) -> int:
        """The number of the latest event; 0 before the first."""
        ...

    def since(self, event_id: int, limit: int | None = None) -> list[Entry] | None:
        """The events after ``event_id``, oldest first; None if some of them are gone.

        ``limit``: no more than so many of them.
        """
        ...

    def dump(self) -> tuple[int, Iterator[BlockStored]]:
        """The latest number, and what is resident as of it: all tiers, parents first.

        It may be read in pieces: what changes meanwhile has a later number, and is idempotent.
        """
        ...

    @property
    def last_hole_id(self) -> int:
        """The number that the latest kick left out; 0 before the first."""
        ...

    def backlog(self, event_id: int) -> int | None:
        """How many blocks the events after ``event_id`` name; None if some of them are gone."""
        ...

    def digests(self) -> Mapping[Tier, TierDigest]:
        """The digest of each tier, as of the latest number."""
        ...

    def beat(self) -> None:
        """Enter NOTHING: who has missed the last events sees it by the number of this one."""
        ...

    def kick(self) -> None:
        """Enter a HOLE, which nobody sends, and NOTHING: everybody asks for what was missed.

        Who asks from the hole on, or from before, is to be answered with a dump.
        """
        ...


class EventLog:
    """A bounded ring of numbered events; with ``walk`` it is a ``EventSource``.

    ``ring`` bounds the blocks that its events name together (an event that names none counts as
    one); the oldest events fall out. An event that names more than ``max_event_blocks`` blocks is
    entered as several, so that each fits into a message. ``walk`` yields everything resident,
    parents first.
    """

    def __init__(
        self,
        *,
        ring: int,
        max_event_blocks: int,
        walk: Callable[[], Iterator[BlockStored]] = lambda: iter(()),
    ) -> None:
        self._entries: list[Entry] = []
        self._totals: list[int] = []  # blocks named up to each entry, it included
        self._first = 0  # the entries before have fallen out
        self._ring = ring
        self._max_event_blocks = max_event_blocks
        self._walk = walk
        self._total = 0
        self._total_gone = 0
        self._digests = Digests()
        self.last_id = 0
        self.last_hole_id = 0

    def append(self, events: Iterable[Event]) -> None:
        """Number ``events`` in their order."""
        for event in events:
            self._digests.follow(event)
            for piece in split(event, self._max_event_blocks):
                self._enter(piece)
        self._trim()

    def begin_with(self, resident: Iterable[BlockStored]) -> None:
        """Blocks are resident that no event tells of: who asks for the first gets a dump."""
        found = False
        for event in resident:
            self._digests.follow(event)
            found = True
        if found:
            self.kick()

    def beat(self) -> None:
        """Enter NOTHING."""
        self.append([NOTHING])

    def kick(self) -> None:
        """Enter a HOLE and NOTHING."""
        self.append([HOLE, NOTHING])
        self.last_hole_id = self.last_id - 1

    def since(self, event_id: int, limit: int | None = None) -> list[Entry] | None:
        """The events after ``event_id``, oldest first; None if some of them fell out."""
        start = self._place(event_id)
        if start is None:
            return None
        return self._entries[start : None if limit is None else start + limit]

    def backlog(self, event_id: int) -> int | None:
        """How many blocks the events after ``event_id`` name; None if some of them fell out."""
        start = self._place(event_id)
        if start is None:
            return None
        before = self._totals[start - 1] if start > self._first else self._total_gone
        return self._total - before

    def dump(self) -> tuple[int, Iterator[BlockStored]]:
        """The latest number, and what is resident: what changes while it is read has later ones."""
        return self.last_id, self._walk()

    def digests(self) -> Mapping[Tier, TierDigest]:
        """The digest of each tier, as of the latest number."""
        return self._digests.now()

    def _enter(self, event: Event) -> None:
        self.last_id += 1
        self._total += _weight(event)
        self._entries.append(Entry(self.last_id, event))
        self._totals.append(self._total)

    def _trim(self) -> None:
        last = len(self._entries) - 1
        while self._total - self._total_gone > self._ring and self._first < last:
            self._total_gone = self._totals[self._first]
            self._entries[self._first] = _GONE  # lets go of the blocks
            self._first += 1
        if self._first > len(self._entries) // 2:
            del self._entries[: self._first]
            del self._totals[: self._first]
            self._first = 0

    def _place(self, event_id: int) -> int | None:
        """Where the entry after ``event_id`` is, or will be."""
        num_after = self.last_id - event_id
        start = len(self._entries) - max(0, num_after)
        return start if start >= self._first else None


_GONE = Entry(0, NOTHING)


def _weight(event: Event) -> int:
    return max(1, num_named(event))
