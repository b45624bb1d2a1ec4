"""The feed's counts and digests come from an engine into its metrics."""

from __future__ import annotations

from flexkv import Engine, Tier
from flexkv.hashing import blocks_of
from flexkv.integration.vllm.feed_metrics import FEED_METRICS
from tests.engine.test_engine import BLOCKS, LAYOUT, TOKENS_PER_BLOCK, caches, config


def values(engine: Engine) -> dict[str, int]:
    stats = engine.stats()
    return {name: metric.value_of(stats) for name, metric in FEED_METRICS.items()}


async def test_equal_contents_have_equal_digests() -> None:
    async with Engine(config(), LAYOUT, sinks=[]) as engine:
        engine.attach(caches())
        assert values(engine)["flexkv_host_digest"] == 0
        await engine.store(BLOCKS, range(5))
        filled = values(engine)
        assert 0 < filled["flexkv_host_digest"] == sum(BLOCKS.router_hashes()) % 2**53
        assert float(filled["flexkv_host_digest"]).is_integer()
        assert filled["flexkv_ssd_digest"] == 0
        await engine.clear()
        assert values(engine)["flexkv_host_digest"] == 0
        await engine.store(BLOCKS[:2], range(2))
        await engine.store(BLOCKS, range(5))
        assert values(engine)["flexkv_host_digest"] == filled["flexkv_host_digest"]
        await engine.store(blocks_of([7] * 12, TOKENS_PER_BLOCK), range(3))
        assert engine.stats().tiers[Tier.HOST].digest.startswith("8:")
        assert values(engine)["flexkv_host_digest"] != filled["flexkv_host_digest"]
