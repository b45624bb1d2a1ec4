"""The rules of TierIndex, one by one; the model test beside it tries all mixtures."""

from __future__ import annotations

import pytest

from flexkv import Blocks, Tier, TierFullError
from flexkv.engine.index import TierIndex
from flexkv.events.types import BlockRemoved, BlockStored
from tests.engine.chains import chain
from tests.engine.followers import believed, single_steps

CHAIN = chain(1, 2, 3, 4)


def index_of(num_slots: int, *chains: Blocks, evict_ratio: float = 0.0) -> TierIndex:
    index = TierIndex(Tier.HOST, num_slots, evict_ratio=evict_ratio)
    for blocks in chains:
        reservation, _ = index.reserve(blocks)
        index.commit(reservation)
    return index


def test_a_reserved_block_is_not_resident_before_its_commit() -> None:
    index = TierIndex(Tier.HOST, 8)
    reservation, removed = index.reserve(CHAIN)
    assert removed == []
    assert index.match(CHAIN).num_blocks == 0
    assert index.num_present(CHAIN) == 4
    assert index.commit(reservation) == [BlockStored(CHAIN, Tier.HOST)]
    assert index.match(CHAIN).slots == reservation.slots


def test_a_match_ends_where_the_chains_diverge() -> None:
    index = index_of(8, CHAIN)
    assert index.match(chain(1, 2, 9, 9, 9)).num_blocks == 2
    assert index.match(chain(9)).num_blocks == 0
    assert index.match(chain()).num_blocks == 0


def test_a_store_of_a_longer_chain_stores_the_rest_only() -> None:
    index = index_of(8, CHAIN)
    longer = chain(1, 2, 3, 4, 5)
    reservation, _ = index.reserve(longer)
    assert reservation.num_present == 4
    (stored,) = index.commit(reservation)
    assert isinstance(stored, BlockStored)
    assert list(stored.blocks) == [longer.key(4)]
    assert stored.blocks.parent == CHAIN.key(3)


def test_a_full_tier_evicts_the_least_recently_used_from_its_tail() -> None:
    index = index_of(8, CHAIN, chain(5, 6, 7, 8))
    index.touch(CHAIN)
    _, removed = index.reserve(chain(9))
    assert removed == [BlockRemoved(chain(5, 6, 7, 8)[3:], Tier.HOST)]
    assert index.match(chain(5, 6, 7, 8)).num_blocks == 3


def test_a_lookup_does_not_touch() -> None:
    index = index_of(8, CHAIN, chain(5, 6, 7, 8))
    index.match(CHAIN)
    _, removed = index.reserve(chain(9))
    assert removed == [BlockRemoved(CHAIN[3:], Tier.HOST)]


def test_evict_ratio_frees_at_least_its_share() -> None:
    index = index_of(10, chain(1, 2, 3, 4, 5), chain(6, 7, 8, 9, 10), evict_ratio=0.4)
    _, removed = index.reserve(chain(11))
    assert len(single_steps(removed)) == 4
    assert index.num_free == 3


def test_a_larger_need_than_evict_ratio_is_met() -> None:
    index = index_of(10, chain(1, 2, 3, 4, 5), chain(6, 7, 8, 9, 10), evict_ratio=0.4)
    _, removed = index.reserve(chain(*range(20, 27)))
    assert len(single_steps(removed)) == 7
    assert index.num_free == 0


def test_an_infeasible_reservation_changes_nothing() -> None:
    index = index_of(8, CHAIN, chain(5, 6, 7, 8))
    lease = index.lease(CHAIN)
    with pytest.raises(TierFullError, match="need 5 slots, 4 are free or evictable") as full:
        index.reserve(chain(*range(20, 25)))
    assert (full.value.needed, full.value.available) == (5, 4)
    assert index.match(chain(5, 6, 7, 8)).num_blocks == 4
    index.release(lease)
    index.reserve(chain(*range(20, 25)))


