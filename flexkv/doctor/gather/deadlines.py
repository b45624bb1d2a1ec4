"""Runs what blocks, for a limited time: a disk or a host that hangs must not hang doctor."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


async def within(deadline_s: float, step: Callable[[], _T]) -> _T | None:
    """What ``step`` returns; None if it takes longer: its thread is left to itself."""
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(step())
        except BaseException as error:
            outcome.set_exception(error)
            raise

    Thread(target=work, daemon=True, name="flexkv-doctor").start()
    try:
        async with asyncio.timeout(deadline_s):
            return await asyncio.shield(asyncio.wrap_future(outcome))
    except TimeoutError:
        return None
