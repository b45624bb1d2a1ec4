"""``deployment.json``: what runs, for ``flexkv doctor`` and for programs beside the launcher."""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

from flexkv.errors import ConfigError
from flexkv.process import Process

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

NAME = "deployment.json"
_LOCK = "launch.lock"


class Record:
    """The file and the lock of one folder: one launcher at a time.

    Raises:
        ConfigError: another launcher has the folder, or what one started runs still.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._folder = folder
        self._fd = -1
        self.document: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self._folder / _LOCK, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"--folder {self._folder} can't be written ({error.strerror}): give another one"
            ) from None
        try:
            self._take()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def _take(self) -> None:
        before = _read(self._path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"a deployment of pid {before.get('pid')} runs in {self._folder}: end it "
                "(Ctrl-C), or give another --folder"
            ) from None
        if alive := _survivors(before):
            groups = " ".join(f"-{pid}" for pid in alive)
            raise ConfigError(
                f"what an earlier launch started in {self._folder} runs still: end it with: "
                f"kill -- {groups}"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def write(self) -> None:
        """Replace the file by ``document``: whoever reads sees the old one or the new one."""
        draft = self._path.with_name(f"{NAME}.new")
        draft.write_text(json.dumps(self.document, indent=2) + "\n", encoding="utf-8")
        draft.replace(self._path)


def started_of(pid: int | None) -> str | None:
    """Tells the process from a later one with its pid."""
    return Process(pid).started if pid is not None else None


def _survivors(document: dict[str, Any]) -> list[int]:
    """Processes of an earlier launch that its launcher did not end."""
    started = document.get("started")
    if not isinstance(started, dict):
        return []
    return [int(pid) for pid, ticks in started.items() if ticks and started_of(int(pid)) == ticks]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
