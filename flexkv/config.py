"""The settings of an engine: frozen, checked once, with errors that name key, value and range."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, PrivateAttr

from flexkv.config_checks import InvalidError, Problem, Settings, listed, setting, shown
from flexkv.config_sources import PATH_VARIABLE, Draft, path_of, read_mapping
from flexkv.errors import ConfigError

DEFAULT_NUM_CPU_BLOCKS = 10240

_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})
_MAX_BLOCKS = 2**40
_MAX_NBYTES = 2**50
_MAX_S = 86400
_MAX_SOCKET_PATH = 107  # bytes; Linux's sun_path, less the NUL


def _split(separator: str) -> BeforeValidator:
    def texts(value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(separator) if part.strip())
        return tuple(value) if isinstance(value, list) else value

    return BeforeValidator(texts)


def _require(good: Any) -> AfterValidator:
    def check(value: object) -> object:
        if value is not None and not good(value):
            raise ValueError
        return value

    return AfterValidator(check)


def _is_text(text: str) -> bool:
    return bool(text.encode()) and "\0" not in text


def _is_clean(text: str) -> bool:
    return bool(text) and text.isprintable() and not any(c.isspace() for c in text)


def _is_endpoint(text: str) -> bool:
    if text.startswith("ipc://") and text.isprintable():
        return 0 < len(os.fsencode(text.removeprefix("ipc://"))) <= _MAX_SOCKET_PATH
    if not _is_clean(text):
        return False
    parts = urlsplit(text)
    return parts.scheme == "tcp" and bool(parts.hostname and parts.port and not parts.path)


def _are_servers(servers: tuple[str, ...]) -> bool:
    for server in servers:
        if not _is_clean(server):
            return False
        parts = urlsplit(server)
        is_bare = parts.path in {"", "/"} and parts.username is None and parts.port != 0
        if parts.scheme not in {"nats", "tls"} or not parts.hostname or not is_bare:
            return False
    return bool(servers)


def _is_subject(text: str) -> bool:
    return _is_clean(text) and all(text.split(".")) and not set(text) & set("*>/")


_Text = Annotated[str, _require(_is_text)]
_Subject = Annotated[str, _require(_is_subject)]


class CacheConfig(Settings):
    """How much each tier holds, and when it makes room."""

    enable_cpu: Annotated[bool, _require(bool)] = setting(
        "the host tier", default=True, allowed="true: every other tier needs the host tier"
    )
    enable_ssd: bool = setting("the SSD tier", default=False, later=(True,))
    enable_remote: bool = setting("the remote tier", default=False, later=(True,))
    use_gds: bool = setting("copies between SSD and GPU directly", default=False, later=(True,))
    enable_trace: bool = setting("a trace of all requests", default=False, later=(True,))
    tokens_per_block: int = setting("tokens of one block", default=64, ge=1, le=65536)
    num_cpu_blocks: int | None = setting(
        f"size of the host tier in blocks; {DEFAULT_NUM_CPU_BLOCKS} if `cpu_cache_bytes` is not "
        "given either",
        default=None,
        ge=1,
        le=_MAX_BLOCKS,
    )
    cpu_cache_bytes: int | None = setting(
        "size of the host tier in bytes, instead of `num_cpu_blocks`",
        default=None,
        ge=1,
        le=_MAX_NBYTES,
    )
    num_ssd_blocks: int | None = setting(
        "size of the SSD tier in blocks", default=None, ge=1, le=_MAX_BLOCKS
    )
    ssd_cache_bytes: int | None = setting(
        "size of the SSD tier in bytes, instead of `num_ssd_blocks`",
        default=None,
        ge=1,
        le=_MAX_NBYTES,
    )
    ssd_cache_dir: Annotated[tuple[_Text, ...], _split(";")] = setting(
        "folders of the SSD tier",
        default=(),
        allowed='a text (";" between several), or a list of texts',
    )
    ssd_cache_iouring_entries: int = setting(
        "length of the io_uring queue", default=512, ge=1, le=32768
    )
    evict_ratio: float = setting(
        "the share of a tier freed at least, when there is no room", default=0.05, ge=0, lt=1
    )
    index_accel: bool = setting("no effect: there is one index", default=True)

    def _conflicts(self) -> list[Problem]:
        pairs = {
            "host": ("num_cpu_blocks", "cpu_cache_bytes"),
            "SSD": ("num_ssd_blocks", "ssd_cache_bytes"),
        }
        return [
            Problem(pair, f"both set the size of the {tier} tier: give one of them")
            for tier, pair in pairs.items()
            if None not in (getattr(self, field) for field in pair)
        ]

    def num_host_slots(self, block_nbytes: int) -> int:
        """Slots of the host tier, for blocks of ``block_nbytes`` (all ranks together).

        Raises:
            ConfigError: not even one block fits.
        """
        if self.cpu_cache_bytes is None:
            return self.num_cpu_blocks or DEFAULT_NUM_CPU_BLOCKS
        if num_slots := self.cpu_cache_bytes // block_nbytes:
            return num_slots
        raise ConfigError(
            f"cpu_cache_bytes is {self.cpu_cache_bytes}, but one block takes {block_nbytes} bytes: "
            f"the host tier must hold at least one"
        )


class TransfersConfig(Settings):
    """Limits of copies and of waits for them."""

    chunk_bytes: int = setting(
        "a load or store is copied in chunks of about this size",
        default=2**26,
        ge=1,
        le=_MAX_NBYTES,
    )
    max_load_bytes: int = setting(
        "bytes in flight toward the GPU", default=2**28, ge=1, le=_MAX_NBYTES
    )
    max_store_bytes: int = setting(
        "bytes in flight away from the GPU", default=2**28, ge=1, le=_MAX_NBYTES
    )
    deadline_s: float = setting(
        "how long a call waits, in a queue too", default=30.0, gt=0, le=_MAX_S
    )
    close_timeout_s: float = setting(
        "how long closing waits for running copies", default=10.0, gt=0, le=_MAX_S
    )
    touch_threads: int = setting(
        "threads that touch the pool first; 0: one per core, up to 16", default=0, ge=0, le=256
    )
    huge_pages: bool = setting(
        "pages of 2 MiB for the pool, where the system gives them to shared memory", default=False
    )

    def _conflicts(self) -> list[Problem]:
        return [
            Problem((field,), f"is {limit}: it must be at least chunk_bytes, {self.chunk_bytes}")
            for field in ("max_load_bytes", "max_store_bytes")
            if (limit := getattr(self, field)) < self.chunk_bytes
        ]


class EventsConfig(Settings):
    """Who hears what the tiers hold, and how."""

    sink: Literal["auto", "vllm", "nats", "zmq", "none"] = setting(
        "who carries the events; `auto`: `nats` if `worker_id` is known and `event_plane` is "
        "`nats`, else `none`",
        default="auto",
        later=("vllm", "zmq"),
    )
    event_plane: Literal["nats", "zmq"] | None = setting(
        "the event plane of the Dynamo deployment; its own default is `zmq`", default=None
    )
    nats_servers: Annotated[tuple[str, ...], _split(","), _require(_are_servers)] = setting(
        "NATS servers",
        default=("nats://127.0.0.1:4222",),
        allowed="nats://HOST:PORT or tls://HOST:PORT without credentials, or a list of them",
    )
    nats_user: _Text | None = setting("user name; needs `nats_password`", default=None)
    nats_password: _Text | None = setting("password of `nats_user`", default=None, secret=True)
    nats_token: _Text | None = setting("token, instead of a user", default=None, secret=True)
    nats_creds: _Text | None = setting("credentials file, instead of a user or token", default=None)
    nats_tls_ca: _Text | None = setting("file with the authority of the server", default=None)
    nats_tls_cert: _Text | None = setting("file with our certificate", default=None)
    nats_tls_key: _Text | None = setting("file with the key of `nats_tls_cert`", default=None)
    nats_required: bool = setting(
        "an unreachable server is an error at start; false: a warning, and it is tried again",
        default=True,
    )
    connect_timeout_s: float = setting(
        "how long the start waits for NATS", default=5.0, gt=0, le=_MAX_S
    )
    namespace: _Subject = setting("of the Dynamo worker", default="dynamo", allowed="a Dynamo name")
    component: _Subject = setting(
        "of the Dynamo worker", default="backend", allowed="a Dynamo name"
    )
    endpoint: _Subject = setting(
        "of the Dynamo worker", default="generate", allowed="a Dynamo name"
    )
    worker_id: int | None = setting(
        "of the Dynamo worker; needed where the sink is `nats`", default=None, ge=0, le=2**64 - 1
    )
    dp_rank: int = setting("data-parallel rank of the worker", default=0, ge=0, le=2**32 - 1)
    discovery: Literal["file", "etcd"] = setting(
        "where the router looks for sources", default="file", later=("etcd",)
    )
    discovery_path: _Text | None = setting(
        "folder of the file discovery; as in Dynamo, `$TMPDIR/dynamo_store_kv` if not given",
        default=None,
    )
    outbox: int = setting(
        "blocks that may wait for the publisher before it falls back to a resync",
        default=65536,
        ge=1,
        le=2**32,
    )
    ring: int = setting(
        "blocks named by the events that are kept for catching up", default=262144, ge=1, le=2**32
    )
    max_event_blocks: int = setting("blocks that one event may name", default=512, ge=1, le=65536)
    reconnect_resync_s: float = setting(
        "from a reconnect to the resync; the router takes up to 4 s", default=5.0, ge=0, le=_MAX_S
    )
    close_timeout_s: float = setting(
        "how long closing waits for the last events", default=2.0, gt=0, le=_MAX_S
    )

    def effective_sink(self) -> Literal["nats", "none"]:
        """The sink of an embedded engine, with ``auto`` decided."""
        if self.sink == "auto":
            known = self.worker_id is not None and self.event_plane == "nats"
            return "nats" if known else "none"
        return "nats" if self.sink == "nats" else "none"

    def _conflicts(self) -> list[Problem]:
        problems = []
        if self.sink == "nats" and self.worker_id is None:
            need = "it needs a worker_id (or DYN_FPM_WORKER_ID)"
            problems.append(Problem(("sink",), f'is "nats": {need}'))
        for pair in (("nats_user", "nats_password"), ("nats_tls_cert", "nats_tls_key")):
            given = [field for field in pair if getattr(self, field) is not None]
            if len(given) == 1:
                missing = next(field for field in pair if field not in given)
                problems.append(Problem((given[0],), f"needs {missing} beside it"))
        ways = ("nats_user", "nats_token", "nats_creds")
        if len(given := [way for way in ways if getattr(self, way) is not None]) > 1:
            problems.append(Problem(tuple(given), "exclude each other: give one of them"))
        return problems


_AnySettings = TypeVar("_AnySettings", bound=Settings)


class Config(Settings):
    """All settings of an engine.

    ``Config(cache=CacheConfig(...), ...)`` takes what is given; ``load`` and ``from_mapping`` read
    files, mappings and variables. Each raises ConfigError, with all problems in one.
    """

    enable_flexkv: bool = setting("false: nothing is kept and nothing is announced", default=True)
    server_recv_port: Annotated[str, _require(_is_endpoint)] | None = setting(
        "where the engine listens for GPU workers",
        default=None,
        allowed=f"ipc://PATH (at most {_MAX_SOCKET_PATH} bytes) or tcp://HOST:PORT",
    )
    num_log_interval_requests: int = setting(
        "requests between two lines of statistics in the log; 0: none", default=200, ge=0, le=2**32
    )
    cache: CacheConfig = setting("what each tier holds", default=CacheConfig())
    transfers: TransfersConfig = setting("limits of copies", default=TransfersConfig())
    events: EventsConfig = setting("the event feed", default=EventsConfig())
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one block."""
        return self.cache.tokens_per_block

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the log at start: what was given and has no effect."""
        if "index_accel" not in self.cache.model_fields_set:
            return self._notes
        return (*self._notes, "index_accel has no effect: there is one index, and it is fast")

    @classmethod
    def load(cls, path: str | Path | None = None, env: Mapping[str, str] = os.environ) -> Self:
        """The settings of a file, else of FLEXKV_* variables, else the defaults.

        ``path`` comes before FLEXKV_CONFIG_PATH. A file replaces all other FLEXKV_* variables;
        what its ``events`` leave open comes from Dynamo's variables in any case.
        """
        if path is not None:
            return cls._built(read_mapping(Path(path)), env, str(path))
        named = env.get(PATH_VARIABLE)
        if not named:
            return cls._built(None, env, "")
        try:
            return cls._built(read_mapping(Path(named)), env, named)
        except ConfigError as error:
            raise ConfigError(f"{PATH_VARIABLE} names {error}") from None

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, object], env: Mapping[str, str] = _NO_VARIABLES
    ) -> Self:
        """The settings of a mapping, in the nested or the flat form of a file."""
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"the settings are {shown(mapping)}: they must be a mapping of keys")
        return cls._built(mapping, env, "")

    @classmethod
    def _built(
        cls, mapping: Mapping[Any, object] | None, env: Mapping[str, str], source: str
    ) -> Self:
        known = {section: set(settings.model_fields) for section, settings in _SECTIONS.items()}
        draft = Draft({"": set(cls.model_fields) - set(_SECTIONS)} | known)
        if mapping is None:
            draft.take_variables(env)
        else:
            draft.take_mapping(mapping)
            draft.pass_over_variables(env, source or "a mapping")
        draft.take_dynamo(env)
        sections = {name: _checked(settings, draft, name) for name, settings in _SECTIONS.items()}
        if isinstance(events := sections["events"], EventsConfig):
            draft.check_dynamo(env, events.effective_sink())
        config = _checked(cls, draft, "", **{k: made for k, made in sections.items() if made})
        if draft.problems or config is None:
            raise listed(draft.problems, source)
        config._notes = tuple(draft.notes)  # noqa: SLF001  # our own, just made
        return config


_SECTIONS: dict[str, type[Settings]] = {
    "cache": CacheConfig,
    "transfers": TransfersConfig,
    "events": EventsConfig,
}


def _checked(
    settings: type[_AnySettings], draft: Draft, section: str, **sections: Settings
) -> _AnySettings | None:
    """The settings of one section; None where ``draft`` got problems instead."""
    given = draft.given[section]
    try:
        return settings(**{field: value for field, (value, _) in given.items()}, **sections)
    except InvalidError as error:
        for fields, text in error.problems:
            names = " and ".join(
                given[field].name if field in given else path_of(section, field) for field in fields
            )
            draft.problems.append(f"{names} {text}")
        return None
