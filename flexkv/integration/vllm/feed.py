"""Who hears of flexkv's blocks when it runs in vLLM: chosen once, said in one line of the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flexkv.errors import ConfigError
from flexkv.events.zmq import ZmqSink
from flexkv.integration.vllm.stream import StreamSink
from flexkv.integration.vllm.tolerant_sink import TolerantSink
from flexkv.integration.vllm.worker_sink import WorkerSink

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexkv.engine.bridge import LoopThread
    from flexkv.events.sinks import EventSink
    from flexkv.integration.vllm.settings import VllmSettings

_log = logging.getLogger(__name__)


class Feed:
    """The sinks of the engine; ``take_events`` is empty unless one joins vLLM's own stream."""

    def __init__(self, sinks: list[EventSink], stream: StreamSink | None = None) -> None:
        self.sinks = sinks
        self._stream = stream
        self._thread: LoopThread | None = None
        self._pool: Any = None  # vLLM's blocks on the GPU
        self._index: Any = None  # the pool's, which a reset replaces

    def attach(self, thread: LoopThread) -> None:
        """``thread`` runs the engine that the sinks belong to."""
        self._thread = thread

    def watch(self, scheduler_output: Any) -> None:
        """See from a step's output where vLLM keeps its blocks."""
        if self._pool is None and self._stream is not None:
            resolve = scheduler_output.kv_connector_block_state.resolve_block_ids
            manager = getattr(resolve, "__self__", None)  # no other way for the built-in class
            self._pool = getattr(manager, "block_pool", None)
            self._index = getattr(self._pool, "cached_block_hash_to_block", None)
            if self._index is None:
                self._stream = None
                _log.error(
                    "flexkv's events stay out of vLLM's stream: this vLLM keeps its blocks in "
                    "another way, so a reset of its prefix cache could not be seen"
                )

    def take_events(self) -> Iterable[Any]:
        """Events of vLLM's kind for the step that ends now; they follow those of the GPU's blocks.

        A reset of the GPU's prefix cache is among the latter, and its reader forgets every tier:
        then all that flexkv holds is told again.
        """
        if self._stream is None:
            return ()
        if self._pool is not None and self._pool.cached_block_hash_to_block is not self._index:
            self._index = self._pool.cached_block_hash_to_block
            self._stream.forget_told()
            if self._thread is not None:
                self._thread.call(self._stream.tell_all)
        return self._stream.take()

    @property
    def num_waiting(self) -> int:
        """Blocks whose change has not been taken for vLLM's stream."""
        return 0 if self._stream is None else self._stream.num_waiting


def feed_of(settings: VllmSettings) -> Feed:
    """The feed that ``settings`` ask for.

    Raises:
        ConfigError: a sink is asked for that does not go with vLLM's own events.
    """
    events = settings.config.events
    kind: str = events.sink
    if kind == "auto":
        kind, why = _chosen(settings)
    else:
        why = "the settings say so"
    if kind == "nats" and settings.publishes:
        raise ConfigError(
            "events.sink is nats, but vLLM publishes KV events too, and a router takes one source "
            'for each worker: turn vLLM\'s off (--kv-events-config), or set events.sink to "vllm"'
        )
    if kind == "vllm" and not settings.publishes:
        raise ConfigError(
            "events.sink is vllm, but vLLM publishes no KV events: start it with "
            "--kv-events-config, or set events.sink to none"
        )
    _log.info("flexkv's events: sink %s, because %s", kind, why)
    if kind == "nats":
        return Feed([WorkerSink(events)])
    if kind == "zmq":
        return Feed([TolerantSink(ZmqSink(events))])
    if kind == "vllm":
        stream = StreamSink(events.step_blocks)
        return Feed([stream], stream)
    return Feed([])


def _chosen(settings: VllmSettings) -> tuple[str, str]:
    """What ``auto`` means here, and why."""
    events = settings.config.events
    if settings.publishes:
        return "vllm", "vLLM publishes its own KV events"
    if events.effective_sink() == "nats":
        return "nats", "this is a Dynamo worker on the event plane nats whose own events are off"
    if events.worker_id is None:
        return "none", "this is no Dynamo worker, and vLLM publishes no KV events"
    _log.warning(
        "this is a Dynamo worker, but nobody hears of flexkv's blocks: the event plane is not "
        "known to be nats. What was said on Dynamo's command line only is not seen here: set "
        "DYN_EVENT_PLANE=nats (and NATS_SERVER, DYN_DISCOVERY_BACKEND), or events.sink"
    )
    return "none", "the event plane is not known to be nats"
