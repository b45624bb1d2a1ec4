"""Work that can't be abandoned half-way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``; who is cancelled meanwhile hears of it afterwards."""
    working = asyncio.gather(work)  # a task, which this call alone owns
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as late:
            cancelled = late
    working.result()
    if cancelled is not None:
        raise cancelled
