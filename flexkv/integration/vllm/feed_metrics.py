"""What ``/metrics`` says of the feed: the sinks' counts and the tiers' digests, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flexkv.blocks import Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv.engine.stats import EngineStats

_EXACT = 2**53  # larger integers are no floats


class FeedMetric(NamedTuple):
    """``is_state``: a gauge; else a counter."""

    is_state: bool
    text: str
    value_of: Callable[[EngineStats], int]


def _counted(name: str, text: str, *, is_state: bool = False) -> FeedMetric:
    return FeedMetric(is_state, text, lambda stats: stats.feed.get(name, 0))


def _digest(tier: Tier, text: str) -> FeedMetric:
    def value_of(stats: EngineStats) -> int:
        of = stats.tiers.get(tier)
        return 0 if of is None else int(of.digest.partition(":")[2], 16) % _EXACT

    return FeedMetric(True, text, value_of)  # noqa: FBT003  # the field's name is above


FEED_METRICS = {
    "flexkv_feed_connected": _counted(
        "connected", "Whether events reach NATS; 0 for other sinks too.", is_state=True
    ),
    "flexkv_feed_waiting_blocks": _counted(
        "waiting", "Blocks whose events wait to be sent.", is_state=True
    ),
    "flexkv_feed_blocks": _counted("blocks", "Blocks whose events were sent."),
    "flexkv_feed_messages": _counted("messages", "Messages with events that were sent."),
    "flexkv_feed_bytes": _counted("nbytes", "Bytes of these messages."),
    "flexkv_feed_unsent_messages": _counted("unsent", "Messages that NATS did not take in time."),
    "flexkv_feed_left_out_blocks": _counted(
        "left_out", "Blocks whose events were not sent, so that routers had to ask for them."
    ),
    "flexkv_feed_overflows": _counted("overflows", "Times that the outbox was full."),
    "flexkv_feed_reconnects": _counted("reconnects", "Times that NATS was connected again."),
    "flexkv_feed_kicks": _counted("kicks", "Times that all routers were made to ask."),
    "flexkv_feed_gaps": _counted("gaps", "Queries of routers answered with events."),
    "flexkv_feed_dumps": _counted("dumps", "Times that everything resident was told."),
    "flexkv_feed_queries": _counted("queries", "Queries of routers."),
    "flexkv_feed_lost_answers": _counted("lost", "Answers to routers that did not arrive."),
    "flexkv_feed_refused": _counted(
        "refused", "Connections and queries of routers that were turned away."
    ),
    "flexkv_feed_malformed": _counted("malformed", "Requests that no router sends."),
    "flexkv_host_digest": _digest(
        Tier.HOST, "Sum of the hashes of the blocks in host memory, modulo 2**53."
    ),
    "flexkv_ssd_digest": _digest(Tier.SSD, "Sum of the hashes of the blocks on SSD, modulo 2**53."),
}
