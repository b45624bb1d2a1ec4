"""What vLLM's stream is told adds up to what is resident, whenever it is asked for how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from flexkv.blocks import Tier
from flexkv.engine.index import TierIndex
from flexkv.errors import TierFullError
from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored
from flexkv.integration.vllm.net_changes import NetChanges, Removed, Stored
from tests.engine.chains import chain

if TYPE_CHECKING:
    from flexkv.blocks import BlockKey


class Reader:
    """Believes what it is told, and insists on how it is told."""

    def __init__(self) -> None:
        self.believes: dict[Tier, set[BlockKey]] = {tier: set() for tier in Tier}

    def read(self, changes: list[Stored | Removed]) -> None:
        for change in changes:
            believes = self.believes[change.tier]
            if isinstance(change, Removed):
                for key in change.keys:
                    believes.remove(key)  # never of what was not told
                continue
            parent = change.blocks.parent
            assert parent is None or parent in believes, "parents come first"
            for key in change.blocks:
                assert key not in believes, "nothing is told twice"
                believes.add(key)


chains = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda symbols: chain(*symbols))
steps = st.one_of(
    st.tuples(st.just("store"), chains),
    st.tuples(st.just("take"), st.integers(1, 5)),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("forget"), st.none()),
)


@given(st.lists(steps, max_size=40))
def test_what_was_told_is_what_is_resident(steps: list[tuple[str, Any]]) -> None:
    index = TierIndex(Tier.HOST, 6)
    changes, reader = NetChanges(), Reader()
    for what, argument in steps:
        if what == "store":
            try:
                reservation, removed = index.reserve(argument)
            except TierFullError:
                continue
            for event in [*removed, *index.commit(reservation)]:
                changes.add(event)
        elif what == "take":
            taken = changes.take(argument)
            assert (
                sum(len(c.blocks if isinstance(c, Stored) else c.keys) for c in taken) <= argument
            )
            reader.read(taken)
        elif what == "clear":
            index.clear()
            changes.add(AllBlocksCleared())
        else:  # whoever reads the stream was told to forget all
            reader = Reader()
            changes.forget_told()
            for blocks in index.walk():
                changes.add(BlockStored(blocks, Tier.HOST))
        assert len(changes) <= index.num_slots * 2
    while len(changes):
        reader.read(changes.take(3))
    assert reader.believes[Tier.HOST] == index.residency()


def test_stored_and_removed_before_anybody_asked_is_nothing() -> None:
    changes = NetChanges()
    changes.add(BlockStored(chain(1, 2, 3), Tier.HOST))
    changes.add(BlockRemoved(chain(1, 2, 3)[1:], Tier.HOST))
    assert [len(c.blocks) for c in changes.take(9) if isinstance(c, Stored)] == [1]
    changes.add(BlockRemoved(chain(1), Tier.HOST))
    changes.add(BlockStored(chain(1), Tier.HOST))
    assert changes.take(9) == []


def test_tiers_are_told_apart() -> None:
    changes = NetChanges()
    changes.add(BlockStored(chain(1, 2), Tier.HOST))
    changes.add(BlockStored(chain(1, 2), Tier.SSD))
    changes.add(BlockRemoved(chain(1, 2), Tier.HOST))
    (stored,) = changes.take(9)
    assert isinstance(stored, Stored)
    assert (stored.tier, len(stored.blocks)) == (Tier.SSD, 2)


def test_removals_come_first_and_children_before_parents() -> None:
    changes = NetChanges()
    changes.add(BlockStored(chain(1, 2, 3), Tier.HOST))
    changes.take(9)
    changes.add(BlockStored(chain(4), Tier.HOST))
    changes.add(BlockRemoved(chain(1, 2, 3), Tier.HOST))
    removed, stored = changes.take(9)
    assert isinstance(removed, Removed)
    assert removed.keys == list(reversed(list(chain(1, 2, 3))))
    assert isinstance(stored, Stored)


def test_blocks_of_one_chain_are_told_together_in_pieces_of_the_limit() -> None:
    changes = NetChanges()
    changes.add(BlockStored(chain(1, 2, 3, 4, 5), Tier.HOST))
    pieces = [changes.take(2) for _ in range(3)]
    assert [[len(c.blocks) for c in piece if isinstance(c, Stored)] for piece in pieces] == [
        [2],
        [2],
        [1],
    ]
