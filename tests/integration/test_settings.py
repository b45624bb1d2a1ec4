"""What vLLM's settings mean to flexkv, and who hears of its blocks."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flexkv.errors import ConfigError
from flexkv.integration.vllm.feed import feed_of
from flexkv.integration.vllm.settings import settings_of, unsupported, warn_of_keys
from flexkv.integration.vllm.stream import StreamSink
from flexkv.integration.vllm.worker_sink import WorkerSink

if TYPE_CHECKING:
    from pathlib import Path

DYNAMO = {"DYN_FPM_WORKER_ID": "7", "DYN_EVENT_PLANE": "nats"}
PUBLISHING = SimpleNamespace(enable_kv_cache_events=True, endpoint="tcp://*:5557")


def vllm_config(**parallel: Any) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id="an-engine"),
        parallel_config=SimpleNamespace(
            **{"world_size": 1, "rank": 0, "data_parallel_size": 1, "data_parallel_rank": 0}
            | parallel
        ),
        cache_config=SimpleNamespace(block_size=16, prefix_caching_hash_algo="sha256"),
        kv_events_config=None,
        model_config=SimpleNamespace(enable_sleep_mode=False),
    )


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def configure(document: dict[str, Any] | None, **env: str) -> None:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        if document is not None:
            path = tmp_path / "config.json"
            path.write_text(json.dumps(document))
            monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(path))

    for name in ("DYN_FPM_WORKER_ID", "DYN_EVENT_PLANE", "FLEXKV_CONFIG_PATH", "PYTHONHASHSEED"):
        monkeypatch.delenv(name, raising=False)
    return configure


def test_without_a_file_the_defaults_fit_vllm(configured: Any) -> None:
    configured(None)
    settings = settings_of(vllm_config())
    assert settings.config.tokens_per_block == 16
    assert settings.endpoint.endswith("/an-engine")
    assert not settings.config.events.nats_required


def test_another_block_size_is_refused_and_names_the_flag(configured: Any) -> None:
    configured({"cache_config": {"tokens_per_block": 64}})
    with pytest.raises(ConfigError, match="--block-size 64"):
        settings_of(vllm_config())


def test_each_data_parallel_rank_has_its_own_endpoint(configured: Any) -> None:
    configured({"server_recv_port": "ipc:///tmp/x"})
    endpoints = [
        settings_of(vllm_config(data_parallel_size=2, data_parallel_rank=rank)).endpoint
        for rank in (0, 1)
    ]
    assert endpoints == ["ipc:///tmp/x.dp0", "ipc:///tmp/x.dp1"]


def test_ranks_of_a_dense_model_have_their_own_too(configured: Any) -> None:
    configured({"server_recv_port": "ipc:///tmp/x"})
    endpoints = []
    for rank in (0, 1):  # each is told that it is alone
        config = vllm_config(data_parallel_index=rank)
        config.kv_transfer_config.engine_id = f"an-engine_dp{rank}"
        endpoints.append(settings_of(config).endpoint)
    assert endpoints == ["ipc:///tmp/x.dp0", "ipc:///tmp/x.dp1"]
    assert settings_of(vllm_config(data_parallel_index=0)).endpoint == "ipc:///tmp/x"


def test_no_two_data_parallel_ranks_share_a_feed(configured: Any) -> None:
    configured({"events": {"recovery_port": 9000, "zmq_replay_endpoint": "tcp://127.0.0.1:6000"}})
    ranks = [
        settings_of(vllm_config(data_parallel_size=2, data_parallel_rank=rank)).config.events
        for rank in (0, 1)
    ]
    for name in ("dp_rank", "zmq_endpoint", "zmq_replay_endpoint", "recovery_port"):
        assert getattr(ranks[0], name) != getattr(ranks[1], name), name


def test_blocks_that_span_ranks_or_hashes_are_declined() -> None:
    assert unsupported(vllm_config(), follows_sleep=False) is None
    assert "decode_context" in str(
        unsupported(vllm_config(decode_context_parallel_size=2), follows_sleep=True)
    )
    config = vllm_config()
    config.cache_config.hash_block_size = 8
    assert "hashes 8" in str(unsupported(config, follows_sleep=True))


def test_keys_that_change_with_every_start_are_named(
    configured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    configured(None)
    config = vllm_config()
    warn_of_keys(config)
    assert caplog.text == ""
    config.cache_config.prefix_caching_hash_algo = "xxhash"
    warn_of_keys(config)
    assert "PYTHONHASHSEED" in caplog.text


def chosen(caplog: pytest.LogCaptureFixture, *, publishes: bool = False) -> str:
    """The kind of sink, which the log must name."""
    caplog.set_level(logging.INFO)
    config = vllm_config()
    if publishes:
        config.kv_events_config = PUBLISHING
    feed = feed_of(settings_of(config))
    kinds = {WorkerSink: "nats", StreamSink: "vllm"}
    kind = kinds[type(feed.sinks[0])] if feed.sinks else "none"
    assert f"sink {kind}, because" in caplog.text
    return kind


def test_a_dynamo_worker_is_its_own_source(
    configured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    configured({"cache_config": {}}, **DYNAMO)
    assert chosen(caplog) == "nats"


def test_vllms_own_stream_comes_first(configured: Any, caplog: pytest.LogCaptureFixture) -> None:
    configured({"cache_config": {}}, **DYNAMO)
    assert chosen(caplog, publishes=True) == "vllm"


def test_elsewhere_nobody_hears(configured: Any, caplog: pytest.LogCaptureFixture) -> None:
    configured(None)
    assert chosen(caplog) == "none"
    assert "DYN_EVENT_PLANE" not in caplog.text


def test_a_plane_that_is_not_known_names_the_variable(
    configured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    configured(None, DYN_FPM_WORKER_ID="7")
    assert chosen(caplog) == "none"
    assert "DYN_EVENT_PLANE" in caplog.text


def test_discovery_without_a_record_names_the_remedy(
    configured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    configured(None, **DYNAMO, DYN_DISCOVERY_BACKEND="kubernetes")
    assert chosen(caplog) == "none"
    assert "DYN_DISCOVERY_BACKEND" in settings_of(vllm_config()).notes[0]


@pytest.mark.parametrize(
    ("sink", "publishes", "text"),
    [("nats", True, "one source"), ("vllm", False, "--kv-events-config")],
)
def test_a_sink_that_does_not_go_with_vllms_events_is_refused(
    configured: Any,
    caplog: pytest.LogCaptureFixture,
    sink: str,
    publishes: bool,  # noqa: FBT001  # a case
    text: str,
) -> None:
    configured({"cache_config": {}, "events": {"sink": sink, "worker_id": 7}})
    with pytest.raises(ConfigError, match=text):
        chosen(caplog, publishes=publishes)


def test_a_sleep_that_nobody_tells_of_is_declined() -> None:
    config = vllm_config()
    config.model_config.enable_sleep_mode = True
    assert "sleep mode" in str(unsupported(config, follows_sleep=False))
    assert unsupported(config, follows_sleep=True) is None
