"""One direction of the CUDA copier, on a device that is made up: bounds, cancellation, loss."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from flexkv.errors import TransferError
from flexkv.tiers.cuda_lane import Lane, Submitted


class HeldEvent:
    """An event that comes when it is told to."""

    def __init__(self) -> None:
        self.come = threading.Event()
        self.loss: RuntimeError | None = None

    def synchronize(self) -> None:
        assert self.come.wait(timeout=60)
        if self.loss is not None:
            raise self.loss

    def query(self) -> bool:
        if self.loss is not None:
            raise self.loss
        return self.come.is_set()


class MadeUp:
    """A channel that notes what is submitted."""

    def __init__(self) -> None:
        self.events: list[HeldEvent] = []
        self.parts: list[Any] = []
        self.error: RuntimeError | None = None  # not all of the next is submitted
        self.loss: Exception | None = None

    def submit(self, part: Any, after: object) -> Submitted:
        if self.loss is not None:
            raise self.loss
        self.parts.append((part, after))
        self.events.append(HeldEvent())
        error, self.error = self.error, None
        return Submitted(self.events[-1], error)


class Made:
    """A lane of two channels."""

    def __init__(self, max_slices: int = 4) -> None:
        self.channels = [MadeUp(), MadeUp()]
        self.losses: list[RuntimeError] = []
        self.lane = Lane("lane", self.channels, max_slices=max_slices, on_loss=self.losses.append)

    def copy(self, *parts: Any) -> asyncio.Task[None]:
        return asyncio.create_task(self.lane.copy(parts, "mark"))

    @property
    def num_submitted(self) -> int:
        return sum(len(channel.parts) for channel in self.channels)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # a thread makes it true
            await asyncio.sleep(0.001)


@pytest.fixture
def made() -> Made:
    return Made()


async def test_slices_go_to_the_streams_in_turn_with_the_mark(made: Made) -> None:
    task = made.copy("a", "b", "c")
    await turns()
    assert made.channels[0].parts == [("a", "mark"), ("c", "mark")]
    assert made.channels[1].parts == [("b", "mark")]
    for channel in made.channels:
        for event in channel.events:
            assert not task.done()
            event.come.set()
    await task
    made.lane.close()


async def test_no_more_slices_than_allowed_are_in_flight(made: Made) -> None:
    task = made.copy(*"abcdefgh")
    other = made.copy("i")
    await turns()
    assert made.num_submitted == 4
    for channel in made.channels:  # half of them
        channel.events[0].come.set()
    await until(lambda: made.num_submitted == 6)
    while not (task.done() and other.done()):
        for channel in made.channels:
            for event in channel.events:
                event.come.set()
        await asyncio.sleep(0.001)
    assert made.num_submitted == 9
    await asyncio.gather(task, other)
    made.lane.close()


async def test_a_cancelled_copy_begins_no_more_and_waits_for_what_has_begun(made: Made) -> None:
    task = made.copy(*"abcdefgh")
    await turns()
    for _ in range(3):
        task.cancel()
        await turns()
        assert not task.done()
    for channel in made.channels:
        for event in channel.events:
            event.come.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made.num_submitted == 4
    following = made.copy(*"ijkl")  # all places are free again
    await turns()
    assert made.num_submitted == 8
    for channel in made.channels:
        for event in channel.events:
            event.come.set()
    await following
    made.lane.close()


async def test_a_bug_in_a_launch_is_raised_and_keeps_no_place(made: Made) -> None:
    for channel in made.channels:
        channel.loss = KeyError("a bug")
    for _ in range(5):  # of 4 places
        with pytest.raises(KeyError):
            await made.copy("a")
    made.lane.close()


async def test_a_slice_that_can_not_be_launched_fails_its_copy_alone(made: Made) -> None:
    made.channels[1].error = RuntimeError("no such launch")
    task, other = made.copy("a", "b"), made.copy("c")
    await turns()
    made.channels[1].events[0].come.set()
    await turns()
    assert not task.done()  # its first slice runs
    for event in made.channels[0].events:
        event.come.set()
    with pytest.raises(TransferError, match="no such launch"):
        await task
    await other
    assert not made.losses
    made.lane.close()


async def test_after_a_failure_no_more_slices_begin(made: Made) -> None:
    made.channels[0].error = RuntimeError("no such launch")
    task = made.copy(*"abcdefgh")
    await turns()
    made.channels[0].events[0].come.set()
    await turns()
    for channel in made.channels:
        for event in channel.events:
            event.come.set()
    with pytest.raises(TransferError):
        await task
    assert made.num_submitted <= 5
    made.lane.close()


async def test_a_lost_device_fails_all_that_is_in_flight_and_what_follows(made: Made) -> None:
    tasks = [made.copy(i) for i in range(6)]
    await turns()
    loss = RuntimeError("lost")
    for channel in made.channels:
        channel.loss = loss
        for event in channel.events:
            event.loss = loss
            event.come.set()
    for task in tasks:
        with pytest.raises(TransferError, match="lost"):
            await task
    assert made.losses
    assert set(made.losses) == {loss}
    made.lane.close()


async def test_ends_that_came_together_wake_the_loop_once(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    report = made.lane._report

    def count(ended: list[Any]) -> None:
        calls.append(len(ended))
        report(ended)

    monkeypatch.setattr(made.lane, "_report", count)
    tasks = [made.copy(i) for i in range(4)]
    await turns()
    for event in (*made.channels[1].events, *made.channels[0].events[::-1]):
        event.come.set()  # the thread waits for the very first
    await asyncio.gather(*tasks)
    assert calls == [4]
    made.lane.close()


async def test_an_end_is_told_at_once_if_what_follows_belongs_to_another_copy(made: Made) -> None:
    first, second = made.copy("a"), made.copy("b", "c", "d")
    await turns()
    made.channels[0].events[0].come.set()
    await first
    assert not second.done()
    for channel in made.channels:
        for event in channel.events:
            event.come.set()
    await second
    made.lane.close()


async def test_nothing_to_copy_starts_no_thread(made: Made) -> None:
    await made.lane.copy([], None)
    assert made.lane._thread is None
    made.lane.close()


async def test_a_closed_lane_has_no_thread(made: Made) -> None:
    task = made.copy("a")
    await turns()
    made.channels[0].events[0].come.set()
    await task
    thread = made.lane._thread
    assert thread is not None
    made.lane.close()
    assert not thread.is_alive()
