from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests import virtual_time
from tests.virtual_time import DeadlockError, VirtualTimeLoop, run_virtual

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_a_sleep_of_hours_takes_exactly_its_time_on_the_clock() -> None:
    async def scenario() -> list[float]:
        times = [now_s()]
        for delay_s in (3600, 0.25, 0):
            await asyncio.sleep(delay_s)
            times.append(now_s())
        return times

    assert run_virtual(scenario()) == [0, 3600, 3600.25, 3600.25]


def test_timers_fire_in_the_order_of_their_times() -> None:
    async def scenario() -> list[tuple[float, str]]:
        fired: list[tuple[float, str]] = []

        async def after(delay_s: float, name: str) -> None:
            await asyncio.sleep(delay_s)
            fired.append((now_s(), name))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(after(20, "late"))
            tasks.create_task(after(5, "early"))
            tasks.create_task(after(10, "between"))
        return fired

    assert run_virtual(scenario()) == [(5, "early"), (10, "between"), (20, "late")]


def test_a_deadline_passes_without_real_waiting() -> None:
    async def scenario() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return now_s()

    assert run_virtual(scenario()) == 30


def test_the_clock_stands_still_while_an_executor_job_runs() -> None:
    async def scenario() -> tuple[str, float]:
        may_end = threading.Event()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(1, lambda: None)  # the clock must not jump to it
        job = loop.run_in_executor(None, lambda: may_end.wait(30) and "done")
        await asyncio.sleep(0)
        # Only another thread can end the job: the loop has to wait for real.
        releaser = threading.Timer(0.02, may_end.set)
        releaser.start()
        result = await job
        timer.cancel()
        releaser.join()
        return str(result), now_s()

    assert run_virtual(scenario()) == ("done", 0)


def test_a_cancelled_wait_does_not_make_the_clock_run_on_before_the_job_is_over() -> None:
    async def scenario() -> tuple[bool, float]:
        begun, may_end = threading.Event(), threading.Event()
        over = False

        def job() -> None:
            nonlocal over
            begun.set()
            may_end.wait(30)
            over = True

        with ThreadPoolExecutor(1) as executor:
            wait = asyncio.get_running_loop().run_in_executor(executor, job)
            begun.wait(30)
            wait.cancel()
            releaser = threading.Timer(0.02, may_end.set)
            releaser.start()
            await asyncio.sleep(5)
            seen = over
            releaser.join()
        return seen, now_s()

    assert run_virtual(scenario()) == (True, 5)


def test_a_job_that_never_began_and_was_cancelled_lets_the_clock_go_on() -> None:
    async def scenario() -> float:
        may_end = threading.Event()
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as executor:
            running = loop.run_in_executor(executor, may_end.wait, 30)
            queued = loop.run_in_executor(executor, may_end.wait, 30)
            queued.cancel()
            may_end.set()
            await running
            await asyncio.sleep(7)
        return now_s()

    assert run_virtual(scenario()) == 7


def test_the_error_of_an_executor_job_arrives() -> None:
    async def scenario() -> None:
        await asyncio.get_running_loop().run_in_executor(None, int, "no number")

    with pytest.raises(ValueError, match="no number"):
        run_virtual(scenario())


@pytest.mark.parametrize("num_jobs", [1, 50])
def test_jobs_and_timers_mix(num_jobs: int) -> None:
    async def scenario() -> tuple[list[int], float]:
        async def step(i: int) -> int:
            await asyncio.sleep(i)
            return await asyncio.to_thread(lambda: i)

        async with asyncio.TaskGroup() as tasks:
            steps = [tasks.create_task(step(i)) for i in range(num_jobs)]
        return [done.result() for done in steps], now_s()

    assert run_virtual(scenario()) == (list(range(num_jobs)), num_jobs - 1)


def test_a_thread_of_ones_own_is_waited_for_when_it_is_announced() -> None:
    async def scenario() -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        called: asyncio.Future[str] = loop.create_future()
        thread = threading.Timer(
            0.02, loop.call_soon_threadsafe, [called.set_result, "from a thread"]
        )
        with loop.thread_at_work():
            thread.start()
            result = await asyncio.wait_for(called, 1)
        thread.join()
        return result, now_s()

    assert run_virtual(scenario()) == ("from a thread", 0)


async def wait_for_nothing() -> None:
    await asyncio.Event().wait()


async def wait_for_a_lock_of_its_own() -> None:
    lock = asyncio.Lock()
    async with lock, lock:
        pass


@pytest.mark.parametrize("stuck", [wait_for_nothing, wait_for_a_lock_of_its_own])
def test_a_deadlock_is_an_error_that_names_who_waits(stuck: Callable[[], Awaitable[None]]) -> None:
    async def scenario() -> None:
        await asyncio.sleep(3)
        await stuck()

    with pytest.raises(DeadlockError, match=r"at 3 s nothing is ready.*scenario"):
        run_virtual(scenario())


def test_a_deadlock_that_heart_beats_hide_is_an_error_as_well() -> None:
    beats: list[float] = []

    async def heart() -> None:
        while True:
            await asyncio.sleep(1)
            beats.append(now_s())

    async def scenario() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(heart())
            await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match=r"100 virtual seconds have passed.*heart"):
        run_virtual(scenario(), limit_s=100)
    assert beats == list(range(1, 101))


def test_a_thread_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_time, "THREAD_LIMIT_S", 0.02)
    may_end = threading.Event()

    async def scenario() -> None:
        job = asyncio.get_running_loop().run_in_executor(None, may_end.wait, 30)
        try:
            await job
        finally:
            may_end.set()

    with pytest.raises(DeadlockError, match="1 jobs in threads did not end"):
        run_virtual(scenario())


def test_what_a_deadlock_left_behind_is_cancelled() -> None:
    cleaned: list[str] = []

    async def scenario() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            cleaned.append("slots")

    with pytest.raises(DeadlockError):
        run_virtual(scenario())
    assert cleaned == ["slots"]


def test_sockets_are_refused() -> None:
    async def scenario() -> None:
        with socket.socket() as listener:
            asyncio.get_running_loop().add_reader(listener, lambda: None)

    with pytest.raises(RuntimeError, match="no sockets in virtual time"):
        run_virtual(scenario())


def test_two_runs_of_a_scenario_are_the_same() -> None:
    async def scenario() -> list[tuple[float, int]]:
        order: list[tuple[float, int]] = []
        turn = asyncio.Semaphore(3)

        async def worker(i: int) -> None:
            async with turn:
                await asyncio.sleep((i * 7) % 5 + 1)
                order.append((now_s(), i))

        async with asyncio.TaskGroup() as tasks:
            for i in range(30):
                tasks.create_task(worker(i))
        return order

    first = run_virtual(scenario())
    assert len(first) == 30
    assert run_virtual(scenario()) == first
