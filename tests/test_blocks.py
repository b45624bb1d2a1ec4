from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv import Blocks, KVLayout, LayoutError
from tests.engine.chains import chain

CHAIN = chain(1, 2, 3, 4, 5)


def test_a_slice_knows_its_keys_tokens_and_parent() -> None:
    part = CHAIN[2:4]
    assert list(part) == [CHAIN.key(2), CHAIN.key(3)]
    assert part.parent == CHAIN.key(1)
    assert part.token_ids.tobytes() == CHAIN.token_ids.tobytes()[16:32]
    assert CHAIN[:2].parent is None
    assert len(CHAIN[4:2]) == 0
    assert part[1:].parent == CHAIN.key(2)


def test_blocks_are_equal_by_content() -> None:
    assert CHAIN[1:3] == chain(1, 2, 3)[1:]
    assert CHAIN[1:3] != CHAIN[2:4]
    assert CHAIN[:1] != chain(2)
    assert CHAIN != "a chain"


def test_a_compact_copy_is_equal_and_no_longer_than_needed() -> None:
    copy = CHAIN[3:4].compact()
    assert copy == CHAIN[3:4]
    assert copy.parent == CHAIN.key(2)
    assert copy.token_ids == CHAIN[3:4].token_ids
    assert len(copy._chain.keys) == 32
    assert CHAIN[:4].compact()._chain is CHAIN._chain, "half or more is not worth a copy"


def test_a_router_hash_is_the_keys_low_64_bits_big_endian() -> None:
    assert CHAIN.router_hashes() == [int.from_bytes(key[-8:], "big") for key in CHAIN]
    assert CHAIN[2:3].router_hashes() == CHAIN.router_hashes()[2:3]
    assert chain().router_hashes() == []


@given(
    mine=st.lists(st.integers(0, 1), max_size=12),
    theirs=st.lists(st.integers(0, 1), max_size=12),
    data=st.data(),
)
def test_bisection_finds_what_walking_would(
    mine: list[int], theirs: list[int], data: st.DataObject
) -> None:
    num_common = 0
    for a, b in zip(mine, theirs, strict=False):
        if a != b:
            break
        num_common += 1
    at = data.draw(st.integers(0, num_common))
    assert chain(*mine)[at:].num_common(chain(*theirs), at) == num_common - at


def test_arrays_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(LayoutError, match="33 bytes of keys at 32 each"):
        Blocks(bytes(33), bytes(8), tokens_per_block=2)
    with pytest.raises(LayoutError, match="12 bytes of token ids at 8 a block"):
        Blocks(bytes(32), bytes(12), tokens_per_block=2)
    with pytest.raises(LayoutError, match="key_nbytes is 4"):
        Blocks(bytes(4), bytes(8), tokens_per_block=2, key_nbytes=4)
    with pytest.raises(LayoutError, match="step 2 is not possible"):
        CHAIN[::2]


def test_a_layout_knows_the_bytes_of_a_block() -> None:
    layout = KVLayout.of_model(
        num_layers=32, num_kv_heads=8, head_size=128, dtype_nbytes=2, tokens_per_block=16
    )
    assert layout.block_nbytes == 32 * 2 * 16 * 8 * 128 * 2
    with pytest.raises(LayoutError, match="num_ranks is 0"):
        KVLayout(tokens_per_block=16, block_nbytes=1, num_ranks=0)


@pytest.mark.parametrize("wrong", [0, -2, "2", 2.0, None])
def test_a_model_without_a_whole_number_of_something_is_refused(wrong: Any) -> None:
    model = {"num_layers": -2, "num_kv_heads": 8, "head_size": 128, "dtype_nbytes": 2}
    with pytest.raises(LayoutError, match="num_layers is -2: give an integer from 1"):
        KVLayout.of_model(**model | {"num_kv_heads": -8}, tokens_per_block=16)
    with pytest.raises(LayoutError, match=f"head_size is {wrong!r}: give an integer"):
        KVLayout.of_model(**model | {"num_layers": 2, "head_size": wrong}, tokens_per_block=16)


def test_blocks_with_extra_keys_and_what_follows_them_are_not_plain() -> None:
    keys = b"".join(bytes([i]) * 32 for i in range(6))
    extra = (None, None, ("image", 0), None, None, None)
    blocks = Blocks(keys, bytes(4 * 6), tokens_per_block=1, extra_keys=extra)
    assert blocks.num_plain == 2
    assert blocks[:1].num_plain == 1
    assert blocks[1:4].num_plain == 1
    assert blocks[1:4].extra_keys == (None, ("image", 0), None)
    tail = blocks[4:].compact()  # its own extra keys are gone, and yet it follows some
    assert (tail.num_plain, blocks[4:].num_plain, blocks[2:].compact().num_plain) == (0, 0, 0)
    assert blocks[:2].compact().num_plain == 2


def test_extra_keys_that_do_not_go_with_the_blocks_are_refused() -> None:
    with pytest.raises(LayoutError, match="1 extra keys do not go with 2 blocks"):
        Blocks(bytes(64), bytes(8), tokens_per_block=1, extra_keys=(None,))
