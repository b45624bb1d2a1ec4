from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from flexkv.blocks import Tier
from flexkv.events.digest import TierDigest, digest_of
from flexkv.events.log import Entry, EventLog
from flexkv.events.types import HOLE, NOTHING, AllBlocksCleared, BlockRemoved, BlockStored
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


def test_a_limit_gives_the_oldest_of_what_is_asked_for() -> None:
    log = log_of(*[AllBlocksCleared()] * 5)
    assert [entry.event_id for entry in log.since(1, 2) or ()] == [2, 3]


def test_a_beat_takes_a_number_and_names_nothing() -> None:
    log = log_of(BlockStored(CHAIN, Tier.HOST))
    log.beat()
    assert log.since(1) == [Entry(2, NOTHING)]
    assert log.last_hole_id == 0


def test_a_kick_leaves_a_hole_before_its_number() -> None:
    log = log_of(BlockStored(CHAIN, Tier.HOST))
    log.kick()
    assert log.last_hole_id == 2
    entries = log.since(1) or []
    assert entries == [Entry(2, HOLE), Entry(3, NOTHING)]
    assert [entry.event is HOLE for entry in entries] == [True, False]


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 30))
def test_the_backlog_is_what_the_later_events_name(sizes: list[int], ring: int) -> None:
    log = EventLog(ring=ring, max_event_blocks=100)
    for size in sizes:
        log.append([BlockStored(chain(*range(size)), Tier.HOST)])
    for event_id in range(len(sizes) + 1):
        entries = log.since(event_id)
        if entries is None:
            assert log.backlog(event_id) is None
            assert sum(sizes[event_id:]) > ring
        else:
            assert log.backlog(event_id) == sum(sizes[event_id:])
            assert len(entries) == len(sizes) - event_id


def test_the_digests_follow_what_is_resident_and_nothing_else() -> None:
    log = log_of(BlockStored(CHAIN, Tier.HOST), BlockStored(CHAIN[:2], Tier.SSD))
    log.append([BlockRemoved(CHAIN[2:], Tier.HOST), NOTHING])
    held = digest_of(CHAIN[:2].router_hashes())
    assert log.digests()[Tier.HOST] == held == log.digests()[Tier.SSD]
    assert str(held).startswith("2:")
    log.append([AllBlocksCleared()])
    assert set(log.digests().values()) == {TierDigest(0, 0)}


def test_the_digest_does_not_tell_in_which_order_or_pieces_blocks_came() -> None:
    one = log_of(BlockStored(CHAIN, Tier.HOST))
    other = log_of(
        BlockStored(CHAIN[:3], Tier.HOST),
        BlockRemoved(CHAIN[1:3], Tier.HOST),
        BlockStored(CHAIN[1:], Tier.HOST),
    )
    assert one.digests() == other.digests()
    assert one.digests() != log_of(BlockStored(CHAIN[:4], Tier.HOST)).digests()
