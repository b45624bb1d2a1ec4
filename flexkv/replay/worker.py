"""A simulated inference worker: an engine beside a small paged cache, every loaded byte checked."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexkv.blocks import KVLayout, Tier
from flexkv.errors import ConfigError
from flexkv.replay.payload import num_wrong, payload_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from flexkv.blocks import Blocks
    from flexkv.engine.engine import Engine

_NUM_LAYERS = 2
_NUM_KV_PARTS = 2
_SCRUBBED = 0xA5
_MIN_GPU_BLOCKS = 3  # with two, the shape would not say which axis counts blocks


def layout_of(block_nbytes: int, tokens_per_block: int) -> KVLayout:
    """The layout of a simulated cache: two layers, keys and values, one head of bytes.

    Raises:
        ConfigError: ``block_nbytes`` can't be divided that way.
    """
    step = _NUM_LAYERS * _NUM_KV_PARTS * tokens_per_block
    if block_nbytes < step or block_nbytes % step:
        raise ConfigError(
            f"a block of {block_nbytes} bytes does not divide into keys and values of "
            f"{_NUM_LAYERS} layers for {tokens_per_block} tokens: give a multiple of {step}"
        )
    return KVLayout(tokens_per_block=tokens_per_block, block_nbytes=block_nbytes)


class PagedCache:
    """A paged KV cache on the CPU: blocks are allocated for a request and freed after it."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        tokens = layout.tokens_per_block
        head_nbytes = layout.block_nbytes // (_NUM_LAYERS * _NUM_KV_PARTS * tokens)
        shape = (num_blocks, _NUM_KV_PARTS, tokens, 1, head_nbytes)
        self.layers = {
            f"layers.{i}.attn": torch.zeros(shape, dtype=torch.uint8) for i in range(_NUM_LAYERS)
        }
        self._rows = [layer.numpy().reshape(num_blocks, -1) for layer in self.layers.values()]
        self._free = deque(range(num_blocks))

    @contextmanager
    def allocated(self, num_blocks: int) -> Iterator[list[int]]:
        """Blocks that are the caller's until it leaves.

        They are scrubbed first: what an earlier request left there can't pass for loaded bytes.
        """
        assert num_blocks <= len(self._free), "sized for the requests that a worker admits"
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        for rows in self._rows:
            rows[block_ids] = _SCRUBBED
        try:
            yield block_ids
        finally:
            self._free.extend(block_ids)

    def read(self, block_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """The bytes of blocks, of shape (len(block_ids), block_nbytes)."""
        return np.concatenate([rows[block_ids] for rows in self._rows], axis=1)

    def write(self, block_ids: Sequence[int], payload: npt.NDArray[np.uint8]) -> None:
        """Put ``payload[i]`` into ``block_ids[i]``: what a model would have computed."""
        width = payload.shape[1] // len(self._rows)
        for i, rows in enumerate(self._rows):
            rows[block_ids] = payload[:, i * width : (i + 1) * width]


@dataclass(slots=True)
class Tally:
    """What a worker has done so far, in blocks unless named otherwise."""

    num_requests: int = 0
    num_blocks: int = 0
    num_hit: int = 0
    num_missing: int = 0
    num_dropped: int = 0
    num_wrong_bytes: int = 0
    num_checked_bytes: int = 0
    num_stored: int = 0  # in host, by engines that are closed
    num_evicted: int = 0  # as well
    num_back: int = 0  # on SSD, when the engine was started again


class SimulatedWorker:
    """Serves requests the way an inference worker does, with at most ``max_requests`` at once.

    ``num_longest``: blocks of the longest request that will come.
    """

    def __init__(
        self, name: str, engine: Engine, layout: KVLayout, *, num_longest: int, max_requests: int
    ) -> None:
        self.name = name
        self.engine = engine
        self.tally = Tally()
        self._layout = layout
        num_gpu_blocks = max(_MIN_GPU_BLOCKS, num_longest * max_requests)
        self._cache = PagedCache(layout, num_gpu_blocks)
        self._admitted = asyncio.Semaphore(max_requests)
        engine.attach(self._cache.layers)

    def leave(self) -> None:
        """Note what the engine has done; it is closed next."""
        host = self.engine.stats().tiers[Tier.HOST]
        self.tally.num_stored += host.num_stored
        self.tally.num_evicted += host.num_evicted

    def go_on(self, engine: Engine) -> None:
        """Serve through ``engine``, the successor of the one that was left."""
        self.engine = engine
        self.tally.num_back += len(engine.residency(Tier.SSD))
        engine.attach(self._cache.layers)

    async def serve(self, blocks: Blocks) -> None:
        """Load what the engine holds, compare it byte by byte, compute the rest, store all."""
        async with self._admitted:
            with self._cache.allocated(len(blocks)) as block_ids:
                await self._serve(blocks, block_ids)
        self.tally.num_requests += 1

    async def _serve(self, blocks: Blocks, block_ids: list[int]) -> None:
        tally = self.tally
        num_expected = self.engine.lookup(blocks).num_blocks
        loaded = await self.engine.load(blocks, block_ids[:num_expected])
        num_hit = loaded.num_blocks
        payload = payload_of(blocks, self._layout.block_nbytes)
        found = self._cache.read(block_ids[:num_hit])
        tally.num_wrong_bytes += num_wrong(found, payload[:num_hit])
        tally.num_checked_bytes += found.nbytes
        tally.num_blocks += len(blocks)
        tally.num_hit += num_hit
        tally.num_missing += num_expected - num_hit
        # The loaded part stays as it came: were it wrong, storing it must not hide that.
        self._cache.write(block_ids[num_hit:], payload[num_hit:])
        stored = await self.engine.store(blocks, block_ids)
        tally.num_dropped += stored.num_dropped
