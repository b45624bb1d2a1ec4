"""A request and the index give a plan: which blocks to copy, and between which slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexkv.errors import TierFullError

if TYPE_CHECKING:
    from array import array

    from flexkv.blocks import Blocks
    from flexkv.engine.index import TierIndex
    from flexkv.engine.runs import Lease, Reservation
    from flexkv.events.types import Event


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Copy ``slots[i]`` to the caller's i-th GPU block; then release ``lease``."""

    lease: Lease
    slots: array[int]


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Copy the caller's blocks from ``num_present`` on into ``reservation.slots``.

    ``num_present`` of the caller's blocks are resident or on their way already. ``reservation`` is
    None where nothing can be stored. ``removed`` is to be emitted before anything else happens.
    """

    num_present: int
    reservation: Reservation | None
    removed: list[Event]


def plan_load(index: TierIndex, blocks: Blocks, first: int) -> LoadPlan:
    """Load ``blocks[first:]`` as far as the resident prefix reaches; it is touched and leased."""
    index.touch(blocks.part(0, index.match(blocks).num_blocks))
    lease = index.lease(blocks)
    return LoadPlan(lease, lease.slots[first:])


def plan_store(index: TierIndex, blocks: Blocks, first: int) -> StorePlan:
    """Store those of ``blocks[first:]`` that are absent: all, or the leading part that fits.

    Nothing can be stored where blocks before ``first`` are absent: a tier has no gaps.
    """
    num_present = index.num_present(blocks)
    if num_present < first:
        return StorePlan(0, None, [])
    try:
        reservation, removed = index.reserve(blocks)
    except TierFullError as full:
        fitting = blocks.part(0, num_present + full.available)
        reservation, removed = index.reserve(fitting)
    return StorePlan(num_present - first, reservation, removed)