def test_the_prefix_that_a_store_extends_makes_no_room() -> None:
    index = index_of(4, CHAIN)
    with pytest.raises(TierFullError, match="need 1 slots, 0 are free or evictable"):
        index.reserve(chain(1, 2, 3, 4, 5))


def test_a_lease_protects_just_its_prefix() -> None:
    index = index_of(4, CHAIN)
    index.lease(chain(1, 2))
    _, removed = index.reserve(chain(8, 9))
    assert removed == [BlockRemoved(CHAIN[2:], Tier.HOST)]
    with pytest.raises(TierFullError):
        index.reserve(chain(7))


def test_an_abort_in_mid_chain_aborts_all_descendants() -> None:
    index = TierIndex(Tier.HOST, 8)
    first, _ = index.reserve(chain(1, 2, 3))
    second, _ = index.reserve(chain(1, 2, 3, 4, 5))
    assert second.joined == (first,)
    assert index.commit(second) == [], "the parent is not resident yet"
    assert single_steps(index.commit(first, 1)) == [("stored", CHAIN.key(0))]
    assert second.num_stored == 0
    assert index.num_free == 7


def test_blocks_that_arrive_before_their_parent_become_resident_with_it() -> None:
    index = TierIndex(Tier.HOST, 8)
    first, _ = index.reserve(chain(1, 2))
    second, _ = index.reserve(CHAIN)
    assert index.commit(second) == []
    events = index.commit(first)
    assert events == [
        BlockStored(CHAIN[:2], Tier.HOST),
        BlockStored(CHAIN[2:], Tier.HOST),
    ]


def test_a_store_may_diverge_inside_a_chain_that_is_being_written() -> None:
    index = TierIndex(Tier.HOST, 8)
    first, _ = index.reserve(CHAIN)
    second, _ = index.reserve(chain(1, 2, 9))
    events = [*index.commit(second), *index.commit(first)]
    assert believed(events) == set(CHAIN) | set(chain(1, 2, 9))
    assert first.num_stored == 4


def test_a_lost_block_takes_what_follows_it_along_children_first() -> None:
    index = index_of(8, CHAIN, chain(1, 2, 9))
    events = index.lose(chain(1, 2))
    assert index.match(CHAIN).num_blocks == 1
    keys = [key for _, key in single_steps(events)]
    assert keys[-1] == CHAIN.key(1)
    assert set(keys) == {*list(CHAIN)[1:], chain(1, 2, 9).key(2)}


def test_the_slot_of_a_lost_block_returns_when_its_last_reader_ends() -> None:
    index = index_of(4, CHAIN)
    lease = index.lease(CHAIN)
    index.lose(chain(1, 2))
    assert index.num_free == 0
    index.release(lease)
    assert index.num_free == 3


def test_a_clear_returns_slots_that_are_being_written_when_that_ends() -> None:
    index = TierIndex(Tier.HOST, 4)
    reservation, _ = index.reserve(CHAIN)
    index.clear()
    assert (index.num_present(CHAIN), index.num_free) == (0, 0)
    assert index.commit(reservation) == []
    assert (reservation.num_stored, index.num_free) == (0, 4)


def test_a_walk_sees_what_a_split_moved_behind_it() -> None:
    index = index_of(16, chain(5, 6), CHAIN)
    walk = index.walk()
    seen = set(next(walk))
    for blocks in (chain(1, 2, 8), chain(5, 7)):
        index.commit(index.reserve(blocks)[0])
    seen |= {key for blocks in walk for key in blocks}
    assert set(CHAIN) | set(chain(5, 6)) <= seen


def test_what_an_index_keeps_does_not_hold_a_long_request_in_memory() -> None:
    long = chain(*range(100))
    index = index_of(200, long[:99])
    (stored,) = index.commit(index.reserve(long)[0])
    assert isinstance(stored, BlockStored)
    assert len(stored.blocks._chain.keys) == 32
