"""The engine with real copies on CPU tensors, and what it refuses."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from flexkv import (
    Blocks,
    CacheConfig,
    Config,
    ConfigError,
    Engine,
    EngineClosedError,
    EventsConfig,
    FeedError,
    InputError,
    KVLayout,
    LayoutError,
    ListSink,
    Tier,
    blocks_of,
)
from tests.engine.followers import believed

if TYPE_CHECKING:
    from pathlib import Path

TOKENS_PER_BLOCK = 4
NUM_GPU_BLOCKS = 16
LAYOUT = KVLayout.of_model(
    num_layers=3, num_kv_heads=2, head_size=8, dtype_nbytes=2, tokens_per_block=TOKENS_PER_BLOCK
)
TOKENS = list(range(23))
BLOCKS = blocks_of(TOKENS, TOKENS_PER_BLOCK)


def config(num_slots: int = 8, **changes: object) -> Config:
    cache = CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=num_slots)
    return Config(cache=cache, **changes)


def caches(num_layers: int = 3, tokens: int = TOKENS_PER_BLOCK) -> dict[str, torch.Tensor]:
    shape = (NUM_GPU_BLOCKS, 2, tokens, 16)
    return {f"layer.{i}": torch.randn(shape).to(torch.bfloat16) for i in range(num_layers)}


async def test_what_is_stored_is_loaded_byte_for_byte() -> None:
    kv_caches = caches()
    before = {name: cache.clone() for name, cache in kv_caches.items()}
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(kv_caches)
        assert engine.lookup(BLOCKS).num_blocks == 0
        stored = await engine.store(BLOCKS, [3, 1, 4, 15, 9])
        assert (stored.num_stored, stored.num_present, stored.num_dropped) == (5, 0, 0)
        match = engine.lookup(BLOCKS)
        assert (match.num_blocks, match.by_tier) == (5, {Tier.HOST: 5})
        loaded = await engine.load(BLOCKS, [0, 2, 6, 7, 8])
        assert (loaded.num_blocks, loaded.missing) == (5, ())
        assert loaded.nbytes_by_tier == {Tier.HOST: 5 * LAYOUT.block_nbytes}
    for name, cache in kv_caches.items():
        assert torch.equal(cache[[0, 2, 6, 7, 8]], before[name][[3, 1, 4, 15, 9]])


async def test_ids_belong_to_the_blocks_from_first_on() -> None:
    kv_caches = caches()
    before = kv_caches["layer.1"].clone()
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(kv_caches)
        await engine.store(BLOCKS[:2], [10, 11])
        stored = await engine.store(BLOCKS, np.array([12, 13, 14]), first=2)
        assert stored.num_stored == 3
        loaded = await engine.load(BLOCKS, torch.tensor([0, 1]), first=3)
        assert loaded.num_blocks == 2
        assert torch.equal(kv_caches["layer.1"][[0, 1]], before[[13, 14]])


async def test_a_load_says_which_gpu_blocks_did_not_arrive() -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        await engine.store(BLOCKS[:2], [0, 1])
        loaded = await engine.load(BLOCKS, [5, 6, 7, 8, 9])
        assert (loaded.num_blocks, loaded.missing) == (2, (7, 8, 9))


async def test_a_store_behind_a_gap_stores_nothing() -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        stored = await engine.store(BLOCKS, [1, 2], first=3)
        assert (stored.num_stored, stored.num_dropped) == (0, 2)


async def test_a_store_that_does_not_fit_stores_the_leading_part() -> None:
    sink = ListSink()
    async with Engine(config(num_slots=3), LAYOUT, sinks=[sink]) as engine:
        engine.attach(caches())
        stored = await engine.store(BLOCKS, range(5))
        assert (stored.num_stored, stored.num_dropped) == (3, 2)
        assert engine.lookup(BLOCKS).num_blocks == 3
        assert believed(sink.events) == engine.residency(Tier.HOST) == set(BLOCKS[:3])


async def test_every_rank_has_a_part_of_every_block() -> None:
    layout = KVLayout(
        tokens_per_block=TOKENS_PER_BLOCK, block_nbytes=LAYOUT.block_nbytes, num_ranks=2
    )
    ranks = [caches(), caches()]
    before = [kv_caches["layer.0"].clone() for kv_caches in ranks]
    async with Engine(config(), layout, sinks=[]) as engine:
        engine.attach(ranks[0], rank=0)
        with pytest.raises(InputError, match="1 of 2 ranks have their caches"):
            await engine.store(BLOCKS, range(5))
        engine.attach(ranks[1], rank=1)
        await engine.store(BLOCKS, range(5))
        loaded = await engine.load(BLOCKS, range(5, 10))
        assert loaded.nbytes_by_tier == {Tier.HOST: 5 * 2 * LAYOUT.block_nbytes}
    for kv_caches, old in zip(ranks, before, strict=True):
        assert torch.equal(kv_caches["layer.0"][5:10], old[:5])


async def test_a_cleared_engine_holds_nothing() -> None:
    sink = ListSink()
    async with Engine(config(), LAYOUT, sinks=[sink]) as engine:
        engine.attach(caches())
        await engine.store(BLOCKS, range(5))
        await engine.clear()
        assert engine.lookup(BLOCKS).num_blocks == 0
        assert believed(sink.events) == engine.residency(Tier.HOST) == set()


async def test_a_prefetched_chain_is_evicted_last() -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        await engine.store(BLOCKS, range(5))
        await engine.store(blocks_of([7] * 12, TOKENS_PER_BLOCK), range(3))
        assert await engine.prefetch(BLOCKS) == 5
        await engine.store(blocks_of([8] * 12, TOKENS_PER_BLOCK), range(3))
        assert engine.lookup(BLOCKS).num_blocks == 5


async def test_statistics_are_logged_every_so_many_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "flexkv")
    async with Engine(config(num_log_interval_requests=2), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        engine.lookup(BLOCKS)
        await engine.store(BLOCKS, range(5))
        assert "hit rate" not in caplog.text
        engine.lookup(BLOCKS)
        assert "2 requests, hit rate 50.0%" in caplog.text
        assert "stored 5 blocks" in caplog.text


async def test_an_engine_that_is_switched_off_keeps_nothing() -> None:
    async with Engine(config(enable_flexkv=False), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        assert (await engine.store(BLOCKS, range(5))).num_dropped == 5
        assert (await engine.load(BLOCKS, range(5))).missing == (0, 1, 2, 3, 4)
        assert engine.lookup(BLOCKS).num_blocks == 0


async def test_a_closed_engine_says_so() -> None:
    engine = Engine(config(), LAYOUT, sinks=[])
    with pytest.raises(EngineClosedError, match="async with engine"):
        engine.lookup(BLOCKS)
    async with engine:
        engine.attach(caches())
        await engine.store(BLOCKS, range(5))
    assert engine.residency(Tier.HOST) == set()
    with pytest.raises(EngineClosedError, match="used once"):
        async with engine:
            pytest.fail("its memory is gone")
    for call in (engine.store(BLOCKS, [1]), engine.load(BLOCKS, [1]), engine.clear()):
        with pytest.raises(EngineClosedError):
            await call


def test_settings_and_layout_must_agree_on_tokens_per_block() -> None:
    layout = KVLayout(tokens_per_block=16, block_nbytes=64)
    with pytest.raises(LayoutError, match="tokens_per_block is 4 in the settings but 16"):
        Engine(config(), layout)


def test_settings_and_layouts_of_another_kind_are_refused_with_the_way_to_make_them() -> None:
    wrong: Any = {"cache_config": {}}
    with pytest.raises(InputError, match=r"config is dict: .*Config\.from_mapping"):
        Engine(wrong, LAYOUT)
    with pytest.raises(InputError, match=r"layout is dict: .*KVLayout\.of_model"):
        Engine(config(), wrong)


def test_a_host_tier_smaller_than_a_block_is_refused() -> None:
    cache = CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, cpu_cache_bytes=100)
    with pytest.raises(ConfigError, match="cpu_cache_bytes is 100, but one block takes"):
        Engine(Config(cache=cache), LAYOUT)


@pytest.mark.parametrize(
    ("kv_caches", "text"),
    [
        (caches(tokens=8), "8"),
        (caches(num_layers=2), "block_nbytes"),
    ],
)
async def test_caches_of_another_shape_are_refused(
    kv_caches: dict[str, torch.Tensor], text: str
) -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        with pytest.raises(LayoutError, match=text):
            engine.attach(kv_caches)


@pytest.mark.parametrize(
    ("blocks", "block_ids", "first", "text"),
    [
        (BLOCKS, [1, 2, 3, 4, 5, 6], 0, "6 GPU block ids for 5 blocks"),
        (BLOCKS, [1, 2, 3], 3, "3 GPU block ids for 2 blocks"),
        (BLOCKS, [1], 6, "first is 6"),
        (BLOCKS, [1], -1, "first is -1"),
        (BLOCKS, [1, 16], 0, "GPU block id 16 is not in the cache of 16 blocks"),
        (BLOCKS, [-1], 0, "GPU block id -1"),
        (BLOCKS, [1, 2, 2], 0, "GPU block id 2 occurs twice"),
        (blocks_of(TOKENS, 8), [1], 0, "8 tokens each"),
        (BLOCKS[1:], [1], 0, "do not begin their chain"),
    ],
)
async def test_ids_and_blocks_that_do_not_go_together_are_refused(
    blocks: Blocks, block_ids: list[int], first: int, text: str
) -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        for call in (engine.load, engine.store):
            with pytest.raises(InputError, match=text):
                await call(blocks, block_ids, first=first)
        assert engine.stats().tiers[Tier.HOST].num_free == 8


async def test_keys_of_two_kinds_are_refused() -> None:
    short = Blocks(bytes(16), bytes(16), tokens_per_block=TOKENS_PER_BLOCK, key_nbytes=16)
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        await engine.store(BLOCKS, range(5))
        with pytest.raises(InputError, match="keys of 16 bytes do not go with the 32"):
            engine.lookup(short)


async def test_ranks_are_attached_once_each() -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        with pytest.raises(InputError, match="rank 0 has its caches already"):
            engine.attach(caches())
        with pytest.raises(InputError, match="rank 1 is not one of the layout's 1"):
            engine.attach(caches(), rank=1)


def test_an_engine_whose_feed_cannot_start_does_not_start(tmp_path: Path) -> None:
    events = EventsConfig(
        sink="nats",
        worker_id=7,
        nats_servers=("nats://127.0.0.1:1",),
        connect_timeout_s=0.5,
        discovery_path=str(tmp_path),
    )

    async def scenario() -> None:
        async with asyncio.timeout(10), Engine(config(events=events), LAYOUT):
            pytest.fail("the body must not run")

    with pytest.raises(FeedError, match=r"127\.0\.0\.1:1"):
        asyncio.run(scenario())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_what_is_no_argument_is_refused_by_name() -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        with pytest.raises(InputError, match="blocks is list: make it with blocks_of"):
            engine.lookup([1, 2])  # type: ignore[arg-type]
        with pytest.raises(InputError, match="gpu_block_ids must be integers"):
            await engine.load(BLOCKS, ["1"])  # type: ignore[list-item]
        with pytest.raises(InputError, match="tier is 'disk': give one of gpu, host"):
            engine.residency("disk")  # type: ignore[arg-type]


async def test_a_byte_cap_holds_with_the_padding_of_slots() -> None:
    cache = CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, cpu_cache_bytes=5 * 4096 + 1000)
    async with Engine(Config(cache=cache), LAYOUT, sinks=[]) as engine:
        assert engine.stats().tiers[Tier.HOST].num_slots == 5


def test_more_memory_than_there_is_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="num_cpu_blocks"):
        Engine(config(num_slots=2**40), LAYOUT)


async def test_a_sink_that_one_change_outran_begins_again() -> None:
    sink = ListSink()
    events = EventsConfig(ring=2)
    async with Engine(config(events=events), LAYOUT, sinks=[sink]) as engine:
        engine.attach(caches())
        for tokens in ([1] * 4, [2] * 4, [3] * 4, [4] * 4, [5] * 4, [6] * 4, [7] * 4, [8] * 4):
            await engine.store(blocks_of(tokens, TOKENS_PER_BLOCK), [0])
        await engine.store(BLOCKS, range(5))
        assert believed(sink.events) == engine.residency(Tier.HOST)


def test_events_that_are_to_join_vllms_need_vllm() -> None:
    config = Config.from_mapping({"events": {"sink": "vllm"}, "cache": {"num_cpu_blocks": 1}})
    layout = KVLayout(tokens_per_block=config.tokens_per_block, block_nbytes=64)
    with pytest.raises(ConfigError, match="inside vLLM"):
        Engine(config, layout)
