"""Where settings come from: JSON and YAML files, the flat form, environment variables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml

from flexkv.config_checks import nearest, shown, shown_key
from flexkv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

PATH_VARIABLE = "FLEXKV_CONFIG_PATH"
GB = 2**30

_MAX_GB = 2**20
_PREFIX = "FLEXKV_"


class FlatKey(NamedTuple):
    """What a key of the flat form stands for, and how its variable is read."""

    section: str
    field: str
    kind: Literal["int", "float", "bool", "text", "gb"]


FLAT_KEYS = {
    "cpu_cache_gb": FlatKey("cache", "cpu_cache_bytes", "gb"),
    "ssd_cache_gb": FlatKey("cache", "ssd_cache_bytes", "gb"),
    "ssd_cache_dir": FlatKey("cache", "ssd_cache_dir", "text"),
    "enable_gds": FlatKey("cache", "use_gds", "bool"),
    "enable_trace": FlatKey("cache", "enable_trace", "bool"),
    "iouring_entries": FlatKey("cache", "ssd_cache_iouring_entries", "int"),
    "tokens_per_block": FlatKey("cache", "tokens_per_block", "int"),
    "evict_ratio": FlatKey("cache", "evict_ratio", "float"),
    "index_accel": FlatKey("cache", "index_accel", "bool"),
    "server_recv_port": FlatKey("", "server_recv_port", "text"),
    "num_log_interval_requests": FlatKey("", "num_log_interval_requests", "int"),
    "enable_flexkv": FlatKey("", "enable_flexkv", "bool"),
}
"""The flat form; section "" is the top level."""

VARIABLES = {
    "ENABLE_FLEXKV" if key == "enable_flexkv" else _PREFIX + key.upper(): key for key in FLAT_KEYS
}
"""The variable of each flat key."""

_UNREACHABLE = ("mem", "kubernetes")  # Dynamo's discovery in one process, or in an API of its own

DYNAMO_VARIABLES = {
    "DYN_EVENT_PLANE": "event_plane",
    "DYN_FILE_KV": "discovery_path",
    "DYN_FPM_WORKER_ID": "worker_id",
    "DYN_NAMESPACE": "namespace",
    "DYN_REQUEST_PLANE": "request_plane",
    "DYN_TCP_RPC_HOST": "recovery_host",
    "ETCD_AUTH_PASSWORD": "etcd_password",
    "ETCD_AUTH_USERNAME": "etcd_user",
    "ETCD_ENDPOINTS": "etcd_endpoints",
    "NATS_SERVER": "nats_servers",
    "NATS_TLS_CA_CERT_PATH": "nats_tls_ca",
    "NATS_TLS_CLIENT_CERT_PATH": "nats_tls_cert",
    "NATS_TLS_CLIENT_KEY_PATH": "nats_tls_key",
}
"""Dynamo's variables and the key of ``events`` that each one stands in for."""

DYNAMO_CREDENTIALS = (
    {"NATS_AUTH_USERNAME": "nats_user", "NATS_AUTH_PASSWORD": "nats_password"},
    {"NATS_AUTH_TOKEN": "nats_token"},
    {"NATS_AUTH_NKEY": "nats_nkey"},
    {"NATS_AUTH_CREDENTIALS_FILE": "nats_creds"},
)
"""Ways to authenticate: the first whose variables are all set is taken, as in Dynamo."""

_CREDENTIALS = ("nats_user", "nats_password", "nats_token", "nats_creds", "nats_nkey")

_SECTION_OF = {
    "cache": "cache",
    "cache_config": "cache",
    "events": "events",
    "transfers": "transfers",
}


class Given(NamedTuple):
    """A value, and the name under which somebody wrote it down."""

    value: object
    name: str


