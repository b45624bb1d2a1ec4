"""Settings: every form that must load, and which one wins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from flexkv.config import CacheConfig, Config, EventsConfig, TransfersConfig
from flexkv.config_sources import (
    DYNAMO_VARIABLES,
    FLAT_KEYS,
    VARIABLES,
)
from flexkv.errors import ConfigError
from tests.config_forms import errors_of, load_text

if TYPE_CHECKING:
    from pathlib import Path

BLUEPRINT = """
{ "enable_flexkv": true,
  "server_recv_port": "ipc:///tmp/flexkv_0_test",
  "cache_config": { "enable_cpu": true, "enable_ssd": false, "enable_remote": false, "use_gds": false, "enable_trace": false,
    "ssd_cache_iouring_entries": 512, "tokens_per_block": 64, "num_cpu_blocks": 10240, "num_ssd_blocks": 256000,
    "ssd_cache_dir": "/data/flexkv_ssd/", "evict_ratio": 0.05, "index_accel": true },
  "num_log_interval_requests": 200 }
"""  # noqa: E501  # unchanged, as it is in the wild


def test_nothing_given_gives_the_defaults() -> None:
    config = Config.load(None, {})
    assert config.cache == CacheConfig()
    assert config.transfers == TransfersConfig()
    assert config.events == EventsConfig(discovery_path="/tmp/dynamo_store_kv")
    assert config.notes == ()
    assert config.cache.num_host_slots(1) == 10240


def test_the_nested_json_form_loads_unchanged(tmp_path: Path) -> None:
    config = load_text(tmp_path, "flexkv_config_0.json", BLUEPRINT)
    cache = config.cache
    assert config.enable_flexkv is True
    assert config.server_recv_port == "ipc:///tmp/flexkv_0_test"
    assert config.num_log_interval_requests == 200
    assert cache.enable_cpu is True
    assert cache.enable_ssd is False
    assert cache.enable_remote is False
    assert cache.use_gds is False
    assert cache.enable_trace is False
    assert cache.ssd_cache_iouring_entries == 512
    assert cache.tokens_per_block == config.tokens_per_block == 64
    assert cache.num_cpu_blocks == cache.num_host_slots(2**30) == 10240
    assert cache.num_ssd_blocks == 256000
    assert cache.ssd_cache_dir == ("/data/flexkv_ssd/",)
    assert cache.evict_ratio == 0.05
    assert cache.index_accel is True
    assert config.notes == ("index_accel has no effect: there is one index, and it is fast",)


def test_each_key_of_the_nested_form_is_read_not_just_its_default() -> None:
    config = Config.from_mapping(
        {
            "enable_flexkv": False,
            "server_recv_port": "tcp://127.0.0.1:5555",
            "cache_config": {
                "ssd_cache_iouring_entries": 64,
                "tokens_per_block": 16,
                "num_cpu_blocks": 7,
                "num_ssd_blocks": 9,
                "ssd_cache_dir": ["/a", "/b"],
                "evict_ratio": 0,
                "index_accel": False,
            },
            "num_log_interval_requests": 0,
        }
    )
    assert config == Config(
        enable_flexkv=False,
        server_recv_port="tcp://127.0.0.1:5555",
        cache=CacheConfig(
            ssd_cache_iouring_entries=64,
            tokens_per_block=16,
            num_cpu_blocks=7,
            num_ssd_blocks=9,
            ssd_cache_dir=("/a", "/b"),
            evict_ratio=0.0,
            index_accel=False,
        ),
        num_log_interval_requests=0,
    ).model_copy(update={"events": config.events})
    assert len(config.notes) == 1


def test_the_flat_form_and_its_variables_say_the_same() -> None:
    flat = {
        "cpu_cache_gb": 0.5,
        "ssd_cache_gb": 2,
        "ssd_cache_dir": "/a;/b",
        "enable_gds": False,
        "enable_trace": False,
        "iouring_entries": 64,
        "tokens_per_block": 16,
        "evict_ratio": 0.1,
        "index_accel": True,
        "server_recv_port": "ipc:///tmp/x",
        "num_log_interval_requests": 5,
        "enable_flexkv": False,
    }
    config = Config.from_mapping(flat)
    assert config.cache.cpu_cache_bytes == 2**29
    assert config.cache.num_host_slots(2**20) == 512
    assert config.cache.enable_ssd
    assert config.cache.ssd_cache_bytes == 2**31
    assert config.cache.ssd_cache_dir == ("/a", "/b")
    assert config.cache.ssd_cache_iouring_entries == 64
    assert config.tokens_per_block == 16
    assert config.cache.evict_ratio == 0.1
    assert config.server_recv_port == "ipc:///tmp/x"
    assert config.num_log_interval_requests == 5
    assert not config.enable_flexkv
    assert not Config.from_mapping(flat | {"ssd_cache_gb": 0}).cache.enable_ssd
    assert set(flat) == set(FLAT_KEYS), "a new flat key belongs into this test"
    env = {variable: str(flat[key]) for variable, key in VARIABLES.items()}
    assert Config.load(None, env) == config


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    text = "cache_config:\n  num_cpu_blocks: 12\n  evict_ratio: 0.5\nevents:\n"
    for name in ("a.yml", "a.yaml", "A.YAML"):
        config = load_text(tmp_path, name, text)
        assert config == Config.from_mapping({"cache": {"num_cpu_blocks": 12, "evict_ratio": 0.5}})


def test_nested_and_flat_keys_mix_where_no_setting_is_named_twice() -> None:
    config = Config.from_mapping({"cache_config": {"evict_ratio": 0.2}, "cpu_cache_gb": 1})
    assert config.cache == CacheConfig(evict_ratio=0.2, cpu_cache_bytes=2**30)
    text = errors_of({"cache_config": {"evict_ratio": 0.2}, "evict_ratio": 0.2})
    assert text == "cache_config.evict_ratio and evict_ratio are the same setting: give one of them"


def test_a_file_replaces_the_variables_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"tokens_per_block": 32}')
    env = {"FLEXKV_CONFIG_PATH": str(path), "FLEXKV_EVICT_RATIO": "0.9", "ENABLE_FLEXKV": "0"}
    config = Config.load(None, env)
    assert config.tokens_per_block == 32
    assert config.cache.evict_ratio == 0.05
    assert not config.enable_flexkv, "the file leaves it open"
    assert config.notes == (f"FLEXKV_EVICT_RATIO: no effect, the settings are from {path}",)
    path.write_text('{"enable_flexkv": true}')
    assert Config.load(None, env).enable_flexkv


def test_a_path_comes_before_the_variable_that_names_one(tmp_path: Path) -> None:
    env = {"FLEXKV_CONFIG_PATH": str(tmp_path / "absent.json")}
    assert load_text(tmp_path, "a.json", "{}", **env) == Config.from_mapping({})
    with pytest.raises(ConfigError, match=r"^FLEXKV_CONFIG_PATH names .*absent\.json: can't be re"):
        Config.load(None, env)


def test_an_unknown_variable_is_a_note_with_the_nearest_name() -> None:
    config = Config.load(None, {"FLEXKV_CPU_CACHE_GBS": "4", "FLEXKV_EVICT_RATIO": ""})
    assert config.cache == CacheConfig()
    (note,) = config.notes
    assert "FLEXKV_CPU_CACHE_GBS is not known" in note
    assert "did you mean FLEXKV_CPU_CACHE_GB?" in note


def test_load_reads_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith(("FLEXKV_", "DYN_", "NATS_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("FLEXKV_TOKENS_PER_BLOCK", "32")
    assert Config.load().tokens_per_block == 32


DYNAMO = {
    "DYN_EVENT_PLANE": "nats",
    "DYN_DISCOVERY_BACKEND": "file",
    "DYN_FILE_KV": "/kv",
    "DYN_FPM_WORKER_ID": str(2**64 - 1),
    "DYN_NAMESPACE": "flex",
    "DYN_REQUEST_PLANE": "tcp",
    "DYN_TCP_RPC_HOST": "10.1.2.3",
    "ETCD_AUTH_PASSWORD": "secret",
    "ETCD_AUTH_USERNAME": "us",
    "ETCD_ENDPOINTS": "http://e:2379,https://f",
    "NATS_SERVER": "nats://a:1,tls://b:2",
    "NATS_TLS_CA_CERT_PATH": "ca",
    "NATS_TLS_CLIENT_CERT_PATH": "cert",
    "NATS_TLS_CLIENT_KEY_PATH": "key",
}


def test_dynamos_variables_fill_in_what_events_leave_open() -> None:
    events = Config.from_mapping({}, DYNAMO).events
    assert events == EventsConfig(
        event_plane="nats",
        discovery_path="/kv",
        worker_id=2**64 - 1,
        namespace="flex",
        request_plane="tcp",
        recovery_host="10.1.2.3",
        discovery="file",
        etcd_endpoints=("http://e:2379", "https://f"),
        etcd_user="us",
        etcd_password="secret",
        nats_servers=("nats://a:1", "tls://b:2"),
        nats_tls_ca="ca",
        nats_tls_cert="cert",
        nats_tls_key="key",
    )
    assert events.effective_sink() == "nats"
    assert set(DYNAMO_VARIABLES) <= set(DYNAMO), "a new variable belongs into this test"


def test_the_file_wins_over_dynamos_variables() -> None:
    given = {"worker_id": 5, "namespace": "own", "nats_token": "mine", "nats_servers": ["nats://c"]}
    auth = {"NATS_AUTH_USERNAME": "u", "NATS_AUTH_PASSWORD": "p"}
    events = Config.from_mapping({"events": given}, DYNAMO | auth).events
    assert (events.worker_id, events.namespace, events.nats_servers) == (5, "own", ("nats://c",))
    assert (events.nats_token, events.nats_user, events.nats_password) == ("mine", None, None)


def test_the_first_complete_way_to_authenticate_is_taken_as_in_dynamo() -> None:
    env = {
        "NATS_AUTH_USERNAME": "u",
        "NATS_AUTH_TOKEN": "t",
        "NATS_AUTH_NKEY": "n",
        "NATS_AUTH_CREDENTIALS_FILE": "f",
    }
    events = Config.from_mapping({}, DYNAMO | env).events
    assert (events.nats_user, events.nats_token, events.nats_creds) == (None, "t", None)
    del env["NATS_AUTH_TOKEN"]
    assert Config.from_mapping({}, DYNAMO | env).events.nats_nkey == "n"
    del env["NATS_AUTH_NKEY"]
    assert Config.from_mapping({}, DYNAMO | env).events.nats_creds == "f"
    env["NATS_AUTH_PASSWORD"] = "p"
    events = Config.from_mapping({}, DYNAMO | env).events
    assert (events.nats_user, events.nats_password, events.nats_creds) == ("u", "p", None)


def test_auto_needs_a_worker_and_the_nats_plane() -> None:
    def sink(**env: str) -> tuple[str, int]:
        config = Config.from_mapping({}, env)
        return config.events.effective_sink(), len(config.notes)

    assert sink() == ("none", 0)
    assert sink(DYN_EVENT_PLANE="nats") == ("none", 0)
    assert sink(DYN_FPM_WORKER_ID="1") == ("none", 1), "no feed for a worker is worth a line"
    assert sink(DYN_FPM_WORKER_ID="1", DYN_EVENT_PLANE="zmq") == ("none", 1)
    assert sink(DYN_FPM_WORKER_ID="1", DYN_EVENT_PLANE="nats") == ("nats", 0)
    assert EventsConfig(sink="nats", worker_id=1).effective_sink() == "nats"
    assert EventsConfig(sink="none", worker_id=1, event_plane="nats").effective_sink() == "none"


def test_a_discovery_that_nobody_here_knows_is_refused_only_where_events_need_it() -> None:
    env = DYNAMO | {"DYN_DISCOVERY_BACKEND": "kubernetes"}
    text = errors_of({"events": {"sink": "nats"}}, **env)
    assert 'DYN_DISCOVERY_BACKEND is "kubernetes": for events it must be "file" or "etcd"' in text
    chosen = Config.from_mapping({}, env)  # auto: no source, and a line that says why
    assert chosen.events.sink == "none"
    assert "DYN_DISCOVERY_BACKEND" in chosen.notes[0]
    assert Config.from_mapping({"events": {"sink": "none"}}, env).events.worker_id is None
    assert Config.from_mapping({"events": {"discovery": "file"}}, env).events.worker_id
    assert Config.from_mapping({}, {"DYN_DISCOVERY_BACKEND": "mem"}) == Config.from_mapping({})


def test_discovery_through_etcd_comes_from_dynamos_variable() -> None:
    env = DYNAMO | {"DYN_DISCOVERY_BACKEND": "etcd"}
    assert Config.from_mapping({}, env).events.discovery == "etcd"
    assert Config.from_mapping({"events": {"discovery": "file"}}, env).events.discovery == "file"


def test_a_broken_variable_of_dynamo_is_named() -> None:
    text = errors_of({}, DYN_FPM_WORKER_ID="x", DYN_EVENT_PLANE="carrier pigeon")
    assert 'environment variable DYN_FPM_WORKER_ID is "x": it must be a whole number' in text
    assert 'environment variable DYN_EVENT_PLANE is "carrier pigeon": it must be "nats"' in text
