"""The journal's files: what is on the disk, across restarts. Blocks; for one thread."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexkv.tiers.ssd_frames import Replay, framed, unframed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flexkv.tiers.ssd_frames import Kept

_log = logging.getLogger(__name__)

_VERSION = 1
_NAME = re.compile(r"journal-(\d{10})")
_MAX_JOURNAL_NBYTES = 2**40


@dataclass(frozen=True, slots=True)
class DiskCalls:
    """What is asked of the operating system; tests put faults here."""

    preadv: Callable[[int, list[memoryview], int], int] = os.preadv
    pwritev: Callable[[int, list[memoryview], int], int] = os.pwritev
    write: Callable[[int, memoryview], int] = os.write
    fdatasync: Callable[[int], None] = os.fdatasync
    posix_fallocate: Callable[[int, int, int], None] = os.posix_fallocate


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within, of a file descriptor, says where."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class Journal:
    """Records in ``folder``, appended and made durable in groups; newer files replace older ones.

    ``about``: what the blocks depend on. A journal that says anything else is not ours: it is
    thrown away, and so is one whose files are damaged from the first record on. ``sync`` False:
    a power cut may lose the latest records, which is safe and loses their blocks.

    Raises, by every method:
        OSError: the folder can't be used; the journal on the disk is a valid, shorter one.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, object], calls: DiskCalls, *, sync: bool = True
    ) -> None:
        self._folder = folder
        self._about = json.loads(json.dumps(about))
        self._calls = calls
        self._sync = sync
        self._generation = 0
        self._fd = -1
        self._next_fd = -1  # of the snapshot that is being written
        self.nbytes = 0
        self._next_nbytes = 0

    def load(self, num_slots: int, *, can_keep: bool = True) -> list[Kept]:
        """What the journal says is in slots 0 to ``num_slots - 1``; appending goes on behind it.

        ``can_keep`` False: the slots' bytes are gone, so the journal begins anew.
        """
        found = self._files()
        self._generation = max(found, default=0)
        kept: list[Kept] | None = None
        if can_keep and found:
            kept = self._replayed(found[self._generation], num_slots)
        if kept is None:
            self.start_snapshot()
            self.finish_snapshot()
        self._drop_others()
        return kept or []

    def append(self, records: Sequence[bytes]) -> None:
        """Write ``records``, all durable on return (where ``sync``)."""
        if not records:
            return
        frames = memoryview(b"".join(map(framed, records)))
        self._write(self._fd, frames)
        self.nbytes += len(frames)
        if self._next_fd >= 0:
            self._write(self._next_fd, frames)
            self._next_nbytes += len(frames)
        if self._sync:
            with naming(self._folder):
                self._calls.fdatasync(self._fd)

    def start_snapshot(self) -> None:
        """Begin a new file; until it is finished, what is appended goes into both."""
        self.drop_snapshot()
        header = {"version": _VERSION, "about": self._about}
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._next_fd = os.open(self._folder / "journal-next", flags, 0o600)
        self._next_nbytes = 0
        self.append_snapshot([json.dumps(header).encode()])

    def append_snapshot(self, records: Sequence[bytes]) -> None:
        """Write ``records`` into the new file only."""
        frames = memoryview(b"".join(map(framed, records)))
        self._write(self._next_fd, frames)
        self._next_nbytes += len(frames)

    def finish_snapshot(self) -> None:
        """The new file replaces the old one, in one step."""
        with naming(self._folder):
            self._calls.fdatasync(self._next_fd)
        path = self._folder / f"journal-{self._generation + 1:010}"
        os.rename(self._folder / "journal-next", path)  # noqa: PTH104  # beside its siblings
        _sync_folder(self._folder)
        self._generation += 1
        old_fd, self._fd, self._next_fd = self._fd, self._next_fd, -1
        self.nbytes = self._next_nbytes
        if old_fd >= 0:
            os.close(old_fd)
        self._drop_others()

    def drop_snapshot(self) -> None:
        """Give up the new file."""
        if self._next_fd >= 0:
            os.close(self._next_fd)
            self._next_fd = -1
        (self._folder / "journal-next").unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files; once more does nothing."""
        for fd in (self._fd, self._next_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._next_fd = -1

    def _files(self) -> dict[int, Path]:
        named = ((_NAME.fullmatch(path.name), path) for path in self._folder.iterdir())
        return {int(match[1]): path for match, path in named if match}

    def _replayed(self, path: Path, num_slots: int) -> list[Kept] | None:
        """The blocks that the file leaves, with the file open behind them; None: it is not ours."""
        size = path.stat().st_size
        if size > _MAX_JOURNAL_NBYTES:
            return None
        journal = memoryview(path.read_bytes())
        records = unframed(journal)
        header, end = next(records, (None, 0))
        if header is None:
            _log.warning("ssd: the journal %s is damaged: starting empty", path)
            return None
        wrong = self._difference(bytes(header))
        if wrong:
            _log.warning("ssd: what is in %s is of %s: starting empty", self._folder, wrong)
            return None
        replay = Replay(num_slots)
        for record, at in records:
            replay.take(record)
            end = at
        if end < size:
            _log.warning("ssd: the journal %s ends torn, %d bytes are cut off", path, size - end)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with naming(path):
            os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        self.nbytes = end
        return replay.kept()

    def _difference(self, header: bytes) -> str:
        """How the file's header differs from ours, in words; nothing if it does not."""
        try:
            found = json.loads(header)
        except ValueError:
            return "an unknown format"
        if found.get("version") != _VERSION:
            return f"format version {found.get('version')}, not {_VERSION}"
        theirs = found.get("about", {})
        keys = sorted(self._about.keys() | theirs.keys())
        wrong = [key for key in keys if self._about.get(key) != theirs.get(key)]
        return ", ".join(
            f"{key} {theirs.get(key)!r}, not {self._about.get(key)!r}" for key in wrong
        )

    def _drop_others(self) -> None:
        for generation, path in self._files().items():
            if generation != self._generation:
                path.unlink(missing_ok=True)
        if self._next_fd < 0:
            (self._folder / "journal-next").unlink(missing_ok=True)

    def _write(self, fd: int, frames: memoryview) -> None:
        while len(frames):
            with naming(self._folder):
                num_written = self._calls.write(fd, frames)
            frames = frames[num_written:]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)
