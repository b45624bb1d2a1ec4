"""What discovery holds, in a folder or in etcd, the dead as well; and who has an endpoint."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv.doctor.facts import Discovery, Endpoint, Record
from flexkv.errors import FeedError
from flexkv.events import ownership
from flexkv.events.etcd import Etcd
from flexkv.events.nats import discovery_folder
from flexkv.link.endpoint import lock_path
from flexkv.link.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.config import EventsConfig

_CARDS = "mdc"
_SOURCES = "event_sources"


def discovery(settings: EventsConfig) -> Discovery:
    """Cards and sources, where the settings say."""
    if settings.discovery == "etcd":
        return _in_etcd(settings)
    folder = discovery_folder(settings)
    if not folder.is_dir():
        return Discovery(backend="file", where=str(folder), error="there is no such folder")
    return Discovery(
        backend="file",
        where=str(folder),
        cards=list(_in_folder(folder / "v1" / _CARDS)),
        sources=list(_in_folder(folder / "v1" / _SOURCES)),
    )


def endpoint(
    where: str, worker: str, family: frozenset[int] = frozenset(), *, is_expected: bool = True
) -> Endpoint:
    """Who holds the lock of an endpoint. The lock is not touched."""
    owner, signed = None, ""
    try:
        path = lock_path(where)
        inode = path.stat().st_ino
        signed = path.read_text(errors="replace").strip()
        owner = _holder(inode)
    except (OSError, LinkError):  # nobody has been there
        pass
    return Endpoint(
        endpoint=where,
        worker=worker,
        family=family,
        owner=owner,
        signed=signed,
        is_expected=is_expected,
    )


def _in_etcd(settings: EventsConfig) -> Discovery:
    where = ",".join(settings.etcd_endpoints)
    etcd = Etcd(settings.etcd_endpoints, settings.etcd_user, settings.etcd_password)
    try:
        return Discovery(
            backend="etcd",
            where=where,
            cards=[_record(key, content) for key, content in etcd.under(f"v1/{_CARDS}/")],
            sources=[_record(key, content) for key, content in etcd.under(f"v1/{_SOURCES}/")],
        )
    except FeedError as error:
        return Discovery(backend="etcd", where=where, error=str(error))


def _in_folder(folder: Path) -> Iterator[Record]:
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return
    now_s = time.time()
    for path in paths:
        try:
            if not path.name.startswith("."):
                age_s = max(0.0, now_s - path.stat().st_mtime)
                yield _record(str(path), json.loads(path.read_bytes()), age_s)
        except (OSError, ValueError, RecursionError):  # gone, or somebody else's
            continue


def _record(place: str, content: Any, age_s: float = 0.0) -> Record:
    content = content if isinstance(content, dict) else {}
    metadata = content.get("metadata")
    owner = metadata.get(ownership.OWNER) if isinstance(metadata, dict) else None
    is_gone = isinstance(owner, dict) and ownership.is_gone(owner)
    return Record(place=place, content=content, age_s=age_s, owner_is_gone=is_gone)


def _holder(inode: int) -> int | None:
    """Who has a file locked, as the kernel says: to try the lock would disturb its owner."""
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
            return int(words[4])
    return None


def is_writable(folder: Path) -> str:
    """Why nothing can be made in ``folder``, which may have to be made first; "" if it can."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return "" if os.access(place, os.W_OK | os.X_OK) else f"no right to write to {place}"
        if place.exists() or place.is_symlink():
            return f"{place} is no folder"
    return "no such folder"
