"""The settings of an engine: frozen, checked once, with errors that name key, value and range."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import PrivateAttr

from flexkv.config_checks import InvalidError, Problem, Settings, listed, setting, shown
from flexkv.config_events import EventsConfig as EventsConfig  # noqa: PLC0414  # known from here
from flexkv.config_sources import PATH_VARIABLE, Draft, path_of, read_mapping
from flexkv.config_ssd import SsdFields
from flexkv.config_values import ENDPOINTS, Text, is_endpoint, require, split_at
from flexkv.errors import ConfigError

DEFAULT_NUM_CPU_BLOCKS = 10240

_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})
_MAX_BLOCKS = 2**40
_MAX_NBYTES = 2**50
_MAX_S = 86400


class CacheConfig(SsdFields):
    """How much each tier holds, and when it makes room."""

    enable_cpu: Annotated[bool, require(bool)] = setting(
        "the host tier", default=True, allowed="true: every other tier needs the host tier"
    )
    enable_ssd: bool = setting("the SSD tier", default=False)
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
    ssd_cache_dir: Annotated[tuple[Text, ...], split_at(";")] = setting(
        "folders of the SSD tier",
        default=(),
        allowed='a text (";" between several), or a list of texts',
    )
    ssd_cache_iouring_entries: int = setting(
        "requests in flight through io_uring, 32 at most in each queue; 0: threads instead",
        default=512,
        ge=0,
        le=32768,
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
        problems = [
            Problem(pair, f"both set the size of the {tier} tier: give one of them")
            for tier, pair in pairs.items()
            if None not in (getattr(self, field) for field in pair)
        ]
        if self.enable_ssd and not self.ssd_cache_dir:
            problems.append(Problem(("ssd_cache_dir",), "is empty: give the SSD tier a folder"))
        if self.enable_ssd and self.num_ssd_blocks is None and self.ssd_cache_bytes is None:
            problems.append(Problem(pairs["SSD"], "are not given: give the SSD tier a size"))
        return problems

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
        "bytes in flight toward each rank's GPU", default=2**28, ge=1, le=_MAX_NBYTES
    )
    max_store_bytes: int = setting(
        "bytes in flight away from each rank's GPU", default=2**28, ge=1, le=_MAX_NBYTES
    )
    deadline_s: float = setting(
        "how long a call waits, in a queue too", default=30.0, gt=0, le=_MAX_S
    )
    close_timeout_s: float = setting(
        "how long each step of closing waits for running copies", default=10.0, gt=0, le=_MAX_S
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


_AnySettings = TypeVar("_AnySettings", bound=Settings)


class Config(Settings):
    """All settings of an engine.

    ``Config(cache=CacheConfig(...), ...)`` takes what is given; ``load`` and ``from_mapping`` read
    files, mappings and variables. Each raises ConfigError, with all problems in one.
    """

    enable_flexkv: bool = setting("false: nothing is kept and nothing is announced", default=True)
    server_recv_port: Annotated[str, require(is_endpoint)] | None = setting(
        "where the engine listens for GPU workers",
        default=None,
        allowed=ENDPOINTS,
    )
    num_log_interval_requests: int = setting(
        "requests between two lines of statistics in the log; 0: none", default=200, ge=0, le=2**32
    )
    load_failure_policy: Literal["recompute", "fail"] = setting(
        "under vLLM: what becomes of a request whose load has failed", default="recompute"
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
