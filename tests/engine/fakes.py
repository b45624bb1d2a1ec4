"""A paged cache with slow, failing copies, and an engine around it: for faults and time."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import torch

from flexkv import CacheConfig, Config, Engine, KVLayout, ListSink, TransfersConfig
from flexkv.errors import TransferError
from tests.engine.chains import TOKENS_PER_BLOCK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from flexkv.blocks import BlockKey, Blocks
    from flexkv.tiers.host import HostPool
    from flexkv.tiers.ssd_journal import DiskCalls

BLOCK_NBYTES = 64


def payload(key: BlockKey) -> torch.Tensor:
    """What the bytes of a block must be."""
    return torch.frombuffer(bytearray(key * (BLOCK_NBYTES // len(key))), dtype=torch.uint8)


class SlowCopier:
    """Each copy takes ``seconds``; its bytes move at the end, and are garbage until then.

    ``failing``: how many of the next copies fail. Fails the test where a slot is used by two
    copies, unless both read it.
    """

    def __init__(self, num_blocks: int = 64, seconds: float = 1.0) -> None:
        self.num_blocks = num_blocks
        self.seconds = seconds
        self.failing = 0
        self.cache = torch.zeros((num_blocks, BLOCK_NBYTES), dtype=torch.uint8)
        self.num_running = 0
        self.num_blocks_by_copy: list[tuple[str, int]] = []
        self.log: list[str] = []
        self._region = torch.empty(0)
        self._readers: Counter[int] = Counter()
        self._writers: Counter[int] = Counter()

    def attach_pool(self, pool: HostPool, rank: int) -> None:
        self._region = pool.region(rank)

    def mark(self) -> object:
        return None

    def compute(self, blocks: Blocks, block_ids: Sequence[int]) -> None:
        """Write what the model would have."""
        for key, block_id in zip(blocks, block_ids, strict=True):
            self.cache[block_id] = payload(key)

    def wrong_blocks(self, blocks: Blocks, block_ids: Sequence[int]) -> int:
        """How many of the cache's blocks are not what they must be."""
        pairs = zip(blocks, block_ids, strict=True)
        return sum(not torch.equal(self.cache[i], payload(key)) for key, i in pairs)

    async def gather(self, block_ids: Sequence[int], slots: Sequence[int], after: object) -> None:
        assert after is None
        assert not any(self._readers[s] or self._writers[s] for s in slots), "slot in use"
        self._region[list(slots)] = 0xEE
        self._writers.update(slots)
        try:
            await self._move("gather", len(slots))
            self._region[list(slots)] = self.cache[list(block_ids)]
        finally:
            self._writers.subtract(slots)

    async def scatter(
        self, slots: Sequence[int], block_ids: Sequence[int], after: object = None
    ) -> None:
        assert after is None
        assert not any(self._writers[s] for s in slots), "slot is being written"
        self.cache[list(block_ids)] = 0xDD
        self._readers.update(slots)
        try:
            await self._move("scatter", len(slots))
            self.cache[list(block_ids)] = self._region[list(slots)]
        finally:
            self._readers.subtract(slots)

    async def close(self) -> None:
        assert not self.num_running

    async def _move(self, what: str, num_blocks: int) -> None:
        loop = asyncio.get_running_loop()
        self.num_blocks_by_copy.append((what, num_blocks))
        fails, self.failing = self.failing > 0, max(0, self.failing - 1)
        self.log.append(f"{what} begins")
        self.num_running += 1
        ended = loop.create_future()
        loop.call_later(self.seconds, ended.set_result, None)
        cancelled = None
        while not ended.done():  # bytes move whether anybody waits or not
            try:
                await asyncio.wait([ended])
            except asyncio.CancelledError as error:
                cancelled = error
        self.num_running -= 1
        self.log.append(f"{what} ends")
        if fails:
            raise TransferError("injected")
        if cancelled is not None:
            raise cancelled


@asynccontextmanager
async def slow_engine(
    num_slots: int = 32,
    *,
    seconds: float = 1.0,
    evict_ratio: float = 0.0,
    chunk_blocks: int = 1024,
    max_blocks_in_flight: int = 4096,
    deadline_s: float = 30.0,
    close_timeout_s: float = 10.0,
    ssd: dict[str, Any] | None = None,
    calls: DiskCalls | None = None,
) -> AsyncIterator[tuple[Engine, SlowCopier, ListSink]]:
    """An engine whose only rank has a ``SlowCopier``; ``ssd`` adds settings of an SSD tier."""
    cache: dict[str, Any] = {"num_cpu_blocks": num_slots, "evict_ratio": evict_ratio}
    config = Config(
        cache=CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, **cache, **(ssd or {})),
        transfers=TransfersConfig(
            chunk_bytes=chunk_blocks * BLOCK_NBYTES,
            max_load_bytes=max(chunk_blocks, max_blocks_in_flight) * BLOCK_NBYTES,
            max_store_bytes=max(chunk_blocks, max_blocks_in_flight) * BLOCK_NBYTES,
            deadline_s=deadline_s,
            close_timeout_s=close_timeout_s,
        ),
    )
    layout = KVLayout(tokens_per_block=TOKENS_PER_BLOCK, block_nbytes=BLOCK_NBYTES)
    sink = ListSink()
    engine = Engine(config, layout, sinks=[sink])
    if calls is not None:
        engine._below._disk._calls = calls
    async with engine:
        copier = SlowCopier(seconds=seconds)
        engine.attach_copier(copier, 0)
        yield engine, copier, sink
