"""What a stream that is read now and then has not been told yet, per tier and block."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from flexkv.blocks import BlockKey, Tier
from flexkv.events.types import AllBlocksCleared, BlockStored

if TYPE_CHECKING:
    from flexkv.blocks import Blocks
    from flexkv.events.types import Event

_Where: TypeAlias = tuple[Tier, BlockKey]


class Stored(NamedTuple):
    """Consecutive ``blocks`` of a chain that became readable."""

    blocks: Blocks
    tier: Tier


class Removed(NamedTuple):
    """Blocks that are not readable any more, the last of a chain first."""

    keys: list[BlockKey]
    tier: Tier


class NetChanges:
    """Stored and then removed, or the other way round, is nothing: so what waits is bounded.

    At most everything that is resident and everything that was told. The first of an OrderedDict is
    found at once, that of a dict behind everything deleted before it.
    """

    def __init__(self) -> None:
        self._told: dict[_Where, None] = {}  # parents first
        self._cleared: dict[_Where, None] = {}  # told before all was cleared; parents first
        self._stored: OrderedDict[_Where, tuple[Blocks, int]] = OrderedDict()  # parents first
        self._removed: OrderedDict[_Where, None] = OrderedDict()  # children first

    def __len__(self) -> int:
        return len(self._stored) + len(self._removed) + len(self._cleared)

    def add(self, event: Event) -> None:
        """Something has happened in the tiers. A second time, it is nothing new."""
        if isinstance(event, AllBlocksCleared):
            self._stored = OrderedDict()
            self._removed = OrderedDict()
            self._told.update(self._cleared)  # most often none
            self._cleared, self._told = self._told, {}
        elif isinstance(event, BlockStored):
            for i, key in enumerate(event.blocks):
                self._add_stored((event.tier, key), event.blocks, i)
        else:
            for i in reversed(range(len(event.blocks))):
                self._add_removed((event.tier, event.blocks.key(i)))

    def forget_told(self) -> None:
        """The stream's readers have forgotten everything; what is resident is to be added anew."""
        self._told.clear()
        self._cleared.clear()
        self._stored.clear()
        self._removed.clear()

    def take(self, max_blocks: int) -> list[Stored | Removed]:
        """The next changes to tell, of at most so many blocks; removals first."""
        changes: list[Stored | Removed] = []
        num_left = max_blocks
        while self._cleared and num_left:
            removed = self._next_cleared(num_left)
            changes.append(removed)
            num_left -= len(removed.keys)
        while self._removed and num_left:
            removed = self._next_removed(num_left)
            changes.append(removed)
            num_left -= len(removed.keys)
        while self._stored and num_left:
            stored = self._next_stored(num_left)
            changes.append(stored)
            num_left -= len(stored.blocks)
        return changes

    def _add_stored(self, where: _Where, blocks: Blocks, i: int) -> None:
        if where in self._removed:
            del self._removed[where]
        elif where in self._cleared:
            del self._cleared[where]
            self._told[where] = None
        elif where not in self._told:
            self._stored.setdefault(where, (blocks, i))

    def _add_removed(self, where: _Where) -> None:
        if where in self._told:
            self._removed[where] = None
        else:
            self._stored.pop(where, None)

    def _next_cleared(self, max_blocks: int) -> Removed:
        tier, _ = next(reversed(self._cleared))
        keys: list[BlockKey] = []
        while self._cleared and len(keys) < max_blocks:
            if next(reversed(self._cleared))[0] != tier:
                break
            keys.append(self._cleared.popitem()[0][1])
        return Removed(keys, tier)

    def _next_removed(self, max_blocks: int) -> Removed:
        tier, _ = next(iter(self._removed))
        keys: list[BlockKey] = []
        while self._removed and len(keys) < max_blocks:
            where = next(iter(self._removed))
            if where[0] != tier:
                break
            del self._removed[where]
            del self._told[where]
            keys.append(where[1])
        return Removed(keys, tier)

    def _next_stored(self, max_blocks: int) -> Stored:
        """Of what waits longest, as many blocks as follow one another."""
        first = next(iter(self._stored))
        tier = first[0]
        blocks, start = self._stored[first]
        stop = start
        while self._stored and stop - start < max_blocks:
            where = next(iter(self._stored))
            of, i = self._stored[where]
            if of is not blocks or i != stop or where[0] != tier:
                break
            del self._stored[where]
            self._told[where] = None
            stop += 1
        return Stored(blocks.part(start, stop), tier)
