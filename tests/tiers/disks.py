"""Disks that fail on purpose, and stores on them."""

from __future__ import annotations

import errno
import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from flexkv.blocks import BlockKey, Blocks
from flexkv.tiers.host import HostPool
from flexkv.tiers.ssd import SsdSettings, SsdStore
from flexkv.tiers.ssd_journal import DiskCalls

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path
    from random import Random

    from flexkv.tiers.ssd_frames import Kept

SLOT_NBYTES = 5000  # not a multiple of a page: there is padding


def writes_held_until(go_on: threading.Event) -> DiskCalls:
    """A disk that hangs: at most for a minute, so that a test that fails ends."""

    def held(fd: int, buffers: list[memoryview], offset: int) -> int:
        go_on.wait(60)
        return os.pwritev(fd, buffers, offset)

    return replace(DiskCalls(), pwritev=held)


@asynccontextmanager
async def store_on(
    *folders: Path,
    num_slots: int = 16,
    num_host_slots: int = 16,
    num_ranks: int = 1,
    calls: DiskCalls | None = None,
    about: dict[str, object] | None = None,
    has_identity: bool = True,
    uring_entries: int = 0,
) -> AsyncIterator[tuple[SsdStore, HostPool, list[Kept]]]:
    settings = SsdSettings(
        folders=folders,
        num_slots=num_slots,
        about=(about or {"model": "tiny"}) if has_identity else None,
        num_readers=3,
        num_writers=3,
        uring_entries=uring_entries,
    )
    pool = HostPool(num_host_slots, SLOT_NBYTES, num_ranks)
    store = SsdStore(settings, pool, calls or DiskCalls())
    try:
        kept = await store.open()
        try:
            yield store, pool, kept
        finally:
            await store.close()
    finally:
        pool.close()


def fill(pool: HostPool, host_slot: int, seed: int) -> list[bytes]:
    """Bytes that depend on ``seed`` and rank, into all ranks' parts of a slot."""
    parts = []
    for rank in range(pool.num_ranks):
        part = np.random.default_rng([seed, rank]).bytes(pool.slot_nbytes)
        pool.slot(rank, host_slot)[:] = part
        parts.append(part)
    return parts


def content(pool: HostPool, host_slot: int) -> list[bytes]:
    return [bytes(pool.slot(rank, host_slot)) for rank in range(pool.num_ranks)]


def some_blocks(first: int, num_blocks: int, parent: BlockKey | None = None) -> Blocks:
    """Blocks with the keys ``first``, ``first`` + 1 and so on."""
    keys = b"".join(i.to_bytes(32, "big") for i in range(first, first + num_blocks))
    tokens = np.arange(first, first + 2 * num_blocks, dtype="<u4")
    return Blocks(keys, tokens.tobytes(), tokens_per_block=2, parent=parent, namespace="a")


class FaultyDisk:
    """Fails calls with the given chances, by the throw of ``random``."""

    def __init__(
        self,
        random: Random,
        *,
        read_error: float = 0,
        short_read: float = 0,
        short_write: float = 0,
        sync_error: float = 0,
        rot: float = 0,
        write_error: float = 0,
        number: int = errno.EIO,
    ) -> None:
        self._random = random
        self._chances = {
            "read_error": read_error,
            "short_read": short_read,
            "short_write": short_write,
            "sync_error": sync_error,
            "rot": rot,
            "write_error": write_error,
        }
        self._number = number
        self.num_faults = 0

    def calls(self) -> DiskCalls:
        return replace(
            DiskCalls(),
            preadv=self._preadv,
            pwritev=self._pwritev,
            write=self._write,
            fdatasync=self._fdatasync,
        )

    def _throw(self, what: str) -> bool:
        hit = self._random.random() < self._chances[what]
        self.num_faults += hit
        return hit

    def _error(self) -> OSError:
        return OSError(self._number, os.strerror(self._number))

    def _preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self._throw("read_error"):
            raise self._error()
        num_read = os.preadv(fd, buffers, offset)
        if self._throw("rot"):
            buffers[-1][7] ^= 0x10
        if self._throw("short_read"):
            buffers[-1][:] = b"?" * len(buffers[-1])
            return num_read - 512
        return num_read

    def _pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self._throw("write_error"):
            raise self._error()
        if self._throw("short_write"):
            return os.pwritev(fd, buffers, offset) - 512
        return os.pwritev(fd, buffers, offset)

    def _fdatasync(self, fd: int) -> None:
        if self._throw("sync_error"):
            raise self._error()
        os.fdatasync(fd)

    def _write(self, fd: int, data: memoryview) -> int:
        if self._throw("write_error"):
            raise self._error()
        return os.write(fd, data)


def nbytes_in(folders: Sequence[Path]) -> int:
    """What the folders take on their disks."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(512 * path.stat().st_blocks for path in files)
