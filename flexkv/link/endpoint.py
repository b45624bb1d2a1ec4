"""Where an engine listens, and the lock that lets only one engine listen there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.link.errors import EndpointTakenError, LinkError
from flexkv.process import Process, host_name

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_SOCKET_PATH = 107  # bytes; Linux's sun_path, less the NUL
_MAX_TRIES = 100
_SWEEP_S = 0.01
_FRESH_S = 60.0


def default_endpoint(
    engine_id: str, dp_rank: int | None = None, env: Mapping[str, str] = os.environ
) -> str:
    """Where engine and workers meet if no endpoint is given: what both know decides.

    Raises:
        LinkError: there is no private folder for it, or its path is too long.
    """
    name = engine_id
    if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        name = _digest(engine_id)
    if dp_rank is not None:
        name += f".dp{dp_rank}"
    folder = private_folder(env)
    if len(os.fsencode(folder / name)) > _MAX_SOCKET_PATH:
        name = _digest(name)
    return _checked(f"ipc://{folder / name}")


def with_dp_rank(endpoint: str, dp_rank: int) -> str:
    """``endpoint`` for one data-parallel rank: ``.dp<rank>`` behind a path, or the next port.

    Raises:
        LinkError: there is no such port, or the path is too long.
    """
    if endpoint.startswith("ipc://"):
        return _checked(f"{endpoint}.dp{dp_rank}")
    head, _, port = endpoint.rpartition(":")
    if not (head.startswith("tcp://") and port.isdecimal()):
        raise LinkError(endpoint, "an endpoint is ipc://PATH or tcp://HOST:PORT")
    if not 0 < int(port) + dp_rank < 2**16:
        raise LinkError(endpoint, f"there is no port {int(port) + dp_rank} for rank {dp_rank}")
    return f"{head}:{int(port) + dp_rank}"


def private_folder(env: Mapping[str, str] = os.environ) -> Path:
    """A folder that only this user can enter; made if need be.

    Raises:
        LinkError: it is somebody else's, or can't be made.
    """
    runtime = env.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        folder = Path(runtime) / "flexkv"
    else:
        folder = Path(tempfile.gettempdir()) / f"flexkv-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise LinkError(f"ipc://{folder}", f"the folder can't be made: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise LinkError(
            f"ipc://{folder}",
            "this must be a folder of this user alone (mode 0700): remove it, or set "
            "server_recv_port",
        )
    return folder


def socket_path(endpoint: str) -> Path | None:
    """The socket file of an ipc endpoint; None where there is no file."""
    path = endpoint.removeprefix("ipc://")
    return None if path == endpoint or path.startswith("@") else Path(path)


def lock_path(endpoint: str) -> Path:
    """The file that whoever listens at ``endpoint`` holds locked, and names itself in.

    Raises:
        LinkError: there is no private folder for it.
    """
    if path := socket_path(endpoint):
        return path.with_name(path.name + ".lock")
    return private_folder() / f"{_digest(endpoint)}.lock"


class EndpointLock:
    """Held by the one engine that listens at ``endpoint``.

    The kernel lets go of it when the process ends, however it ends. Its file names the owner.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._fd: int | None = None
        self._path = Path()

    def take(self) -> None:
        """Take it, or fail at once.

        Raises:
            EndpointTakenError: another engine has it.
            LinkError: the lock file can't be made.
        """
        try:
            self._path = lock_path(self._endpoint)
            if self._path.parent == private_folder():
                _sweep(self._path.parent)
            self._fd = self._locked()
        except FileNotFoundError:
            raise LinkError(
                self._endpoint,
                f"the folder {self._path.parent} does not exist: make it, or set another "
                "server_recv_port",
            ) from None
        except OSError as error:
            raise LinkError(
                self._endpoint,
                f"can't lock {self._path}: {error.strerror}: set another server_recv_port",
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()} {host_name()}\n".encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Let the next engine have it; the socket file must be gone by now."""
        if self._fd is not None:
            _held.discard(self)
            self._path.unlink(missing_ok=True)  # while it is still ours
            self.forget()

    def forget(self) -> None:
        """Close the file: what a forked child does, so that it never holds the parent's lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _locked(self) -> int:
        for _ in range(_MAX_TRIES):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(fd, self._path):
                    return fd
            except BlockingIOError:
                pid, host = _owner_of(fd)
                if pid is None or host != host_name() or Process(pid).is_alive():
                    raise EndpointTakenError(self._endpoint, pid, host) from None
                time.sleep(_SWEEP_S)  # somebody is sweeping up what the dead owner has left
                continue
            except OSError:
                os.close(fd)
                raise
            os.close(fd)  # its owner removed it between our two steps
        raise EndpointTakenError(self._endpoint, None)


_held: weakref.WeakSet[EndpointLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


def _sweep(folder: Path) -> None:
    """Remove what engines that were killed have left: their names never come again."""
    now_s = time.time()
    for path in folder.glob("*.lock"):
        with contextlib.suppress(OSError):  # another engine's, or another sweeper was faster
            if now_s - path.lstat().st_mtime < _FRESH_S:
                continue  # its owner may be about to lock it
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(fd, path):
                    path.with_suffix("").unlink(missing_ok=True)
                    path.unlink()
            finally:
                os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _owner_of(fd: int) -> tuple[int | None, str]:
    """Pid and host of the lock's owner. Closes ``fd``."""
    try:
        for _ in range(10):
            pid, _, host = os.pread(fd, 512, 0).decode(errors="replace").partition(" ")
            if pid.isdecimal() and host.endswith("\n"):
                return int(pid), host.strip()
            time.sleep(0.01)  # the owner took it just now, and is about to sign
        return None, ""
    finally:
        os.close(fd)


def _checked(endpoint: str) -> str:
    path = endpoint.removeprefix("ipc://")
    if (length := len(os.fsencode(path))) > _MAX_SOCKET_PATH:
        raise LinkError(
            endpoint,
            f"the path has {length} bytes, and a socket's may have {_MAX_SOCKET_PATH}: set a "
            "shorter server_recv_port or TMPDIR",
        )
    return endpoint


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]
