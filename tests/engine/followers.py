"""Who follows events, as a router does, and checks what it may rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexkv.blocks import BlockKey, Tier
    from flexkv.events.types import Event


def single_steps(events: list[Event]) -> list[tuple[str, BlockKey]]:
    """Events block by block, in the order in which they became true."""
    steps: list[tuple[str, BlockKey]] = []
    for event in events:
        if isinstance(event, BlockStored):
            steps += [("stored", key) for key in event.blocks]
        elif isinstance(event, BlockRemoved):
            steps += [("removed", key) for key in reversed(list(event.blocks))]
    return steps


def follow(believed: set[BlockKey], event: Event) -> None:
    """Apply an event as a router does, and check what it may rely on."""
    if isinstance(event, AllBlocksCleared):
        believed.clear()
        return
    for kind, key in single_steps([event]):
        if kind == "stored":
            assert key not in believed, "one Stored per residency"
            believed.add(key)
        else:
            assert key in believed, "one Removed per loss"
            believed.remove(key)
    assert event.blocks.parent is None or event.blocks.parent in believed, "parents outlive"


def believed(events: Iterable[Event], tier: Tier | None = None) -> set[BlockKey]:
    """What a follower takes for resident after ``events``, of one tier if there are several."""
    keys: set[BlockKey] = set()
    for event in events:
        if tier is None or isinstance(event, AllBlocksCleared) or event.tier == tier:
            follow(keys, event)
    return keys
