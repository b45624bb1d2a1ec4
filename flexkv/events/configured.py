"""The sinks that the settings of an embedded engine ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv.errors import ConfigError

if TYPE_CHECKING:
    from flexkv.config import EventsConfig
    from flexkv.events.sinks import EventSink


def sinks_of(settings: EventsConfig) -> list[EventSink]:
    """One sink, or none.

    Raises:
        ConfigError: the events are to join vLLM's, and this is not inside vLLM.
    """
    if settings.sink == "vllm":
        raise ConfigError(
            "events.sink is vllm, which is for an engine inside vLLM: set nats, zmq or none"
        )
    kind = settings.effective_sink()
    if kind == "nats":
        from flexkv.events.nats import NatsSink  # noqa: PLC0415  # only who publishes needs it

        return [NatsSink(settings)]
    if kind == "zmq":
        from flexkv.events.zmq import ZmqSink  # noqa: PLC0415  # as above

        return [ZmqSink(settings)]
    return []