class Draft:
    """What was given, per section and field, with everything that is wrong so far.

    ``known``: the fields of each section.
    """

    def __init__(self, known: Mapping[str, Collection[str]]) -> None:
        self.given: dict[str, dict[str, Given]] = {section: {} for section in known}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._known = known

    def take_mapping(self, mapping: Mapping[Any, object]) -> None:
        """Take the nested form, the flat form, or both where no setting is named twice."""
        for key, value in mapping.items():
            section = _SECTION_OF.get(key) if isinstance(key, str) else None
            if section is None:
                self._take("", key, value, shown_key(key))
            elif isinstance(value, Mapping):
                for inner, inner_value in value.items():
                    name = f"{key}.{shown_key(inner)}"
                    self._take(section, inner, inner_value, name)
            elif value is not None:  # a section with nothing in it is null in YAML
                self.problems.append(f"{key} is {shown(value)}: it must be a mapping of keys")

    def take_variables(self, env: Mapping[str, str]) -> None:
        """Take the settings that FLEXKV_* variables give."""
        for variable, text in sorted(env.items()):
            key = VARIABLES.get(variable)
            if key is not None and text:
                self._take_flat(key, _parsed(text, FLAT_KEYS[key].kind), _named(variable))
            elif key is None and variable.startswith(_PREFIX) and variable != PATH_VARIABLE:
                hint = nearest(variable, [*VARIABLES, PATH_VARIABLE])
                self.notes.append(f"{_named(variable)} is not known and has no effect; {hint}")

    def pass_over_variables(self, env: Mapping[str, str], source: str) -> None:
        """Say which FLEXKV_* variables have no effect beside ``source``."""
        ignored = sorted(v for v in env if v.startswith(_PREFIX) and v != PATH_VARIABLE)
        if ignored:
            self.notes.append(f"{', '.join(ignored)}: no effect, the settings are from {source}")
        switch = env.get("ENABLE_FLEXKV")
        if switch and "enable_flexkv" not in self.given[""]:
            self._take_flat("enable_flexkv", _parsed(switch, "bool"), _named("ENABLE_FLEXKV"))

    def take_dynamo(self, env: Mapping[str, str]) -> None:
        """Fill in what ``events`` leaves open from Dynamo's variables."""
        events = self.given["events"]
        if "sink" in events and events["sink"].value == "none":
            return
        for variable, field in DYNAMO_VARIABLES.items():
            self._fill(field, env.get(variable), variable)
        if (backend := env.get("DYN_DISCOVERY_BACKEND")) in {"file", "etcd"}:
            self._fill("discovery", backend, "DYN_DISCOVERY_BACKEND")
        self._check_discovery(env)
        temporary = env.get("TMPDIR") or "/tmp"  # noqa: S108  # Dynamo's default: must be the same
        self._fill("discovery_path", f"{temporary.rstrip('/')}/dynamo_store_kv", "TMPDIR")
        if any(field in events and events[field].value is not None for field in _CREDENTIALS):
            return
        for way in DYNAMO_CREDENTIALS:
            if all(env.get(variable) for variable in way):
                for variable, field in way.items():
                    self._fill(field, env[variable], variable)
                return

    def _check_discovery(self, env: Mapping[str, str]) -> None:
        """Where routers can't find our record there is no source, unless one is asked for."""
        events = self.given["events"]
        asked = "sink" in events and events["sink"].value != "auto"
        backend = env.get("DYN_DISCOVERY_BACKEND")
        if "worker_id" not in events or asked or "discovery" in events:
            return
        if backend in _UNREACHABLE:
            self.notes.append(
                f"no events are published: {_named('DYN_DISCOVERY_BACKEND')} is {shown(backend)}, "
                "where flexkv can't show itself to routers; use file discovery, or vLLM's own "
                "events (--kv-events-config)"
            )
            events["sink"] = Given("none", "sink")

    def check_dynamo(self, env: Mapping[str, str], sink: Literal["nats", "zmq", "none"]) -> None:
        """Find what Dynamo's variables ask for and ``sink`` can't do."""
        events = {field: value for field, (value, _) in self.given["events"].items()}
        plane = events.get("event_plane")
        is_auto = events.get("sink", "auto") == "auto"
        if sink == "none" and is_auto and events.get("worker_id") is not None:
            self.notes.append(
                "no events are published: events.sink is auto, and the event plane "
                f'(DYN_EVENT_PLANE) is {shown(plane or "zmq")}, not "nats"'
            )
        if sink != "nats":
            return
        if plane == "zmq":
            self.notes.append("events go to NATS; a router on the event plane zmq hears none")
        backend = env.get("DYN_DISCOVERY_BACKEND") or "file"
        if backend != "file" and "discovery" not in events:
            self.problems.append(
                f"{_named('DYN_DISCOVERY_BACKEND')} is {shown(backend)}: for events it must be "
                '"file" or "etcd" in this version; else set events.sink to "none"'
            )
        if env.get("NATS_TLS_INSECURE"):
            self.notes.append("NATS_TLS_INSECURE has no effect: certificates are always verified")

    def _fill(self, field: str, text: str | None, variable: str) -> None:
        events = self.given["events"]
        if text and (field not in events or events[field].value is None):
            kind: Literal["int", "text"] = "int" if field == "worker_id" else "text"
            events[field] = Given(_parsed(text, kind), _named(variable))

    def _take(self, section: str, key: object, value: object, name: str) -> None:
        flat = FLAT_KEYS.get(key) if isinstance(key, str) else None
        if isinstance(key, str) and key in self._known[section]:
            self._put(section, key, value, name)
        elif isinstance(key, str) and flat is not None and section in {"", flat.section}:
            self._take_flat(key, value, name)
        else:
            hint = nearest(shown_key(key), self._names(section), self._names(None))
            self.problems.append(f"{name} is not a known key: {hint}")

    def _take_flat(self, key: str, value: object, name: str) -> None:
        section, field, kind = FLAT_KEYS[key]
        if kind != "gb":
            self._put(section, field, value, name)
            return
        floor = 0.0 if key == "ssd_cache_gb" else 1 / GB  # 0 turns SSD off; a host tier is needed
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not floor <= value <= _MAX_GB
        ):
            least = "at least 0" if key == "ssd_cache_gb" else "above 0"
            self.problems.append(
                f"{name} is {shown(value)}: it must be a number of GB (2**30 bytes), "
                f"{least}, at most {_MAX_GB}"
            )
        elif key == "cpu_cache_gb" or value:
            self._put(section, field, math.floor(value * GB), name)
            if key == "ssd_cache_gb":
                self.given[section].setdefault("enable_ssd", Given(value=True, name=name))

    def _put(self, section: str, field: str, value: object, name: str) -> None:
        before = self.given[section].get(field)
        if before is not None:
            self.problems.append(f"{before.name} and {name} are the same setting: give one of them")
            return
        self.given[section][field] = Given(value, name)

    def _names(self, section: str | None) -> dict[str, str]:
        """Leaf -> the name to write, of one section or (None) of all."""
        names: dict[str, str] = {}
        for known in self._known if section is None else [section]:
            names |= {field: path_of(known, field) for field in self._known[known]}
        for key, flat in FLAT_KEYS.items():
            if key not in names and (not section or section == flat.section):
                names[key] = path_of(section or "", key)
        if not section:
            names |= {key: key for key in _SECTION_OF if key != "cache"}
        return names


