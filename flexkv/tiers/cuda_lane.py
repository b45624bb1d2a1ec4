"""One direction of a CUDA copier: submits slices to its streams in turn, waits for their ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, Protocol

from flexkv.errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from flexkv.tiers.cuda_slices import Slice


class Event(Protocol):
    """A point in a stream. Both calls raise RuntimeError where the device is lost."""

    def synchronize(self) -> None:
        """Wait until the stream is there; without the GIL."""
        ...

    def query(self) -> bool:
        """Is it?"""
        ...


class Submitted(NamedTuple):
    """What was submitted of a slice has ended at ``event``; ``error``: it is not all of it."""

    event: Event
    error: RuntimeError | None = None


class Channel(Protocol):
    """A stream and what it copies with."""

    def submit(self, part: Slice, after: object) -> Submitted:
        """Begin to copy ``part`` when the work marked by ``after`` has ended; wait for nothing.

        Raises:
            RuntimeError: the device is lost: nothing moves any more.
        """
        ...


class _Copying:
    """One call of ``Lane.copy``; used on its loop only."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.num_running = 0
        self.error: TransferError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def end(self, error: TransferError | None) -> None:
        """One slice has ended."""
        self.num_running -= 1
        self.error = self.error or error
        if not self.num_running and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def ended(self) -> None:
        """Wait for all slices that have begun, through cancellation too."""
        cancelled: asyncio.CancelledError | None = None
        while self.num_running:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


class _Running(NamedTuple):
    submitted: Submitted
    copying: _Copying


_Ended = tuple[_Copying, TransferError | None]


class Lane:
    """Copies in one direction. For callers of one event loop.

    At most ``max_slices`` are in flight; who comes first goes first. ``on_loss`` is told, in the
    lane's thread or on the loop, that the device is lost; whatever was in flight then fails.
    """

    def __init__(
        self,
        name: str,
        channels: Sequence[Channel],
        *,
        max_slices: int,
        on_loss: Callable[[RuntimeError], None],
    ) -> None:
        self._channels = channels
        self._on_loss = on_loss
        self._turn = 0
        self._places = asyncio.Semaphore(max_slices)
        self._most_untold = max_slices // 2  # ended slices of one copy; others need their places
        self._running: SimpleQueue[_Running | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._name = name

    async def copy(self, slices: Iterable[Slice], after: object) -> None:
        """Copy ``slices``, all after the work marked by ``after``.

        When cancelled, it begins no more of them, and ends when those that have begun have.

        Raises:
            TransferError: the bytes at the destination are undefined.
        """
        copying = _Copying()
        try:
            for part in slices:
                await self._places.acquire()
                if copying.error is not None:
                    self._places.release()
                    break
                self._begin(part, after, copying)
        finally:
            await copying.ended()
        if copying.error is not None:
            raise copying.error

    def close(self) -> None:
        """End the thread; nothing may be copying."""
        if self._thread is not None:
            self._running.put(None)
            self._thread.join()  # it has nothing left to do
            self._thread = None

    def _begin(self, part: Slice, after: object, copying: _Copying) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        channel = self._channels[self._turn]
        self._turn = (self._turn + 1) % len(self._channels)
        copying.num_running += 1
        try:
            submitted = channel.submit(part, after)
        except RuntimeError as error:
            self._on_loss(error)
            self._report([(copying, _failure(error))])
        except BaseException:  # a bug: nobody may wait for this slice
            self._report([(copying, None)])
            raise
        else:
            self._running.put(_Running(submitted, copying))

    def _report(self, ended: list[_Ended]) -> None:
        for copying, error in ended:
            self._places.release()
            copying.end(error)

    # What follows runs in the thread.

    def _serve(self) -> None:
        ended: list[_Ended] = []
        running = self._running.get()
        while running is not None:
            if ended and not (self._has_ended(running) or self._can_wait(ended, running)):
                self._tell(ended)
                ended = []
            ended.append((running.copying, self._outcome(running)))
            try:
                running = self._running.get_nowait()
            except Empty:
                self._tell(ended)
                ended = []
                running = self._running.get()
        if ended:
            self._tell(ended)

    def _can_wait(self, ended: list[_Ended], running: _Running) -> bool:
        """Does nobody ask before ``running`` ends? Whoever is told meanwhile takes the GIL."""
        is_one = all(copying is running.copying for copying, _ in ended)
        return is_one and len(ended) < self._most_untold

    def _tell(self, ended: list[_Ended]) -> None:
        with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits any more
            ended[0][0].loop.call_soon_threadsafe(self._report, ended)

    def _outcome(self, running: _Running) -> TransferError | None:
        error = running.submitted.error
        try:
            running.submitted.event.synchronize()
        except RuntimeError as loss:
            self._on_loss(loss)
            error = loss
        return None if error is None else _failure(error)

    def _has_ended(self, running: _Running) -> bool:
        try:
            return running.submitted.event.query()
        except RuntimeError:
            return True  # _outcome looks closer


def _failure(error: RuntimeError) -> TransferError:
    failure = TransferError(f"a copy failed: {error}")
    failure.__cause__ = error
    return failure
