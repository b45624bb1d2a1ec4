"""The SSD tier behind an engine: what goes down comes up again, or is a miss."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import shutil
import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flexkv import BlockRemoved, BlockStored, Config, ConfigError, Engine, FeedError, KVLayout, Tier
from flexkv.engine import rising
from flexkv.engine.disk import Disk
from flexkv.events.digest import digest_of
from flexkv.events.types import num_named
from flexkv.tiers.ssd_journal import DiskCalls
from tests.engine.chains import chain
from tests.engine.fakes import slow_engine
from tests.engine.followers import believed
from tests.tiers.disks import FaultyDisk, writes_held_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from flexkv import Blocks, ListSink, Loaded, Stored
    from tests.engine.fakes import SlowCopier

A, B, C = chain(1, 2, 3, 4), chain(1, 2, 7, 8), chain(9, 9, 9, 9)


class Bench:
    """An engine with few host slots and more on SSD."""

    def __init__(self, engine: Engine, copier: SlowCopier, sink: ListSink) -> None:
        self.engine = engine
        self.copier = copier
        self.sink = sink

    async def store(self, blocks: Blocks) -> Stored:
        ids = list(range(len(blocks)))
        self.copier.compute(blocks, ids)
        stored = await self.engine.store(blocks, ids)
        await self.engine._below._writer.settled(10)
        return stored

    async def load(self, blocks: Blocks, first: int = 0) -> Loaded:
        ids = list(range(20 + first, 20 + len(blocks)))
        self.copier.cache[ids] = 0
        loaded = await self.engine.load(blocks, ids, first)
        arrived = blocks.part(first, first + loaded.num_blocks)
        assert self.copier.wrong_blocks(arrived, ids[: loaded.num_blocks]) == 0
        return loaded

    def held(self, tier: Tier) -> set[bytes]:
        held = self.engine.residency(tier)
        assert held == believed(self.sink.events, tier)
        return held


@asynccontextmanager
async def bench(
    *folders: Path,
    num_slots: int = 32,
    num_host_slots: int = 4,
    chunk_blocks: int = 2,
    calls: DiskCalls | None = None,
    close_timeout_s: float = 10.0,
    **settings: Any,
) -> AsyncIterator[Bench]:
    ssd = {
        "enable_ssd": True,
        "num_ssd_blocks": num_slots,
        "ssd_cache_dir": tuple(map(str, folders)),
        "weights_id": "tiny",
        "ssd_cache_iouring_entries": 0,
        **settings,
    }
    async with slow_engine(
        num_host_slots,
        seconds=0,
        chunk_blocks=chunk_blocks,
        close_timeout_s=close_timeout_s,
        ssd=ssd,
        calls=calls,
    ) as made:
        yield Bench(*made)


async def test_what_host_had_to_forget_comes_back_from_ssd(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        await b.store(C)  # the host tier holds four blocks
        assert b.held(Tier.HOST) == set(C)
        assert b.held(Tier.SSD) == {*A, *C}
        match = b.engine.lookup(A)
        assert (match.num_blocks, match.by_tier) == (4, {Tier.HOST: 0, Tier.SSD: 4})
        loaded = await b.load(A)
        assert loaded.num_blocks == 4
        assert loaded.nbytes_by_tier == {Tier.HOST: 0, Tier.SSD: 4 * 64}
        assert b.held(Tier.HOST) == set(A), "it was promoted"
        assert b.engine.lookup(A).by_tier == {Tier.HOST: 4, Tier.SSD: 0}


async def test_a_part_comes_from_host_and_the_rest_from_ssd(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", num_host_slots=6) as b:
        await b.store(A)
        await b.store(C)
        await b.store(A[:2])
        await b.store(C)
        assert b.held(Tier.HOST) == {*A[:2], *C}
        loaded = await b.load(A)
        assert loaded.num_blocks == 4
        assert loaded.nbytes_by_tier == {Tier.HOST: 2 * 64, Tier.SSD: 2 * 64}


async def test_loads_at_the_same_time_do_not_take_host_slots_from_each_other(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path / "ssd") as b:
        for blocks in (A, C):
            await b.store(blocks)
        leases = [b.engine.lease(blocks) for blocks in (A, C)]
        assert [lease.num_blocks for lease in leases] == [4, 4]
        loads = [
            b.engine.load(blocks, range(at, at + 4), pin=lease)
            for at, blocks, lease in zip((20, 24), (A, C), leases, strict=True)
        ]
        assert [loaded.num_blocks for loaded in await asyncio.gather(*loads)] == [4, 4]
        for at, blocks in ((20, A), (24, C)):
            assert b.copier.wrong_blocks(blocks, list(range(at, at + 4))) == 0


async def test_a_load_behind_a_gpu_prefix_brings_what_is_asked_for(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        await b.store(C)
        loaded = await b.load(A, first=3)
        assert loaded.num_blocks == 1


async def test_prefetch_brings_blocks_into_host(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        await b.store(C)
        assert await b.engine.prefetch(A) == 4
        assert b.held(Tier.HOST) == set(A)


async def test_more_than_host_can_hold_comes_in_part(tmp_path: Path) -> None:
    long = chain(*range(1, 9))
    async with bench(tmp_path / "ssd") as b:
        await b.store(long[:4])
        await b.store(long[:4])
        lease = b.engine.lease(long[:3])
        await b.store(C)
        loaded = await b.load(long)
        assert loaded.num_blocks == 4
        b.engine.release(lease)


async def test_the_ssd_tier_evicts_the_least_recently_used(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", num_slots=8) as b:
        await b.store(A)
        await b.store(C)
        await b.load(A)
        await b.store(chain(5, 5))
        assert b.held(Tier.SSD) == {*A, *C[:2], *chain(5, 5)}


async def test_an_engine_that_restarts_serves_from_ssd_without_telling_it_as_news(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        await b.store(B)
        await b.store(C)
    async with bench(tmp_path / "ssd") as b:
        assert all(num_named(entry.event) == 0 for entry in b.engine._events.since(0))
        assert b.engine._events.last_hole_id == 1, "who asks for the first event gets a dump"
        digest = digest_of(key for blocks in (A, B[2:], C) for key in blocks.router_hashes())
        assert b.engine.stats().tiers[Tier.SSD].digest == str(digest)
        assert b.engine.residency(Tier.SSD) == {*A, *B, *C}
        told = {key for event in b.engine._walk() for key in event.blocks}
        assert told == {*A, *B, *C}
        for blocks in (A, B, C):
            assert (await b.load(blocks)).num_blocks == 4


async def test_recency_survives_a_restart(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", num_slots=8) as b:
        await b.store(A)
        await b.store(C)
        await b.load(A)
    async with bench(tmp_path / "ssd", num_slots=8) as b:
        await b.store(chain(5, 5))
        assert b.engine.residency(Tier.SSD) == {*A, *C[:2], *chain(5, 5)}


async def test_blocks_of_other_weights_are_not_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
    async with bench(tmp_path / "ssd", weights_id="tuned") as b:
        assert b.engine.lookup(A).num_blocks == 0
        assert "weights_id 'tiny', not 'tuned'" in caplog.text


async def test_what_is_of_nobody_knows_which_weights_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        async with bench(tmp_path / "ssd", weights_id=None) as b:
            assert b.engine.lookup(A).num_blocks == 0
            assert "set weights_id" in caplog.text
            await b.store(A)


async def test_clear_empties_it_for_good(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        assert await b.engine.clear()
        assert b.held(Tier.SSD) == set()
        crashed = tmp_path / "crashed"
        shutil.copytree(tmp_path / "ssd", crashed)  # as kill -9 would leave it
        await b.store(C)
    async with bench(crashed) as b:
        assert b.engine.residency(Tier.SSD) == set()
    async with bench(tmp_path / "ssd") as b:
        assert b.engine.residency(Tier.SSD) == set(C)


async def test_a_rotten_block_is_a_miss_and_leaves_with_what_follows(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        await b.store(C)
        disk = b.engine._below._disk
        slot = disk.index.match(A).slots[2]
        with (tmp_path / "ssd" / "slots-1of1").open("r+b") as file:
            file.seek(4096 * slot + 5)
            file.write(b"\xff")
        loaded = await b.load(A)
        assert (loaded.num_blocks, len(loaded.missing)) == (2, 2)
        assert b.held(Tier.SSD) == {*A[:2], *C}
        of_ssd = b.engine.stats().tiers[Tier.SSD]
        assert (of_ssd.num_rotten, of_ssd.num_loaded) == (1, 2)
        await b.store(A)  # recomputed
        await b.store(C)
        assert (await b.load(A)).num_blocks == 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
async def test_a_disk_that_fails_to_write_turns_the_tier_off_and_the_engine_goes_on(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FaultyDisk(random.Random(0), number=number)
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        disk._chances["write_error"] = 1
        assert (await b.store(C)).num_stored == 4
        assert b.held(Tier.SSD) == set()
        assert os.strerror(number) in caplog.text
        assert "ssd: off" in caplog.text
        assert b.engine.stats().tiers[Tier.SSD].num_slots == 0
        assert b.engine.lookup(A).num_blocks == 0
        assert (await b.load(C)).num_blocks == 4
        assert (await b.store(A)).num_stored == 4
        assert b.held(Tier.SSD) == set()


async def test_a_disk_that_fails_to_read_is_a_miss_and_turns_the_tier_off(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0))
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        await b.store(C)
        disk._chances["read_error"] = 1
        loaded = await b.load(A)
        assert (loaded.num_blocks, len(loaded.missing)) == (0, 4)
        assert b.held(Tier.SSD) == set()


async def test_a_folder_that_vanishes_takes_only_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    async with bench(*folders) as b:
        await b.store(A)
        shutil.rmtree(folders[0])
        await b.store(C)
        assert f"going on without {folders[0]}" in caplog.text
        assert b.held(Tier.SSD) == set()
        await b.store(A)
        await b.store(C)
        assert b.held(Tier.SSD) == {*A, *C}
        assert b.engine.stats().tiers[Tier.SSD].num_slots == 16
        assert (await b.load(A)).num_blocks == 4


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EFAULT])
async def test_too_little_memory_is_a_miss_and_no_failure_of_the_disk(
    tmp_path: Path, number: int
) -> None:
    disk = FaultyDisk(random.Random(0), number=number)
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        await b.store(C)
        disk._chances["read_error"] = 1
        assert (await b.load(A)).num_blocks == 0
        disk._chances["read_error"] = 0
        assert (await b.load(A)).num_blocks == 4
        assert b.held(Tier.SSD) == {*A, *C}


async def test_clear_reaches_a_disk_that_has_failed(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0))
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        disk._chances["read_error"] = 1
        await b.store(C)
        assert (await b.load(A)).num_blocks == 0
        assert await b.engine.clear()
    async with bench(tmp_path / "ssd") as b:
        assert b.held(Tier.SSD) == set()


async def test_a_disk_that_fails_during_a_clear_is_emptied(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0))
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        disk._chances["write_error"] = 1
        assert await b.engine.clear()
    async with bench(tmp_path / "ssd") as b:
        assert b.held(Tier.SSD) == set()


async def test_clear_says_so_where_a_disk_can_not_be_emptied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FaultyDisk(random.Random(0))
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        (tmp_path / "ssd").rename(tmp_path / "away")
        await b.store(C)
        assert not await b.engine.clear()
        assert "can't be cleared" in caplog.text
        assert b.held(Tier.HOST) == set()


async def test_a_full_disk_at_the_start_is_said_and_the_engine_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with bench(tmp_path / "ssd", calls=replace(DiskCalls(), posix_fallocate=full)) as b:
        assert "ssd: off" in caplog.text
        await b.store(A)
        assert (await b.load(A)).num_blocks == 4
    assert not (tmp_path / "ssd" / "slots-1of1").exists()


async def test_a_disk_that_hangs_does_not_hold_up_loads_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    calls = writes_held_until(go_on)
    async with bench(tmp_path / "ssd", calls=calls, close_timeout_s=0.05) as b:
        b.copier.compute(A, range(4))
        await b.engine.store(A, range(4))
        assert (await b.load(A)).num_blocks == 4
        writing = b.engine._below._writing
    assert "1 copies did not end" in caplog.text
    go_on.set()
    b.engine._below._writer.close()
    await writing
    await b.engine._below._disk.close()


async def test_a_disk_that_hangs_with_the_last_journal_does_not_hold_up_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    go_on.set()

    def hanging(fd: int) -> None:
        go_on.wait(20)
        os.fdatasync(fd)

    calls = replace(DiskCalls(), fdatasync=hanging)
    async with bench(tmp_path / "ssd", calls=calls, close_timeout_s=0.05) as b:
        await b.store(A)
        go_on.clear()
    assert "the disk did not take the last journal within 0.05 s" in caplog.text
    go_on.set()
    assert await b.engine._below.close(30) == 0
    async with bench(tmp_path / "ssd") as b:
        assert b.engine.residency(Tier.SSD) == set(A)


class NoSink:
    """Can't work, or does not begin; the journal, which hangs, has something to write by then."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.engine: Engine
        self.begun = asyncio.Event()

    async def start(self, *_: object) -> None:
        self.engine._below.forget()
        self.begun.set()
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()


