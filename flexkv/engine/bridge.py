"""The only place where threads meet coroutines: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from typing import TYPE_CHECKING, TypeVar

from flexkv.errors import EngineClosedError, FlexKVError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_CLEAR_UP_S = 10.0


class LoopThread:
    """Runs one coroutine function, with a loop of its own, in a daemon thread.

    ``main`` gets this object; it calls ``ready`` once others may rely on it, and returns soon
    after ``stopping`` is set. However it ends, ``alive`` is False then; a FlexKVError that ended
    it stands in ``error``.
    """

    def __init__(
        self, name: str, main: Callable[[LoopThread], Coroutine[None, None, None]]
    ) -> None:
        self.error: BaseException | None = None
        self.stopping = asyncio.Event()
        self._main = main
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the coroutine still runs."""
        return self._thread.is_alive() and not self._loop.is_closed()

    def start(self, timeout_s: float) -> None:
        """Start; return once ``main`` is ready.

        Raises:
            FlexKVError: what ended ``main`` before it was ready.
            EngineClosedError: it was not ready in time, and has been told to stop.
        """
        self._thread.start()
        if not self._ready.wait(timeout_s):
            self.stop(0)
            raise EngineClosedError(f"{self._thread.name} was not ready within {timeout_s} s")
        if self.error is not None:
            raise self.error

    def ready(self) -> None:
        """For ``main``: whoever waits in ``start`` may go on."""
        self._ready.set()

    def call(self, work: Callable[[], object]) -> bool:
        """Have the loop call ``work`` soon, in the order of the calls. False if it has ended."""
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:  # the loop is closed
            return False
        return self.alive

    def ask(self, work: Callable[[], _T], timeout_s: float) -> _T:
        """What ``work`` returns, called by the loop.

        Raises:
            FlexKVError: what ``work`` raised.
            EngineClosedError: the loop has ended, or did not get round to it in time.
        """
        answer: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def answering() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(work())
            except FlexKVError as error:
                answer.set_exception(error)

        if self.call(answering):
            try:
                return answer.result(timeout_s)
            except TimeoutError:
                answer.cancel()
        raise EngineClosedError(f"{self._thread.name} did not answer within {timeout_s} s")

    def stop(self, timeout_s: float) -> bool:
        """Tell ``main`` to end, and wait for it. False if it did not in time."""
        self.call(self.stopping.set)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    async def until_stopping(self, work: Coroutine[None, None, None]) -> None:
        """For ``main``: run ``work`` to its end, or cancel it when the thread is to stop.

        Raises:
            FlexKVError: what ``work`` raised.
        """
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(_failure_of(work))
            stopping = tasks.create_task(_until(self.stopping))
            await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
            working.cancel()
            stopping.cancel()
        if not working.cancelled() and (failure := working.result()) is not None:
            raise failure

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main(self))
        except FlexKVError as error:
            self.error = error
            if self._ready.is_set():
                _log.error("%s has ended: %s", self._thread.name, error)
        except BaseException as error:
            self.error = error
            _log.exception("%s has ended", self._thread.name)
            raise
        finally:
            self._clear_up()
            self._loop.close()
            self._ready.set()

    def _clear_up(self) -> None:
        """Whatever ended ``main`` from outside left tasks behind that hold sockets and locks."""
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=_CLEAR_UP_S))


async def _failure_of(work: Coroutine[None, None, None]) -> FlexKVError | None:
    try:
        await work
    except FlexKVError as error:
        return error
    return None


async def _until(event: asyncio.Event) -> None:
    await event.wait()
