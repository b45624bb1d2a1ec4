"""Workloads and payloads: deterministic, and different where they must be."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.errors import ConfigError
from flexkv.hashing import blocks_of
from flexkv.replay.payload import num_wrong, payload_of
from flexkv.replay.worker import layout_of
from flexkv.replay.workload import Request, Workload, conversations, tokens_of

CHAINS = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=6)


def workload_of(chains: list[list[int]]) -> Workload:
    return Workload("test", [Request(0.0, tuple(chain)) for chain in chains], 4)


def test_equal_block_ids_are_equal_tokens_wherever_they_stand() -> None:
    tokens = tokens_of([7, 8, 7], 16, seed=3).reshape(3, 16)
    assert (tokens[0] == tokens[2]).all()
    assert (tokens_of([7], 16, seed=3) == tokens[0]).all()
    assert (tokens[0] != tokens[1]).any()


def test_the_seed_changes_the_tokens() -> None:
    assert (tokens_of([7], 16, seed=3) != tokens_of([7], 16, seed=4)).any()


def test_tokens_stay_below_two_to_the_31() -> None:
    tokens = tokens_of(range(5000), 16, seed=2**63 - 1)
    assert tokens.dtype == np.uint32
    assert 2**30 < tokens.max() < 2**31


def test_blocks_of_a_large_workload_never_share_their_tokens() -> None:
    rows = tokens_of(range(20000), 16, seed=0).reshape(-1, 16)
    assert len({row.tobytes() for row in rows}) == 20000


def test_block_ids_and_seeds_that_add_up_alike_are_different_tokens() -> None:
    assert (tokens_of([7], 16, seed=3) != tokens_of([6], 16, seed=4)).any()


@given(CHAINS)
def test_common_blocks_are_those_that_every_request_begins_with(chains: list[list[int]]) -> None:
    full = [chain for chain in chains if chain]
    shortest = min((len(chain) for chain in full), default=0)
    expected = 0
    while expected < shortest and len({chain[expected] for chain in full}) == 1:
        expected += 1
    assert workload_of(chains).num_common == expected


def test_conversations_are_the_same_for_a_seed_and_others_for_another() -> None:
    once, again, other = (conversations(50, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_conversations_grow_and_share_their_system_prompts() -> None:
    chains = [request.block_ids for request in conversations(300, seed=0).requests]
    turns = {chain: i for i, chain in enumerate(chains)}
    grown = [c for c in chains if any(c[:n] in turns for n in range(1, len(c)))]
    assert len(grown) > 100
    sessions = {
        chain for chain in chains if not any(chain[:n] in turns for n in range(1, len(chain)))
    }
    beginnings = Counter(chain[0] for chain in sessions)
    assert 1 < sum(n > 1 for n in beginnings.values()) < 10


def test_a_payload_depends_on_the_key_the_whole_prefix_and_the_place() -> None:
    a, b = (blocks_of([first, 2, 3, 4], 2) for first in (1, 9))
    payload = payload_of(a, 64)
    assert payload.shape == (2, 64)
    assert (payload == payload_of(a, 64)).all()
    assert (payload[1:] == payload_of(a[1:], 64)).all()
    assert num_wrong(payload_of(b, 64)[1], payload[1]) > 32  # same tokens, another prefix
    words = payload.view("<u8").ravel()
    assert len(set(words.tolist())) == len(words)


def test_a_payload_is_the_same_on_every_machine() -> None:
    payload = payload_of(blocks_of([1, 2, 3, 4], 2), 16)
    assert payload[0].tobytes().hex() == "c12eb4d72ea68b6c09cf651c27653cb0"


@pytest.mark.parametrize(("at", "bit"), [(0, 0), (17, 3), (127, 7)])
def test_one_flipped_bit_is_one_wrong_byte(at: int, bit: int) -> None:
    payload = payload_of(blocks_of([1, 2, 3, 4], 2), 64)
    found = payload.copy()
    found.reshape(-1)[at] ^= 1 << bit
    assert num_wrong(found, payload) == 1


@pytest.mark.parametrize("block_nbytes", [1, 2047, 2049, 3000])
def test_block_bytes_that_do_not_divide_are_refused_with_the_step(block_nbytes: int) -> None:
    with pytest.raises(ConfigError, match=f"{block_nbytes} bytes .* multiple of 2048"):
        layout_of(block_nbytes, 512)
