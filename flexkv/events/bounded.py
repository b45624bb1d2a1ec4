"""A deadline, and a cancellation, for work that may swallow the one or the other."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

_AGAIN_S = 0.1
_MAX_CANCELS = 50


async def bounded(work: Coroutine[Any, Any, None], deadline_s: float | None = None) -> None:
    """Do ``work``; when it takes too long, or the caller is cancelled, cancel it until it ends.

    nats-py's connecting goes on now and then where it is cancelled once: it would be for ever.

    Raises:
        TimeoutError: it was not done in time.
    """
    running = asyncio.gather(work)  # a task, which this call alone owns
    try:
        await asyncio.wait([running], timeout=deadline_s)
        if running.done():
            running.result()
            return
    finally:
        for _ in range(_MAX_CANCELS):
            if running.done():
                break
            running.cancel()
            await asyncio.wait([running], timeout=_AGAIN_S)
        if running.done():
            with contextlib.suppress(asyncio.CancelledError):
                running.exception()  # what came of it after its time is nobody's concern
    raise TimeoutError
