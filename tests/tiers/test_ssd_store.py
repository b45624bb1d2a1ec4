"""Bytes on disks: they come back as they were, or are said to be lost."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from flexkv.errors import ConfigError
from flexkv.tiers import ssd_files
from flexkv.tiers.ssd_frames import added
from flexkv.tiers.ssd_journal import DiskCalls
from tests.tiers.disks import FaultyDisk, content, fill, some_blocks, store_on

if TYPE_CHECKING:
    from pathlib import Path

URING = [
    0,
    pytest.param(
        64,
        marks=pytest.mark.skipif(
            subprocess.run(
                [sys.executable, "-c", "import uring_api; uring_api.Ring(1).close()"],
                capture_output=True,
                check=False,
            ).returncode
            != 0,
            reason="io_uring: not installed, or the kernel does not allow it",
        ),
    ),
]


@pytest.mark.parametrize("uring_entries", URING)
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("num_folders", [1, 2])
async def test_what_was_written_is_read(
    tmp_path: Path, num_folders: int, num_ranks: int, uring_entries: int
) -> None:
    folders = [tmp_path / str(i) for i in range(num_folders)]
    async with store_on(*folders, num_ranks=num_ranks, uring_entries=uring_entries) as made:
        store, pool, _ = made
        assert ("io_uring" in store.way) == (uring_entries > 0)
        expected = [fill(pool, i, seed=i) for i in range(16)]
        slots = random.Random(0).sample(range(16), 16)
        sums = await store.write(slots, range(16))
        for i in range(16):
            fill(pool, i, seed=99)
        host_slots = random.Random(1).sample(range(16), 16)
        assert await store.read(slots, host_slots, sums) == []
        assert [content(pool, host_slot) for host_slot in host_slots] == expected


@pytest.mark.parametrize("uring_entries", URING)
async def test_rotten_and_missing_bytes_are_lost_one_by_one(
    tmp_path: Path, uring_entries: int
) -> None:
    async with store_on(tmp_path, uring_entries=uring_entries) as (store, pool, _):
        expected = [fill(pool, i, seed=i) for i in range(8)]
        sums = await store.write(range(8), range(8))
        with (tmp_path / "slots-1of1").open("r+b") as file:
            file.seek(2 * 8192 + 4999)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([last ^ 1]))
            file.truncate(7 * 8192 + 4096)
        assert await store.read(range(8), range(8, 16), sums) == [2, 7]
        for i in (0, 1, 3, 4, 5, 6):
            assert content(pool, 8 + i) == expected[i]


async def test_padding_is_not_summed_up(tmp_path: Path) -> None:
    async with store_on(tmp_path) as (store, pool, _):
        fill(pool, 0, seed=0)
        sums = await store.write([0], [0])
        with (tmp_path / "slots-1of1").open("r+b") as file:
            file.seek(5000)
            file.write(b"other padding")
        assert await store.read([0], [1], sums) == []


async def test_short_reads_are_lost_blocks(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0), short_read=1)
    async with store_on(tmp_path, calls=disk.calls()) as (store, pool, _):
        fill(pool, 0, seed=0)
        sums = await store.write([3], [0])
        assert await store.read([3], [0], sums) == [0]


async def test_a_disk_that_fails_is_an_error_and_the_slots_are_free(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0), read_error=1)
    async with store_on(tmp_path, calls=disk.calls()) as (store, _, _):
        with pytest.raises(OSError, match="Input/output error"):
            await store.read(range(8), range(8), [0] * 8)
    disk = FaultyDisk(random.Random(0), write_error=0.5, number=errno.ENOSPC)
    async with store_on(tmp_path, num_slots=16) as (store, _, _):
        store._mover._calls = disk.calls()
        with pytest.raises(OSError, match="No space left"):  # noqa: PT012  # by chance, not at once
            for _ in range(20):
                await store.write(range(16), range(16))


async def test_a_cancelled_caller_waits_for_its_bytes(tmp_path: Path) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        return os.preadv(fd, buffers, offset)

    calls = replace(DiskCalls(), preadv=slow)
    async with store_on(tmp_path, calls=calls) as (store, pool, _):
        expected = fill(pool, 0, seed=0)
        sums = await store.write([0], [0])
        reading = asyncio.gather(store.read([0], [1], sums))
        await began.wait()
        reading.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not reading.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert content(pool, 1) == expected


async def test_what_was_recorded_is_there_after_a_restart(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    async with store_on(*folders) as (store, pool, kept):
        assert kept == []
        expected = [fill(pool, i, seed=i) for i in range(5)]
        sums = await store.write(range(3, 8), range(5))
        await store.record([added(some_blocks(0, 5), range(3, 8), sums)])
    async with store_on(*folders) as (store, pool, (run,)):
        assert await store.read(run.slots, range(5), run.sums) == []
        assert [content(pool, i) for i in range(5)] == expected


async def test_a_smaller_tier_keeps_what_fits_and_gives_the_rest_back(tmp_path: Path) -> None:
    async with store_on(tmp_path, num_slots=16) as (store, pool, _):
        for i in range(16):
            fill(pool, i, seed=i)
        sums = await store.write(range(16), range(16))
        await store.record([added(some_blocks(0, 16), range(16), sums)])
    async with store_on(tmp_path, num_slots=4) as (store, _, (run,)):
        assert len(run.blocks) == 4
        assert await store.read(run.slots, range(4), run.sums) == []
        assert (tmp_path / "slots-1of1").stat().st_size == 4 * 8192


@pytest.mark.parametrize("loss", ["a slot file", "nothing says which model"])
async def test_what_can_not_be_trusted_is_not_kept(tmp_path: Path, loss: str) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    async with store_on(*folders) as (store, _, _):
        sums = await store.write([0], [0])
        await store.record([added(some_blocks(0, 1), [0], sums)])
    if loss == "a slot file":
        (folders[1] / "slots-2of2").unlink()
    async with store_on(*folders, has_identity=loss == "a slot file") as (_, _, kept):
        assert kept == []
    async with store_on(*folders) as (_, _, kept):
        assert kept == []


async def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    async with store_on(tmp_path):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}, this one"):
            async with store_on(tmp_path):
                pass
    async with store_on(tmp_path):  # and afterwards it is free
        pass


async def test_a_folder_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"in use by process .*, this one: name it once"):
        async with store_on(tmp_path, tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
async def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(ssd_files.fcntl, "flock", refusing)
        message = rf"ssd_cache_dir {tmp_path} can't be locked \({os.strerror(number)}\)"
        with pytest.raises(ConfigError, match=message):
            async with store_on(tmp_path):
                pass
    async with store_on(tmp_path):
        pass


async def test_a_disk_without_room_for_the_lock_is_an_error_that_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(ssd_files.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left") as caught:
            async with store_on(tmp_path):
                pass
    assert caught.value.filename == str(tmp_path)
    async with store_on(tmp_path):
        pass


async def test_a_folder_that_can_not_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"ssd_cache_dir .*/file/x can't be used"):
        async with store_on(tmp_path / "file" / "x"):
            pass


async def test_a_full_disk_is_not_left_behind(tmp_path: Path) -> None:
    def full(fd: int, _: int, length: int) -> None:
        os.posix_fallocate(fd, 0, length // 2)  # as ext4 does
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calls = replace(DiskCalls(), posix_fallocate=full)
    with pytest.raises(OSError, match=r"No space .* slots take \d+ bytes.* lower num_ssd_blocks"):
        async with store_on(tmp_path, calls=calls):
            pass
    assert not (tmp_path / "slots-1of1").exists()
    async with store_on(tmp_path):
        pass


async def test_a_file_system_without_direct_io_is_said_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, mode)

    real_open = os.open
    monkeypatch.setattr(ssd_files.os, "open", refusing)
    async with store_on(tmp_path) as (store, pool, _):
        assert "buffered I/O" in store.way
        assert "does not take direct I/O" in caplog.text
        expected = fill(pool, 0, seed=0)
        sums = await store.write([1], [0])
        assert await store.read([1], [1], sums) == []
        assert content(pool, 1) == expected
        assert not (tmp_path / "probe").exists()


async def test_a_folder_that_vanishes_is_an_error(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    async with store_on(*folders) as (store, _, _):
        sums = await store.write([0], [0])
        shutil.rmtree(folders[1])
        with pytest.raises(OSError, match="No such file"):
            await store.record([added(some_blocks(0, 1), [0], sums)])
