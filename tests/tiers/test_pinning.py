"""Pinning in the background, with a pinner that is made up; and which processors are near."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

import pytest

from flexkv.errors import ConfigError, TransferError
from flexkv.tiers import host
from flexkv.tiers.host import HostPool
from flexkv.tiers.numa import cpus_near, stay_on
from flexkv.tiers.pinning import Pinning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096


class MadeUpPinner:
    """Notes what is pinned; waits for ``go`` where there is one for the chunk."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.order: list[int] = []
        self.held: Callable[[int], bool] = lambda _: False
        self.go = threading.Event()
        self.error: RuntimeError | None = None
        self.num_at_once = self.most_at_once = 0

    def pin(self, address: int, nbytes: int) -> None:
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        if self.held(address):
            assert self.go.wait(timeout=60)
        self.num_at_once -= 1
        if self.error is not None:
            raise self.error
        self.order.append(address)
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]


@pytest.fixture
def pool() -> Iterator[HostPool]:
    """Two regions of ten slots of a page; one thread, so that the order is known."""
    made = HostPool(10, 100, num_ranks=2, touch_threads=1)
    yield made
    made.close()


@pytest.fixture
def pinner() -> MadeUpPinner:
    return MadeUpPinner()


async def test_all_of_the_region_is_pinned_in_chunks_of_whole_slots(
    pool: HostPool, pinner: MadeUpPinner
) -> None:
    pool.num_touch_threads = 3
    pinning = Pinning(pool, 1, pinner, chunk_nbytes=3 * PAGE + 1)
    await pinning.wait(range(10))
    start = pool.region(1).data_ptr()
    assert pinner.pinned == {start + i * PAGE: min(3, 10 - i) * PAGE for i in range(0, 10, 3)}
    assert 512 * os.fstat(pool.fd).st_blocks == 10 * PAGE  # touched, and the other region is not
    assert pinning.seconds is not None
    assert pinner.most_at_once == 1
    await pinning.wait([0, 9])
    pinning.close()
    assert pinner.pinned == {}


async def test_the_last_slots_come_first_and_those_that_are_wanted_before_them(
    pool: HostPool, pinner: MadeUpPinner
) -> None:
    start = pool.region(0).data_ptr()
    pinner.held = lambda address: address == start + 9 * PAGE
    pinning = Pinning(pool, 0, pinner, chunk_nbytes=PAGE)
    waiting = asyncio.create_task(pinning.wait([3, 5]))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    pinner.go.set()
    await waiting
    for thread in pinning._threads:
        await asyncio.to_thread(thread.join)
    slots = [(address - start) // PAGE for address in pinner.order]
    assert slots == [9, 3, 5, 8, 7, 6, 4, 2, 1, 0]
    pinning.close()


async def test_what_is_pinned_does_not_wait_for_the_rest(
    pool: HostPool, pinner: MadeUpPinner
) -> None:
    start = pool.region(0).data_ptr()
    pinner.held = lambda address: address < start + 5 * PAGE
    pinning = Pinning(pool, 0, pinner, chunk_nbytes=PAGE)
    await asyncio.wait_for(pinning.wait([9, 5]), 60)
    late = asyncio.create_task(pinning.wait([9, 0]))
    await asyncio.sleep(0.01)
    assert not late.done()
    late.cancel()
    pinner.go.set()
    await pinning.wait([0])
    pinning.close()


async def test_memory_that_can_not_be_pinned_is_a_transfer_error_now_and_later(
    pool: HostPool, pinner: MadeUpPinner
) -> None:
    pinner.error = RuntimeError("ulimit -l")
    pinning = Pinning(pool, 0, pinner)
    for _ in range(2):
        with pytest.raises(TransferError, match="can't be pinned: ulimit -l"):
            await pinning.wait([0])
    pinning.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bug_in_a_thread_lets_nobody_wait(
    pool: HostPool, pinner: MadeUpPinner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(pool, "touch_part", fail)
    pinning = Pinning(pool, 0, pinner)
    with pytest.raises(TransferError, match="a bug"):
        await pinning.wait([0])
    pinning.close()


async def test_close_wakes_who_waits_and_lets_go_of_what_is_pinned(
    pool: HostPool, pinner: MadeUpPinner
) -> None:
    start = pool.region(0).data_ptr()
    pinner.held = lambda address: address <= start + PAGE
    pinning = Pinning(pool, 0, pinner, chunk_nbytes=PAGE)
    await pinning.wait([9])
    waiting = asyncio.create_task(pinning.wait([0]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(pinning.close))
    pinner.go.set()
    await closing
    assert pinner.pinned == {}
    if (error := (await asyncio.gather(waiting, return_exceptions=True))[0]) is not None:
        assert isinstance(error, TransferError)
    with pytest.raises(TransferError):
        await pinning.wait([9])


def test_too_little_memory_is_an_error_at_once(
    pool: HostPool, pinner: MadeUpPinner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(nbytes: int) -> None:
        raise ConfigError(str(nbytes))

    monkeypatch.setattr(host, "require_memory", refuse)
    with pytest.raises(ConfigError, match=str(10 * PAGE)):
        Pinning(pool, 0, pinner)


def test_touch_soon_takes_the_region_and_survives_a_closed_pool(pool: HostPool) -> None:
    pool.touch_soon(1)
    for thread in threading.enumerate():
        if thread.name.startswith("flexkv-touch"):
            thread.join(timeout=60)
    assert 512 * os.fstat(pool.fd).st_blocks == 10 * PAGE
    pool.touch_soon(0)
    pool.close()
    for thread in threading.enumerate():
        if thread.name.startswith("flexkv-touch"):
            thread.join(timeout=60)


def test_a_pool_of_huge_pages_is_there_whether_the_system_gives_them_or_not() -> None:
    pool = HostPool(2, 5000, huge_pages=True)
    pool.touch(0)
    pool.slot(0, 1)[:2] = b"ok"
    pool.close()


def test_the_processors_near_a_device_are_those_of_its_node(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0000:1a:00.0"
    node = tmp_path / "devices/system/node/node1"
    device.mkdir(parents=True)
    node.mkdir(parents=True)
    (node / "cpulist").write_text("8-10,24\n")
    (device / "numa_node").write_text("1\n")
    assert cpus_near("0000:1A:00.0", system=tmp_path) == {8, 9, 10, 24}
    (device / "numa_node").write_text("-1\n")
    assert cpus_near("0000:1A:00.0", system=tmp_path) == set()
    assert cpus_near("0000:2b:00.0", system=tmp_path) == set()


def test_a_thread_stays_on_the_processors_it_may_use() -> None:
    allowed: list[set[int]] = []

    def look(cpus: set[int]) -> None:
        stay_on(cpus)
        allowed.append(os.sched_getaffinity(0))

    everywhere = os.sched_getaffinity(0)
    one = min(everywhere)
    for cpus in ({one, 10_000}, {10_000}, set()):
        thread = threading.Thread(target=look, args=(cpus,))
        thread.start()
        thread.join()
    assert allowed == [{one}, everywhere, everywhere]
    assert os.sched_getaffinity(0) == everywhere
