"""Keep blocks of a paged KV cache in host memory, and get them back."""

import asyncio

import torch

from flexkv import CacheConfig, Config, Engine, KVLayout, Tier, blocks_of

TOKENS_PER_BLOCK = 16


async def main() -> None:
    """Store four blocks, forget them on the "GPU", load them back."""
    # 8 layers of [blocks, heads, tokens, K and V], as vLLM lays them out
    kv_caches = {f"layers.{i}": torch.randn(64, 2, TOKENS_PER_BLOCK, 2 * 64) for i in range(8)}
    layout = KVLayout.of_model(
        num_layers=8,
        num_kv_heads=2,
        head_size=64,
        dtype_nbytes=4,
        tokens_per_block=TOKENS_PER_BLOCK,
    )
    config = Config(cache=CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=256))
    blocks = blocks_of(range(1000, 1064), TOKENS_PER_BLOCK, namespace="tenant-a")

    async with Engine(config, layout) as engine:
        engine.attach(kv_caches)
        stored = await engine.store(blocks, [7, 3, 12, 5])  # block i lies in GPU block ids[i]
        print(f"stored {stored.num_stored} blocks")

        before = kv_caches["layers.0"][[7, 3, 12, 5]].clone()
        for cache in kv_caches.values():
            cache.zero_()

        match = engine.lookup(blocks)
        loaded = await engine.load(blocks, [20, 21, 22, 23])
        assert torch.equal(kv_caches["layers.0"][20:24], before)
        print(f"found {match.num_blocks}, loaded {loaded.num_blocks}, missing {loaded.missing}")
        print(f"{len(engine.residency(Tier.HOST))} blocks are in host memory")


asyncio.run(main())
