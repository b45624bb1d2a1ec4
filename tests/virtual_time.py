"""An event loop whose clock jumps: a scenario of hours runs in milliseconds, always the same way.

    def test_a_load_gives_up_at_its_deadline() -> None:
        run_virtual(scenario())

When nothing is ready, the clock jumps to the next timer. While a thread works for
``run_in_executor`` the clock stands still and the loop really waits: work in threads takes no
virtual time. Threads that the loop can't know of are announced with ``loop.thread_at_work()``.
Code under test reads ``loop.time()``, not ``time.monotonic()``. Sockets have no place here: their
peers live in real time.
"""

from __future__ import annotations

import asyncio
import selectors
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from selectors import SelectorKey

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

THREAD_LIMIT_S = 60.0  # real seconds that a thread may work while nothing else can happen
DEFAULT_LIMIT_S = 86_400.0  # virtual seconds: a day of heart-beats and nothing else is a hang


class DeadlockError(RuntimeError):
    """The scenario can't go on: what it waits for will never come."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio loop on a virtual clock that starts at 0.

    Raises, out of ``run_until_complete``:
        DeadlockError: nothing is ready, no timer is set and no thread works; or ``limit_s``
            virtual seconds have passed; or a thread has worked for a real minute.
    """

    def __init__(self, *, limit_s: float = DEFAULT_LIMIT_S) -> None:
        self._now_s = 0.0
        self._limit_s = limit_s
        self._num_threads_at_work = 0
        self._own_executor: ThreadPoolExecutor | None = None
        super().__init__(_VirtualSelector(self))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    @contextmanager
    def thread_at_work(self) -> Iterator[None]:
        """The clock stands still inside: a thread works that the loop does not know of.

        Entered and left on the loop's thread.
        """
        self._num_threads_at_work += 1
        try:
            yield
        finally:
            self._num_threads_at_work -= 1

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """As asyncio's, and the clock stands still until ``func`` has returned."""
        if executor is None:
            if self._own_executor is None:
                self._own_executor = ThreadPoolExecutor(thread_name_prefix="virtual")
                self.set_default_executor(self._own_executor)
            executor = self._own_executor
        job = executor.submit(func, *args)
        self._num_threads_at_work += 1
        waiter = asyncio.wrap_future(job, loop=self)
        # Added after wrap_future's own, so the result is in the ready queue before the count drops.
        job.add_done_callback(self._job_is_done)
        return waiter

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """As asyncio's, waiting for real."""
        del timeout  # real seconds on a virtual clock mean nothing; THREAD_LIMIT_S bounds it
        with self.thread_at_work():
            await super().shutdown_default_executor()

    def _job_is_done(self, _: Future[Any]) -> None:
        self.call_soon_threadsafe(self._job_left)

    def _job_left(self) -> None:
        self._num_threads_at_work -= 1

    def next_events(
        self, real: selectors.BaseSelector, timeout: float | None
    ) -> list[tuple[SelectorKey, int]]:
        """What the loop's selector does instead of sleeping for ``timeout``."""
        events = real.select(0)
        if events or timeout == 0:
            return events
        if self._num_threads_at_work:
            events = real.select(THREAD_LIMIT_S)
            if not events:
                raise DeadlockError(
                    f"{self._num_threads_at_work} jobs in threads did not end in "
                    f"{THREAD_LIMIT_S:g} real seconds, and nothing else can happen meanwhile"
                )
            return events
        if timeout is None:
            raise DeadlockError(self._what_waits("nothing is ready and no timer is set"))
        self._now_s += timeout
        if self._now_s > self._limit_s:
            raise DeadlockError(self._what_waits(f"{self._limit_s:g} virtual seconds have passed"))
        return events

    def _what_waits(self, why: str) -> str:
        tasks = sorted(str(task.get_coro()) for task in asyncio.all_tasks(self))
        return f"at {self._now_s:g} s {why}; still waiting: {', '.join(tasks) or 'no task'}"


class _VirtualSelector(selectors.BaseSelector):
    """The real selector for wake-ups from threads; the loop decides how long a wait is."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def register(self, fileobj: Any, events: int, data: object = None) -> SelectorKey:
        if self._real.get_map():  # the loop's own wake-up socket is the first and only one
            raise RuntimeError("no sockets in virtual time: use asyncio.run, or a fake")
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        return self._loop.next_events(self._real, timeout)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Mapping[Any, SelectorKey]:
        return self._real.get_map()


def run_virtual(main: Coroutine[Any, Any, T], *, limit_s: float = DEFAULT_LIMIT_S) -> T:
    """``asyncio.run(main)`` on a virtual clock; what it leaves behind is cancelled, as there."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(limit_s=limit_s)) as runner:
        return runner.run(main)
