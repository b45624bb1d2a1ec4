"""Paged copies on a GPU against contiguous ones: how much of the link's speed is left."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from _gpu import (
    DEVICE,
    GIB,
    HEAD_SIZE,
    MIB,
    NUM_HEADS,
    NUM_LAYERS,
    Contiguous,
    paged_caches,
    pairs,
    seconds,
)
from _report import Report, percentile

from flexkv import CacheConfig, Config, Engine, EventsConfig, KVLayout, blocks_of
from flexkv.tiers.cuda import CudaPagedCopier
from flexkv.tiers.gpu import make_copier
from flexkv.tiers.host import HostPool
from flexkv.tiers.segments import segments_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from _gpu import Caches

TARGETS = {2: 0.95, 8: 0.90, 32: 0.92, 128: 0.95, 2048: 0.97}  # by MiB
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
NUM_WARM_REPLAYS, NUM_REPLAYS = 3, 10
COLD = """
import time, torch
torch.empty(1, device="cuda")
from flexkv.tiers.cuda import CudaPagedCopier
from flexkv.tiers.host import HostPool
from flexkv.tiers.segments import segments_of
import asyncio, json
async def main():
    shape = (2, 64, 16, 8, 128)
    caches = {str(i): torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for i in range(32)}
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    pool = HostPool(4096, 2 << 20)
    copier = CudaPagedCopier(segments_of(caches, 16), torch.device("cuda", 0))
    copier.attach_pool(pool, 0)
    await copier.scatter([4095], [1])
    print(json.dumps(time.perf_counter() - started_s), flush=True)
    await copier.close()
