"""What vLLM's own configuration says to flexkv, read once in each role."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexkv.config import Config, EventsConfig
from flexkv.errors import ConfigError
from flexkv.integration.vllm.identity import identity_of
from flexkv.link.endpoint import default_endpoint, with_dp_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """One role's view: the same ``endpoint`` and ``engine_id`` on both sides of the link.

    ``publishes``: vLLM's own KV events are on. ``notes``: for the log.
    """

    config: Config
    endpoint: str
    engine_id: str
    block_size: int
    num_ranks: int
    rank: int
    publishes: bool
    notes: tuple[str, ...] = ()
    identity: Mapping[str, object] | None = None


def settings_of(vllm_config: Any) -> VllmSettings:
    """Read vLLM's configuration, and flexkv's from ``FLEXKV_CONFIG_PATH`` or ``FLEXKV_*``.

    Raises:
        ConfigError: flexkv's settings are wrong, or do not go with vLLM's.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    block_size = vllm_config.cache_config.block_size
    dp_rank = _dp_rank(parallel, transfer.engine_id)
    given = Config.load()
    config = _for_vllm(given, block_size, dp_rank)
    endpoint = config.server_recv_port
    if endpoint is None:
        endpoint = default_endpoint(transfer.engine_id, dp_rank)
    elif dp_rank is not None:
        endpoint = with_dp_rank(endpoint, dp_rank)
    events = vllm_config.kv_events_config
    publishes = events is not None and events.enable_kv_cache_events
    return VllmSettings(
        config=config,
        endpoint=endpoint,
        engine_id=transfer.engine_id,
        block_size=block_size,
        num_ranks=parallel.world_size,
        rank=parallel.rank,
        publishes=publishes,
        notes=given.notes,
        identity=identity_of(vllm_config) if config.cache.enable_ssd else None,
    )


def unsupported(vllm_config: Any, *, follows_sleep: bool) -> str | None:
    """Why flexkv can't serve this vLLM at all; None if it can, as far as is known here.

    ``follows_sleep``: vLLM tells the connector before it unmaps the KV caches.
    """
    if vllm_config.model_config.enable_sleep_mode and not follows_sleep:
        return (
            "sleep mode unmaps the KV caches, and this vLLM does not tell this connector: turn it "
            "off, or take flexkv.integration.vllm.connector with vLLM 0.33"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}: blocks that span ranks are not supported"
    cache = vllm_config.cache_config
    hash_block_size = getattr(cache, "hash_block_size", None) or cache.block_size
    if hash_block_size != cache.block_size:
        return f"vLLM's blocks have {cache.block_size} tokens, but it hashes {hash_block_size}"
    return None


def warn_of_keys(vllm_config: Any) -> None:
    """Say so where block keys are others in each process."""
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if str(algorithm).startswith("xxhash") and not os.environ.get("PYTHONHASHSEED"):
        _log.warning(
            "prefix_caching_hash_algo is %s and PYTHONHASHSEED is not set: block keys change with "
            "every start of vLLM, so nothing is found again after a restart",
            algorithm,
        )


def _dp_rank(parallel: Any, engine_id: str) -> int | None:
    """The data-parallel rank; None where there is one rank only.

    For a dense model vLLM tells each rank that it is alone; the index and the engine's id stay.
    """
    index: int = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    is_one_of_many = parallel.data_parallel_size > 1 or index > 0
    return index if is_one_of_many or engine_id.endswith(f"_dp{index}") else None


def _for_vllm(config: Config, block_size: int, dp_rank: int | None) -> Config:
    """``config`` for vLLM's block size and rank; NATS is never required under vLLM."""
    cache = config.cache
    if "tokens_per_block" in cache.model_fields_set and cache.tokens_per_block != block_size:
        raise ConfigError(
            f"tokens_per_block is {cache.tokens_per_block}, but vLLM's block size is {block_size}: "
            f"start vLLM with --block-size {cache.tokens_per_block}, or leave tokens_per_block out"
        )
    folders = cache.ssd_cache_dir
    if dp_rank is not None:
        folders = tuple(f"{folder.rstrip('/')}/dp{dp_rank}" for folder in folders)
    changed = {"tokens_per_block": block_size, "ssd_cache_dir": folders}
    cache = type(cache)(**_given(cache) | changed)
    events = EventsConfig(
        **_given(config.events) | {"nats_required": False} | _of_rank(config.events, dp_rank)
    )
    return Config(**_given(config) | {"cache": cache, "events": events})


def _of_rank(events: EventsConfig, dp_rank: int | None) -> dict[str, Any]:
    """What of the feed's settings no two data-parallel ranks may share."""
    if dp_rank is None:
        return {}
    own: dict[str, Any] = {
        "dp_rank": dp_rank,
        "zmq_endpoint": with_dp_rank(events.zmq_endpoint, dp_rank),
    }
    if events.zmq_replay_endpoint is not None:
        own["zmq_replay_endpoint"] = with_dp_rank(events.zmq_replay_endpoint, dp_rank)
    if events.recovery_port:
        own["recovery_port"] = events.recovery_port + dp_rank
    return own


def _given(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.model_fields_set}
