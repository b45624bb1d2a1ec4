"""Slot files: preallocated, one for each folder, and locked to one process."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.errors import ConfigError
from flexkv.tiers.ssd_journal import naming

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexkv.tiers.ssd_journal import DiskCalls

_log = logging.getLogger(__name__)

_PROBE_NBYTES = 4096
_NO_MISTAKES = {  # of a configuration, but what a disk does
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENODEV,
    errno.ENXIO,
    errno.ESTALE,
}
_NO_LOCKS = {  # on that file system, ever
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EBADF,
}


class FolderLock:
    """One process on one folder. The system takes the lock back when the process dies.

    Raises:
        ConfigError: another process has it, or it can't be made or locked by this user, or there.
        OSError: its disk fails, is full or read-only.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in _NO_MISTAKES:
                raise
            raise ConfigError(
                f"ssd_cache_dir {folder} can't be used ({error.strerror}): give a folder that this "
                "user may write to"
            ) from error
        try:
            self._take(folder)
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, folder: Path) -> None:
        try:
            with naming(folder):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            whose = f"process {owner}" + (", this one" if owner == str(os.getpid()) else "")
            raise ConfigError(
                f"ssd_cache_dir {folder} is in use by {whose}: name it once, and give each engine "
                "a folder of its own"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise ConfigError(
                f"ssd_cache_dir {folder} can't be locked ({error.strerror}): give a folder on a "
                "file system that knows flock, such as a local disk's"
            ) from error
        with naming(folder):
            os.ftruncate(self._fd, os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0))

    def release(self) -> None:
        """Let others have the folder; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SlotFiles:
    """``num_slots`` slots of ``slot_nbytes`` in turn over ``folders``, in one file each.

    ``is_direct``: past the page cache, in all folders. ``had_all``: the files were there before, of
    a size that can hold what the journal names.

    Raises:
        OSError: no room, or a folder can't be used. What was made is gone again.
    """

    def __init__(
        self, folders: Sequence[Path], num_slots: int, slot_nbytes: int, calls: DiskCalls
    ) -> None:
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self.fds: list[int] = []
        self.had_all = True
        self._inodes: list[tuple[Path, tuple[int, int]]] = []
        self._calls = calls
        self.is_direct = all(list(map(_takes_direct_io, folders)))  # each is asked, and warned of
        try:
            for i, folder in enumerate(folders):
                num_here = len(range(i, num_slots, len(folders)))
                path = folder / f"slots-{i + 1}of{len(folders)}"
                for other in set(folder.glob("slots-*")) - {path}:
                    other.unlink()  # of other folders or another order: of no use any more
                self._open(path, num_here * slot_nbytes)
        except BaseException:
            self.close()
            raise

    def place(self, slot: int) -> tuple[int, int]:
        """Which file, and where in it."""
        number, which = divmod(slot, len(self.fds))
        return which, number * self.slot_nbytes

    def named(self, error: OSError, which: int) -> OSError:
        """``error`` with the name of the file that it came from."""
        return OSError(error.errno, error.strerror, str(self._inodes[which][0]))

    def devices(self) -> dict[Path, int]:
        """Which file system each folder is on."""
        return {path.parent: device for path, (device, _) in self._inodes}

    def sync(self) -> None:
        """What was written is durable."""
        for which, fd in enumerate(self.fds):
            try:
                self._calls.fdatasync(fd)
            except OSError as error:
                raise self.named(error, which) from error

    def check(self) -> None:
        """The files are still where they were.

        Raises:
            OSError: one is not.
        """
        for path, inode in self._inodes:
            found = path.stat()
            if (found.st_dev, found.st_ino) != inode:
                raise FileNotFoundError(errno.ENOENT, "replaced by another file", str(path))

    def close(self) -> None:
        """Let go of the files; once more does nothing."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def _open(self, path: Path, nbytes: int) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if self.is_direct else 0)
        is_new = not path.exists()
        fd = os.open(path, flags | os.O_CREAT, 0o600)
        size = os.fstat(fd).st_size
        try:
            with naming(path):
                if size > nbytes:
                    os.ftruncate(fd, nbytes)
                if nbytes:  # an existing file may have holes
                    self._calls.posix_fallocate(fd, 0, nbytes)
        except OSError as error:  # ext4 leaves a file as far as it got, and the disk full
            os.close(fd)
            path.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC:
                raise _too_large(path, nbytes) from error
            raise
        self.had_all &= not is_new
        self.fds.append(fd)
        made = os.fstat(fd)
        self._inodes.append((path, (made.st_dev, made.st_ino)))


