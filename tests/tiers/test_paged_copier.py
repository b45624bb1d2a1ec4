"""The CPU copier: whole blocks, byte for byte, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_caches import (
    LAYOUTS,
    block_axis_of,
    bytes_of_block,
    caches_of_seven_blocks,
    fill,
    pool_for,
    vllm_caches,
)

from flexkv.errors import EngineClosedError, InputError, LayoutError
from flexkv.tiers.gpu import make_copier
from flexkv.tiers.host import HostPool
from flexkv.tiers.segments import segments_of


def block_of(caches: dict[str, torch.Tensor], axes: dict[str, int], i: int) -> list[torch.Tensor]:
    """Every element of one block, through the caches' own shapes."""
    return [cache.select(axes[name], i).clone() for name, cache in caches.items()]


async def there_and_back(
    caches: dict[str, torch.Tensor],
    axes: dict[str, int],
    tokens: int,
    moves: list[tuple[int, int, int]],
) -> None:
    """Gather blocks, spoil the caches, scatter to other blocks; compare all elements."""
    paged = segments_of(caches, tokens)
    copier = make_copier(caches, tokens, paged.block_nbytes)
    pool = HostPool(max((slot for _, slot, _ in moves), default=0) + 1, paged.block_nbytes)
    copier.attach_pool(pool, 0)
    fill(caches)
    before = [block_of(caches, axes, i) for i in range(paged.num_blocks)]
    await copier.gather([m[0] for m in moves], [m[1] for m in moves], copier.mark())
    for block_id, slot, _ in moves:
        assert bytes(pool.slot(0, slot)) == bytes_of_block(paged, block_id)
    fill(caches)
    expected = [block_of(caches, axes, i) for i in range(paged.num_blocks)]
    for source, _, target in moves:
        expected[target] = before[source]
    await copier.scatter([m[1] for m in moves], [m[2] for m in moves])
    for i in range(paged.num_blocks):
        for found, wanted in zip(block_of(caches, axes, i), expected[i], strict=True):
            assert torch.equal(found, wanted)
    await copier.close()
    pool.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
async def test_every_layout_comes_back_byte_for_byte(layout: str, seed: int) -> None:
    caches = LAYOUTS[layout]()
    rng = random.Random(seed)
    num_moves = rng.randint(1, 7)
    moves = list(zip(*(rng.sample(range(limit), num_moves) for limit in (7, 12, 7)), strict=True))
    axes = {name: block_axis_of(cache) for name, cache in caches.items()}
    await there_and_back(caches, axes, 4, moves)


async def test_neighbours_come_back_byte_for_byte() -> None:
    caches = vllm_caches("BLHNC", layers=2, blocks=50, heads=2, tokens=4, content=3)
    ids = [*range(10, 40), 3, 4, 5, 9, 8, 7, 0]
    moves = [(block_id, i + (i > 12), block_id) for i, block_id in enumerate(ids)]
    await there_and_back(caches, dict.fromkeys(caches, 0), 4, moves)


async def test_more_blocks_than_one_call_of_torch_takes() -> None:
    caches = vllm_caches("LHBNC", layers=3, blocks=600, heads=2, tokens=4, content=5)
    caches.update(extra=torch.empty((600, 1, 4, 7), dtype=torch.int8))
    ids = random.Random(5).sample(range(600), 600)
    moves = list(zip(ids, reversed(ids), range(600), strict=True))
    await there_and_back(caches, dict.fromkeys(caches, 0), 4, moves)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_strided_caches_come_back(data: st.DataObject) -> None:
    layers, blocks, heads, tokens, content = (
        data.draw(st.integers(1, limit)) for limit in (3, 9, 4, 4, 17)
    )
    order = "".join(data.draw(st.permutations("LBHNC")))
    caches = vllm_caches(
        order, layers=layers, blocks=blocks, heads=heads, tokens=tokens, content=content
    )
    sources = data.draw(st.lists(st.integers(0, blocks - 1), unique=True))
    slots = data.draw(st.permutations(range(len(sources) + 2)))
    targets = data.draw(st.permutations(range(blocks)))
    moves = list(zip(sources, slots, targets, strict=False))
    asyncio.run(there_and_back(caches, dict.fromkeys(caches, 0), tokens, moves))


async def test_caches_made_in_inference_mode_can_be_written() -> None:
    with torch.inference_mode():
        caches = caches_of_seven_blocks()
        copier = make_copier(caches, 4, 144)
        pool = pool_for(copier)
    await copier.gather([2], [0], None)
    await copier.scatter([0], [5])
    assert all(torch.equal(cache[2], cache[5]) for cache in caches.values())
    await copier.close()
    pool.close()


async def test_each_rank_has_its_own_region() -> None:
    caches = caches_of_seven_blocks()
    copier = make_copier(caches, 4, 144)
    pool = pool_for(copier)
    await copier.gather(range(7), range(7), None)
    assert not pool.region(0).any()
    assert pool.region(1).any()
    await copier.close()
    pool.close()


