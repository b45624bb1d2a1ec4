"""What kernel and file systems allow: tried, where trying does no harm."""

from __future__ import annotations

import ctypes
import os
import resource
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.doctor.facts import Machine, SsdFolder
from flexkv.doctor.gather.records import is_writable
from flexkv.tiers.memory import available_memory
from flexkv.tiers.ssd_files import direct_io_refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexkv.config import Config

_SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_IO_URING_SETUP = 425  # the same on x86_64 and arm64
_PARAMS_NBYTES = 120


def machine(configs: Iterable[Config], home: str) -> Machine:
    """Of the folders that ``configs`` name; ``home``: of whoever runs the frontend."""
    folders = {f for c in configs if c.cache.enable_ssd for f in c.cache.ssd_cache_dir}
    cards = Path(home) / ".cache" / "dynamo" / "mdc"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Machine(
        ssd_folders=[ssd_folder(folder) for folder in sorted(folders)],
        uring=uring(),
        has_uring_extra=find_spec("uring_api") is not None,
        shmem_enabled=_text(_SHMEM_HUGE_PAGES),
        memlock=None if soft == resource.RLIM_INFINITY else soft,
        available=available_memory(Path("/proc"), Path("/sys/fs/cgroup")),
        card_folder=str(cards),
        card_folder_error=is_writable(cards),
    )


def ssd_folder(path: str) -> SsdFolder:
    """Try direct I/O in a folder of its own there, or where ``path`` will be made."""
    folder = Path(path)
    if refusal := is_writable(folder):
        return SsdFolder(path=path, refusal=refusal)
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".flexkv-doctor-", dir=there) as own:
            return SsdFolder(path=path, buffered=direct_io_refusal(Path(own)) or "")
    except OSError as error:
        return SsdFolder(path=path, refusal=str(error.strerror))


def uring() -> str:
    """Why the kernel does not give a ring; "" if it does."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(_PARAMS_NBYTES))
    if fd < 0:
        return os.strerror(ctypes.get_errno())
    os.close(fd)
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
