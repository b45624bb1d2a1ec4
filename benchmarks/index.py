"""How fast the index is at a million blocks: match, store into a full tier, eviction."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from _report import Report, calibration, timed

from flexkv.blocks import Blocks, Tier
from flexkv.engine.index import TierIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TOKENS_PER_BLOCK = 64
SHORT, LONG = 16, 2048


def random_chain(num_blocks: int, rng: np.random.Generator) -> Blocks:
    """A chain that shares nothing with any other."""
    keys = rng.bytes(32 * num_blocks)
    tokens = rng.bytes(4 * TOKENS_PER_BLOCK * num_blocks)
    return Blocks(keys, tokens, tokens_per_block=TOKENS_PER_BLOCK)


def store(index: TierIndex, blocks: Blocks) -> int:
    """A whole store as the engine does it. Returns how many events came of it."""
    reservation, removed = index.reserve(blocks)
    return len(removed) + len(index.commit(reservation))


def filled_index(
    num_blocks: int, length: int, rng: np.random.Generator, evict_ratio: float = 0.0
) -> tuple[TierIndex, list[Blocks]]:
    """A tier of chains of one length; whatever is stored next evicts."""
    index = TierIndex(Tier.HOST, num_blocks // length * length, evict_ratio=evict_ratio)
    chains = [random_chain(length, rng) for _ in range(num_blocks // length)]
    for blocks in chains:
        store(index, blocks)
    return index, chains


def alternated(
    work: Callable[[Blocks], object], inputs: Sequence[Blocks]
) -> tuple[list[float], float]:
    """Seconds of each call, and *c* as measured in between."""
    samples, references = [], []
    step = max(1, len(inputs) // 8)
    for i, blocks in enumerate(inputs):
        if i % step == 0:
            references.append(calibration())
        samples.append(timed(lambda blocks=blocks: work(blocks)))
    return samples, median(references)


def main() -> None:
    """Measure everything, print it."""
    report = Report(__doc__)
    rng = np.random.default_rng(7)
    num_blocks = 100_000 if report.quick else 1_000_000
    num_samples = 200 if report.quick else 1000

    index, chains = filled_index(num_blocks, LONG, rng)
    # a request brings equal keys in arrays of its own
    requests = [
        Blocks(
            bytes(bytearray(blocks.packed_keys())),
            bytes(blocks.token_ids),
            tokens_per_block=TOKENS_PER_BLOCK,
        )
        for blocks in (chains[i] for i in rng.integers(len(chains), size=num_samples))
    ]

    def match(blocks: Blocks) -> None:
        assert len(index.match(blocks).slots) == LONG
        index.touch(blocks)

    samples, c_s = alternated(match, requests)
    report.add("c", 1e6 * c_s, "us")
    report.add_ratio(f"match and touch {LONG} of {num_blocks} blocks", samples, c_s, 0.29)
    del index, chains, requests

    for stored, target in ((SHORT, 0.71), (LONG, 2.1)):
        index, _ = filled_index(num_blocks, SHORT, rng)
        new = [random_chain(stored, rng) for _ in range(num_samples)]
        samples, c_s = alternated(partial(store, index), new)
        name = f"store {stored} blocks, tier full of {num_blocks // SHORT} chains"
        report.add_ratio(name, samples, c_s, target)
        assert index.num_evicted == stored * num_samples

    index, _ = filled_index(num_blocks, SHORT, rng, evict_ratio=0.05)
    burst_s = timed(partial(store, index, random_chain(SHORT, rng)))
    assert index.num_evicted >= 0.05 * index.num_slots
    report.add("evict 5 % of that tier at once", 1e3 * burst_s, "ms")
    report.finish()


if __name__ == "__main__":
    main()
