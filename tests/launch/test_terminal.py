"""Lines for people, whether they read them or not."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from flexkv.launch.logs import Follower, last_lines
from flexkv.launch.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path


def test_who_does_not_read_holds_up_nobody() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as stream:
        os.set_blocking(writing, True)
        terminal = Terminal(stream, max_waiting=10)
        with terminal:
            for _ in range(1000):
                terminal.line("worker0", "x" * 1000)  # far more than a pipe holds
            assert terminal.num_left_out > 0
            os.set_blocking(writing, False)  # so that the test can end


def test_lines_have_their_source_and_progress_is_said_once_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Terminal(stream) as terminal:
        terminal.progress("waiting for worker0")
        terminal.progress("waiting for worker0")
        terminal.line("worker0", "loading")
    assert stream.getvalue() == "[launch] waiting for worker0\n[worker0] loading\n"


def test_a_log_is_followed_by_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    follower = Follower(log)
    assert follower.lines() == []
    log.write_bytes(b"one\ntw")
    assert follower.lines() == ["one"]
    with log.open("ab") as file:
        file.write(b"o\n10%\r20%\n\xff\n")
    assert follower.lines() == ["two", "10%", "20%", "\ufffd"]
    assert last_lines(log, 2) == ["20%", "\ufffd"]
