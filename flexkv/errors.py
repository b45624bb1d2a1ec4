"""The error tree: each class says what is true now, and what to do."""

from __future__ import annotations


class FlexKVError(Exception):
    """The root of every error that flexkv raises on purpose."""


class ConfigError(FlexKVError, ValueError):
    """A setting is unknown, impossible or not in this version. Nothing was started."""


class InputError(FlexKVError, ValueError):
    """An argument of a call can't be right. Nothing changed."""


class LayoutError(FlexKVError, ValueError):
    """Caches, keys or tokens do not have the shape that was promised. Nothing changed."""


class TierFullError(FlexKVError):
    """Too few slots are free or evictable. Nothing changed; retry after a release."""

    def __init__(self, tier: str, *, needed: int, available: int) -> None:
        super().__init__(
            f"{tier} tier is full: need {needed} slots, {available} are free or evictable"
        )
        self.tier = tier
        self.needed = needed
        self.available = available


class TransferError(FlexKVError):
    """A copy failed: the bytes at its destination are undefined, its source is as it was."""


class EngineClosedError(FlexKVError):
    """The engine is closed or closing. Nothing was copied."""


class FeedError(FlexKVError):
    """The event feed can't start: no NATS server or no discovery. The engine did not start."""