def path_of(section: str, field: str) -> str:
    """Where the nested form has ``field``."""
    return {"": "", "cache": "cache_config."}.get(section, f"{section}.") + field


def read_mapping(path: Path) -> Mapping[object, object]:
    """The top level of a .json, .yaml or .yml file.

    Raises:
        ConfigError: it can't be read or is broken (line and column are named), a key stands
            twice in one mapping, or the top level is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{str(path)!r}: can't be read: {error}") from None
    kind = path.suffix.lower()
    if kind not in {".json", ".yaml", ".yml"}:
        raise ConfigError(f"{path}: the name must end in .json, .yaml or .yml")
    try:
        top = _from_json(text) if kind == ".json" else _from_yaml(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path}, {where}: {error.msg}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}, {_described(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except ValueError as error:  # a key twice, a date that isn't one, a number beyond all bounds
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(top, Mapping):
        raise ConfigError(f"{path}: the top level is {shown(top)}: it must be a mapping of keys")
    return top


def _named(variable: str) -> str:
    return f"environment variable {variable}"


def _parsed(text: str, kind: Literal["int", "float", "bool", "text", "gb"]) -> object:
    """What a variable says; the text itself where it says nothing of ``kind``."""
    if kind == "bool":
        words = {"0": False, "false": False, "no": False, "off": False}
        words |= {"1": True, "true": True, "yes": True, "on": True}
        return words.get(text.strip().lower(), text)
    try:
        if kind == "int":
            return int(text)
        if kind in {"float", "gb"}:
            return float(text)
    except ValueError:
        pass  # the check of the value says what it must be
    return text


def _from_json(text: str) -> object:
    return json.loads(text, object_pairs_hook=_without_twins)


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twin)} stands twice in one mapping")
    return mapping


def _from_yaml(text: str) -> object:
    for node in _mappings(yaml.compose(text, Loader=yaml.SafeLoader)):
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {shown(key.value)} stands twice in one mapping",
                        problem_mark=key.start_mark,
                    )
                keys.add((key.tag, key.value))
    return yaml.safe_load(text)


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an alias: maybe of itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            todo += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value


def _described(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}"
