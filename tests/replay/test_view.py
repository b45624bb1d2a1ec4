"""What is shown while a replay runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flexkv.replay import view
from flexkv.replay.stage import Settings
from flexkv.replay.workload import conversations
from tests.replay.local_stage import local_stage

WORKLOAD = conversations(60, seed=1, tokens_per_block=16)
SETTINGS = Settings(block_nbytes=512)


async def shown_text(*, is_terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=120)
    async with local_stage(WORKLOAD, SETTINGS) as stage, view.shown(stage, console):
        await stage.run()
    return text.getvalue()


async def test_a_terminal_sees_hit_rate_tiers_events_and_lanes() -> None:
    text = await shown_text(is_terminal=True)
    for name in ("conversations", "hit rate", "blocks per tier", "host", "events", "lanes", "60"):
        assert name in text


async def test_a_log_gets_lines_without_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_LINE_S", 0.001)
    text = await shown_text(is_terminal=False)
    assert "of 60 requests; hit rate: 0 " in text
    assert "\x1b" not in text


async def test_an_error_in_the_body_ends_the_view_and_is_raised() -> None:
    async def fails_while_shown() -> None:
        console = Console(file=io.StringIO())
        async with local_stage(WORKLOAD, SETTINGS) as stage, view.shown(stage, console):
            raise ConnectionError

    with pytest.raises(ExceptionGroup) as caught:
        await fails_while_shown()
    assert caught.group_contains(ConnectionError)
