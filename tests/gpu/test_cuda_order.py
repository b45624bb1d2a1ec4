"""The CUDA copier beside other work on the GPU: order, cancellation, a lost context."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from flexkv.tiers import pinning
from flexkv.tiers.cuda_host import CudaPinner
from tests.gpu.gpu_caches import TABLES, copier_on, is_pinned, slot_bytes

if TYPE_CHECKING:
    from tests.gpu.gpu_caches import Caches

ROOT = Path(__file__).parent.parent.parent

HALF_A_SECOND = 800_000_000  # cycles, roughly
NBYTES = 3 * 4 * 1024


@pytest.fixture
def caches() -> Caches:
    """Three layers, 50 blocks; a block is as long as three pages."""
    return {f"{i}": torch.zeros((50, 4, 1024), dtype=torch.uint8, device="cuda") for i in range(3)}


@pytest.fixture
def model() -> torch.cuda.Stream:
    """The stream of somebody who computes."""
    return torch.cuda.Stream()


@pytest.mark.parametrize("way", TABLES)
async def test_a_store_sees_what_was_written_before_its_mark(
    caches: Caches, model: torch.cuda.Stream, way: str
) -> None:
    async with copier_on(caches, num_slots=50, table=TABLES[way]) as (copier, pool):
        await copier.gather([0], [0], None)  # is warm
        for turn in range(1, 11):
            with torch.cuda.stream(model):
                torch.cuda._sleep(HALF_A_SECOND // 50)
                for cache in caches.values():
                    cache[:25].fill_(turn)
                mark = copier.mark()
                for cache in caches.values():  # the next step writes other blocks
                    cache[25:].fill_(100 + turn)
            await copier.gather(range(25), range(25), mark)
            for slot in range(25):
                assert slot_bytes(pool, slot, NBYTES) == bytes([turn]) * NBYTES


@pytest.mark.parametrize("way", TABLES)
async def test_a_load_waits_for_those_who_still_use_the_blocks(
    caches: Caches, model: torch.cuda.Stream, way: str
) -> None:
    async with copier_on(caches, num_slots=50, table=TABLES[way]) as (copier, pool):
        pool.region(0).fill_(7)
        await copier.scatter([0], [0])
        for cache in caches.values():
            cache.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(model):
            torch.cuda._sleep(HALF_A_SECOND // 10)
            seen = torch.stack([cache[:25].sum() for cache in caches.values()])
            for cache in caches.values():
                cache[:25].fill_(9)  # is overwritten by the load, and not the other way round
            mark = copier.mark()
        await copier.scatter(range(25), range(25), mark)
        with torch.cuda.stream(torch.cuda.Stream()):  # any stream sees the bytes now
            found = [cache[:25].unique().tolist() for cache in caches.values()]
        assert found == [[7], [7], [7]]
        assert not seen.any()


async def test_the_loop_goes_on_while_a_copy_waits(
    caches: Caches, model: torch.cuda.Stream
) -> None:
    async with copier_on(caches, num_slots=50) as (copier, _):
        await copier.gather([0], [0], None)
        with torch.cuda.stream(model):
            torch.cuda._sleep(HALF_A_SECOND)
            mark = copier.mark()
        task = asyncio.create_task(copier.gather(range(50), range(50), mark))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not mark.query()
        assert not task.done()
        await task
        assert mark.query()


async def test_a_load_overtakes_a_store_that_waits(
    caches: Caches, model: torch.cuda.Stream
) -> None:
    async with copier_on(caches, num_slots=50) as (copier, _):
        await copier.gather([0], [0], None)
        await copier.scatter([0], [0])
        with torch.cuda.stream(model):
            torch.cuda._sleep(HALF_A_SECOND)
            mark = copier.mark()
        store = asyncio.create_task(copier.gather(range(25), range(25), mark))
        await asyncio.sleep(0)
        await copier.scatter(range(25, 50), range(25, 50))
        assert not mark.query()
        assert not store.done()
        await store


@pytest.mark.parametrize("way", ["direct", "small slices"])
async def test_a_cancelled_copy_owns_its_blocks_until_it_has_ended(
    caches: Caches, model: torch.cuda.Stream, way: str
) -> None:
    async with copier_on(caches, num_slots=50, table=TABLES[way]) as (copier, pool):
        pool.region(0).fill_(7)
        await copier.scatter([0], [0])
        with torch.cuda.stream(model):
            torch.cuda._sleep(HALF_A_SECOND // 2)
            mark = copier.mark()
        task = asyncio.create_task(copier.scatter(range(1, 50), range(1, 50), mark))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        assert not mark.query()
        assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert mark.query()
        # All streams have nothing left to write: what there is now, stays.
        found = {name: cache.clone() for name, cache in caches.items()}
        torch.cuda.synchronize()
        assert all(torch.equal(cache, found[name]) for name, cache in caches.items())
        whole = [
            all(cache[i].unique().tolist() == [7] for cache in caches.values()) for i in range(50)
        ]
        none = [not any(cache[i].any() for cache in caches.values()) for i in range(50)]
        assert all(a or b for a, b in zip(whole, none, strict=True))
        if way == "small slices":
            assert any(none)  # what had not begun never did
        await copier.gather([0], [1], None)  # and the copier goes on


async def test_a_copy_that_was_cancelled_before_it_began_copies_nothing(caches: Caches) -> None:
    async with copier_on(caches, num_slots=50) as (copier, pool):
        await copier.gather([0], [0], None)
        for cache in caches.values():
            cache.fill_(3)
        task = asyncio.create_task(copier.gather([1], [1], copier.mark()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        torch.cuda.synchronize()
        assert not pool.region(0)[1].any()


async def test_the_first_copies_run_before_the_pool_is_pinned(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []
    go = threading.Event()
    pin = CudaPinner.pin

    def hold(self: CudaPinner, address: int, nbytes: int) -> None:
        pinned.append(address)
        if len(pinned) > 3:
            assert go.wait(timeout=60)
        pin(self, address, nbytes)

    monkeypatch.setattr(CudaPinner, "pin", hold)
    monkeypatch.setattr(pinning, "_CHUNK_NBYTES", NBYTES)
    async with copier_on(caches, num_slots=50) as (copier, pool):
        for cache in caches.values():
            cache.fill_(3)
        await copier.gather([1, 2], [49, 48], copier.mark())  # an index hands out the last first
        assert slot_bytes(pool, 49, NBYTES) == b"\3" * NBYTES
        late = asyncio.create_task(copier.gather([1], [0], copier.mark()))
        await asyncio.sleep(0.01)
        assert not late.done()
        assert not is_pinned(pool)
        go.set()
        await late
        assert slot_bytes(pool, 0, NBYTES) == b"\3" * NBYTES


def test_a_lost_context_fails_every_copy_and_hangs_nobody() -> None:
    script = """if True:
        import asyncio, torch
        from flexkv.errors import TransferError
        from flexkv.tiers.gpu import make_copier
        from flexkv.tiers.host import HostPool

        async def fails(copy):
            try:
                await copy
            except TransferError as error:
                return str(error)
            raise AssertionError("it did not fail")

        async def main():
            caches = {"a": torch.zeros((50, 4, 1024), dtype=torch.uint8, device="cuda")}
            copier = make_copier(caches, 4, 4096)
            pool = HostPool(50, 4096)
            copier.attach_pool(pool, 0)
            await copier.gather(range(50), range(50), copier.mark())
            await copier.scatter(range(50), range(50))
            torch.cuda._sleep(400_000_000)
            torch.zeros(9, device="cuda")[torch.tensor([10**6], device="cuda")]  # asserts there
            mark = copier.mark()
            copies = [fails(copier.gather([i], [i], mark)) for i in range(9)]
            copies += [fails(copier.scatter([i], [i], mark)) for i in range(9, 18)]
            for reason in await asyncio.wait_for(asyncio.gather(*copies), 60):
                print("failed:", reason.splitlines()[0])
            print("then:", (await fails(copier.gather([1], [1], None))).splitlines()[0])
            print("loss:", copier.loss.splitlines()[0])
            await asyncio.wait_for(copier.close(), 60)
            pool.close()
            print("closed")

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        timeout=100,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([line for line in lines if line.startswith("failed: ")]) == 18
    assert any(line.startswith("then: the CUDA context of cuda:0 is lost") for line in lines)
    assert any(line.startswith("loss: the CUDA context of cuda:0 is lost") for line in lines)
    assert lines[-1] == "closed"