@pytest.mark.parametrize("error", [FeedError("no sink"), None])
async def test_a_start_that_fails_beside_a_disk_that_hangs_ends_and_keeps_the_memory(
    tmp_path: Path, error: FeedError | None
) -> None:
    go_on = threading.Event()
    go_on.set()

    def hanging(fd: int, data: memoryview) -> int:
        go_on.wait(20)
        return os.write(fd, data)

    sink = NoSink(error)
    made = bench(tmp_path / "ssd", close_timeout_s=0.05)
    async with made as b:
        config, layout = b.engine._config, b.engine._layout
    sink.engine = engine = Engine(config, layout, sinks=[sink])
    engine._below._disk._calls = replace(DiskCalls(), write=hanging)
    real = engine._below._disk._restore

    def restored(*arguments: Any) -> None:
        real(*arguments)
        go_on.clear()  # it hangs from now on

    engine._below._disk._restore = restored
    try:
        starting = asyncio.ensure_future(engine.__aenter__())
        await sink.begun.wait()
        if error is None:
            starting.cancel()
            await asyncio.sleep(0.01)
            starting.cancel()  # does not let it skip what is left
        ended, _ = await asyncio.wait([starting], timeout=10)
        assert ended, "it does not wait for the disk"
        assert starting.cancelled() if error is None else starting.exception() is error
        assert not engine._below._writing.done()
        assert engine._pool.slot(0, 0) is not None, "what threads use is there"
    finally:
        go_on.set()
    assert await engine._below.close(30) == 0
    engine._pool.close()


