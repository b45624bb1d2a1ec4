"""Who is cancelled, or fails, on the way between host and SSD keeps no slots, leases or room."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from flexkv import Tier
from tests.engine.chains import chain
from tests.engine.test_disk import A, C, bench
from tests.tiers.disks import writes_held_until

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from flexkv.engine.shared_index import SharedIndex


def num_held(shared: SharedIndex) -> int:
    """Slots that could not be had now, were they wanted."""
    index = shared._index
    return index.num_slots - index.num_free - index.num_evictable


@pytest.mark.parametrize("step", ["plan_store", "commit"])
async def test_a_writer_that_is_cancelled_between_two_chains_holds_nothing(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    calls = writes_held_until(go_on)
    settings: dict[str, Any] = {"num_host_slots": 64, "close_timeout_s": 0.05}
    async with bench(tmp_path / "ssd", calls=calls, **settings) as b:
        below = b.engine._below
        index, writing = below._disk.index, below._writing
        b.copier.compute(A, range(4))
        await b.engine.store(A, range(4))
        for i in range(4):  # they wait for it, and then go together
            b.copier.compute(chain(i, i), [0, 1])
            await b.engine.store(chain(i, i), [0, 1])
        real = getattr(index, step)
        num_left = 2 if step == "plan_store" else 3  # A's commit is not one of theirs

        def cancelling(*arguments: Any) -> Any:
            nonlocal num_left
            num_left -= 1
            if not num_left:
                writing.cancel()
            return real(*arguments)

        monkeypatch.setattr(index, step, cancelling)
        go_on.set()
        await asyncio.wait([writing], timeout=30)
        assert writing.cancelled()
        below._writer.drop()
        assert num_held(index) == num_held(b.engine._host) == 0
        assert below._writer.nbytes == 0
        assert set(A) <= b.held(Tier.SSD)
    await below._disk.close()


class Tasks:
    """A task group whose next task ends before its first step, or is not made at all."""

    def __init__(self, real: asyncio.TaskGroup, *, refuses: bool) -> None:
        self._real = real
        self._refuses = refuses

    def create_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._refuses:
            raise RuntimeError("the group is shutting down")
        task = self._real.create_task(work)
        task.cancel()
        return task


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_chunk_whose_task_never_begins_gives_back_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, refuses: bool
) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        await b.store(C)
        risings = b.engine._below._risings
        with monkeypatch.context() as patched:
            patched.setattr(risings, "_tasks", Tasks(risings._tasks, refuses=refuses))
            if refuses:
                with pytest.raises(RuntimeError, match="shutting down"):
                    await b.load(A)
            else:
                assert (await b.load(A)).num_blocks == 0
        assert risings._room.nbytes_in_flight == 0
        assert num_held(b.engine._host) == 0
        assert (await b.load(A)).num_blocks == 4


async def test_a_rising_that_fails_after_its_first_chunk_gives_its_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path / "ssd") as b:
        await b.store(A)
        await b.store(C)
        risings = b.engine._below._risings
        real, plans = b.engine._host.plan_store, []

        def failing(*arguments: Any) -> Any:
            if plans:
                raise MemoryError
            plans.append(real(*arguments))
            return plans[0]

        with monkeypatch.context() as patched:
            patched.setattr(b.engine._host, "plan_store", failing)
            with pytest.raises(MemoryError):
                await b.load(A)
        await asyncio.wait(risings._running, timeout=30)
        await asyncio.sleep(0)
        assert risings._room.nbytes_in_flight == 0
        assert num_held(b.engine._host) == 0
        assert (await b.load(A)).num_blocks == 4
