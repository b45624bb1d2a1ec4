"""The settings file of each worker, made from the template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexkv.config import Config
from flexkv.config_values import MAX_SOCKET_PATH
from flexkv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexkv.launch.options import Options

PLACE = "{worker}"
"""Stands for the worker's number in a template's texts."""

_DEFAULT_BLOCK_SIZE = 64
_SHARED = (
    *("nats_servers", "discovery", "discovery_path", "etcd_endpoints", "request_plane"),
    *("namespace", "component", "endpoint", "worker_id", "dp_rank"),
)
_LONGEST_SUFFIX = len(".dp999.lock")


def block_size_of(options: Options, env: Mapping[str, str]) -> int:
    """Tokens of a block: one answer for vLLM, flexkv and the router.

    Raises:
        ConfigError: the template can't be used, or disagrees with --block-size.
    """
    given = None
    if not options.without_flexkv:
        cache = _loaded(_draft(options, 0), env).cache
        given = cache.tokens_per_block if "tokens_per_block" in cache.model_fields_set else None
    if options.block_size is None:
        return given or _DEFAULT_BLOCK_SIZE
    if given not in {None, options.block_size}:
        raise ConfigError(
            f"--block-size is {options.block_size}, but tokens_per_block in the template is "
            f"{given}: give one of them only, since router, vLLM and flexkv share it"
        )
    return options.block_size


def worker_settings(
    options: Options, index: int, block_size: int, env: Mapping[str, str]
) -> tuple[dict[str, Any], Config]:
    """The file of worker ``index``, and what it says.

    Raises:
        ConfigError: it can't be used; endpoints may still be shared.
    """
    mapping = _draft(options, index)
    given = _loaded(mapping, env)
    sink = "vllm" if options.gpu_events else "nats"
    _require_the_deployments(mapping, given, env, sink)
    cache, events = mapping["cache_config"], mapping["events"]
    mapping.pop("tokens_per_block", None)  # the flat form of what is set here
    mapping.pop("ssd_cache_dir", None)
    mapping["server_recv_port"] = given.server_recv_port or _endpoint(options, index)
    cache["tokens_per_block"] = block_size
    cache.pop("ssd_cache_dir", None)
    if given.cache.enable_ssd:
        folders = given.cache.ssd_cache_dir
        cache["ssd_cache_dir"] = [f"{folder.rstrip('/')}/worker{index}" for folder in folders]
    events |= {"sink": sink, "event_plane": "nats"}
    return mapping, _loaded(mapping, env)


def _require_the_deployments(
    mapping: dict[str, Any], given: Config, env: Mapping[str, str], sink: str
) -> None:
    """Flexkv must be on the planes of its worker, or nobody hears it, without an error."""
    if "sink" in given.events.model_fields_set and given.events.sink not in {"auto", sink}:
        raise ConfigError(
            f"events.sink in the template is {given.events.sink}: launch sets it to {sink} "
            "(--gpu-events: vllm, else nats): leave it out"
        )
    others = {name: value for name, value in mapping["events"].items() if name not in _SHARED}
    own = _loaded(mapping | {"events": others}, env).events
    for name in _SHARED:
        if getattr(given.events, name) != getattr(own, name):
            raise ConfigError(
                f"events.{name} in the template is {getattr(given.events, name)}: flexkv has it "
                "from its worker, as launch and Dynamo set it: leave it out"
            )


def endpoints_of(config: Config, num_ranks: int) -> list[str]:
    """Where the engines of one worker listen, as the connector will choose."""
    endpoint = config.server_recv_port or ""
    if num_ranks == 1:
        return [endpoint]
    if endpoint.startswith("ipc://"):
        return [f"{endpoint}.dp{rank}" for rank in range(num_ranks)]
    head, _, port = endpoint.rpartition(":")
    return [f"{head}:{int(port) + rank}" for rank in range(num_ranks)]


def shared_endpoints(configs: list[Config], num_ranks: int) -> list[str]:
    """What is wrong where two engines would listen at one endpoint or port."""
    port = configs[0].events.recovery_port if configs else 0
    if port and len(configs) * num_ranks > 1:
        text = f"events.recovery_port in the template is {port}, and every engine needs its own"
        return [f"{text}: leave it out"]
    owners: dict[str, int] = {}
    for index, config in enumerate(configs):
        for endpoint in endpoints_of(config, num_ranks):
            if (owner := owners.setdefault(endpoint, index)) != index:
                text = (
                    f"server_recv_port is {endpoint} for worker {owner} and worker {index}: leave "
                    "it out of the template, so that each has its own, or put "
                    f"{PLACE} where the worker's number belongs"
                )
                return [text]
    return []


def endpoint_length_problem(options: Options) -> str | None:
    """Sockets have short paths, and some of them are in the folder."""
    longest = len(_endpoint(options, options.num_workers - 1).encode()) - len("ipc://")
    if longest + _LONGEST_SUFFIX <= MAX_SOCKET_PATH:
        return None
    room = MAX_SOCKET_PATH - _LONGEST_SUFFIX - (longest - len(str(options.folder).encode()))
    length = len(str(options.folder).encode())
    text = (
        f"--folder {options.folder} has {length} bytes, and there is room for {room} in the path "
    )
    return f"{text}of a socket: give a shorter one"


def _endpoint(options: Options, index: int) -> str:
    return f"ipc://{options.folder}/worker{index}.sock"


def _draft(options: Options, index: int) -> dict[str, Any]:
    """The template for one worker, its sections under one name each, the SSD tier with a folder."""
    mapping: dict[str, Any] = _numbered(dict(options.template), index)
    sections = {"cache_config": ("cache_config", "cache"), "events": ("events",)}
    for section, names in sections.items():
        merged: dict[str, Any] = {}
        for given in [mapping.pop(name) for name in names if name in mapping]:
            if given is not None and not isinstance(given, dict):
                raise ConfigError(f"{section} is {given!r}: it must be a mapping of keys")
            merged |= given or {}
        mapping[section] = merged
    if not {"ssd_cache_dir"} & (mapping.keys() | mapping["cache_config"].keys()):
        mapping["cache_config"]["ssd_cache_dir"] = [str(options.folder / "ssd")]
    return mapping


def _numbered(value: Any, index: int) -> Any:
    """``value`` with the worker's number in its texts."""
    if isinstance(value, str):
        return value.replace(PLACE, str(index))
    if isinstance(value, dict):
        return {key: _numbered(inner, index) for key, inner in value.items()}
    return [_numbered(inner, index) for inner in value] if isinstance(value, list) else value


def _loaded(mapping: Mapping[str, object], env: Mapping[str, str]) -> Config:
    return Config.from_mapping(mapping, {"DYN_FPM_WORKER_ID": "0"} | dict(env))
