"""The engine's statistics in the forms that vLLM passes on, logs and exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from flexkv.blocks import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexkv.engine.stats import EngineStats

COUNTERS = {
    "flexkv_requests": "Requests that looked up their prefix.",
    "flexkv_requested_blocks": "Blocks that requests looked up.",
    "flexkv_hit_blocks": "Blocks that were resident when a request looked them up.",
    "flexkv_loaded_blocks": "Blocks copied to the GPU.",
    "flexkv_load_failed_blocks": "Blocks whose copy to the GPU failed; they were computed again.",
    "flexkv_loaded_bytes": "Bytes copied to the GPU.",
    "flexkv_stored_blocks": "Blocks copied from the GPU.",
    "flexkv_store_dropped_blocks": "Blocks that were to be stored and were not.",
    "flexkv_stored_bytes": "Bytes copied from the GPU.",
    "flexkv_evicted_blocks": "Blocks evicted from host memory.",
}
GAUGES = {
    "flexkv_host_blocks": "Blocks resident in host memory.",
    "flexkv_host_slots": "Blocks that host memory can hold.",
}


@dataclass
class FlexKVStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not there for mypy
    """Counts since the last of its kind, and the latest state. Plain numbers by metric."""

    def reset(self) -> None:
        """Nothing has happened."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> FlexKVStats:
        """What both say; ``other`` is the later one."""
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES else self.data.get(name, 0) + value
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
        totals = _totals(stats)
        if totals == self._last:
            return None
        news = {
            name: value if name in GAUGES else value - self._last.get(name, 0)
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
        kinds = ((COUNTERS, metric_types[Counter]), (GAUGES, metric_types[Gauge]))
        metrics = {
            name: kind(name=f"vllm:{name}", documentation=text, labelnames=labelnames)
            for names, kind in kinds
            for name, text in names.items()
        }
        self._series = {
            engine: {name: metric.labels(*values) for name, metric in metrics.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine says."""
        for name, value in transfer_stats_data.items():
            series = self._series[engine_idx][name]
            if name in GAUGES:
                series.set(value)
            else:
                series.inc(value)


def _totals(stats: EngineStats) -> dict[str, int]:
    host = stats.tiers[Tier.HOST]
    return {
        "flexkv_requests": stats.num_requests,
        "flexkv_requested_blocks": stats.num_requested,
        "flexkv_hit_blocks": stats.num_hit,
        "flexkv_loaded_blocks": stats.num_loaded,
        "flexkv_load_failed_blocks": stats.num_load_failed,
        "flexkv_loaded_bytes": stats.nbytes_loaded,
        "flexkv_stored_blocks": stats.num_stored,
        "flexkv_store_dropped_blocks": stats.num_store_dropped,
        "flexkv_stored_bytes": stats.nbytes_stored,
        "flexkv_evicted_blocks": host.num_evicted,
        "flexkv_host_blocks": host.num_resident,
        "flexkv_host_slots": host.num_slots,
    }
