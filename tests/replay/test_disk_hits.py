"""An engine with an SSD tier hits what a plain dictionary of that size would, restarts included."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv import CacheConfig, Config, Engine, ListSink, Tier, blocks_of
from flexkv.replay.trace import read_trace
from flexkv.replay.worker import SimulatedWorker, layout_of
from flexkv.replay.workload import conversations, tokens_of

if TYPE_CHECKING:
    from flexkv import Blocks
    from flexkv.replay.workload import Workload

TRACE = os.environ.get("TRACE") or None  # the nightly part; not ours to ship
BLOCK_NBYTES = 16384
MAX_POINTS = 0.5


def workload() -> Workload:
    return read_trace(Path(TRACE), None) if TRACE else conversations(600, seed=1)


class DictionaryLRU:
    """Blocks by key; who follows leaves before what it follows."""

    def __init__(self, capacity: int) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._capacity = capacity
        self.num_hit = 0

    def serve(self, blocks: Blocks) -> None:
        keys = list(blocks)
        self.num_hit += next((i for i, key in enumerate(keys) if key not in self._keys), len(keys))
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._capacity:
            self._keys.popitem(last=False)


async def test_hits_are_those_of_a_dictionary_of_the_ssds_size(tmp_path: Path) -> None:
    work = workload()
    capacity = max(2 * work.num_longest, work.num_distinct // 4)
    config = Config(
        num_log_interval_requests=0,
        cache=CacheConfig(
            tokens_per_block=work.tokens_per_block,
            num_cpu_blocks=max(work.num_longest + 1, capacity // 4),
            evict_ratio=0.0,
            enable_ssd=True,
            num_ssd_blocks=capacity,
            ssd_cache_dir=(str(tmp_path),),
            weights_id="simulated",
        ),
    )
    layout = layout_of(BLOCK_NBYTES, work.tokens_per_block)
    plain = DictionaryLRU(capacity)
    num_blocks = num_hit = num_wrong = num_back = 0
    half = len(work.requests) // 2
    for requests in (work.requests[:half], work.requests[half:]):  # a restart in the middle
        async with Engine(config, layout, sinks=[ListSink()]) as engine:
            num_back = len(engine.residency(Tier.SSD))
            worker = SimulatedWorker(
                "x", engine, layout, num_longest=work.num_longest, max_requests=1
            )
            for request in requests:
                tokens = tokens_of(request.block_ids, work.tokens_per_block, 0)
                blocks = blocks_of(tokens, work.tokens_per_block)
                await worker.serve(blocks)
                await engine.flush()  # they come faster than a disk writes: nothing is dropped
                plain.serve(blocks)
            tally = worker.tally
            num_blocks += tally.num_blocks
            num_hit += tally.num_hit
            num_wrong += tally.num_wrong_bytes
    assert num_wrong == 0
    assert num_back > capacity // 2
    assert num_hit > 0
    assert abs(100 * (num_hit - plain.num_hit) / num_blocks) <= MAX_POINTS
