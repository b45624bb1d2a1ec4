"""Numbers what happens and keeps the last of it, so that a sink that fell behind can catch up."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol

from flexkv.events.types import AllBlocksCleared, BlockStored, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from flexkv.events.types import Event


class Entry(NamedTuple):
    """One event and its number; numbers increase by one."""

    event_id: int
    event: Event


class EventSource(Protocol):
    """What a sink reads from: events since a number, or everything as of a number."""

    @property
    def last_id(self) -> int:
        """The number of the latest event; 0 before the first."""
        ...

    def since(self, event_id: int) -> list[Entry] | None:
        """The events after ``event_id``, oldest first; None if some of them are gone."""
        ...

    def dump(self) -> tuple[int, Iterator[BlockStored]]:
        """The latest number, and what is resident as of it: all tiers, parents first.

        It may be read in pieces: what changes meanwhile has a later number, and is idempotent.
        """
        ...


class EventLog:
    """A bounded ring of numbered events; with ``walk`` it is an ``EventSource``.

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
        self._entries: deque[Entry] = deque()
        self._ring = ring
        self._max_event_blocks = max_event_blocks
        self._walk = walk
        self._num_blocks = 0
        self.last_id = 0

    def append(self, events: Iterable[Event]) -> None:
        """Number ``events`` in their order."""
        for event in events:
            for piece in split(event, self._max_event_blocks):
                self.last_id += 1
                self._entries.append(Entry(self.last_id, piece))
                self._num_blocks += _weight(piece)
        while self._num_blocks > self._ring and len(self._entries) > 1:
            self._num_blocks -= _weight(self._entries.popleft().event)

    def since(self, event_id: int) -> list[Entry] | None:
        """The events after ``event_id``, oldest first; None if some of them fell out."""
        num_missed = self.last_id - event_id
        if num_missed > len(self._entries):
            return None
        latest = list(islice(reversed(self._entries), num_missed))
        latest.reverse()
        return latest

    def dump(self) -> tuple[int, Iterator[BlockStored]]:
        """The latest number, and what is resident: what changes while it is read has later ones."""
        return self.last_id, self._walk()


def _weight(event: Event) -> int:
    return 1 if isinstance(event, AllBlocksCleared) else max(1, len(event.blocks))
