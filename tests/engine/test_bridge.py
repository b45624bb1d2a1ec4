"""A loop in a thread of its own: how it starts, answers and ends."""

from __future__ import annotations

import threading

import pytest

from flexkv.engine.bridge import LoopThread
from flexkv.errors import EngineClosedError, FeedError

LIMIT_S = 10.0


async def until_stopped(thread: LoopThread) -> None:
    thread.ready()
    await thread.stopping.wait()


def test_calls_run_in_their_order_on_the_loops_thread() -> None:
    seen: list[tuple[int, str]] = []
    thread = LoopThread("a-loop", until_stopped)
    thread.start(LIMIT_S)
    for i in range(3):
        assert thread.call(lambda i=i: seen.append((i, threading.current_thread().name)))
    assert thread.ask(lambda: "an answer", LIMIT_S) == "an answer"
    assert seen == [(0, "a-loop"), (1, "a-loop"), (2, "a-loop")]
    assert thread.stop(LIMIT_S)


def test_a_loop_that_has_ended_says_so() -> None:
    thread = LoopThread("a-loop", until_stopped)
    thread.start(LIMIT_S)
    assert thread.alive
    assert thread.stop(LIMIT_S)
    assert not thread.alive
    assert not thread.call(lambda: None)
    assert thread.stop(LIMIT_S)
    with pytest.raises(EngineClosedError):
        thread.ask(lambda: None, LIMIT_S)


def test_what_ends_the_loop_before_it_is_ready_reaches_who_starts_it() -> None:
    async def fail(_: LoopThread) -> None:
        raise FeedError("no such thing")

    with pytest.raises(FeedError, match="no such thing"):
        LoopThread("a-loop", fail).start(LIMIT_S)


def test_a_loop_that_is_not_ready_in_time_is_told_to_stop() -> None:
    ended = threading.Event()

    async def late(thread: LoopThread) -> None:
        await thread.stopping.wait()
        ended.set()

    with pytest.raises(EngineClosedError, match=r"a-loop was not ready within 0\.01 s"):
        LoopThread("a-loop", late).start(0.01)
    assert ended.wait(LIMIT_S)


def test_a_loop_that_is_busy_does_not_hold_up_who_asks() -> None:
    go_on = threading.Event()
    asked: list[None] = []
    thread = LoopThread("a-loop", until_stopped)
    thread.start(LIMIT_S)
    thread.call(lambda: go_on.wait(LIMIT_S))
    with pytest.raises(EngineClosedError, match=r"did not answer within 0\.01 s"):
        thread.ask(lambda: asked.append(None), 0.01)
    go_on.set()
    assert thread.stop(LIMIT_S)
    assert asked == []  # nor is it done later, when nobody expects it


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_ends_the_loop_and_is_seen_from_outside() -> None:
    async def buggy(thread: LoopThread) -> None:
        thread.ready()
        await thread.stopping.wait()
        raise AssertionError("a bug")

    thread = LoopThread("a-loop", buggy)
    thread.start(LIMIT_S)
    assert thread.stop(LIMIT_S)
    assert not thread.alive
    assert isinstance(thread.error, AssertionError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_runs_is_ended_in_order_even_if_the_loop_is_stopped_from_outside() -> None:
    ended = threading.Event()

    async def work(thread: LoopThread) -> None:
        thread.ready()
        try:
            await thread.stopping.wait()
        finally:
            ended.set()

    def stop() -> None:
        raise SystemExit

    thread = LoopThread("a-loop", work)
    thread.start(LIMIT_S)
    thread.call(stop)
    assert ended.wait(LIMIT_S)
    assert thread.stop(LIMIT_S)
    assert isinstance(thread.error, SystemExit)
