"""Settings that must not load, and what their errors say."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.config import CacheConfig, Config, EventsConfig, TransfersConfig
from flexkv.config_sources import (
    DYNAMO_CREDENTIALS,
    DYNAMO_VARIABLES,
    FLAT_KEYS,
    VARIABLES,
)
from flexkv.errors import ConfigError
from tests.config_forms import errors_of, load_text


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("FLEXKV_EVICT_RATIO", "a lot", "a number, 0 <= x < 1"),
        ("FLEXKV_EVICT_RATIO", "1.5", "a number, 0 <= x < 1"),
        ("FLEXKV_EVICT_RATIO", "nan", "a number, 0 <= x < 1"),
        ("FLEXKV_CPU_CACHE_GB", "0", "a number of GB"),
        ("FLEXKV_CPU_CACHE_GB", "16G", "a number of GB"),
        ("FLEXKV_TOKENS_PER_BLOCK", "6.4", "a whole number, 1 to 65536"),
        ("FLEXKV_ENABLE_GDS", "maybe", "false"),
        ("FLEXKV_ENABLE_GDS", "1", "not in this version"),
        ("FLEXKV_SSD_CACHE_GB", "x", "a number of GB"),
        ("ENABLE_FLEXKV", "2", "true or false"),
    ],
)
def test_a_bad_variable_is_named_with_its_value_and_range(
    variable: str, text: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(None, {variable: text})
    message = str(caught.value)
    assert message.startswith(f"environment variable {variable} is ")
    assert allowed in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evict_ratio", 1.5, "is 1.5: it must be a number, 0 <= x < 1"),
        ("evict_ratio", 1, "is 1: it must be a number, 0 <= x < 1"),
        ("evict_ratio", -0.1, "is -0.1: it must be a number, 0 <= x < 1"),
        ("evict_ratio", True, "is true: it must be a number, 0 <= x < 1"),
        ("evict_ratio", float("inf"), "is Infinity: it must be a number, 0 <= x < 1"),
        ("evict_ratio", 10**400, "is a number of 1329 bits: it must be a number, 0 <= x < 1"),
        ("tokens_per_block", "64", 'is "64": it must be a whole number, 1 to 65536'),
        ("tokens_per_block", True, "is true: it must be a whole number, 1 to 65536"),
        ("tokens_per_block", 64.0, "is 64.0: it must be a whole number, 1 to 65536"),
        ("tokens_per_block", None, "is null: it must be a whole number, 1 to 65536"),
        ("tokens_per_block", [64], "is a list of 1: it must be a whole number, 1 to 65536"),
        ("tokens_per_block", -64, "is -64: it must be a whole number, 1 to 65536"),
        ("num_cpu_blocks", 0, "is 0: it must be a whole number, 1 to 1099511627776"),
        ("num_cpu_blocks", -1, "is -1: it must be a whole number, 1 to 1099511627776"),
        ("cpu_cache_bytes", 0, "is 0: it must be a whole number, 1 to 1125899906842624"),
        ("cpu_cache_gb", 0, "is 0: it must be a number of GB (2**30 bytes), above 0, at most"),
        ("cpu_cache_gb", 1e-12, "is 1e-12: it must be a number of GB"),
        ("cpu_cache_gb", True, "is true: it must be a number of GB"),
        ("cpu_cache_gb", "16", 'is "16": it must be a number of GB'),
        ("ssd_cache_gb", -1, "is -1: it must be a number of GB (2**30 bytes), at least 0"),
        ("enable_cpu", False, "is false: it must be true: every other tier needs the host tier"),
        ("enable_cpu", 1, "is 1: it must be true: every other tier needs the host tier"),
        ("enable_remote", True, "is true: not in this version; it must be false"),
        ("use_gds", True, "is true: not in this version; it must be false"),
        ("enable_trace", True, "is true: not in this version; it must be false"),
        ("index_accel", "yes", 'is "yes": it must be true or false'),
        ("ssd_cache_dir", 5, 'is 5: it must be a text (";" between several)'),
        ("ssd_cache_dir", ["/a", ""], "is a list of 2: it must be a text"),
        ("evict_rato", 0.1, "is not a known key: did you mean cache_config.evict_ratio?"),
        ("nats_servers", "", "is not a known key: did you mean events.nats_servers?"),
        ("zzz", 1, "is not a known key: known are cpu_cache_bytes, cpu_cache_gb, enable_cpu"),
    ],
)
def test_a_bad_cache_setting_is_named_with_its_value_and_range(
    key: str, value: object, message: str
) -> None:
    text = errors_of({"cache_config": {key: value}})
    assert text.startswith(f"cache_config.{key} {message}")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"server_recv_port": "localhost"}, 'server_recv_port is "localhost": it must be ipc://'),
        ({"server_recv_port": "tcp://localhost"}, 'server_recv_port is "tcp://localhost": it mus'),
        ({"server_recv_port": "tcp://h:70000"}, 'server_recv_port is "tcp://h:70000": it must be'),
        ({"server_recv_port": "ipc://"}, 'server_recv_port is "ipc://": it must be ipc://PATH'),
        ({"server_recv_port": "ipc://" + 108 * "x"}, 'server_recv_port is "ipc://xxx'),
        ({"num_log_interval_requests": -1}, "num_log_interval_requests is -1: it must be a whole"),
        ({"num_cpu_blocks": 5}, "num_cpu_blocks is not a known key: did you mean cache_config.num"),
        ({"cache_confg": {}}, "cache_confg is not a known key: did you mean cache_config?"),
        ({"cache_config": [1]}, "cache_config is a list of 1: it must be a mapping of keys"),
        ({5: 1}, "5 is not a known key: known are"),
        ({"notes": []}, "notes is not a known key"),
        ({"cache_config": {"num_cpu_blocks": 1}, "cpu_cache_gb": 1}, "cache_config.num_cpu_block"),
        ({"transfers": {"chunk_bytes": 0}}, "transfers.chunk_bytes is 0: it must be a whole numb"),
        ({"transfers": {"deadline_s": 0}}, "transfers.deadline_s is 0: it must be a number, 0 <"),
        ({"transfers": {"max_store_bytes": 9}}, "transfers.max_store_bytes is 9: it must be at l"),
        ({"transfers": {"chunk_bytes": 2**28 + 1}}, "2 settings can't be used:\n  transfers.max_"),
        ({"events": {"sink": "kafka"}}, 'events.sink is "kafka": it must be "auto", "vllm", "na'),
        ({"events": {"sink": "nats"}}, 'events.sink is "nats": it needs a worker_id'),
        ({"events": {"discovery": "mem"}}, 'events.discovery is "mem": it must be "file" or "etc'),
        ({"events": {"etcd_endpoints": "e:1"}}, 'events.etcd_endpoints is "e:1": it must be http'),
        ({"events": {"worker_id": -1}}, "events.worker_id is -1: it must be a whole number, 0 to"),
        ({"events": {"worker_id": 2**64}}, "events.worker_id is 18446744073709551616: it must be"),
        ({"events": {"nats_servers": []}}, "events.nats_servers is a list of 0: it must be nats:"),
        ({"events": {"nats_servers": "h:4222"}}, 'events.nats_servers is "h:4222": it must be na'),
        (
            {"events": {"namespace": "a b"}},
            'events.namespace is "a b": it must be a Dynamo name: no spaces',
        ),
        ({"events": {"endpoint": "a..b"}}, 'events.endpoint is "a..b": it must be a Dynamo name'),
        ({"events": {"outbox": 0}}, "events.outbox is 0: it must be a whole number, 1 to"),
        ({"events": {"nats_user": "me"}}, "events.nats_user needs nats_password beside it"),
        ({"events": {"nats_tls_key": "f"}}, "events.nats_tls_key needs nats_tls_cert beside it"),
        (
            {"events": {"nats_token": "s", "nats_creds": "f"}},
            "events.nats_token and events.nats_creds exclude each other",
        ),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_range(
    mapping: dict[Any, Any], message: str
) -> None:
    assert errors_of(mapping).startswith(message)


def test_all_problems_are_listed_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(
            tmp_path,
            "a.json",
            '{"evict_ratio": 2, "cache_config": {"num_cpu_blocks": 0, "use_gds": true}, "x": 1,'
            ' "events": {"outbox": -1}, "server_recv_port": 5}',
        )
    head, *problems = str(caught.value).splitlines()
    assert head == f"{tmp_path / 'a.json'}: 6 settings can't be used:"
    keys = {problem.split()[0] for problem in problems}
    assert keys == {
        "evict_ratio",
        "cache_config.num_cpu_blocks",
        "cache_config.use_gds",
        "x",
        "events.outbox",
        "server_recv_port",
    }


def test_a_thousand_problems_do_not_make_a_thousand_lines() -> None:
    lines = errors_of({f"key {i}": i for i in range(1000)}).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 980 more"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": 1,\n  "b" 2}', "a.json, line 2, column 7: Expecting ':' delimiter"),
        ("a.json", "", "a.json, line 1, column 1: Expecting value"),
        ("a.json", "[1]", "a.json: the top level is a list of 1: it must be a mapping of keys"),
        ("a.json", '{"evict_ratio": 0, "evict_ratio": 0}', 'the key "evict_ratio" stands twice'),
        ("a.json", 100_000 * "[", "a.json: nested too deeply"),
        ("a.json", '{"tokens_per_block": ' + 5000 * "9" + "}", "a.json: Exceeds the limit"),
        ("a.yaml", "a: 1\nb: [", "a.yaml, line 2, column 5: "),
        ("a.yaml", "a: 1\na: 2", 'a.yaml, line 2, column 1: the key "a" stands twice'),
        ("a.yaml", "", "a.yaml: the top level is null: it must be a mapping of keys"),
        ("a.yaml", "a: &x {b: *x}", "a.yaml: a is not a known key"),
        ("a.yaml", "tokens_per_block: 2024-13-45", "a.yaml: "),
        ("a.yaml", "tokens_per_block: 2024-01-01", "is datetime.date(2024, 1, 1): it must be"),
        ("a.yaml", "a: !!python/object:os.system {}", "a.yaml, line 1, column 4: could not determ"),
        ("a.yaml", "a: \x01", "a.yaml, "),
        ("a.toml", "", "a.toml: the name must end in .json, .yaml or .yml"),
    ],
)
def test_a_broken_file_is_named_with_line_and_column(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_text(tmp_path, name, text)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "absent.json", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("a\0.json"), "null"),
    ):
        with pytest.raises(ConfigError, match=rf"can't be read: .*{reason}"):
            Config.load(path, {})
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(ConfigError, match=r"latin\.json: not UTF-8 at byte 7"):
        Config.load(tmp_path / "latin.json", {})


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"evict_ratio": 0.5}')
    assert Config.load(tmp_path / "a.json", {}).cache.evict_ratio == 0.5


def test_python_arguments_are_checked_alike() -> None:
    with pytest.raises(ConfigError, match=r"evict_ratio is 1\.5: it must be a number, 0 <= x < 1"):
        CacheConfig(evict_ratio=1.5)
    with pytest.raises(ConfigError, match=r"not a known key: did you mean deadline_s\?"):
        TransfersConfig(deadlin_s=1)  # type: ignore[call-arg]  # that is the point
    with pytest.raises(ConfigError, match="cache is 5: it must be an instance of CacheConfig"):
        Config(cache=5)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigError, match=r"^cache\.use_gds is true: not in this version"):
        Config(cache={"use_gds": True})  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigError, match="num_cpu_blocks and cpu_cache_bytes both set the size"):
        CacheConfig(num_cpu_blocks=1, cpu_cache_bytes=1)
    with pytest.raises(ConfigError, match="ssd_cache_dir is empty: give the SSD tier a folder"):
        CacheConfig(enable_ssd=True, num_ssd_blocks=1)
    with pytest.raises(ConfigError, match="are not given: give the SSD tier a size"):
        CacheConfig(enable_ssd=True, ssd_cache_dir=("/a",))
    with pytest.raises(ConfigError, match="it needs a worker_id"):
        EventsConfig(sink="nats")


def test_a_number_too_long_to_print_is_refused_like_any_other() -> None:
    assert errors_of({"cpu_cache_gb": 10**5000, "tokens_per_block": -(10**5000)}).count("bits") == 2
    assert errors_of({10**5000: 1}).startswith("a number of 16610 bits is not a known key")


def test_settings_are_frozen() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.cache.evict_ratio = 0.5
    assert config.cache.evict_ratio == 0.05


def test_a_host_tier_smaller_than_one_block_is_refused() -> None:
    cache = CacheConfig(cpu_cache_bytes=1000)
    assert cache.num_host_slots(1000) == 1
    with pytest.raises(ConfigError, match=r"cpu_cache_bytes is 1000, but one block takes 1001"):
        cache.num_host_slots(1001)


def test_secrets_are_shown_nowhere() -> None:
    config = Config.from_mapping({"events": {"nats_user": "u", "nats_password": "hush"}})
    assert config.events.nats_password == "hush"
    assert "hush" not in repr(config) + str(config)
    for events in (
        {"nats_password": ["hush"]},
        {"nats_token": "hush\0"},
        {"nats_pasword": "hush"},
        {"nats_servers": "nats://me:hush@host:1"},
        {"nats_servers": ["nats://me:hush@host:1"]},
        [{"nats_token": "hush"}],
    ):
        assert "hush" not in errors_of({"events": events})


NAMES = sorted(
    {"cache", "cache_config", "events", "transfers", "nonsense", *FLAT_KEYS}
    | {
        *Config.model_fields,
        *CacheConfig.model_fields,
        *EventsConfig.model_fields,
        *TransfersConfig.model_fields,
    }
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 100)
    | st.sampled_from([10**400, -(10**4000), "nats", "none", "nats://[::1", "tcp://[", "0.5"])
    | st.floats()
    | st.text()
    | st.binary(max_size=4)
)
KEYS = st.sampled_from(NAMES) | st.text(max_size=8) | st.integers() | st.none()
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6)
)
VARIABLE_NAMES = sorted(
    {*VARIABLES, *DYNAMO_VARIABLES, "DYN_DISCOVERY_BACKEND", "FLEXKV_X", "TMPDIR"}
    | {variable for way in DYNAMO_CREDENTIALS for variable in way}
)


@given(
    st.dictionaries(KEYS, JUNK, max_size=8),
    st.dictionaries(st.sampled_from(VARIABLE_NAMES), st.text() | st.just("1"), max_size=5),
)
def test_junk_gives_a_config_or_a_config_error_and_nothing_else(
    mapping: dict[Any, Any], env: dict[str, str]
) -> None:
    for given_mapping in (mapping, None):
        try:
            if given_mapping is None:
                config = Config.load(None, env)
            else:
                config = Config.from_mapping(given_mapping, env)
        except ConfigError as error:
            str(error).encode()
        else:
            assert isinstance(config, Config)
            assert config.cache.num_host_slots(1) >= 1


@given(
    st.sampled_from([".json", ".yaml"]),
    st.text() | st.dictionaries(st.text(), JUNK).map(lambda junk: json.dumps(junk, default=str)),
)
def test_any_text_gives_a_config_or_a_config_error_and_nothing_else(kind: str, text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a" + kind)
        path.write_bytes(text.encode(errors="surrogatepass"))
        try:
            config: Config | None = Config.load(path, {})
            message = ""
        except ConfigError as error:
            config, message = None, str(error)
        assert config is not None or message.startswith(str(path))
