"""The SSD tier against fio on the same file, and how fast it is back after a restart.

Takes 4 GiB of the folder named by FLEXKV_BENCH_DIR (default: the current one); fio has to be there.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING

import numpy as np
from _report import Report, percentile

from flexkv import CacheConfig, Config, Engine, KVLayout, blocks_of
from flexkv.hashing import tokens_hashes
from flexkv.replay.worker import PagedCache
from flexkv.tiers.host import HostPool
from flexkv.tiers.ssd import SsdSettings, SsdStore
from flexkv.tiers.ssd_frames import added

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv import Blocks

KIB, MIB = 1 << 10, 1 << 20
SLICE_S = 0.5
NUM_BLOCKS = 128  # of one request
NUM_REQUESTS = 2  # in flight: a load asks for its next chunk while one arrives
TARGETS = {("read", "threads"): 0.90, ("read", "io_uring"): 0.95}
TARGETS |= {("write", "threads"): 0.85, ("write", "io_uring"): 0.90}


async def beat(lags_s: list[float]) -> None:
    """Note every 5 ms how late the event loop is."""
    while True:
        due = time.perf_counter() + 0.005
        await asyncio.sleep(0.005)
        lags_s.append(time.perf_counter() - due)


async def beside(lags_s: list[float], work: Callable[[], float]) -> float:
    """What ``work`` returns, in a thread; how late the loop is with nothing of ours to do."""
    async with asyncio.TaskGroup() as tasks:
        beating = tasks.create_task(beat(lags_s))
        answer = await asyncio.to_thread(work)
        beating.cancel()
    return answer


def fio(folder: Path, way: str, block_nbytes: int, file_nbytes: int, engine: str) -> float:
    """Bytes per second of fio on the slots' own file."""
    depth = ["--numjobs=8"] if engine == "psync" else ["--iodepth=32"]
    runtime = f"{int(1000 * SLICE_S)}ms"
    done = subprocess.run(
        [
            "fio", "--name=x", f"--filename={folder / 'slots-1of1'}", f"--rw=rand{way}",
            f"--bs={block_nbytes}", "--direct=1", "--time_based", f"--runtime={runtime}",
            f"--size={file_nbytes}", "--group_reporting", "--output-format=json", "--thread",
            "--randrepeat=0", "--allow_file_create=0", f"--ioengine={engine}", *depth,
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(done.stdout)["jobs"][0][way]["bw_bytes"])


def fio_readers(folder: Path, file_nbytes: int, *, is_written: bool) -> tuple[float, float]:
    """Bytes per second of fio's 4 readers, and of 2 writers beside them on the same file."""
    writers = ["--name=w", "--rw=randwrite", "--numjobs=2"] if is_written else []
    done = subprocess.run(
        [
            "fio", f"--filename={folder / 'slots-1of1'}", f"--bs={MIB}", "--direct=1",
            "--time_based", "--runtime=1000ms", f"--size={file_nbytes}", "--thread",
            "--output-format=json", "--randrepeat=0", "--allow_file_create=0",
            "--ioengine=psync", "--name=r", "--rw=randread", "--numjobs=4", *writers,
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    jobs = json.loads(done.stdout)["jobs"]
    read, wrote = (sum(job[way]["bw_bytes"] for job in jobs) for way in ("read", "write"))
    return float(read), float(wrote)


class Ours:
    """Requests to an SsdStore; ``lags_s`` are how late the event loop was."""

    def __init__(self, folder: Path, pool: HostPool, file_nbytes: int, kind: str) -> None:
        self.lags_s: list[float] = []
        self._pool = pool
        self._num_slots = file_nbytes // pool.slot_nbytes
        self._folder = folder
        self._entries = 512 if kind == "io_uring" else 0

    def store(self, **settings: object) -> SsdStore:
        """A store that is still to be opened."""
        return SsdStore(
            SsdSettings(
                folders=[self._folder],
                num_slots=self._num_slots,
                about=None,
                uring_entries=self._entries,
                **settings,  # type: ignore[arg-type]  # as in SsdSettings
            ),
            self._pool,
        )

    async def rate(self, store: SsdStore, way: str, seconds: float, num_requests: int) -> float:
        """Bytes per second of random requests, ``num_requests`` in flight."""
        chance = random.Random(1)
        end = time.perf_counter() + seconds
        num_moved = 0

        async def one(number: int) -> None:
            nonlocal num_moved
            host = range(number * NUM_BLOCKS, (number + 1) * NUM_BLOCKS)
            while time.perf_counter() < end:
                slots = chance.sample(range(self._num_slots), NUM_BLOCKS)
                if way == "read":
                    await store.read(slots, host, [0] * NUM_BLOCKS)
                else:
                    await store.write(slots, host)
                num_moved += NUM_BLOCKS

        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_requests):
                tasks.create_task(one(number))
        return num_moved * self._pool.slot_nbytes / (time.perf_counter() - started)

    async def slice(self, way: str, *, has_sums: bool = False) -> float:
        """Bytes per second of a while, with the loop's lags beside it."""
        store = self.store(has_sums=has_sums)
        await store.open()
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(beat(self.lags_s))
            rate = await self.rate(store, way, SLICE_S, NUM_REQUESTS)
            beating.cancel()
        await store.close()
        return rate


def against_fio(report: Report, folder: Path, file_nbytes: int, *, num_rounds: int) -> None:
    """Reads and writes, in turn with fio."""
    ratios: dict[tuple[str, str], list[float]] = {key: [] for key in TARGETS}
    lags_s: list[float] = []
    idle_lags_s: list[float] = []
    kinds = ["threads", *(["io_uring"] if has_uring() else [])]
    for block_nbytes in (64 * KIB, 256 * KIB, MIB, 4 * MIB):
        pool = HostPool(NUM_REQUESTS * NUM_BLOCKS, block_nbytes)
        pool.touch_all()
        ours = {kind: Ours(folder, pool, file_nbytes, kind) for kind in kinds}
        for way in ("read", "write"):
            sides: dict[str, Callable[[], float]] = {
                f"fio {engine}": partial(
                    lambda work: asyncio.run(beside(idle_lags_s, work)),
                    partial(fio, folder, way, block_nbytes, file_nbytes, engine),
                )
                for engine in ("psync", "io_uring")
            }
            for kind, side in ours.items():
                sides[kind] = partial(lambda side, way: asyncio.run(side.slice(way)), side, way)
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(num_rounds):  # each begins with another: a burst favours the first
                names = list(sides)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    rates[name].append(sides[name]())
            best = max(median(rates["fio psync"]), median(rates["fio io_uring"]))
            name = f"{way} {block_nbytes // KIB} KiB"
            report.add(f"{name}, the better fio", best / 1e6, "MB/s", better="higher")
            for kind in kinds:
                rate = median(rates[kind])
                ratios[way, kind].append(rate / best)
                report.add(f"{name}, {kind}", rate / 1e6, "MB/s", better="higher")
        lags_s += [lag for side in ours.values() for lag in side.lags_s]
        pool.close()
    for (way, kind), values in ratios.items():
        if values:
            name = f"{way}s by {kind} / the better fio, geometric mean"
            report.add(name, geometric_mean(values), "", better="higher", target=TARGETS[way, kind])
    idle = 1e3 * percentile(idle_lags_s, 99)
    report.add("event loop late beside fio p99", idle, "ms")
    report.add("event loop late with our I/O p99", 1e3 * percentile(lags_s, 99), "ms", target=2)


def cost_of_sums(report: Report, folder: Path, file_nbytes: int, *, num_rounds: int) -> None:
    """Writes of 1 MiB blocks, then verified reads of them, with and without checksums."""
    pool = HostPool(NUM_REQUESTS * NUM_BLOCKS, MIB)
    pool.touch_all()
    side = Ours(folder, pool, file_nbytes, "threads")
    ratios = []
    for number in range(3 * num_rounds):  # of pairs, in turn in both orders: the disk drifts
        rates = {}
        for has_sums in (number % 2 == 0, number % 2 == 1):
            rates[has_sums] = asyncio.run(side.slice("read", has_sums=has_sums))
        ratios.append(rates[False] / rates[True])
    cost = 100 * (median(ratios) - 1)
    report.add("cost of checksums, reads of 1 MiB blocks", cost, "%", target=5)
    pool.close()


def beside_writers(report: Report, folder: Path, file_nbytes: int, *, num_rounds: int) -> None:
    """Four readers of 1 MiB blocks, with and without two writers beside them; fio's as well."""
    pool = HostPool(NUM_REQUESTS * NUM_BLOCKS, MIB)
    pool.touch_all()

    async def rate(side: Ours, *, is_written: bool) -> tuple[float, float]:
        store = side.store(num_readers=4, num_writers=2, has_sums=False)
        await store.open()
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(side.rate(store, "read", 1.0, 1))
            writing = tasks.create_task(side.rate(store, "write", 1.0 if is_written else 0.0, 1))
        await store.close()
        return reading.result(), writing.result()

    def ours(kind: str, *, is_written: bool) -> tuple[float, float]:
        side = Ours(folder, pool, file_nbytes, kind)
        return asyncio.run(rate(side, is_written=is_written))

    sides = {kind: partial(ours, kind) for kind in ("threads", *(["io_uring"] * has_uring()))}
    if shutil.which("fio"):
        sides["fio psync"] = partial(fio_readers, folder, file_nbytes)
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    written: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            alone, _ = side(is_written=False)
            beside, wrote = side(is_written=True)
            ratios[name].append(beside / alone)
            written[name].append(wrote)
    for name in sides:
        ratio = median(ratios[name])
        target = None if name.startswith("fio") else 0.9
        name_of = f"4 readers beside 2 writers / alone, {name}"
        report.add(name_of, ratio, "", better="higher", target=target)
        rate_of = median(written[name]) / 1e6
        report.add(f"2 writers beside 4 readers, {name}", rate_of, "MB/s", better="higher")
    pool.close()


def many_chains(num_slots: int, num_run_blocks: int) -> list[Blocks]:
    """Conversations of 64 turns that fill so many slots."""
    num_blocks = 64 * num_run_blocks
    return [
        blocks_of(np.random.default_rng(i).integers(0, 2**17, 64 * num_blocks), 64)
        for i in range(num_slots // num_blocks)
    ]


async def kept(folder: Path, layout: KVLayout, num_slots: int, num_run_blocks: int) -> Blocks:
    """Write a journal as a crash leaves it; the first chain's blocks are really there."""
    chains = many_chains(num_slots, num_run_blocks)
    for blocks in chains:
        tokens_hashes(blocks)
    pool = HostPool(len(chains[0]), layout.block_nbytes)
    about = {"tokens_per_block": 64, "weights_id": "bench"}
    store = SsdStore(SsdSettings(folders=[folder], num_slots=num_slots, about=about), pool)
    await store.open()
    sums = await store.write(range(len(chains[0])), range(len(chains[0])))
    at = 0
    for blocks in chains:
        records = []
        for start in range(0, len(blocks), num_run_blocks):
            run = blocks[start : start + num_run_blocks]
            slots = range(at, at + len(run))
            records.append(added(run, slots, sums[start : start + len(run)], tokens_hashes(run)))
            at += len(run)
        await store.record(records)
    await store.close()
    pool.close()
    return chains[0]


async def restarted(folder: Path, layout: KVLayout, num_slots: int, blocks: Blocks) -> list[float]:
    """Seconds to the open engine, to the end of the first load, and of processors for the first."""
    cache = CacheConfig(
        num_cpu_blocks=2 * len(blocks),
        enable_ssd=True,
        num_ssd_blocks=num_slots,
        ssd_cache_dir=(str(folder),),
        weights_id="bench",
    )
    paged = PagedCache(layout, len(blocks))
    times = [time.perf_counter()]
    began_cpu_s = time.process_time()
    engine = Engine(Config(cache=cache), layout, sinks=[])
    async with engine:
        times.append(time.perf_counter())
        cpu_s = time.process_time() - began_cpu_s
        engine.attach(paged.layers)
        loaded = await engine.load(blocks, range(len(blocks)))
        times.append(time.perf_counter())
        assert loaded.num_blocks == len(blocks), "the journal names them all"
    return [times[1] - times[0], times[2] - times[0], cpu_s]


def restart(report: Report, folder: Path, *, num_slots: int, num_run_blocks: int) -> None:
    """From nothing to the index of a full tier, and to the first load from it."""
    layout = KVLayout(tokens_per_block=64, block_nbytes=4096)
    samples = []
    for number in range(3):
        place = folder / f"restart-{num_run_blocks}-{number}"
        blocks = asyncio.run(kept(place, layout, num_slots, num_run_blocks))
        samples.append(asyncio.run(restarted(place, layout, num_slots, blocks)))
        shutil.rmtree(place)
    name = f"restart, {num_slots} slots in runs of {num_run_blocks}"
    opened, served, cpu_s = (median(times) for times in zip(*samples, strict=True))
    report.add(f"{name}: index back", opened, "s", target=1.0)
    report.add(f"{name}: first load served", served, "s", target=1.5)
    report.add(f"{name}: processor time until the index is back", cpu_s, "s")


def has_uring() -> bool:
    """The extra is installed, and the kernel allows it."""
    try:
        import uring_api  # noqa: PLC0415  # an extra

        uring_api.Ring(1).close()
    except (ImportError, OSError):
        return False
    return True


def main() -> None:
    """Run all."""
    report = Report(__doc__)
    num_rounds = 2 if report.quick else 8
    file_nbytes = (1 if report.quick else 4) << 30
    parent = os.environ.get("FLEXKV_BENCH_DIR", ".")
    with tempfile.TemporaryDirectory(prefix="bench-ssd-", dir=parent) as name:
        folder = Path(name)
        num_slots = 64_000 if report.quick else 256_000
        restart(report, folder, num_slots=num_slots, num_run_blocks=16)
        with (folder / "slots-1of1").open("wb") as file:
            piece = os.urandom(MIB)
            for _ in range(file_nbytes // MIB):  # what was never written reads faster
                file.write(piece)
            os.fsync(file.fileno())
        cost_of_sums(report, folder, file_nbytes, num_rounds=num_rounds)
        beside_writers(report, folder, file_nbytes, num_rounds=num_rounds)
        if shutil.which("fio"):
            against_fio(report, folder, file_nbytes, num_rounds=num_rounds)
        else:
            print("fio is not installed: nothing to compare with", file=sys.stderr)
    report.finish()


if __name__ == "__main__":
    main()
