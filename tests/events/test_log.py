from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv.blocks import Tier
from flexkv.events.log import EventLog
from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored
from tests.engine.chains import chain
from tests.engine.followers import single_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.events.types import Event

CHAIN = chain(1, 2, 3, 4, 5)


def log_of(*events: Event, ring: int = 100, max_event_blocks: int = 100) -> EventLog:
    log = EventLog(ring=ring, max_event_blocks=max_event_blocks)
    log.append(events)
    return log


def test_numbers_begin_at_1_and_go_up_by_one() -> None:
    log = log_of()
    assert log.last_id == 0
    assert log.since(0) == []
    log.append([BlockStored(CHAIN, Tier.HOST), AllBlocksCleared()])
    log.append([BlockStored(CHAIN, Tier.HOST)])
    assert [entry.event_id for entry in log.since(0) or ()] == [1, 2, 3]
    assert [entry.event_id for entry in log.since(2) or ()] == [3]
    assert log.since(3) == []


def test_what_fell_out_of_the_ring_is_said_to_be_gone() -> None:
    log = log_of(*(BlockStored(chain(i, i), Tier.HOST) for i in range(5)), ring=4)
    assert log.since(0) is None
    assert log.since(2) is None
    assert [entry.event_id for entry in log.since(3) or ()] == [4, 5]


def test_the_ring_is_bounded_by_blocks_not_by_events() -> None:
    log = log_of(*(AllBlocksCleared() for _ in range(4)), BlockStored(CHAIN, Tier.HOST), ring=6)
    assert [entry.event_id for entry in log.since(3) or ()] == [4, 5]
    assert log.since(2) is None


def test_the_latest_event_stays_even_if_it_is_larger_than_the_ring() -> None:
    log = log_of(BlockStored(CHAIN, Tier.HOST), ring=2)
    assert [entry.event_id for entry in log.since(0) or ()] == [1]


def test_a_long_stored_event_is_entered_in_pieces_parents_first() -> None:
    log = log_of(BlockStored(CHAIN, Tier.HOST), max_event_blocks=2)
    events = [entry.event for entry in log.since(0) or ()]
    assert events == [
        BlockStored(CHAIN[:2], Tier.HOST),
        BlockStored(CHAIN[2:4], Tier.HOST),
        BlockStored(CHAIN[4:], Tier.HOST),
    ]


def test_a_long_removed_event_is_entered_in_pieces_children_first() -> None:
    removed = BlockRemoved(CHAIN, Tier.HOST)
    log = log_of(removed, max_event_blocks=2)
    events = [entry.event for entry in log.since(0) or ()]
    assert len(events) == 3
    assert single_steps(events) == single_steps([removed])


def test_a_dump_is_everything_resident_with_the_latest_number() -> None:
    def walk() -> Iterator[BlockStored]:
        yield BlockStored(CHAIN, Tier.HOST)

    log = EventLog(ring=10, max_event_blocks=3, walk=walk)
    log.append([AllBlocksCleared()] * 7)
    last_id, resident = log.dump()
    assert last_id == 7
    assert list(resident) == [BlockStored(CHAIN, Tier.HOST)]
