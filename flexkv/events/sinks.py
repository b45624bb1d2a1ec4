"""What carries events away from the engine: the protocol, and the sink that keeps a list."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from flexkv.events.types import AllBlocksCleared, changes

if TYPE_CHECKING:
    from asyncio import TaskGroup
    from collections.abc import Iterable, Mapping

    from flexkv.events.log import EventSource
    from flexkv.events.types import Event


class EventSink(Protocol):
    """Carries events to somebody. The engine starts it, wakes it after every change, closes it.

    The engine's loop calls all of it. ``wake`` is called in the same step as the change, so it
    must neither block nor await; a sink that can't keep up reads ``EventSource.dump`` instead of
    queueing without bound.
    """

    async def start(self, source: EventSource, tasks: TaskGroup) -> None:
        """Begin to carry what ``source`` has; ``tasks`` owns what goes on after the return.

        Raises:
            FeedError: the sink can't work; the engine does not start.
        """
        ...

    def wake(self) -> None:
        """``source`` has new events."""
        ...

    async def close(self) -> None:
        """Deliver what is left within the sink's own deadline, then let go."""
        ...


@runtime_checkable
class CountingSink(Protocol):
    """A sink whose counts join the engine's statistics."""

    def counts(self) -> Mapping[str, int]:
        """What has become of the events so far, by names of the sink's own; from any thread.

        ``connected`` (0 or 1) and ``waiting`` (blocks not sent yet) tell of now.
        """
        ...


def counts_of(sinks: Iterable[EventSink]) -> Mapping[str, int]:
    """The counts of all sinks, added up; ``connected`` where all are that can be."""
    told = [sink.counts() for sink in sinks if isinstance(sink, CountingSink)]
    total: Counter[str] = Counter()
    for counts in told:
        total.update(counts)
    if "connected" in total:
        total["connected"] = min(counts.get("connected", 1) for counts in told)
    return dict(total)


class ListSink:
    """Keeps every event in ``events``: for tests and replay, where the list may grow."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._source: EventSource | None = None
        self._last_id = 0

    async def start(self, source: EventSource, _tasks: TaskGroup) -> None:
        """Begin with what is resident already."""
        self._source = source
        self._last_id, resident = source.dump()
        self.events.extend(resident)

    def wake(self) -> None:
        """Take what is new."""
        if self._source is None:
            return
        entries = self._source.since(self._last_id)
        if entries is None:  # one change was larger than the log's ring
            self._last_id, resident = self._source.dump()
            self.events += [AllBlocksCleared(), *resident]
        else:
            self.events.extend(entry.event for entry in entries if changes(entry.event))
            self._last_id = self._source.last_id

    async def close(self) -> None:
        """Keep the list, take no more."""
        self._source = None
