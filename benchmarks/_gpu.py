"""What the benchmarks on a GPU share: caches, contiguous copies to compare with, alternation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from flexkv.tiers.cuda import CudaPagedCopier
from flexkv.tiers.host import HostPool
from flexkv.tiers.segments import segments_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MIB = 1 << 20
GIB = 1 << 30
NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 32, 8, 128
DEVICE = torch.device("cuda", 0)

Caches = dict[str, torch.Tensor]


class Contiguous:
    """The copier itself on ``number`` blocks of one piece each: launched and awaited alike."""

    def __init__(self, nbytes: int, number: int = 1) -> None:
        self._cache = torch.empty((number, 1, nbytes), dtype=torch.uint8, device=DEVICE).fill_(1)
        self._pool = HostPool(number, nbytes)
        self._copier = CudaPagedCopier(segments_of({"": self._cache}, 1), DEVICE)
        self._copier.attach_pool(self._pool, 0)

    async def copy(self, *, is_store: bool, block: int = 0) -> None:
        """One contiguous copy."""
        if is_store:
            await self._copier.gather([block], [block], None)
        else:
            await self._copier.scatter([block], [block])

    async def close(self) -> None:
        """Give all memory back."""
        await self._copier.close()
        self._pool.close()


def paged_caches(
    tokens_per_block: int, nbytes: int, *, in_one: bool = False
) -> tuple[Caches, torch.Tensor | None]:
    """Random numbers: a tensor for each layer, keys and values apart, in allocations of their own.

    ``in_one``: in one allocation, keys and values side by side, which is vLLM's LBNHC; this too.
    """
    block_nbytes = NUM_LAYERS * 2 * tokens_per_block * NUM_HEADS * HEAD_SIZE * 2
    num_blocks = nbytes // block_nbytes
    if in_one:
        shape: tuple[int, ...] = (
            NUM_LAYERS,
            num_blocks,
            tokens_per_block,
            NUM_HEADS,
            2 * HEAD_SIZE,
        )
        backing = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).random_(-100, 100)
        return {str(i): layer.permute(0, 2, 1, 3) for i, layer in enumerate(backing)}, backing
    shape = (2, num_blocks, tokens_per_block, NUM_HEADS, HEAD_SIZE)
    return {
        str(i): torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).random_(-100, 100)
        for i in range(NUM_LAYERS)
    }, None


async def seconds(copy: Callable[[], Awaitable[object]]) -> float:
    """How long it takes, awaited."""
    started_s = time.perf_counter()
    await copy()
    return time.perf_counter() - started_s


async def pairs(
    ours: Callable[[], Awaitable[object]],
    theirs: Callable[[], Awaitable[object]],
    number: int,
    num_warm: int = 3,
) -> tuple[list[float], list[float]]:
    """Seconds of both sides, alternated; who goes first alternates too."""
    samples: tuple[list[float], list[float]] = ([], [])
    for i in range(number + num_warm):
        for side in (i % 2, 1 - i % 2):
            seconds_s = await seconds((ours, theirs)[side])
            if i >= num_warm:
                samples[side].append(seconds_s)
    return samples
