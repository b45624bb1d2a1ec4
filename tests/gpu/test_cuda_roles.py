"""vLLM's worker role and the engine beside it, on CUDA caches, without vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.chains import chain
from tests.integration.roles import NUM_BLOCKS, Roles, roles, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS = chain(1, 2, 3)
IDS = [5, 9, 7]
OTHER_IDS = [20, 21, 22]


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Roles]:
    with roles(f"ipc://{tmp_path}/link", "cuda") as made:
        yield made


def test_what_was_stored_is_loaded_byte_for_byte(both: Roles) -> None:
    expected = both.bytes_of(IDS)
    both.store(BLOCKS, IDS)
    until(lambda: both.resident(BLOCKS) == 3)
    job = both.promise(BLOCKS, OTHER_IDS)
    both.begin_step(loads=[job])
    assert until(lambda: both.reports()[1]) == {"loaded"}
    assert torch.equal(both.bytes_of(OTHER_IDS), expected)


def test_a_store_follows_the_model_and_a_load_comes_before_nothing_of_it(both: Roles) -> None:
    """A long kernel writes the blocks that are stored, and later the ones that are loaded into."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for layer, cache in enumerate(both.caches.values()):
            cache[IDS] = layer + 1.0
        both.begin_step()  # the event behind the kernel
    both.store(BLOCKS, IDS)
    until(lambda: both.resident(BLOCKS) == 3)
    job = both.promise(BLOCKS, OTHER_IDS)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for cache in both.caches.values():
            cache[OTHER_IDS] = -1.0  # what a step in flight still writes there
        both.begin_step(loads=[job])
    assert until(lambda: both.reports()[1]) == {"loaded"}
    torch.cuda.synchronize()
    for layer, cache in enumerate(both.caches.values()):
        assert (cache[IDS] == layer + 1.0).all()
        assert (cache[OTHER_IDS] == layer + 1.0).all()


def test_other_blocks_may_be_written_meanwhile(both: Roles) -> None:
    expected = both.bytes_of(IDS)
    others = [i for i in range(NUM_BLOCKS) if i not in {*IDS, *OTHER_IDS}]
    for round_ in range(50):
        both.store(BLOCKS, IDS)
        for cache in both.caches.values():
            cache[others] = float(round_)
        both.begin_step()
        until(lambda: both.resident(BLOCKS) == 3)
        job = both.promise(BLOCKS, OTHER_IDS)
        both.begin_step(loads=[job])
        assert until(lambda: both.reports()[1]) == {"loaded"}
        assert torch.equal(both.bytes_of(OTHER_IDS), expected)
        for cache in both.caches.values():
            cache[OTHER_IDS] = 0.0
        assert both.service.clear()


def test_a_promise_without_an_engine_is_reported_as_failed(both: Roles) -> None:
    both.store(BLOCKS, IDS)
    until(lambda: both.resident(BLOCKS) == 3)
    job = both.promise(BLOCKS, OTHER_IDS)
    both.service.close()
    both.begin_step(loads=[job], alive=False)
    _, received, failed = until(lambda: (r := both.reports())[1] and r)
    assert (received, failed) == ({"loaded"}, set(OTHER_IDS))
