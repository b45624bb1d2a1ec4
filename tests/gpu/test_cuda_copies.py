"""The CUDA copier: whole blocks of every layout, byte for byte, whichever way they go."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from flexkv import CacheConfig, Config, Engine, EventsConfig, KVLayout, blocks_of
from flexkv.errors import EngineClosedError, InputError, LayoutError
from flexkv.tiers import pinning
from flexkv.tiers.gpu import make_copier
from flexkv.tiers.host import HostPool
from tests.gpu.gpu_caches import (
    PAGE,
    TABLES,
    Caches,
    blocks_of_caches,
    copier_on,
    is_pinned,
    moved,
    refill,
    slot_bytes,
    without_triton,
)
from tests.tiers.paged_caches import LAYOUTS, vllm_caches

if TYPE_CHECKING:
    from flexkv.tiers.cuda_slices import WayTable

ROOT = Path(__file__).parent.parent.parent


async def there_and_back(
    caches: Caches,
    moves: list[tuple[int, int, int]],
    table: WayTable | None = None,
    num_slots: int = 12,
) -> None:
    """Gather blocks, spoil the caches, scatter to other blocks; compare every byte."""
    async with copier_on(caches, table=table, num_slots=num_slots) as (copier, pool):
        refill(caches)
        before = blocks_of_caches(caches)
        await copier.gather([m[0] for m in moves], [m[1] for m in moves], copier.mark())
        for block_id, slot, _ in moves:
            assert slot_bytes(pool, slot, len(before[0])) == before[block_id]
        refill(caches)
        expected = blocks_of_caches(caches)
        for source, _, target in moves:
            expected[target] = before[source]
        await copier.scatter([m[1] for m in moves], [m[2] for m in moves], copier.mark())
        assert blocks_of_caches(caches) == expected


def some_moves(seed: int, num_blocks: int = 7, num_slots: int = 12) -> list[tuple[int, int, int]]:
    rng = random.Random(seed)
    num = rng.randint(1, num_blocks)
    limits = (num_blocks, num_slots, num_blocks)
    return list(zip(*(rng.sample(range(limit), num) for limit in limits), strict=True))


@pytest.mark.parametrize("way", TABLES)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_every_layout_comes_back_whichever_way_it_goes(
    layout: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch alone":
        without_triton(monkeypatch)
    caches = moved(LAYOUTS[layout](), "cuda")
    for seed in range(3):
        await there_and_back(caches, some_moves(seed), TABLES[way])


@pytest.mark.parametrize("order", ["LBNHC", "BLNHC"])
@pytest.mark.parametrize("way", TABLES)
async def test_no_copy_crosses_the_end_of_a_pinned_chunk(
    way: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "_CHUNK_NBYTES", 3 * PAGE)
    caches = moved(vllm_caches(order, layers=2, blocks=40, heads=2, tokens=4, content=256), "cuda")
    moves = [(i, i, 39 - i) for i in range(40)]
    await there_and_back(caches, moves, TABLES[way], num_slots=40)
    for seed in range(3):
        await there_and_back(caches, some_moves(seed, 40, 64), TABLES[way], num_slots=64)


@pytest.mark.parametrize("shape", [(2, 96, 16, 8, 128), (96, 8, 16, 256)])
async def test_blocks_of_megabytes_come_back(shape: tuple[int, ...]) -> None:
    caches = {f"{i}": torch.empty(shape, dtype=torch.bfloat16, device="cuda") for i in range(16)}
    ids = random.Random(3).sample(range(96), 96)
    for cache in caches.values():
        cache.random_(-100, 100)
    before = {name: cache.clone() for name, cache in caches.items()}
    async with copier_on(caches, num_slots=96, tokens=16) as (copier, _):
        await copier.gather(ids, range(96), copier.mark())
        for cache in caches.values():
            cache.zero_()
        # a third goes through a random order of slots
        await copier.scatter(range(64), ids[:64], copier.mark())
        late = random.Random(4).sample(range(64, 96), 32)
        await copier.scatter(late, [ids[slot] for slot in late])
    for name, cache in caches.items():
        assert torch.equal(cache, before[name])


async def test_bytes_between_blocks_are_left_alone() -> None:
    """Even where blocks are as far apart as their slots, and could move as one."""
    backing = torch.full((7, PAGE), 5, dtype=torch.uint8, device="cuda")
    caches = {"a": backing[:, :4000].unflatten(1, (4, 1000))}
    async with copier_on(caches, table=TABLES["staged"]) as (copier, pool):
        pool.region(0).fill_(3)
        await copier.scatter(range(7), range(7), copier.mark())
    assert (backing[:, :4000] == 3).all()
    assert (backing[:, 4000:] == 5).all()


async def test_caches_made_in_inference_mode_can_be_written() -> None:
    with torch.inference_mode():
        caches = {"a": torch.randn((7, 4, 5), device="cuda")}
    async with copier_on(caches) as (copier, _):
        await copier.gather([2], [0], copier.mark())
        await copier.scatter([0], [5])
    assert torch.equal(caches["a"][2], caches["a"][5])


async def test_both_directions_at_once_mix_nothing_up() -> None:
    caches = moved(
        vllm_caches("LBNHC", layers=3, blocks=200, heads=2, tokens=4, content=512), "cuda"
    )
    refill(caches)
    before = blocks_of_caches(caches)
    rng = random.Random(1)
    sources, targets = rng.sample(range(100), 100), rng.sample(range(100, 200), 100)
    slots = rng.sample(range(300), 300)
    async with copier_on(caches, num_slots=300) as (copier, pool):
        await copier.gather(sources, slots[:100], copier.mark())
        async with asyncio.TaskGroup() as tasks:
            for at in range(0, 100, 10):
                part = slice(at, at + 10)
                tasks.create_task(copier.scatter(slots[part], targets[part]))
                tasks.create_task(
                    copier.gather(sources[part], slots[100 + at : 110 + at], copier.mark())
                )
        after = blocks_of_caches(caches)
        for source, target, slot in zip(sources, targets, slots[100:200], strict=True):
            assert after[target] == before[source]
            assert slot_bytes(pool, slot, len(before[0])) == before[source]
        assert after[:100] == before[:100]


async def test_an_engine_stores_and_loads() -> None:
    layout = KVLayout.of_model(
        num_layers=4, num_kv_heads=2, head_size=64, dtype_nbytes=2, tokens_per_block=16
    )
    config = Config(
        cache=CacheConfig(tokens_per_block=16, num_cpu_blocks=64), events=EventsConfig(sink="none")
    )
    caches = {
        f"{i}": torch.randn((100, 2, 16, 128), device="cuda").to(torch.bfloat16) for i in range(4)
    }
    before = {name: cache.clone() for name, cache in caches.items()}
    blocks = blocks_of(list(range(16 * 40)), 16)
    ids = random.Random(2).sample(range(100), 40)
    async with Engine(config, layout) as engine:
        engine.attach(caches)
        stored = await engine.store(blocks, ids)
        assert stored.num_stored == 40
        for cache in caches.values():
            cache.zero_()
        loaded = await engine.load(blocks, ids)
        assert loaded.num_blocks == 40
    for name, cache in caches.items():
        assert torch.equal(cache[ids], before[name][ids])


def test_another_process_pins_and_fills_the_pool() -> None:
    pool = HostPool(40, 3 * 4 * 4 * 64, num_ranks=2)
    script = """if True:
        import asyncio, sys, torch
        from flexkv.tiers.gpu import make_copier
        from flexkv.tiers.host import HostPool

        async def main():
            caches = {str(i): torch.full((9, 4, 64), i + 1.0, device="cuda") for i in range(3)}
            copier = make_copier(caches, 4, 3 * 4 * 4 * 64)
            pool = HostPool.open(sys.argv[1], 40, 3 * 4 * 4 * 64, num_ranks=2)
            copier.attach_pool(pool, 1)
            await copier.gather(range(9), range(31, 40), copier.mark())
            assert torch.from_numpy(pool.region(1).numpy()).is_pinned()
            pool.close()  # as a lost link does; the copier's pinning keeps the memory
            await copier.close()

        asyncio.run(main())
    """
    subprocess.run([sys.executable, "-c", script, pool.path()], check=True, timeout=100, cwd=ROOT)
    found = pool.region(1)[31:].contiguous().view(torch.float32).reshape(9, 3, 256)
    assert [found[:, i].unique().tolist() for i in range(3)] == [[1.0], [2.0], [3.0]]
    assert not pool.region(0).any()
    pool.close()


@pytest.mark.parametrize(
    ("block_ids", "slots", "message"),
    [
        ([0, 7], [0, 1], "block id 7 is out of range: there are 7"),
        ([-1], [0], "block id -1"),
        ([0], [12], "slot 12 is out of range: there are 12"),
        ([0, 1], [0], "2 block ids do not go with 1 slots"),
        ([0.5], [0], "block id is not a whole number"),
    ],
)
async def test_bad_ids_are_refused(block_ids: list[int], slots: list[int], message: str) -> None:
    caches = moved(LAYOUTS["LBNHC"](), "cuda")
    async with copier_on(caches) as (copier, _):
        with pytest.raises(InputError, match=message):
            await copier.gather(block_ids, slots, copier.mark())
        with pytest.raises(InputError, match=message):
            await copier.scatter(slots, block_ids)
        await copier.gather([], [], None)
        await copier.scatter([], [])


async def test_a_copier_without_a_pool_says_so_and_a_closed_one_too() -> None:
    caches = moved(LAYOUTS["LBNHC"](), "cuda")
    copier = make_copier(caches, 4, 144)
    assert copier.num_blocks == 7
    with pytest.raises(InputError, match="attach_pool"):
        await copier.gather([0], [0], None)
    pool = HostPool(3, 143)
    with pytest.raises(LayoutError, match="143 bytes, but a block of the caches 144"):
        copier.attach_pool(pool, 0)
    await copier.close()
    await copier.close()
    with pytest.raises(EngineClosedError):
        await copier.gather([0], [0], None)
    pool.close()


async def test_close_unpins_the_pool_and_a_second_pool_takes_the_place_of_the_first() -> None:
    caches = moved(LAYOUTS["LBNHC"](), "cuda")
    refill(caches)
    async with copier_on(caches) as (copier, first):
        await copier.gather([3], [0], copier.mark())
        assert is_pinned(first)
        second = HostPool(5, 144)
        copier.attach_pool(second, 0)
        assert not is_pinned(first)
        await copier.gather([4], [4], copier.mark())
        assert slot_bytes(second, 4, 144) == blocks_of_caches(caches)[4]
        await copier.close()
        assert not is_pinned(second)
        second.close()


def test_caches_on_two_devices_are_refused() -> None:
    with pytest.raises(LayoutError, match="the caches are on cpu and cuda:0"):
        make_copier(
            {"a": torch.zeros((7, 4, 5)), "b": torch.zeros((7, 4, 5), device="cuda")}, 4, 160
        )