asyncio.run(main())
"""


class Copies:
    """A copier of one block size: twice as many blocks as slots."""

    def __init__(self, tokens_per_block: int, nbytes: int, *, in_one: bool = False) -> None:
        self.name = f"{tokens_per_block} tokens" + (" in one allocation" if in_one else "")
        self.caches: Caches
        self.caches, self._backing = paged_caches(tokens_per_block, 2 * nbytes, in_one=in_one)
        paged = segments_of(self.caches, tokens_per_block)
        self.block_nbytes = paged.block_nbytes
        self.num_blocks = paged.num_blocks
        self.num_slots = nbytes // paged.block_nbytes
        self.pool = HostPool(self.num_slots, paged.block_nbytes)
        self.copier = CudaPagedCopier(paged, DEVICE)
        self.copier.attach_pool(self.pool, 0)
        self._rng = random.Random(1)

    def ids(self, number: int) -> list[int]:
        """Random blocks."""
        return self._rng.sample(range(self.num_blocks), number)

    def slots(self, number: int, *, scattered: bool = False) -> list[int]:
        """Consecutive slots, or random ones."""
        if scattered:
            return self._rng.sample(range(self.num_slots), number)
        first = self._rng.randint(0, self.num_slots - number)
        return list(range(first, first + number))

    def ours(
        self, ids: Iterator[list[int]], slots: Iterator[list[int]], *, is_store: bool
    ) -> Awaitable[None]:
        """A copy of the next blocks."""
        if is_store:
            return self.copier.gather(next(ids), next(slots), None)
        return self.copier.scatter(next(slots), next(ids))

    def num_wrong(self, ids: list[int], slots: list[int]) -> int:
        """Bytes that differ between blocks and their slots, of up to 64 of them."""
        wrong = 0
        for i in random.Random(1).sample(range(len(ids)), min(64, len(ids))):
            if self._backing is None:
                parts = [cache[:, ids[i]].flatten() for cache in self.caches.values()]
            else:
                parts = [self._backing[:, ids[i]].flatten()]
            block = torch.cat(parts).view(torch.uint8).cpu()
            wrong += int((block != self.pool.region(0)[slots[i]]).sum())
        return wrong

    def spoil(self, ids: list[int]) -> None:
        """Overwrite these blocks."""
        for cache in self.caches.values():
            if self._backing is None:
                cache[:, ids] = 0
            else:
                cache[ids] = 0

    async def close(self) -> None:
        """Give all memory back."""
        await self.copier.close()
        self.pool.close()


async def one_size(report: Report, copies: Copies, mib: int, *, scattered: bool = False) -> None:
    """Both directions, one after the other."""
    number = mib * MIB // copies.block_nbytes
    num_pairs = 30 if mib == max(TARGETS) else 60 if mib > 8 else 200
    num_pairs = num_pairs // 5 if report.quick else num_pairs
    contiguous = Contiguous(number * copies.block_nbytes)
    for is_store in (True, False):
        ids = [copies.ids(number) for _ in range(num_pairs + 3)]
        slots = [copies.slots(number, scattered=scattered) for _ in ids]
        samples, references = await pairs(
            partial(copies.ours, iter(ids), iter(slots), is_store=is_store),
            partial(contiguous.copy, is_store=is_store),
            num_pairs,
        )
        direction = "GPU to host" if is_store else "host to GPU"
        name = f"{copies.name}, {mib} MiB, {direction}"
        name += ", random slots" if scattered else ""
        ratio = median(references) / median(samples)
        target = None if scattered else TARGETS[mib]
        report.add(f"{name}: of contiguous", ratio, "", better="higher", target=target)
        gbps = number * copies.block_nbytes / median(samples) / 1e9
        report.add(f"{name}", gbps, "GB/s", better="higher")
        report.add(f"{name} p50", 1e6 * median(samples), "us")
        report.add(f"{name} p99", 1e6 * percentile(samples, 99), "us")
        report.add(f"{name}: contiguous p50", 1e6 * median(references), "us")
    await contiguous.close()


async def check(report: Report, copies: Copies) -> None:
    """Every size and direction once, compared."""
    wrong = 0
    for mib in TARGETS:
        number = mib * MIB // copies.block_nbytes
        for scattered in (False, True):
            if number:
                ids, slots = copies.ids(number), copies.slots(number, scattered=scattered)
                copies.pool.region(0)[slots] = 0
                await copies.copier.gather(ids, slots, copies.copier.mark())
                wrong += copies.num_wrong(ids, slots)
                targets = copies.ids(number)
                copies.spoil(targets)
                await copies.copier.scatter(slots, targets, copies.copier.mark())
                wrong += copies.num_wrong(targets, slots)
    report.add(f"{copies.name}: wrong bytes", wrong, "", target=0)


def both_ways(copies: Copies) -> Callable[[], Awaitable[object]]:
    """A load and a store at once, each of half of the slots; they share nothing."""
    ids = copies.ids(copies.num_slots)
    half = copies.num_slots // 2
    slots = list(range(copies.num_slots))

    async def run() -> None:
        await asyncio.gather(
            copies.copier.scatter(slots[:half], ids[:half]),
            copies.copier.gather(ids[half:], slots[half:], None),
        )

    return run


async def both_directions(report: Report, copies: Copies) -> None:
    """A load and a store at once, against two contiguous copies at once."""
    half = copies.num_slots // 2 * copies.block_nbytes
    contiguous = Contiguous(half, 2)

    async def reference() -> None:
        load = contiguous.copy(is_store=False, block=0)
        await asyncio.gather(load, contiguous.copy(is_store=True, block=1))

    samples, references = await pairs(both_ways(copies), reference, 6 if report.quick else 30)
    await contiguous.close()
    ratio = median(references) / median(samples)
    name = f"{copies.name}, both directions"
    report.add(f"{name}: of contiguous", ratio, "", better="higher", target=0.90)
    report.add(f"{name}, sum", 2 * half / median(samples) / 1e9, "GB/s", better="higher")


def products() -> Callable[[], float]:
    """3000 bf16 products on a stream of their own; a call returns milliseconds per 300."""
    stream = torch.cuda.Stream()
    one, other = (torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    result = torch.empty_like(one)
    torch.matmul(one, other, out=result)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # launched one by one they wait for the GIL
        for _ in range(300):
            torch.matmul(one, other, out=result)
    started, ended = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))

    def run() -> float:
        with torch.cuda.stream(stream):
            for turn in range(NUM_WARM_REPLAYS + NUM_REPLAYS):
                if turn == NUM_WARM_REPLAYS:  # power and clocks have settled
                    started.record()
                graph.replay()
            ended.record()
        ended.synchronize()
        return started.elapsed_time(ended) / NUM_REPLAYS

    return run


async def products_beside(report: Report, copies: Copies) -> None:
    """Products alone and while both directions run."""
    run = products()
    is_over = False
    times_s: list[float] = []

    async def copy() -> None:
        both = both_ways(copies)
        while not is_over:
            times_s.append(await seconds(both))

    alone, beside = [], []
    await asyncio.to_thread(run)
    for _ in range(2 if report.quick else 5):
        alone.append(await asyncio.to_thread(run))
        is_over = False
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy())
            await asyncio.sleep(0.01)
            beside.append(await asyncio.to_thread(run))
            is_over = True
    report.add(f"{copies.name}: products beside copies", median(beside), "ms")
    report.add(f"{copies.name}: products alone", median(alone), "ms")
    ratio = median(beside) / median(alone)
    report.add(f"{copies.name}: products beside / alone", ratio, "", target=1.01)
    gbps = copies.num_slots * copies.block_nbytes / median(times_s) / 1e9
    report.add(f"{copies.name}: copies beside products, sum", gbps, "GB/s", better="higher")


async def engine(report: Report, link_gbps: float) -> None:
    """What a Python program waits for: loads through an engine."""
    tokens, number = 16, 1024
    layout = KVLayout.of_model(
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_HEADS,
        head_size=HEAD_SIZE,
        dtype_nbytes=2,
        tokens_per_block=tokens,
    )
    config = Config(
        cache=CacheConfig(tokens_per_block=tokens, num_cpu_blocks=number + 64),
        events=EventsConfig(sink="none"),
    )
    caches, _ = paged_caches(tokens, 2 * number * layout.block_nbytes)
    rng = random.Random(1)
    blocks = blocks_of(list(range(tokens * number)), tokens)
    async with Engine(config, layout) as owner:
        owner.attach(caches)
        stored = await owner.store(blocks, rng.sample(range(2 * number), number))
        assert stored.num_stored == number
        for size in (1, 16, 256, number):
            samples = []
            for _ in range(40 if report.quick else 200 if size < number else 60):
                ids = rng.sample(range(2 * number), size)
                part = blocks.part(0, size)
                samples.append(await seconds(partial(owner.load, part, ids)))
            nbytes = size * layout.block_nbytes
            target = 200 + nbytes / (0.95 * link_gbps * 1e3)
            name = f"engine.load of {size} blocks"
            report.add(f"{name} p50", 1e6 * median(samples), "us", target=target)
            report.add(f"{name} p99", 1e6 * percentile(samples, 99), "us")
        assert not owner.stats().num_load_failed


async def pinning(report: Report, *, huge_pages: bool = False) -> None:
    """How soon the first load runs, and how soon all of 8 GiB are pinned."""
    caches, _ = paged_caches(16, 256 * MIB)
    first_s, pinned_s, longest_s = [], [], []
    num_slots = 8 * GIB // segments_of(caches, 16).block_nbytes
    num_threads = 0
    for _ in range(3):
        started_s = time.perf_counter()
        nbytes = segments_of(caches, 16).block_nbytes
        pool = HostPool(num_slots, nbytes, huge_pages=huge_pages)
        copier = make_copier(caches, 16, pool.slot_nbytes)
        assert isinstance(copier, CudaPagedCopier)
        copier.attach_pool(pool, 0)
        await copier.scatter([num_slots - 1], [0])
        first_s.append(time.perf_counter() - started_s)
        assert copier.pinning is not None
        longest = 0.0
        while copier.pinning.seconds is None:
            longest = max(longest, await seconds(partial(copier.scatter, [num_slots - 1], [0])))
            await asyncio.sleep(0.001)
        pinned_s.append(time.perf_counter() - started_s)
        longest_s.append(longest)
        num_threads = copier.pinning.num_threads
        await copier.close()
        pool.close()
    name = "8 GiB pool" + (" of huge pages" if huge_pages else "")
    report.add(f"{name}: until the first load has run", median(first_s), "s", target=0.3)
    report.add(f"{name}: pinned, {num_threads} threads", median(pinned_s), "s", target=2)
    report.add(f"{name}: the first of three times", pinned_s[0], "s")
    report.add(f"{name}: longest load while it is pinned", median(longest_s), "s")


def may_have_huge_pages() -> bool:
    """Does a pool that asks for them get any?"""
    setting = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else "[never]"
    return "[never]" not in setting and "[deny]" not in setting


def new_process(report: Report) -> None:
    """How soon the first load runs where Triton has to be imported, its cache is warm or not."""
    for state in ("", ", once more"):
        done = subprocess.run(
            [sys.executable, "-c", COLD], check=True, capture_output=True, text=True, timeout=100
        )
        seconds_s = json.loads(done.stdout)
        report.add(f"a new process{state}: until the first load has run", seconds_s, "s")


async def main() -> Report:
    """Measure everything, print it."""
    logging.basicConfig(level=logging.INFO)
    report = Report(__doc__)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU with CUDA")
    print(torch.cuda.get_device_name(DEVICE), "torch", torch.__version__, file=sys.stderr)
    link_gbps = 0.0
    for tokens, in_one in ((16, False), (64, False), (16, True), (64, True)):
        copies = Copies(tokens, 2 * GIB, in_one=in_one)
        await check(report, copies)
        for mib in TARGETS:
            if mib * MIB >= copies.block_nbytes:
                await one_size(report, copies, mib)
        if tokens == 16 and not in_one:
            for mib in (128, 2048):
                await one_size(report, copies, mib, scattered=True)
        if in_one == (tokens == 64):  # all goes through the kernel, and nothing
            await products_beside(report, copies)
        if not link_gbps:
            contiguous = Contiguous(2 * GIB)
            load = partial(contiguous.copy, is_store=False)
            link_gbps = 2 * GIB / median([await seconds(load) for _ in range(13)][3:]) / 1e9
            await contiguous.close()
            report.add("contiguous, host to GPU", link_gbps, "GB/s", better="higher")
        await both_directions(report, copies)
        await copies.close()
        del copies
        torch.cuda.empty_cache()
    await engine(report, link_gbps)
    await pinning(report)
    if may_have_huge_pages():
        await pinning(report, huge_pages=True)
    new_process(report)
    return report


if __name__ == "__main__":
    asyncio.run(main()).finish()