async def test_a_second_engine_on_the_folder_is_refused(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd"):
        with pytest.raises(ConfigError, match="in use by process"):
            async with bench(tmp_path / "ssd"):
                pass


async def test_a_start_that_is_cancelled_lets_go_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(*_: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(20)

    with monkeypatch.context() as patched:
        patched.setattr(Disk, "_restore", slow)
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(bench(tmp_path / "ssd").__aenter__())
            await begun.wait()
            starting.cancel()
            await asyncio.wait([starting])
            assert starting.cancelled()
    try:
        async with bench(tmp_path / "ssd") as b:
            assert b.engine.residency(Tier.SSD) == set(A)
    finally:
        go_on.set()


def test_more_slots_than_memory_can_index_are_refused_before_any_is_made(tmp_path: Path) -> None:
    cache = {
        "tokens_per_block": 4,
        "num_cpu_blocks": 8,
        "enable_ssd": True,
        "num_ssd_blocks": 2**40,
        "ssd_cache_dir": str(tmp_path / "ssd"),
    }
    layout = KVLayout(tokens_per_block=4, block_nbytes=64)
    with pytest.raises(ConfigError, match=r"index of the SSD tier needs .* lower num_ssd_blocks"):
        Engine(Config.from_mapping({"cache_config": cache}), layout)
    assert not (tmp_path / "ssd").exists()


async def test_under_pressure_writes_are_dropped_and_loads_go_on(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", num_host_slots=8, ssd_write_queue_bytes=1) as b:
        b.copier.compute(A, range(4))
        b.copier.compute(C, range(4, 8))
        await b.engine.store(A, range(4))
        await b.engine.store(C, range(4, 8))
        assert b.engine.stats().tiers[Tier.SSD].num_unwritten == 4
        assert (await b.load(C)).num_blocks == 4
        await b.engine._below._writer.settled(10)
        await b.store(C)  # the next store makes up for it
        assert b.held(Tier.SSD) == {*A, *C}


async def test_only_what_is_seen_twice_is_written(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", ssd_admission="second_sight") as b:
        await b.store(A)
        assert b.held(Tier.SSD) == set()
        await b.store(B)  # the first two blocks are A's
        assert b.held(Tier.SSD) == set(A[:2])


async def test_a_request_that_grows_is_not_a_second_sight_of_itself(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", ssd_admission="second_sight") as b:
        for num_again, num_blocks in ((0, 2), (2, 3), (3, 4)):
            ids = list(range(num_blocks))
            b.copier.compute(A[:num_blocks], ids)
            await b.engine.store(A[:num_blocks], ids, num_again=num_again)
            await b.engine.flush()
        assert b.held(Tier.SSD) == set()
        await b.store(A[:3])  # another request
        assert b.held(Tier.SSD) == set(A[:3])


async def test_what_is_faster_to_compute_is_not_read(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", recompute_tokens_per_s=1e9) as b:
        await b.store(A)
        await b.store(C)
        assert (await b.load(A)).num_blocks == 4  # nothing was measured before
        await b.store(C)
        assert b.engine.lookup(A).num_blocks == 0
        assert (await b.load(A)).num_blocks == 0


async def test_reads_side_by_side_are_measured_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(rising, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    all_begun = threading.Barrier(4, action=lambda: now_s.__setitem__(0, 1.0))

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        all_begun.wait(30)
        return os.preadv(fd, buffers, offset)

    calls = replace(DiskCalls(), preadv=slow)
    tokens_per_s = 4.0  # the four blocks in two seconds; from the disk in one
    async with bench(
        tmp_path / "ssd", calls=calls, chunk_blocks=1, recompute_tokens_per_s=tokens_per_s
    ) as b:
        await b.store(A)
        await b.store(C)
        assert (await b.load(A)).num_blocks == 4
        await b.store(C)
        assert b.engine.lookup(A).num_blocks == 4
        monkeypatch.setattr(b.engine._below._risings, "_tokens_per_s", 2.1 * tokens_per_s)
        assert b.engine.lookup(A).num_blocks == 0


async def test_ssd_blocks_are_announced_and_withdrawn(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd", num_slots=4) as b:
        await b.store(A)
        await b.store(C)
        told = [(type(e), e.tier, len(e.blocks)) for e in b.sink.events if e.tier == Tier.SSD]
        assert told == [
            (BlockStored, Tier.SSD, 4),
            (BlockRemoved, Tier.SSD, 4),
            (BlockStored, Tier.SSD, 4),
        ]


async def test_the_way_of_the_bytes_is_said_at_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with bench(tmp_path / "ssd", ssd_cache_iouring_entries=0):
        assert "by direct I/O, 8 reader and 8 writer threads" in caplog.text
