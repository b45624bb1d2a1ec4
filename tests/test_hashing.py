"""Keys identify a prefix, its tenant and adapter, and nothing else; Dynamo agrees on the hashes."""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from dynamo.llm import compute_block_hash_for_seq
from hypothesis import given
from hypothesis import strategies as st

from flexkv.blocks import Tier
from flexkv.errors import InputError
from flexkv.events.types import BlockStored
from flexkv.hashing import blocks_of, tokens_hashes

token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=12)
names = st.none() | st.text(max_size=4)


def test_the_keys_are_those_of_the_published_scheme() -> None:
    root = hashlib.sha256(
        b"flexkv block keys, version 1\0"
        + (2).to_bytes(4, "little")
        + (b"\1" + (6).to_bytes(8, "little") + b"tenant")
        + b"\0"
    ).digest()
    first = hashlib.sha256(root + bytes((1, 0, 0, 0, 2, 0, 0, 0))).digest()
    second = hashlib.sha256(first + bytes((3, 0, 0, 0, 4, 1, 0, 0))).digest()
    assert list(blocks_of([1, 2, 3, 260], 2, namespace="tenant")) == [first, second]


def test_the_vector_in_the_docstring_is_true() -> None:
    keys = [key.hex()[:12] for key in blocks_of([1, 2, 3, 4], 2)]
    assert keys == ["91ceb2bd5494", "7d45d9817d99"]
    assert all(f"{key}..." in (blocks_of.__doc__ or "") for key in keys)


@pytest.mark.parametrize(
    "same",
    [
        list,
        tuple,
        lambda ids: array("I", ids),
        lambda ids: array("q", ids),
        lambda ids: memoryview(array("L", ids)),
        lambda ids: np.array(ids, np.uint16),
        lambda ids: np.array(ids, ">i8"),
        lambda ids: np.array([7, *ids], np.uint64)[1:],
        lambda ids: np.repeat(np.array(ids, np.int32), 2)[::2],
        lambda ids: list(np.array(ids, np.int32)),
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
    ],
)
def test_what_holds_the_token_ids_does_not_matter(same: Any) -> None:
    token_ids = [random.randrange(2**16) for _ in range(70)]
    assert blocks_of(same(token_ids), 16) == blocks_of(token_ids, 16)


def test_only_full_blocks_count() -> None:
    assert [len(blocks_of(range(n), 16)) for n in (0, 15, 16, 31, 32)] == [0, 0, 1, 1, 2]
    assert blocks_of(range(31), 16) == blocks_of(range(16), 16)


@given(token_lists, names, names, token_lists, names, names)
def test_keys_are_equal_only_where_everything_before_them_is(
    ids: list[int],
    namespace: str | None,
    lora: str | None,
    other_ids: list[int],
    other_namespace: str | None,
    other_lora: str | None,
) -> None:
    mine = blocks_of(ids, 1, namespace, lora)
    theirs = blocks_of(other_ids, 1, other_namespace, other_lora)
    same_root = (namespace, lora) == (other_namespace, other_lora)
    for i in range(min(len(mine), len(theirs))):
        same = same_root and ids[: i + 1] == other_ids[: i + 1]
        assert (mine.key(i) == theirs.key(i)) == same


@given(st.text(max_size=6), st.data(), token_lists)
def test_no_split_of_the_same_text_collides(text: str, data: Any, ids: list[int]) -> None:
    """Namespace and adapter, or namespace and tokens, as one string would be ambiguous."""
    ids = [*ids, 1]
    cuts = data.draw(st.sets(st.integers(0, len(text)), min_size=1, max_size=3))
    roots = [(text[:cut], text[cut:]) for cut in cuts] + [(text, None), (None, text), (None, None)]
    distinct = {blocks_of(ids, 1, namespace, lora).key(0) for namespace, lora in roots}
    assert len(distinct) == len(set(roots))
    tokens_of_text = list(np.frombuffer(text.encode("utf-32-le"), "<u4"))
    assert blocks_of(ids, 1, text).key(0) not in set(blocks_of([*tokens_of_text, *ids], 1))


@given(token_lists)
def test_block_sizes_never_share_a_key(ids: list[int]) -> None:
    assert not set(blocks_of(ids, 1)) & set(blocks_of(ids, 2))


