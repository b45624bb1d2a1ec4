"""The ways that a small copy can go on a GPU, against one another: what ``WayTable`` goes by."""

from __future__ import annotations

import asyncio
import random
import sys
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from _gpu import DEVICE, MIB, Contiguous, paged_caches, seconds
from _report import Report

from flexkv.tiers.cuda import CudaPagedCopier
from flexkv.tiers.cuda_slices import WayTable
from flexkv.tiers.host import HostPool
from flexkv.tiers.segments import segments_of

if TYPE_CHECKING:
    from collections.abc import Coroutine

TOKENS, NUM_SLOTS, SIZES = 16, 64, (2, 4, 8, 16)  # MiB
NEVER, ALWAYS = 1 << 40, 1 << 40
NUM_WARM = 3


def kernel(programs: int) -> WayTable:
    """One kernel."""
    return WayTable(
        row_nbytes=NEVER,
        short_row_nbytes=NEVER,
        direct_load_nbytes=ALWAYS,
        direct_store_nbytes=ALWAYS,
        direct_programs=programs,
    )


def staged(first_nbytes: int) -> WayTable:
    """A kernel and DMA, in slices."""
    return WayTable(
        row_nbytes=NEVER,
        short_row_nbytes=NEVER,
        direct_load_nbytes=-1,
        direct_store_nbytes=-1,
        first_nbytes=first_nbytes,
    )


TABLES = {
    "as it is": WayTable(),
    "kernel": kernel(64),
    "kernel of 32 programs": kernel(32),
    "kernel of 128 programs": kernel(128),
    "staged": staged(8 * MIB),
    "staged, first 2 MiB": staged(2 * MIB),
}
ROWS = WayTable(row_nbytes=1)


async def one_size(
    report: Report, name: str, copiers: dict[str, CudaPagedCopier], mib: int
) -> None:
    """All ways and a contiguous copy in turns, in random order."""
    contiguous = Contiguous(mib * MIB)
    rng = random.Random(1)
    for is_store in (True, False):
        samples: dict[str, list[float]] = {way: [] for way in (*copiers, "contiguous")}
        for turn in range(40 if report.quick else 200):
            for way in rng.sample(sorted(samples), len(samples)):
                copy = partial(contiguous.copy, is_store=is_store)
                if way in copiers:
                    copy = one_copy(copiers[way], rng, mib // 2, is_store=is_store)
                seconds_s = await seconds(copy)
                if turn >= NUM_WARM:
                    samples[way].append(seconds_s)
        direction = "GPU to host" if is_store else "host to GPU"
        theirs = median(samples["contiguous"])
        for way in copiers:
            share = theirs / median(samples[way])
            report.add(f"{name}, {mib} MiB, {direction}, {way}", share, "", better="higher")
        report.add(f"{name}, {mib} MiB, {direction}: contiguous p50", 1e6 * theirs, "us")
    await contiguous.close()


def one_copy(
    copier: CudaPagedCopier, rng: random.Random, number: int, *, is_store: bool
) -> partial[Coroutine[None, None, None]]:
    """Random blocks, consecutive slots."""
    ids = rng.sample(range(copier.num_blocks), number)
    first = rng.randint(0, NUM_SLOTS - number)
    slots = list(range(first, first + number))
    if is_store:
        return partial(copier.gather, ids, slots, None)
    return partial(copier.scatter, slots, ids)


async def main() -> Report:
    """Measure everything, print it."""
    report = Report(__doc__)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU with CUDA")
    for in_one in (False, True):
        caches, _ = paged_caches(TOKENS, 4 * NUM_SLOTS * 2 * MIB, in_one=in_one)
        paged = segments_of(caches, TOKENS)
        pools: list[HostPool] = []  # memory can be pinned but once
        copiers: dict[str, CudaPagedCopier] = {}
        for way, table in (TABLES | ({"rows": ROWS} if in_one else {})).items():
            copiers[way] = CudaPagedCopier(paged, DEVICE, table=table)
            pools.append(HostPool(NUM_SLOTS, paged.block_nbytes))
            copiers[way].attach_pool(pools[-1], 0)
        for mib in SIZES:
            await one_size(report, "in one" if in_one else "apart", copiers, mib)
        for copier in copiers.values():
            await copier.close()
        for pool in pools:
            pool.close()
    return report


if __name__ == "__main__":
    asyncio.run(main()).finish()
