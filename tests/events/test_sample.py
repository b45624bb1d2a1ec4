"""The chains by which an engine lets itself be checked are whole, few, and the same every time."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flexkv.blocks import Blocks, Tier
from flexkv.engine.index import TierIndex
from flexkv.events import sample
from flexkv.events.audit import MAX_CHUNK_NBYTES, Collector, chunks
from flexkv.events.log import EventLog
from flexkv.events.sample import NUM_CHAINS, Sampler
from flexkv.events.types import BlockStored
from flexkv.hashing import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexkv.blocks import RouterHash
    from flexkv.events.sample import SampledChain

SIZE = 4


def a_tree(seed: int, num_chains: int) -> tuple[TierIndex, dict[int, Blocks]]:
    """An index of chains that share heads, and each chain by the hash of its last block."""
    rng = random.Random(seed)
    index = TierIndex(Tier.HOST, 100_000, evict_ratio=0.1)
    tokens = [[rng.randrange(2**32) for _ in range(40)]]
    by_last = {}
    for _ in range(num_chains):
        head = rng.choice(tokens)
        head = head[: rng.randrange(0, len(head), SIZE)]
        tokens.append(head + [rng.randrange(2**32) for _ in range(rng.randrange(1, 10) * SIZE)])
        blocks = blocks_of(tokens[-1], SIZE, namespace="tenant")
        reservation, _ = index.reserve(blocks)
        index.commit(reservation)
        by_last[blocks.router_hashes()[-1]] = blocks
    return index, by_last


def sampled(walk: Iterable[Blocks], max_nbytes: int = 2**20) -> list[SampledChain]:
    sampler = Sampler()
    for blocks in walk:
        sampler.follow(BlockStored(blocks, Tier.HOST))
    return list(sampler.chains(max_nbytes))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_are_whole_chains_down_to_their_last_block(seed: int) -> None:
    index, by_last = a_tree(seed, 200)
    chosen = sampled(index.walk())
    assert len(chosen) == NUM_CHAINS
    parents = {blocks.parent for blocks in index.walk()}
    for chain in chosen:
        blocks = by_last[chain.router_hashes()[-1]]
        assert chain.router_hashes() == blocks.router_hashes()
        assert chain.token_ids == bytes(blocks.token_ids)
        assert (chain.tier, chain.namespace, chain.lora) == ("host_pinned", "tenant", None)
        assert blocks.key(len(blocks) - 1) not in parents
    assert {c.hashes for c in sampled(index.walk())} == {c.hashes for c in chosen}


def test_of_a_long_chain_comes_the_head() -> None:
    blocks = blocks_of(range(4000), SIZE)
    (chain,) = sampled([blocks], max_nbytes=24 * 10)
    assert chain.router_hashes() == blocks.router_hashes()[:10]
    assert chain.tokens() == list(range(40))


def long_chain(num_blocks: int) -> Blocks:
    keys = np.arange(2 * num_blocks, dtype=">u8").tobytes()
    tokens = np.arange(SIZE * num_blocks, dtype="<u4").tobytes()
    return Blocks(keys, tokens, tokens_per_block=SIZE, key_nbytes=16)


def test_no_step_takes_up_all_of_a_long_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = long_chain(70_000)
    real, sizes = Blocks.router_hashes, []

    def watched(self: Blocks) -> list[RouterHash]:
        sizes.append(len(self))
        return real(self)

    resident = [BlockStored(blocks[:3], Tier.HOST), BlockStored(blocks[3:], Tier.HOST)]
    log = EventLog(ring=100_000, max_event_blocks=1000, walk=lambda: iter(resident))
    log.append(resident)
    collector = Collector()
    with monkeypatch.context() as patched:
        patched.setattr(Blocks, "router_hashes", watched)
        messages = [m for m in chunks(log, log.digests()) if m]
    most = MAX_CHUNK_NBYTES // (4 * SIZE + 8)
    assert max(sizes) <= most < len(blocks)
    assert max(len(m) for m in messages) <= 1.5 * MAX_CHUNK_NBYTES
    audit = [collector.take(m) for m in messages][-1]
    assert audit is not None
    assert audit.held["host_pinned"] == set(blocks.router_hashes())
    assert audit.sample[0].router_hashes() == blocks[:most].router_hashes()


def test_a_run_whose_parents_are_in_another_tier_is_left_out() -> None:
    blocks = blocks_of(range(16), SIZE)
    sampler = Sampler()
    sampler.follow(BlockStored(blocks[:2], Tier.HOST))
    sampler.follow(BlockStored(blocks[2:], Tier.SSD))
    (chain,) = sampler.chains(1000)
    assert (chain.tier, chain.tokens()) == ("host_pinned", list(range(8)))


def test_a_run_whose_parents_did_not_come_is_left_out() -> None:
    blocks = blocks_of(range(40), SIZE)
    assert sampled([blocks[2:]]) == []
    (chain,) = sampled([blocks[:2], blocks[4:], blocks[2:4]])
    assert chain.tokens() == list(range(16))


def test_the_walk_of_many_runs_keeps_few_of_them() -> None:
    sampler = Sampler()
    rng = random.Random(1)
    for _ in range(1000):
        tokens = [rng.randrange(2**32) for _ in range(SIZE)]
        sampler.follow(BlockStored(blocks_of(tokens, SIZE), Tier.HOST))
        assert len(sampler._chosen) <= sample.NUM_CHAINS


def test_blocks_that_no_router_can_know_of_are_not_in_an_answer() -> None:
    plain = blocks_of(range(16), SIZE)
    blocks = Blocks(
        plain.packed_keys(),
        bytes(plain.token_ids),
        tokens_per_block=SIZE,
        key_nbytes=plain.key_nbytes,
        extra_keys=((), (), ("an image",), ()),
    )
    resident = [BlockStored(blocks[:3], Tier.HOST), BlockStored(blocks[3:], Tier.HOST)]
    log = EventLog(ring=100, max_event_blocks=10, walk=lambda: iter(resident))
    log.append(resident)
    collector = Collector()
    audit = [collector.take(m) for m in chunks(log, log.digests()) if m][-1]
    assert audit is not None
    assert audit.held["host_pinned"] == set(plain.router_hashes()[:2])
    assert audit.digests["host_pinned"].startswith("2:")
    (chain,) = audit.sample
    assert chain.router_hashes() == plain.router_hashes()[:2]
