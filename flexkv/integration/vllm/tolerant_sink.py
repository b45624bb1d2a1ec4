"""A sink whose failure to start costs the feed alone, never the cache."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flexkv.errors import FeedError
from flexkv.events.sinks import counts_of

if TYPE_CHECKING:
    from asyncio import TaskGroup
    from collections.abc import Mapping

    from flexkv.events.log import EventSource
    from flexkv.events.sinks import EventSink

_log = logging.getLogger(__name__)


class TolerantSink:
    """As ``sink``; where that can't start, an error in the log, and nobody hears anything."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._works = False

    async def start(self, source: EventSource, tasks: TaskGroup) -> None:
        """Start the sink, if that is possible."""
        try:
            await self._sink.start(source, tasks)
        except FeedError as error:
            _log.error("flexkv's events are not published: %s", error)
        else:
            self._works = True

    def wake(self) -> None:
        """There is news."""
        if self._works:
            self._sink.wake()

    def counts(self) -> Mapping[str, int]:
        """The sink's."""
        return counts_of([self._sink])

    async def close(self) -> None:
        """Deliver what is left."""
        if self._works:
            await self._sink.close()
