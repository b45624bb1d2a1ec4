"""Keeps the KV cache of LLM servers alive beyond the GPU, and tells routers the truth about it."""

from flexkv._version import __version__
from flexkv.blocks import BlockKey, Blocks, KVLayout, Tier
from flexkv.config import CacheConfig, Config, EventsConfig, TransfersConfig
from flexkv.engine.engine import Engine
from flexkv.engine.results import Loaded, Match, Stored
from flexkv.engine.stats import EngineStats, TierStats
from flexkv.errors import (
    ConfigError,
    EngineClosedError,
    FeedError,
    FlexKVError,
    InputError,
    LayoutError,
    TierFullError,
    TransferError,
)
from flexkv.events.nats import NatsSink
from flexkv.events.sinks import EventSink, ListSink
from flexkv.events.types import AllBlocksCleared, BlockRemoved, BlockStored, Event
from flexkv.hashing import blocks_of

__all__ = [
    "AllBlocksCleared",
    "BlockKey",
    "BlockRemoved",
    "BlockStored",
    "Blocks",
    "CacheConfig",
    "Config",
    "ConfigError",
    "Engine",
    "EngineClosedError",
    "EngineStats",
    "Event",
    "EventSink",
    "EventsConfig",
    "FeedError",
    "FlexKVError",
    "InputError",
    "KVLayout",
    "LayoutError",
    "ListSink",
    "Loaded",
    "Match",
    "NatsSink",
    "Stored",
    "Tier",
    "TierFullError",
    "TierStats",
    "TransferError",
    "TransfersConfig",
    "__version__",
    "blocks_of",
]
