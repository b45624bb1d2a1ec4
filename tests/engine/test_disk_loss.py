"""A disk is lost: its blocks are misses at once, and are withdrawn piece by piece."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flexkv import Tier
from flexkv.engine import disk_index
from flexkv.engine.disk_index import SharedDiskIndex
from flexkv.tiers import ssd_files
from flexkv.tiers.ssd_journal import DiskCalls
from tests.engine.chains import chain
from tests.engine.followers import believed
from tests.engine.test_disk import A, B, C, bench
from tests.tiers.disks import FaultyDisk

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv.events.types import Event


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_index, "_NUM_RUNS_AT_ONCE", 1)


@pytest.mark.usefixtures("tiny_pieces")
async def test_a_lost_disk_is_a_miss_at_once_and_withdrawn_in_pieces(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0))
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        chains = [A, B, C, *(chain(20 + i, i) for i in range(6))]
        for blocks in chains:
            await b.store(blocks)
        of_ssd = b.engine._below._disk
        of_ssd.fail(of_ssd.store, OSError(5, "lost"))
        seen = []
        while left := len(b.held(Tier.SSD)):  # what is announced is what is there, all the time
            seen.append(left)
            assert all(b.engine.lookup(blocks).by_tier[Tier.SSD] == 0 for blocks in chains)
            await asyncio.sleep(0)
        assert len(set(seen)) >= len(chains) - 1
        assert not any(b.engine.lookup(blocks).by_tier[Tier.SSD] for blocks in chains)


@pytest.mark.usefixtures("tiny_pieces")
async def test_what_is_stored_after_a_loss_is_announced_after_all_of_it(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    async with bench(*folders, num_slots=64) as b:
        for blocks in (A, B, *(chain(20 + i, i) for i in range(6))):
            await b.store(blocks)
        shutil.rmtree(folders[0])
        await b.store(C)
        await b.store(A)
        assert b.held(Tier.SSD) >= set(A)
        assert (await b.load(A)).num_blocks == 4


@pytest.mark.usefixtures("tiny_pieces")
async def test_a_clear_in_the_middle_of_a_loss_leaves_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path / "ssd") as b:
        for blocks in (A, B, C):
            await b.store(blocks)
        of_ssd = b.engine._below._disk
        of_ssd.fail(of_ssd.store, OSError(5, "lost"))
        assert await b.engine.clear()
        assert b.held(Tier.SSD) == b.held(Tier.HOST) == set()


def failing_in(folder: Path, call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """``call``, whose first argument is a file or its descriptor; an error in ``folder``."""

    def failing(file: Path | int, *arguments: Any) -> Any:
        path = Path(f"/proc/self/fd/{file}").readlink() if isinstance(file, int) else Path(file)
        if path.is_relative_to(folder):
            raise OSError(number, os.strerror(number))
        return call(file, *arguments)

    return failing


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("what", ["allocate", "write", "open", "lock"])
async def test_a_folder_that_fails_at_the_start_takes_only_itself(
    tmp_path: Path,
    what: str,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders, bad = [tmp_path / "a", tmp_path / "b"], tmp_path / name
    if what != "write":  # there is nothing to write where a journal goes on
        async with bench(*folders) as b:
            await b.store(A)
    calls = DiskCalls()
    match what:
        case "allocate":
            full = failing_in(bad, os.posix_fallocate, errno.ENOSPC)
            calls = replace(calls, posix_fallocate=full)
        case "write":
            calls = replace(calls, write=failing_in(bad, os.write, errno.EIO))
        case "lock":
            flock = failing_in(bad, fcntl.flock, errno.ESTALE)
            monkeypatch.setattr(ssd_files.fcntl, "flock", flock)
        case "open":
            monkeypatch.setattr(ssd_files.os, "open", failing_in(bad, os.open, errno.EROFS))
    is_hurt = (what, name) != ("write", "b")  # the journal is in the first one
    async with bench(*folders, calls=calls) as b:
        assert (f"going on without {bad}, empty" in caplog.text) == is_hurt
        assert b.engine.stats().tiers[Tier.SSD].num_slots == (16 if is_hurt else 32)
        await b.store(A)
        await b.store(C)
        assert b.held(Tier.SSD) == {*A, *C}
        assert (await b.load(A)).num_blocks == 4
    monkeypatch.undo()
    async with bench(*folders) as b:
        assert b.engine.stats().tiers[Tier.SSD].num_slots == 32
        await b.load(A)


async def test_clear_does_not_take_an_empty_mount_point_for_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FaultyDisk(random.Random(0))
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        of_ssd = b.engine._below._disk
        assert of_ssd._devices == {tmp_path / "ssd": (tmp_path / "ssd").stat().st_dev}
        disk._chances["write_error"] = 1
        await b.store(C)
        of_ssd._devices[tmp_path / "ssd"] += 1  # it was on a file system that is not mounted now
        assert not await b.engine.clear()
        assert "another file system is mounted there" in caplog.text


async def test_the_line_of_numbers_tells_of_ssd(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0))
    async with bench(tmp_path / "ssd", calls=disk.calls()) as b:
        await b.store(A)
        await b.store(C)
        await b.load(A)
        line = b.engine.stats().line()
        assert line.endswith("; SSD 8 of 32 blocks, loaded 4, stored 8, unwritten 0, rotten 0"), (
            line
        )
        disk._chances["write_error"] = 1
        await b.store(B)
        assert b.engine.stats().line().endswith("; SSD off")


@pytest.mark.usefixtures("tiny_pieces")
def test_pieces_take_children_first_and_slots_that_are_in_use_last() -> None:
    events: list[Event] = []
    index = SharedDiskIndex(Tier.SSD, 32, events.extend, 0.0)
    for blocks in (A, B, C):
        plan = index.plan_store(blocks, 0)
        index.commit(plan.reservation, len(plan.reservation.slots))
    lease = index.lease(B)
    writing = index.plan_store(chain(1, 2, 3, 4, 5, 6), 0).reservation
    waiting = index.plan_store(chain(1, 2, 3, 4, 5, 6, 7), 0).reservation
    index.commit(waiting, 1)
    index.touch(chain(1, 2, 3, 4, 5))  # splits what is being written
    num_pieces = 1
    while index.drop_some():
        num_pieces += 1
        assert believed(events, Tier.SSD) == index.residency()
    assert num_pieces == 7
    assert believed(events, Tier.SSD) == index.residency() == set()
    assert index._disk.num_free == 32 - len({*A, *B}) - len(writing.slots), "a parent stays"
    index.commit(writing, 0)
    assert index._disk.num_free == 32 - len(B)
    index.release(lease)
    assert index._disk.num_free == 32
    assert index._disk.num_evictable == 0


@pytest.mark.usefixtures("tiny_pieces")
def test_a_copy_that_ends_between_two_pieces_gives_its_slots_back() -> None:
    events: list[Event] = []
    index = SharedDiskIndex(Tier.SSD, 32, events.extend, 0.0)
    plan = index.plan_store(A, 0)
    index.commit(plan.reservation, 4)
    writing = index.plan_store(chain(1, 2, 3, 4, 5, 6), 0).reservation
    index.touch(chain(1, 2, 3, 4, 5))  # splits what is being written
    assert index.drop_some(), "the second half of it has left"
    index.commit(writing, 0)
    while index.drop_some():
        pass
    assert believed(events, Tier.SSD) == index.residency() == set()
    assert index._disk.num_free == 32
