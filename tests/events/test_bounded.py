"""Work that takes no notice of a cancellation has its deadline all the same."""

from __future__ import annotations

import asyncio

import pytest

from flexkv.events.bounded import bounded

DEADLINE_S = 20.0


class Stubborn:
    """Goes on until it was cancelled so many times."""

    def __init__(self, num_cancels: int) -> None:
        self.num_left = num_cancels
        self.begun = asyncio.Event()

    async def work(self) -> None:
        self.begun.set()
        while self.num_left:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.num_left -= 1


@pytest.mark.parametrize("num_cancels", [1, 3])
async def test_it_ends_at_its_deadline(num_cancels: int) -> None:
    stubborn = Stubborn(num_cancels)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(TimeoutError):
            await bounded(stubborn.work(), 0.01)
    assert not stubborn.num_left


async def test_it_ends_with_its_caller() -> None:
    stubborn = Stubborn(2)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        caller = tasks.create_task(bounded(stubborn.work()))
        await stubborn.begun.wait()
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()
    assert not stubborn.num_left


async def test_what_comes_of_it_in_time_is_handed_on() -> None:
    async def failing() -> None:
        raise ValueError("as it is")

    await bounded(asyncio.sleep(0), 10)
    await bounded(asyncio.sleep(0))
    with pytest.raises(ValueError, match="as it is"):
        await bounded(failing(), 10)
