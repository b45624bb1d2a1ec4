"""The sink ``nats`` inside a Dynamo worker: starts when the worker's names are known."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from flexkv.errors import FeedError
from flexkv.events.discovery import find_worker
from flexkv.events.nats import NatsSink, discovery_folder

if TYPE_CHECKING:
    from asyncio import TaskGroup
    from collections.abc import Mapping

    from flexkv.config import EventsConfig
    from flexkv.events.log import EventSource

_POLL_S = 0.25
_PATIENCE_S = 600.0  # the card appears after vLLM's engine has started
_NAMES = ("namespace", "component", "endpoint")

_log = logging.getLogger(__name__)


class WorkerSink:
    """A NatsSink under the names of the worker's model card, unless the settings give them all.

    What fails is logged and costs the feed, never the cache: routers then know nothing of it.
    """

    def __init__(self, settings: EventsConfig) -> None:
        self._settings = settings
        self._sink: NatsSink | None = None
        self._starting: asyncio.Task[None] | None = None

    async def start(self, source: EventSource, tasks: TaskGroup) -> None:
        """Begin to wait for the names."""
        self._starting = tasks.create_task(self._start(source, tasks))

    def wake(self) -> None:
        """There is news; what comes before the start is in the first dump."""
        if self._sink is not None:
            self._sink.wake()

    def counts(self) -> Mapping[str, int]:
        """The sink's; before its start it is not connected."""
        sink = self._sink
        return {"connected": 0} if sink is None else sink.counts()

    async def close(self) -> None:
        """Wait no more, and deliver what is left."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._sink is not None:
            await self._sink.close()

    async def _start(self, source: EventSource, tasks: TaskGroup) -> None:
        try:
            sink = NatsSink(await self._named())
            await sink.start(source, tasks)
        except FeedError as error:
            _log.error("flexkv's events are not published: %s", error)
            return
        self._sink = sink

    async def _named(self) -> EventsConfig:
        """The settings with the card's names in them."""
        settings = self._settings
        given = {name: getattr(settings, name) for name in settings.model_fields_set}
        if given.keys() >= set(_NAMES) or settings.discovery != "file":
            return settings
        assert settings.worker_id is not None, "the sink is nats"
        folder = discovery_folder(settings)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while True:
                    found = await find_worker(folder, settings.worker_id)
                    if found is not None:
                        break
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise FeedError(
                f"no model card of worker {settings.worker_id} in {folder} within {_PATIENCE_S} s: "
                "set events.discovery_path (DYN_FILE_KV), or events.namespace, component, endpoint"
            ) from None
        return type(settings)(**dict(zip(_NAMES, found, strict=True)) | given)
