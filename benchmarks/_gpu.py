"""What the benchmarks on a GPU share: caches, contiguous copies to compare with, alternation."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import torch

from flexkv.tiers import cuda_dma
from flexkv.tiers.cuda_lane import Lane, Submitted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from flexkv.tiers.host import HostPool

MIB = 1 << 20
GIB = 1 << 30
NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 32, 8, 128
DEVICE = torch.device("cuda", 0)

Caches = dict[str, torch.Tensor]


class Contiguous:
    """A stream that copies the first bytes of one tensor to another; a slice is how many."""

    def __init__(self, host: torch.Tensor, gpu: torch.Tensor, *, is_store: bool) -> None:
        self._host = host.data_ptr()
        self._gpu = gpu.data_ptr()
        self._is_store = is_store
        self._stream = torch.cuda.Stream(DEVICE)
        self._event = torch.cuda.Event(blocking=True)

    def submit(self, part: int, after: object) -> Submitted:
        """Begin to copy ``part`` bytes."""
        del after
        target, source = (self._host, self._gpu) if self._is_store else (self._gpu, self._host)
        handle = self._stream.cuda_stream
        cuda_dma.copy(target, source, part, to_host=self._is_store, stream=handle)
        self._event.record(self._stream)
        return Submitted(self._event)


def contiguous_lane(host: torch.Tensor, gpu: torch.Tensor, *, is_store: bool) -> Lane:
    """One contiguous copy at a time, launched and awaited as the copier's slices are."""

    def on_loss(error: RuntimeError) -> None:
        raise error

    channel = Contiguous(host, gpu, is_store=is_store)
    return Lane("contiguous", [channel], max_slices=1, on_loss=on_loss)


def paged_caches(tokens_per_block: int, nbytes: int) -> Caches:
    """A tensor for each layer, keys and values apart, full of random numbers."""
    block_nbytes = NUM_LAYERS * 2 * tokens_per_block * NUM_HEADS * HEAD_SIZE * 2
    shape = (2, nbytes // block_nbytes, tokens_per_block, NUM_HEADS, HEAD_SIZE)
    return {
        str(i): torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).random_(-100, 100)
        for i in range(NUM_LAYERS)
    }


def num_wrong(caches: Caches, ids: Sequence[int], pool: HostPool, slots: Sequence[int]) -> int:
    """Bytes that differ between blocks and their slots, of up to 64 of them."""
    wrong = 0
    for i in random.Random(1).sample(range(len(ids)), min(64, len(ids))):
        parts = [cache[:, ids[i]].flatten() for cache in caches.values()]
        block = torch.cat(parts).view(torch.uint8).cpu()
        wrong += int((block != pool.region(0)[slots[i]]).sum())
    return wrong


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
