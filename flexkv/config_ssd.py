"""The settings of the SSD tier."""

from __future__ import annotations

from typing import Literal

from flexkv.config_checks import Settings, setting

_MAX_NBYTES = 2**50


class SsdFields(Settings):
    """How the SSD tier works; how large it is and where, ``CacheConfig`` says."""

    weights_id: str | None = setting(
        "names the weights that the blocks are of; without it, and where nobody else says which "
        "model runs, the SSD tier starts empty each time",
        default=None,
    )
    ssd_admission: Literal["all", "second_sight"] = setting(
        "which blocks are written to SSD: all, or those seen twice, to spare the drive",
        default="all",
    )
    ssd_write_queue_bytes: int = setting(
        "bytes that may wait for the SSD, in host slots that can't be evicted; what is more is "
        "not written (at most a quarter of the host tier)",
        default=2**28,
        ge=1,
        le=_MAX_NBYTES,
    )
    ssd_read_bytes: int = setting(
        "bytes in flight from SSD to host", default=2**27, ge=1, le=_MAX_NBYTES
    )
    ssd_read_threads: int = setting("threads that read, without io_uring", default=8, ge=1, le=256)
    ssd_write_threads: int = setting(
        "threads that write, without io_uring; two of them while others read",
        default=8,
        ge=1,
        le=256,
    )
    ssd_sync: bool = setting(
        "blocks count as kept once they are safe from a power cut; false: from a crash",
        default=True,
    )
    recompute_tokens_per_s: float = setting(
        "how fast the model computes a prompt: what would take longer to read from SSD, at the "
        "speed measured, is not read; 0: all is read",
        default=0.0,
        ge=0,
        le=10**12,
    )
