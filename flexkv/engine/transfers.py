"""Runs copies in chunks: bounded in bytes, each wait with a deadline, each copy to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from flexkv.errors import TransferError

if TYPE_CHECKING:
    from array import array
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from flexkv.config import TransfersConfig
    from flexkv.tiers.base import PagedCopier

_log = logging.getLogger(__name__)


class Lane:
    """Bounds the bytes in flight in one direction; who comes first goes first.

    A copy that is larger than the bound goes alone.
    """

    def __init__(self, max_bytes: int, deadline_s: float) -> None:
        self.nbytes_in_flight = 0
        self._is_closed = False
        self._max_bytes = max_bytes
        self._deadline_s = deadline_s
        self._waiting: dict[asyncio.Future[None], int] = {}  # in order of arrival

    def turn_away(self) -> None:
        """Those who wait for room, and those who come, get a TransferError."""
        self._is_closed = True
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(TransferError("the engine is closing"))
        self._waiting.clear()

    def has_room(self, nbytes: int) -> bool:
        """Whether ``enter`` would not wait."""
        return self._is_closed or (not self._waiting and self._fits(nbytes))

    async def enter(self, nbytes: int) -> None:
        """Take room for ``nbytes``, to be given back by ``leave``.

        Raises:
            TransferError: there was none within the deadline.
        """
        if self._is_closed:
            raise TransferError("the engine is closing")
        if self.has_room(nbytes):
            self.nbytes_in_flight += nbytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = nbytes
        try:
            async with asyncio.timeout(self._deadline_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave(nbytes)  # it was our turn, just too late
            else:
                self._waiting.pop(turn, None)
                self._admit()  # whoever came after may fit
            if isinstance(error, TimeoutError):
                raise TransferError(f"waited {self._deadline_s} s for other copies") from None
            raise

    def leave(self, nbytes: int) -> None:
        """Give room back."""
        self.nbytes_in_flight -= nbytes
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            turn, nbytes = next(iter(self._waiting.items()))
            if not self._fits(nbytes):
                break
            del self._waiting[turn]
            if not turn.cancelled():
                self.nbytes_in_flight += nbytes
                turn.set_result(None)

    def _fits(self, nbytes: int) -> bool:
        return not self.nbytes_in_flight or self.nbytes_in_flight + nbytes <= self._max_bytes


class Transfers:
    """Copies between the paged caches of all ranks and the host pool.

    Each copy is a task of ``tasks``. A caller that is cancelled stops the chunks that have not
    begun; it waits for those that have, because they still use the caller's GPU blocks.
    """

    def __init__(
        self, settings: TransfersConfig, block_nbytes: int, tasks: asyncio.TaskGroup
    ) -> None:
        self._loads = Lane(settings.max_load_bytes, settings.deadline_s)
        self._stores = Lane(settings.max_store_bytes, settings.deadline_s)
        self._block_nbytes = block_nbytes
        self._num_chunk_blocks = max(1, settings.chunk_bytes // block_nbytes)
        self._tasks = tasks
        self._running: set[asyncio.Task[bool]] = set()
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.copiers: dict[int, PagedCopier] = {}

    @property
    def lanes(self) -> Mapping[str, int]:
        """Bytes in flight, by direction."""
        return {
            "load": self._loads.nbytes_in_flight,
            "store": self._stores.nbytes_in_flight,
        }

    async def load(
        self, slots: array[int], block_ids: Sequence[int], marks: Mapping[int, object]
    ) -> int:
        """Copy ``slots`` into GPU blocks. Returns how many leading blocks arrived, on all ranks.

        ``marks``: of each rank, the work on its cache that the copy has to follow.
        """
        copiers = self.copiers.items()
        return await self._run(
            self._loads,
            [
                [
                    partial(copier.scatter, slots[part], block_ids[part], marks[rank])
                    for rank, copier in copiers
                ]
                for part in self._chunks(len(slots))
            ],
            len(slots),
        )

    async def store(
        self, block_ids: Sequence[int], slots: array[int], marks: Mapping[int, object]
    ) -> int:
        """Copy GPU blocks into ``slots``. Returns how many leading blocks are there, of all ranks.

        ``marks``: of each rank, the work on its cache that the copy has to follow.
        """
        copiers = self.copiers.items()
        return await self._run(
            self._stores,
            [
                [
                    partial(copier.gather, block_ids[part], slots[part], marks[rank])
                    for rank, copier in copiers
                ]
                for part in self._chunks(len(slots))
            ],
            len(slots),
        )

    async def settle(self, timeout_s: float) -> int:
        """Wait for loads and stores, then for the copies that run by then; how many still do."""
        await self._until_idle(timeout_s)
        self._loads.turn_away()
        self._stores.turn_away()
        await self._until_idle(timeout_s)
        return len(self._running)

    async def _until_idle(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    def _chunks(self, num_blocks: int) -> list[slice]:
        step = self._num_chunk_blocks
        return [slice(at, min(at + step, num_blocks)) for at in range(0, num_blocks, step)]

    async def _run(
        self, lane: Lane, chunks: list[list[Callable[[], Awaitable[None]]]], num_blocks: int
    ) -> int:
        """Begin each chunk as there is room for it; no more after a failure."""
        tasks: list[list[asyncio.Task[bool]]] = []
        self._num_calls += 1
        self._idle.clear()
        try:
            for i, copies in enumerate(chunks):
                if any(task.done() and not task.result() for group in tasks for task in group):
                    break
                size = min(self._num_chunk_blocks, num_blocks - i * self._num_chunk_blocks)
                nbytes = size * self._block_nbytes  # of one rank: each has a link of its own
                await lane.enter(nbytes)
                tasks.append(self._begin(lane, nbytes, copies))
        except TransferError as error:
            _log.warning("a copy did not begin, its blocks count as missing: %s", error)
        finally:
            try:
                await _ended([task for group in tasks for task in group])
            finally:
                self._num_calls -= 1
                if not self._num_calls:
                    self._idle.set()
        for i, group in enumerate(tasks):
            if not all(task.result() for task in group):
                return i * self._num_chunk_blocks
        return min(len(tasks) * self._num_chunk_blocks, num_blocks)

    def _begin(
        self, lane: Lane, nbytes: int, copies: list[Callable[[], Awaitable[None]]]
    ) -> list[asyncio.Task[bool]]:
        """One task for each rank; the last to end leaves the lane."""
        group = [self._tasks.create_task(_outcome(copy)) for copy in copies]
        left = len(group)

        def on_end(task: asyncio.Task[bool]) -> None:
            nonlocal left
            left -= 1
            self._running.discard(task)
            if not left:
                lane.leave(nbytes)

        for task in group:
            self._running.add(task)
            task.add_done_callback(on_end)
        return group


async def _outcome(copy: Callable[[], Awaitable[None]]) -> bool:
    try:
        await copy()
    except TransferError as error:
        _log.warning("a copy failed, its blocks count as missing: %s", error)
        return False
    return True


async def _ended(tasks: Sequence[asyncio.Task[bool]]) -> None:
    """Wait for all of ``tasks``, through cancellation too: a copy can't be abandoned."""
    cancelled: asyncio.CancelledError | None = None
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
            for task in pending:
                task.cancel()
    if cancelled is not None:
        raise cancelled
