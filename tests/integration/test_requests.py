"""A request's chain follows vLLM's own hashes, and only written blocks are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from flexkv.integration.vllm.requests import RequestState
from tests.integration.requests import BLOCK_SIZE, Request, lora

if TYPE_CHECKING:
    from flexkv.blocks import Blocks


def state_of(request: Request) -> RequestState:
    return RequestState(request, BLOCK_SIZE)


def tokens_of(blocks: Blocks) -> list[int]:
    return list(np.frombuffer(blocks.token_ids, "<u4").tolist())


def test_the_chain_has_vllms_keys_and_tokens() -> None:
    request = Request(list(range(11)), cache_salt="tenant", lora_request=lora("adapter"))
    chain = state_of(request).chain()
    assert list(chain) == request.block_hashes
    assert tokens_of(chain) == list(range(8))
    assert (chain.namespace, chain.lora, chain.parent) == ("tenant", "adapter", None)


def test_the_chain_grows_with_the_request() -> None:
    request = Request(list(range(9)))
    state = state_of(request)
    before = state.chain()
    assert state.chain() is before  # asked again, it costs nothing
    request.set_tokens(list(range(17)))
    assert list(state.chain()) == request.block_hashes
    assert tokens_of(state.chain()) == list(range(16))
    assert len(before) == 2
    assert state.chain(1) == before[:1]


def test_the_chain_shrinks_and_goes_another_way_with_a_streaming_session() -> None:
    request = Request(list(range(16)))
    state = state_of(request)
    assert len(state.chain()) == 4
    request.set_tokens(list(range(9)))
    assert list(state.chain()) == request.block_hashes
    request.set_tokens([*range(8), *range(50, 60)])
    assert list(state.chain()) == request.block_hashes
    assert tokens_of(state.chain()) == [*range(8), *range(50, 58)]
    request.set_tokens([*range(4), *range(70, 82)])  # as long as before
    assert list(state.chain()) == request.block_hashes
    assert tokens_of(state.chain()) == [*range(4), *range(70, 82)]


def test_a_request_without_a_full_block_has_an_empty_chain() -> None:
    state = state_of(Request([1, 2]))
    assert len(state.chain()) == len(state.chain(3)) == 0


@pytest.mark.parametrize(
    ("num_tokens", "num_computed", "num_in_flight", "expected"),
    [
        (16, 0, 0, 0),
        (16, 12, 0, 3),
        (16, 12, 1, 2),  # what is scheduled is not written yet
        (16, 16, 0, 3),  # the last token may be one that was sampled just now
        (17, 16, 0, 4),
        (17, 20, 0, 4),
        (16, 4, 8, 0),
    ],
)
def test_only_blocks_of_processed_tokens_are_storable(
    num_tokens: int, num_computed: int, num_in_flight: int, expected: int
) -> None:
    request = Request(
        list(range(num_tokens)),
        num_computed_tokens=num_computed,
        num_in_flight_tokens=num_in_flight,
    )
    state = state_of(request)
    assert state.num_storable() == 0  # it has not been scheduled
    state.is_running = True
    assert state.num_storable() == expected


def test_what_a_request_begins_with_is_storable_after_its_first_step() -> None:
    request = Request(list(range(17)), num_computed_tokens=8)
    state = state_of(request)
    state.begin()
    assert state.num_storable() == 0  # others may be computing it in this very step
    request.num_computed_tokens, request.num_in_flight_tokens = 12, 4
    assert state.num_storable() == 0
    request.num_in_flight_tokens = 0
    assert state.num_storable() == 3
    state.restart()
    assert state.num_storable() == 0


def test_a_prompt_is_stored_at_once_and_what_follows_by_the_handful() -> None:
    request = Request(list(range(200)), prompt=22)
    state = state_of(request)
    state.begin()
    worth = []
    for num_computed in range(1, 120):
        request.num_computed_tokens = num_computed
        if state.has_news():
            worth.append(num_computed)
            state.num_handed = state.num_storable()
    # the prompt's five full blocks as they come, then eight at a time
    assert worth == [4, 8, 12, 16, 20, 52, 84, 116]