@pytest.mark.parametrize(
    ("block_ids", "slots", "message"),
    [
        ([0, 7], [0, 1], "block id 7 is out of range: there are 7"),
        ([-1], [0], "block id -1"),
        ([0], [9], "slot 9 is out of range: there are 9"),
        ([0], [-3], "slot -3"),
        ([0, 1], [0], "2 block ids do not go with 1 slots"),
        ([0.5], [0], "block id is not a whole number"),
    ],
)
async def test_bad_ids_are_refused_before_anything_is_queued(
    block_ids: list[int], slots: list[int], message: str
) -> None:
    copier = make_copier(caches_of_seven_blocks(), 4, 144)
    pool = pool_for(copier)
    with pytest.raises(InputError, match=message):
        await copier.gather(block_ids, slots, None)
    with pytest.raises(InputError, match=message):
        await copier.scatter(slots, block_ids)
    assert copier._thread is None
    await copier.close()
    pool.close()


async def test_nothing_to_copy_is_done_at_once() -> None:
    copier = make_copier(caches_of_seven_blocks(), 4, 144)
    pool = pool_for(copier)
    await copier.gather([], [], None)
    await copier.scatter([], [])
    assert copier._thread is None
    await copier.close()
    pool.close()


async def test_a_copier_without_a_pool_says_so() -> None:
    copier = make_copier(caches_of_seven_blocks(), 4, 144)
    with pytest.raises(InputError, match="attach_pool"):
        await copier.gather([0], [0], None)
    await copier.close()


async def test_a_closed_copier_has_no_thread_and_copies_nothing() -> None:
    copier = make_copier(caches_of_seven_blocks(), 4, 144)
    pool = pool_for(copier)
    await copier.gather([0], [0], None)
    thread = copier._thread
    await copier.close()
    await copier.close()
    assert not thread.is_alive()
    with pytest.raises(EngineClosedError):
        await copier.gather([0], [0], None)
    pool.close()


async def test_close_lets_go_of_cache_and_pool() -> None:
    caches = caches_of_seven_blocks()
    copier = make_copier(caches, 4, 144)
    pool = pool_for(copier)
    await copier.gather([0], [0], None)
    await copier.close()
    assert copier._pieces == []
    assert copier._paged.storages == ()
    pool.close()


def test_slots_smaller_than_a_block_are_refused() -> None:
    copier = make_copier(caches_of_seven_blocks(), 4, 144)
    pool = HostPool(3, 143)
    with pytest.raises(LayoutError, match="143 bytes, but a block of the caches 144"):
        copier.attach_pool(pool, 0)
    pool.close()


def test_another_block_size_than_the_layouts_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"3 layers has 144 bytes, .* block_nbytes=145"):
        make_copier(caches_of_seven_blocks(), 4, 145)


def test_caches_that_are_no_tensors_are_refused() -> None:
    arrays: Any = {name: cache.numpy() for name, cache in caches_of_seven_blocks().items()}
    with pytest.raises(LayoutError, match=r"layer '.*' is ndarray: give a torch tensor"):
        make_copier(arrays, 4, 144)
    with pytest.raises(LayoutError, match=r"kv_caches is list: give \{layer name: tensor\}"):
        make_copier(list(arrays.values()), 4, 144)


@pytest.mark.parametrize("device", ["xpu", "meta"])
def test_caches_on_other_devices_are_refused(device: str) -> None:
    cache: Any = SimpleNamespace(device=torch.device(device))
    with pytest.raises(LayoutError, match=f"{device.upper()} caches are not in this version"):
        make_copier({"a": cache}, 4, 144)


def test_a_copy_starts_no_team_of_threads() -> None:
    script = """if True:
        import asyncio, os, threading, torch
        from flexkv.tiers.gpu import make_copier
        from flexkv.tiers.host import HostPool

        torch.set_num_threads(4)
        cache = torch.zeros((20, 2, 4, 100_000))
        flat = torch.zeros((4000, 1, 4, 64))

        async def copy(caches, nbytes, num):
            copier = make_copier(caches, 4, nbytes)
            pool = HostPool(num, nbytes)
            copier.attach_pool(pool, 0)
            await copier.gather(range(num), range(num), None)
            await copier.scatter(range(num), range(num))
            while any(t.name.startswith('flexkv-touch') for t in threading.enumerate()):
                await asyncio.sleep(0.01)
            tasks = len(os.listdir('/proc/self/task'))
            await copier.close()
            return tasks

        def team():  # shows that a team would be seen
            torch.zeros(4_000_000).copy_(torch.ones(4_000_000))
            print(len(os.listdir('/proc/self/task')))

        before = len(os.listdir('/proc/self/task'))
        one = asyncio.run(copy({'a': cache}, 3_200_000, 20))
        many = asyncio.run(copy({'a': flat}, 1024, 4000))
        print(one - before, many - before)
        thread = threading.Thread(target=team)
        thread.start()
        thread.join()
        print(before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=60,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
    )
    one, many, with_team, before = map(int, done.stdout.split())
    assert (one, many) == (1, 1)  # the copy thread
    assert with_team > before + 1
