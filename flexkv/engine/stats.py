"""Frozen snapshots of what an engine has done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexkv.blocks import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier now (``num_slots`` to ``digest``), and ever (the rest).

    ``digest``: of what was announced of it; equal for equal contents, however they came about.
    ``num_slots`` of an SSD tier that is off is 0. ``num_rotten``: were of another checksum when
    they were read. ``num_unwritten``: were to be written to the tier, and could not be in time.
    """

    num_slots: int
    num_resident: int
    num_free: int
    digest: str
    num_stored: int
    num_evicted: int
    num_loaded: int = 0
    num_rotten: int = 0
    num_unwritten: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine since it started. A request is a call of ``lookup``; counts are of blocks."""

    tiers: Mapping[Tier, TierStats]
    num_requests: int
    num_requested: int
    num_hit: int
    num_loaded: int
    num_load_failed: int
    num_stored: int
    num_store_dropped: int
    nbytes_loaded: int
    nbytes_stored: int
    lanes: Mapping[str, int]
    """Bytes in flight, by direction."""
    last_event_id: int
    feed: Mapping[str, int] = field(default_factory=dict)
    """What the sinks count, added up: see ``CountingSink``."""

    @property
    def hit_rate(self) -> float:
        """The share of the requested blocks that were resident."""
        return self.num_hit / self.num_requested if self.num_requested else 0.0

    def line(self) -> str:
        """The numbers that an operator wants in a log, in one line."""
        evicted = sum(tier.num_evicted for tier in self.tiers.values())
        return (
            f"{self.num_requests} requests, hit rate {self.hit_rate:.1%}, "
            f"loaded {self.num_loaded} blocks ({self.nbytes_loaded / 2**20:.1f} MiB), "
            f"stored {self.num_stored} blocks ({self.nbytes_stored / 2**20:.1f} MiB), "
            f"evicted {evicted}, dropped {self.num_store_dropped}, failed {self.num_load_failed}"
            f"{self._of_ssd()}{self._of_feed()}"
        )

    def _of_ssd(self) -> str:
        ssd = self.tiers.get(Tier.SSD)
        if ssd is None:
            return ""
        if not ssd.num_slots:
            return "; SSD off"
        return (
            f"; SSD {ssd.num_resident} of {ssd.num_slots} blocks, loaded {ssd.num_loaded}, "
            f"stored {ssd.num_stored}, unwritten {ssd.num_unwritten}, rotten {ssd.num_rotten}"
        )

    def _of_feed(self) -> str:
        feed = self.feed
        if not feed:
            return ""
        told = [f"{feed.get('blocks', 0)} blocks told", f"{feed.get('waiting', 0)} waiting"]
        if "connected" in feed:
            told.append(f"{feed.get('left_out', 0)} left out")
            told.append(f"{feed.get('reconnects', 0)} reconnects")
            if not feed["connected"]:
                told.append("NOT CONNECTED")
        return f"; feed {', '.join(told)}"
