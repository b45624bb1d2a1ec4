"""The CPU copier's thread: who goes first, and what becomes of cancelled and failed copies."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from paged_caches import bytes_of_block, caches_of_seven_blocks, fill, pool_for, vllm_caches

from flexkv.errors import EngineClosedError, TransferError
from flexkv.tiers.gpu import CpuPagedCopier
from flexkv.tiers.host import HostPool
from flexkv.tiers.segments import segments_of

if TYPE_CHECKING:
    from collections.abc import Iterator


class HeldCopier(CpuPagedCopier):
    """Its thread stops before each move until it is let go; then moves, or raises."""

    def __init__(self, caches: dict[str, torch.Tensor], **settings: Any) -> None:
        super().__init__(segments_of(caches, 4), **settings)
        self.began = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.moves: list[int] = []  # the first byte that each move has written

    def _move(self, to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
        self.began.release()
        assert self.go.acquire(timeout=60)
        self.moves.append(to[0].data_ptr())
        if self.error is not None:
            raise self.error
        super()._move(to, source)


Held = tuple[HeldCopier, HostPool, dict[str, torch.Tensor]]


async def until_begun(copier: HeldCopier) -> None:
    """Until the thread stands before a move."""
    assert await asyncio.to_thread(copier.began.acquire, timeout=60)


async def turns(number: int = 20) -> None:
    """Let everything run that can."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.fixture
def held() -> Iterator[tuple[HeldCopier, HostPool, dict[str, torch.Tensor]]]:
    caches = caches_of_seven_blocks()
    copier = HeldCopier(caches)
    pool = pool_for(copier)
    yield copier, pool, caches
    pool.close()


async def test_a_copy_cancelled_before_it_began_copies_nothing(held: Held) -> None:
    copier, pool, _ = held
    first = asyncio.create_task(copier.gather([0], [0], None))
    await until_begun(copier)
    second = asyncio.create_task(copier.gather([1], [1], None))
    await turns()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second  # ends while the first still holds the thread
    assert not first.done()
    copier.go.release(9)
    await first
    await copier.close()
    assert len(copier.moves) == 1
    assert pool.region(1)[0].any()
    assert not pool.region(1)[1].any()


async def test_a_cancelled_gather_still_owns_its_slots(held: Held) -> None:
    copier, pool, _ = held
    task = asyncio.create_task(copier.gather([3], [4], None))
    await until_begun(copier)
    for _ in range(3):  # also where it is cancelled again and again
        task.cancel()
        await turns()
    assert not task.done()
    copier.go.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bytes(pool.slot(1, 4)) == bytes_of_block(copier._paged, 3)
    await copier.close()


async def test_loads_overtake_stores_that_wait(held: Held) -> None:
    copier, pool, caches = held
    ended: list[str] = []

    async def run(name: str, copy: Any) -> None:
        await copy
        ended.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run("store 1", copier.gather([0], [0], None)))
        await until_begun(copier)
        tasks.create_task(run("store 2", copier.gather([1], [1], None)))
        tasks.create_task(run("store 3", copier.gather([2], [2], None)))
        await turns()
        tasks.create_task(run("load 1", copier.scatter([7], [5])))
        tasks.create_task(run("load 2", copier.scatter([8], [6])))
        await turns()
        copier.go.release(9)
    assert ended == ["store 1", "load 1", "load 2", "store 2", "store 3"]
    assert not any(cache[5:].any() for cache in caches.values())  # slots 7 and 8 were empty
    assert pool.region(1)[:3].any(dim=1).all()
    await copier.close()


async def test_a_load_overtakes_a_long_store_that_runs() -> None:
    caches = vllm_caches("LBHNC", layers=1, blocks=1000, heads=2, tokens=4, content=6)
    fill(caches)
    copier = HeldCopier(caches)
    pool = pool_for(copier, num_slots=1000)
    ids = random.Random(1).sample(range(1000), 700)
    store = asyncio.create_task(copier.gather(ids, ids, None))
    await until_begun(copier)
    load = asyncio.create_task(copier.scatter([999], [0]))
    await turns()
    copier.go.release(2)  # the store's first part and the load
    await load
    assert not store.done()
    copier.go.release(9)
    await store
    await copier.close()
    pool.close()


async def test_a_failed_copy_is_a_transfer_error_and_the_next_one_works(held: Held) -> None:
    copier, pool, _ = held
    copier.go.release(2)
    copier.error = RuntimeError("a broken page")
    with pytest.raises(TransferError, match="a broken page"):
        await copier.scatter([0], [0])
    copier.error = None
    await copier.gather([3], [4], None)
    assert bytes(pool.slot(1, 4)) == bytes_of_block(copier._paged, 3)
    await copier.close()


async def test_a_cancelled_copy_that_fails_is_cancelled(held: Held) -> None:
    copier, _, _ = held
    copier.error = RuntimeError("a broken page")
    task = asyncio.create_task(copier.gather([3], [4], None))
    await until_begun(copier)
    task.cancel()
    copier.go.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    await copier.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bug_in_the_thread_lets_nobody_wait(held: Held) -> None:
    copier, _, _ = held
    copier.error = KeyError("a bug")
    tasks = [asyncio.create_task(copier.gather([i], [i], None)) for i in range(3)]
    await until_begun(copier)
    await turns()
    copier.go.release()
    for task in tasks:
        with pytest.raises(TransferError, match="copy thread has"):
            await task
    with pytest.raises(EngineClosedError):
        await copier.gather([0], [0], None)
    await copier.close()


async def test_more_calls_than_places_all_end() -> None:
    caches = caches_of_seven_blocks()
    copier = HeldCopier(caches, max_queued=2)
    pool = pool_for(copier)
    async with asyncio.TaskGroup() as tasks:
        for i in range(7):
            tasks.create_task(copier.gather([i], [i], None))
        await until_begun(copier)
        await turns()
        assert len(copier._stores) == 1  # with the one that has begun: two
        copier.go.release(7)
    for i in range(7):
        assert bytes(pool.slot(1, i)) == bytes_of_block(copier._paged, i)
    await copier.close()
    pool.close()


async def test_an_abandoned_copier_ends_the_copy_that_runs_and_begins_none(held: Held) -> None:
    copier, pool, _ = held
    running = asyncio.create_task(copier.gather([3], [4], None))
    await until_begun(copier)
    waiting = asyncio.create_task(copier.gather([1], [1], None))
    await turns()
    abandoned = threading.Thread(target=copier.abandon)
    abandoned.start()
    await turns()
    assert abandoned.is_alive()
    copier.go.release(9)
    await asyncio.to_thread(abandoned.join, 60)
    assert not abandoned.is_alive()
    await running
    assert bytes(pool.slot(1, 4)) == bytes_of_block(copier._paged, 3)
    assert not pool.region(1)[1].any()
    with pytest.raises(TransferError, match="abandoned"):
        await waiting
