"""Our own connector class, for ``kv_connector_module_path``: all that vLLM can ask of one."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from flexkv.config import Config
from flexkv.integration.vllm.layouts import block_outermost_layout
from flexkv.integration.vllm.metadata import FlexKVMetadata
from flexkv.integration.vllm.specs import reason_to_decline_groups
from flexkv.integration.vllm.stats import FlexKVPromMetrics, FlexKVStats, StatsTaker
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl, multi_connector_config

if TYPE_CHECKING:
    from collections.abc import Mapping

_PUSH_S = 2.0  # how long an idle vLLM is kept stepping for events that nobody has taken


class FlexKVConnector(FlexKVConnectorV1Impl, KVConnectorBase_V1):  # type: ignore[misc]  # no vLLM for mypy
    """As the built-in class, and what that does not pass on.

    ``reset_cache``, statistics and metrics, hit sources, layouts, sleep, and events that are
    taken before vLLM goes idle.

    Raises:
        FlexKVError: flexkv's settings are wrong, or the engine's endpoint is taken.
    """

    _forwards_reset = True
    _follows_sleep = hasattr(KVConnectorBase_V1, "unregister_kv_caches")  # since 0.33

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        FlexKVConnectorV1Impl.__init__(self, vllm_config, role)
        self._stats = StatsTaker()
        self._push_until_s: float | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a block that was not stored is a miss of a later request, no more."""
        return False

    # worker role

    def unregister_kv_caches(self) -> None:
        """Before vLLM sleeps: the link ends, with its copies; host memory keeps what it has."""
        if self._worker is not None:
            self._worker.unregister_kv_caches()

    def restore_kv_caches(self) -> None:
        """After vLLM has woken up: the same caches again."""
        if self._worker is not None:
            self._worker.restore_kv_caches()

    # scheduler role

    def on_new_request(self, request: Any) -> None:
        """A request has come; it may have to wait."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_external_cache_hit_sources(
        self, _request: Any, num_external_tokens: int
    ) -> dict[Any, int]:
        """Where the loaded tokens come from."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415  # not in 0.31

        return {CacheHitSource.HOST: num_external_tokens} if num_external_tokens else {}

    def build_connector_meta(self, scheduler_output: Any) -> FlexKVMetadata:
        """What the workers have to know of this step."""
        if scheduler_output.num_scheduled_tokens:
            self._push_until_s = None  # not idle
        return super().build_connector_meta(scheduler_output)

    def has_pending_push_work(self) -> bool:
        """Whether vLLM should step once more although it is idle: events wait to be taken."""
        if self._feed is None or not self._feed.num_waiting:
            self._push_until_s = None
            return False
        now_s = time.monotonic()
        if self._push_until_s is None:
            self._push_until_s = now_s + _PUSH_S
        return now_s < self._push_until_s

    def reset_cache(self) -> bool | None:
        """Forget everything in every tier. False if that was not possible."""
        return None if self._service is None else self._service.clear()

    def get_kv_connector_stats(self) -> FlexKVStats | None:
        """What the engine has done since the last call; None where that is nothing."""
        engine_stats = None if self._service is None else self._service.stats()
        return None if engine_stats is None else self._stats.take(engine_stats)

    # what vLLM asks of the class, in any process

    @classmethod
    def get_required_kvcache_layout(cls, _vllm_config: Any) -> str | None:
        """Blocks outermost where that is possible: one copy for each block, without staging."""
        if multi_connector_config() is not None or not Config.load().enable_flexkv:
            return None  # another layout than its siblings' stops vLLM
        return block_outermost_layout()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> FlexKVStats:
        """The statistics in ``data``, which came from another process."""
        return FlexKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> FlexKVPromMetrics:
        """What shows the statistics on ``/metrics``."""
        return FlexKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _reason_to_decline(self) -> str | None:
        return reason_to_decline_groups(self._kv_cache_config)

    def _metadata_of_step(self) -> FlexKVMetadata | None:
        metadata = self._get_connector_metadata()
        return metadata if isinstance(metadata, FlexKVMetadata) else None


with contextlib.suppress(ValueError):  # it is there already
    # MultiConnector looks its parts' classes up by name, to read their statistics
    KVConnectorFactory.register_connector("FlexKVConnector", __name__, "FlexKVConnector")
