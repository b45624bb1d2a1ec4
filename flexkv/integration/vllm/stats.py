"""The engine's statistics in the forms that vLLM passes on, logs and exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from flexkv.blocks import Tier
from flexkv.integration.vllm.feed_metrics import FEED_METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flexkv.engine.stats import EngineStats


def _of_ssd(name: str) -> Callable[[EngineStats], int]:
    def value_of(stats: EngineStats) -> int:
        tier = stats.tiers.get(Tier.SSD)
        return 0 if tier is None else getattr(tier, name)

    return value_of


class _Metric(NamedTuple):
    kind: type[Counter | Gauge]
    text: str
    value_of: Callable[[EngineStats], int]


METRICS = {
    "flexkv_requests": _Metric(
        Counter, "Requests that looked up their prefix.", lambda stats: stats.num_requests
    ),
    "flexkv_requested_blocks": _Metric(
        Counter, "Blocks that requests looked up.", lambda stats: stats.num_requested
    ),
    "flexkv_hit_blocks": _Metric(
        Counter,
        "Blocks that flexkv had when a request looked them up, also where the GPU had them too.",
        lambda stats: stats.num_hit,
    ),
    "flexkv_loaded_blocks": _Metric(
        Counter, "Blocks copied to the GPU.", lambda stats: stats.num_loaded
    ),
    "flexkv_load_failed_blocks": _Metric(
        Counter,
        "Blocks whose copy to the GPU failed; they were computed again.",
        lambda stats: stats.num_load_failed,
    ),
    "flexkv_loaded_bytes": _Metric(
        Counter, "Bytes copied to the GPU.", lambda stats: stats.nbytes_loaded
    ),
    "flexkv_stored_blocks": _Metric(
        Counter, "Blocks copied from the GPU.", lambda stats: stats.num_stored
    ),
    "flexkv_store_dropped_blocks": _Metric(
        Counter,
        "Blocks that were to be stored and were not.",
        lambda stats: stats.num_store_dropped,
    ),
    "flexkv_stored_bytes": _Metric(
        Counter, "Bytes copied from the GPU.", lambda stats: stats.nbytes_stored
    ),
    "flexkv_evicted_blocks": _Metric(
        Counter,
        "Blocks evicted from host memory.",
        lambda stats: stats.tiers[Tier.HOST].num_evicted,
    ),
    "flexkv_host_blocks": _Metric(
        Gauge, "Blocks resident in host memory.", lambda stats: stats.tiers[Tier.HOST].num_resident
    ),
    "flexkv_host_slots": _Metric(
        Gauge,
        "Blocks that host memory can hold; 0 while the cache is off.",
        lambda stats: stats.tiers[Tier.HOST].num_slots,
    ),
    "flexkv_ssd_loaded_blocks": _Metric(
        Counter, "Blocks copied to the GPU that came from SSD.", _of_ssd("num_loaded")
    ),
    "flexkv_ssd_stored_blocks": _Metric(Counter, "Blocks written to SSD.", _of_ssd("num_stored")),
    "flexkv_ssd_unwritten_blocks": _Metric(
        Counter, "Blocks that SSD was too slow for.", _of_ssd("num_unwritten")
    ),
    "flexkv_ssd_evicted_blocks": _Metric(
        Counter, "Blocks evicted from SSD.", _of_ssd("num_evicted")
    ),
    "flexkv_ssd_rotten_blocks": _Metric(
        Counter, "Blocks whose checksum was wrong when read from SSD.", _of_ssd("num_rotten")
    ),
    "flexkv_ssd_blocks": _Metric(Gauge, "Blocks resident on SSD.", _of_ssd("num_resident")),
    "flexkv_ssd_slots": _Metric(
        Gauge,
        "Blocks that SSD can hold; 0 without SSD and when its disk has failed.",
        _of_ssd("num_slots"),
    ),
} | {
    name: _Metric(Gauge if metric.is_state else Counter, metric.text, metric.value_of)
    for name, metric in FEED_METRICS.items()
}
"""All that is counted: on ``/metrics`` as ``vllm:`` and the name."""


@dataclass
class FlexKVStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not there for mypy
    """Counts since the last of its kind, and the latest state. Plain numbers by metric."""

    def reset(self) -> None:
        """Nothing has happened."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> FlexKVStats:
        """What both say; ``other`` is the later one."""
        for name, value in other.data.items():
            self.data[name] = (
                value if METRICS[name].kind is Gauge else self.data.get(name, 0) + value
            )
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not self.data


class StatsTaker:
    """Turns the engine's totals into what is new."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def take(self, stats: EngineStats) -> FlexKVStats | None:
        """What happened since the last call; None if nothing did."""
        totals = {name: metric.value_of(stats) for name, metric in METRICS.items()}
        if totals == self._last:
            return None
        news = {
            name: value if METRICS[name].kind is Gauge else value - self._last.get(name, 0)
            for name, value in totals.items()
        }
        self._last = totals
        return FlexKVStats(data=news)


class FlexKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # as above
    """``vllm:flexkv_...``, one series for each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        metrics = {
            name: metric_types[metric.kind](
                name=f"vllm:{name}", documentation=metric.text, labelnames=labelnames
            )
            for name, metric in METRICS.items()
        }
        self._series = {
            engine: {name: metric.labels(*values) for name, metric in metrics.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine says."""
        for name, value in transfer_stats_data.items():
            series = self._series[engine_idx][name]
            if METRICS[name].kind is Gauge:
                series.set(value)
            else:
                series.inc(value)