def _too_large(path: Path, nbytes: int) -> OSError:
    found = os.statvfs(path.parent)
    text = (
        f"{os.strerror(errno.ENOSPC)}: its slots take {nbytes} bytes, and "
        f"{found.f_bavail * found.f_frsize} are free: make room, or lower num_ssd_blocks or "
        "ssd_cache_gb"
    )
    return OSError(errno.ENOSPC, text, str(path))


def erase(folders: Sequence[Path], devices: Mapping[Path, int]) -> None:
    """Without the slot files a later start finds nothing in ``folders``, which nobody may use now.

    ``devices``: the file systems that they were on, as far as that is known.

    Raises:
        OSError: one of them can't be changed, is not there, or is not mounted any more.
        ConfigError: another process uses one.
    """
    for folder in folders:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            device = os.fstat(fd).st_dev
            if devices.get(folder, device) != device:
                raise OSError(errno.ENODEV, "another file system is mounted there", str(folder))
            lock = FolderLock(folder)
            try:
                for path in folder.glob("slots-*"):
                    path.unlink()
                os.fsync(fd)
            finally:
                lock.release()
        finally:
            os.close(fd)


def failing(folders: Sequence[Path], error: OSError, *, had_slots: bool) -> list[Path]:
    """The folders that ``error`` names or that can't be written to; all where it is none.

    ``had_slots``: the slot files were there, so who has none now was replaced. False: those that
    ``error`` does not name may not have been made.
    """
    found = [f for f in folders if error.filename and _concerns(f, Path(error.filename))]
    if had_slots or not found:
        found += [f for f in folders if f not in found and not _is_usable(f, had_slots=had_slots)]
    return found or list(folders)


def _concerns(folder: Path, path: Path) -> bool:
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _is_usable(folder: Path, *, had_slots: bool) -> bool:
    try:
        fd = os.open(folder / "probe", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, bytes(_PROBE_NBYTES), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
            (folder / "probe").unlink()
    except OSError:
        return False
    return not had_slots or any(folder.glob("slots-*"))


def _takes_direct_io(folder: Path) -> bool:
    reason = direct_io_refusal(folder)
    if reason is not None:
        _log.warning(
            "ssd: %s does not take direct I/O (%s): falling back to buffered I/O, which costs 5 "
            "times the CPU and takes page cache",
            folder,
            reason,
        )
    return reason is None


def direct_io_refusal(folder: Path) -> str | None:
    """Why ``folder`` does not take direct I/O; None if it does.

    Tried: what a file system says about O_DIRECT is not what it does.
    """
    path = folder / "probe"
    expected = os.urandom(_PROBE_NBYTES)
    buffer = mmap.mmap(-1, 2 * _PROBE_NBYTES)
    view = memoryview(buffer)
    try:
        view[:_PROBE_NBYTES] = expected
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            os.pwritev(fd, [view[:_PROBE_NBYTES]], 0)
            os.preadv(fd, [view[_PROBE_NBYTES:]], 0)
        finally:
            os.close(fd)
        reason = None
        if bytes(view[_PROBE_NBYTES:]) != expected:
            reason = "it reads back other bytes"
    except OSError as error:
        reason = str(error.strerror)
    finally:
        path.unlink(missing_ok=True)
        view.release()
        buffer.close()
    return reason
