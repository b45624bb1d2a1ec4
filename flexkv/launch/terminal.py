"""What people see: prefixed lines, and below them what is waited for."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_MAX_WAITING = 10_000
_TICK_S = 1.0
_CLOSE_S = 2.0
_CLEAR = "\r\x1b[K"


class Terminal:
    """Writes from a thread: who does not read our output holds up nobody.

    Lines that find the queue full are left out and counted; logs have them all.
    """

    def __init__(self, stream: TextIO, max_waiting: int = _MAX_WAITING) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._lines: queue.Queue[str | None] = queue.Queue(max_waiting)
        self._num_left_out = 0
        self._progress = ""
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress = ""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(_CLOSE_S)

    def line(self, source: str, text: str) -> None:
        """One line of ``source``."""
        try:
            self._lines.put_nowait(f"[{source}] {text}")
        except queue.Full:
            self._num_left_out += 1

    def progress(self, text: str) -> None:
        """What is waited for; replaces what was said before. Empty: nothing."""
        if text != self._progress:
            self._progress = text
            if text and not self._is_terminal:
                self.line("launch", text)

    def _run(self) -> None:
        while True:
            try:
                line = self._lines.get(timeout=_TICK_S)
                if line is None:
                    self._write(_CLEAR if self._is_terminal else "")
                    return
            except queue.Empty:
                line = ""
            left_out, self._num_left_out = self._num_left_out, 0
            text = f"[launch] {left_out} lines left out here: see the logs\n" if left_out else ""
            text += f"{line}\n" if line else ""
            if self._is_terminal:
                text = f"{_CLEAR}{text}{self._progress}"
            self._write(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads, or it is closed
            if text:
                self._stream.write(text)
                self._stream.flush()
