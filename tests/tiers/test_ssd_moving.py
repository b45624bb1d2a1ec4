"""Blocks on their way: what a disk does not take whole, and how writes give way to reads."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from flexkv.tiers import ssd_moving
from tests.tiers.disks import FaultyDisk, content, fill, store_on
from tests.tiers.test_ssd_store import URING

if TYPE_CHECKING:
    from pathlib import Path

    from flexkv.tiers.ssd import SsdStore


class Completion(NamedTuple):
    user_data: Any
    res: int


class WatchedRing:
    """A real ring; as many completions as ``failing`` is long end with what it says."""

    def __init__(self, ring: Any, failing: list[int]) -> None:
        self._ring = ring
        self._failing = failing
        self.num_running = self.most_running = 0

    def prepare_read(self, *arguments: Any, **names: Any) -> None:
        self._note(self._ring.prepare_read, *arguments, **names)

    def prepare_write(self, *arguments: Any, **names: Any) -> None:
        self._note(self._ring.prepare_write, *arguments, **names)

    def wait(self) -> list[Any]:
        completions = list(self._ring.wait())
        self.num_running -= len(completions)
        if self._failing and completions:
            completions[0] = Completion(completions[0].user_data, self._failing.pop())
        return completions

    def _note(self, prepare: Any, *arguments: Any, **names: Any) -> None:
        prepare(*arguments, **names)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)


def watch(store: SsdStore, *failing: int) -> list[WatchedRing]:
    mover: Any = store._mover
    left = list(failing)  # of all rings together
    watched = [WatchedRing(ring, left) for ring in mover._rings]
    mover._idle = SimpleQueue()
    for ring in watched:
        mover._idle.put(ring)
    return watched


async def test_a_short_write_is_an_error_that_names_its_file(tmp_path: Path) -> None:
    disk = FaultyDisk(random.Random(0), short_write=1)
    async with store_on(tmp_path, calls=disk.calls()) as (store, _, _):
        with pytest.raises(OSError, match="a write ended after 7680 of 8192 bytes") as caught:
            await store.write([3], [0])
        assert caught.value.filename == str(tmp_path / "slots-1of1")


@pytest.mark.parametrize("uring_entries", URING[1:])
@pytest.mark.parametrize(("res", "reason"), [(-errno.EIO, "Input/output"), (4096, "ended after")])
async def test_a_ring_that_fails_is_an_error_once_all_else_has_ended(
    tmp_path: Path, uring_entries: int, res: int, reason: str
) -> None:
    async with store_on(tmp_path, uring_entries=uring_entries) as (store, pool, _):
        expected = [fill(pool, i, seed=i) for i in range(16)]
        rings = watch(store, res)
        with pytest.raises(OSError, match=reason) as caught:
            await store.write(range(16), range(16))
        assert caught.value.filename == str(tmp_path / "slots-1of1")
        assert not any(ring.num_running for ring in rings)
        sums = await store.write(range(16), range(16))
        assert await store.read(range(16), range(16), sums) == []
        assert [content(pool, i) for i in range(16)] == expected


@pytest.mark.parametrize("uring_entries", URING[1:])
async def test_a_short_read_of_a_ring_is_a_lost_block(tmp_path: Path, uring_entries: int) -> None:
    async with store_on(tmp_path, uring_entries=uring_entries) as (store, _, _):
        sums = await store.write(range(4), range(4))
        watch(store, 4096)
        assert len(await store.read(range(4), range(4), sums)) == 1


@pytest.mark.parametrize("num_entries", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("uring_entries", URING[1:])
async def test_all_rings_together_have_no_more_in_flight_than_asked_for(
    tmp_path: Path, num_entries: int, uring_entries: int
) -> None:
    assert num_entries < uring_entries
    options = {"num_slots": 64, "num_host_slots": 128, "uring_entries": num_entries}
    async with store_on(tmp_path, **options) as (store, pool, _):
        expected = [fill(pool, i, seed=i) for i in range(64)]
        sums = await store.write(range(64), range(64))
        rings = watch(store)
        reads = [store.read(range(64), range(64, 128), sums) for _ in range(2)]
        assert await asyncio.gather(*reads, store.write(range(64), range(64))) == [[], [], sums]
        assert 1 <= sum(ring.most_running for ring in rings) <= num_entries
        assert [content(pool, 64 + i) for i in range(64)] == expected


@pytest.mark.parametrize("uring_entries", URING[1:])
async def test_a_kernel_that_refuses_a_ring_leaves_the_threads(
    tmp_path: Path, uring_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def refusing(_: int) -> Any:
        if len(made) == 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        made.append(real(1))
        return made[-1]

    import uring_api  # noqa: PLC0415  # an extra

    real = uring_api.Ring
    monkeypatch.setattr(uring_api, "Ring", refusing)
    async with store_on(tmp_path, uring_entries=uring_entries) as (store, _, _):
        assert "writer threads, because the kernel forbids io_uring" in store.way
        assert all(ring.closed for ring in made)


@pytest.mark.parametrize("uring_entries", URING)
async def test_writes_give_way_while_blocks_are_read(
    tmp_path: Path, uring_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    clock = SimpleNamespace(perf_counter=time.perf_counter, sleep=pauses.append)
    monkeypatch.setattr(ssd_moving, "time", clock)
    async with store_on(
        tmp_path, num_slots=256, num_host_slots=256, uring_entries=2 * uring_entries
    ) as (store, _, _):
        rings = watch(store) if uring_entries else []
        slots = range(0, 256, 2)  # no neighbours, which go in one call
        await store.write(slots, slots)
        assert not pauses
        assert not rings or max(ring.most_running for ring in rings) > 8
        for ring in rings:
            ring.most_running = 0
        store._mover.num_reading += 1
        await store.write(slots, slots)
        store._mover.num_reading -= 1
        if rings:
            assert max(ring.most_running for ring in rings) == 3
        else:
            assert len(pauses) == 128
            assert all(0 < pause <= ssd_moving._MAX_REST_S for pause in pauses)