@pytest.mark.parametrize(
    ("token_ids", "complaint"),
    [
        ([0, -1], "token_ids[1] is -1"),
        ([0, 1, 2**32], "token_ids[2] is 4294967296"),
        ([0.5], "token_ids[0] is 0.5"),
        ([1, True], "token_ids[1] is True"),
        ([1, np.False_], f"token_ids[1] is {np.False_!r}"),
        ([1, "2"], "token_ids[1] is '2'"),
        ([1, None], "token_ids[1] is None"),
        ([[1, 2]], "token_ids[0] is [1, 2]"),
        (np.array([3, -4]), "token_ids[1] is -4"),
        (np.array([3, 2**32]), "token_ids[1] is 4294967296"),
        (np.array([3, 2**63], np.uint64), "token_ids[1] is 9223372036854775808"),
        (np.array([3, -4], np.int32), "token_ids[1] is -4"),
        (np.array([0.5]), f"of type float64, the first is {np.float64(0.5)!r}"),
        (np.array([True]), "of type bool"),
        (np.zeros((2, 3), int), "shape (2, 3)"),
        (np.array(3), "shape ()"),
        (torch.tensor([0.5]), "of type float32"),
        (torch.tensor([0.5], dtype=torch.bfloat16), "no integer values"),
        (torch.tensor([0.5], requires_grad=True), "no integer values"),
        (torch.zeros((2, 3), dtype=torch.int64), "shape (2, 3)"),
        ("text", "token_ids is str"),
        (b"text", "token_ids is bytes"),
        (None, "token_ids is NoneType"),
        (7, "token_ids is int"),
        ((i for i in range(3)), "token_ids is generator"),
        ({1, 2}, "token_ids is set"),
    ],
)
def test_token_ids_that_cannot_be_right_are_refused(token_ids: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        blocks_of(token_ids, 1)


@pytest.mark.parametrize("tokens_per_block", [0, -1, 2**32, 1.0, True, None, "16"])
def test_a_block_size_that_cannot_be_right_is_refused(tokens_per_block: Any) -> None:
    with pytest.raises(InputError, match=f"tokens_per_block is {tokens_per_block!r}"):
        blocks_of([1], tokens_per_block)


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(InputError, match="namespace is 7"):
        blocks_of([1], 1, namespace=7)  # type: ignore[arg-type]  # the case
    with pytest.raises(InputError, match=r"lora is .* no UTF-8"):
        blocks_of([1], 1, lora="\ud800")


@pytest.mark.parametrize("tokens_per_block", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("namespace", [None, "", "tenant-7", 's\u00e9"x'])
@pytest.mark.parametrize("lora", [None, "", "adapter", "a/b-\u00e9"])
def test_tokens_hashes_are_dynamos(
    tokens_per_block: int, namespace: str | None, lora: str | None
) -> None:
    for num_tokens in (0, 3 * tokens_per_block, 5 * tokens_per_block + 1):
        ids = [random.randrange(2**32) for _ in range(num_tokens)]
        blocks = blocks_of(ids, tokens_per_block, namespace, lora)
        assert tokens_hashes(blocks).tolist() == compute_block_hash_for_seq(
            ids, tokens_per_block, lora_name=lora, cache_namespace=namespace
        )


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6), st.integers(0, 20))
def test_slices_in_any_order_have_the_hashes_of_the_whole(
    cuts: list[tuple[int, int]], compact_from: int
) -> None:
    ids = list(range(80))
    whole = tokens_hashes(blocks_of(ids, 4))
    blocks = blocks_of(ids, 4)
    for start, stop in cuts:
        assert tokens_hashes(blocks[start:stop]) == whole[start : max(start, stop)]
    assert tokens_hashes(blocks[compact_from:].compact()) == whole[compact_from:]


def test_a_chain_is_hashed_only_as_far_as_it_is_told_of() -> None:
    """So that each piece of a long chain costs the feed as much as any other."""
    blocks = blocks_of(range(400), 4)
    event = BlockStored(blocks[:10], Tier.HOST)
    tokens_hashes(event.blocks)
    memo = blocks._chain.tokens_hashes
    assert memo is not None
    assert len(memo) == 10
