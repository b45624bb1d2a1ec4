"""vLLM's own event stream, with flexkv's events in it, replays to what flexkv holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cases import Case
from tests.e2e.event_stream import TOPIC, Replay, Subscriber
from tests.e2e.test_outputs import need

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.cases import Bench

pytestmark = pytest.mark.xdist_group("in-process")


def publishing(endpoint: str) -> dict[str, Any]:
    return {
        "kv_events_config": {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": endpoint,
            "topic": TOPIC,
        }
    }


@pytest.mark.parametrize("cache", [{"num_cpu_blocks": 1024}, {"num_cpu_blocks": 64}])
@pytest.mark.parametrize("connector", ["stock", "own", "multi"])
def test_the_stream_replays_to_what_is_resident(
    bench: Bench, tmp_path: Path, connector: str, cache: dict[str, Any]
) -> None:
    need(connector)
    endpoint = f"ipc://{tmp_path}/events"
    case = Case(connector=connector, engine=publishing(endpoint), script="events", cache=cache)
    with Subscriber(endpoint) as subscriber:
        answer = bench.run(case)
    replay = Replay(subscriber.batches)
    assert subscriber.sequence == list(range(len(subscriber.sequence)))
    assert (
        replay.num_cleared > 0
    )  # the reset of the GPU's cache, which wipes every tier at a router
    held = {int(key[-16:], 16) for key in answer["residency"]["keys"]["HOST"]}
    assert len(held) > 30
    if connector != "multi":  # there vLLM's OffloadingConnector announces its own, too
        assert replay.problems == []
        assert replay.media["CPU"] == held
    assert held <= replay.media["CPU"]


@pytest.mark.parametrize("connector", ["stock", "own"])
def test_the_stream_replays_to_what_is_resident_in_host_and_on_ssd(
    bench: Bench, tmp_path: Path, connector: str
) -> None:
    need(connector)
    endpoint = f"ipc://{tmp_path}/events"
    cache = {
        "num_cpu_blocks": 48,
        "enable_ssd": True,
        "num_ssd_blocks": 56,  # less than what comes by, so that some has to leave
        "ssd_cache_dir": str(tmp_path / "ssd"),
    }
    case = Case(connector=connector, engine=publishing(endpoint), script="events", cache=cache)
    with Subscriber(endpoint) as subscriber:
        answer = bench.run(case)
    replay = Replay(subscriber.batches)
    assert replay.problems == []
    for medium, tier in (("CPU", "HOST"), ("STORAGE", "SSD")):
        held = {int(key[-16:], 16) for key in answer["residency"]["keys"][tier]}
        assert len(held) > 30
        assert replay.media[medium] == held
        assert replay.num_removed[medium] > 0


def test_the_reader_understands_vllms_own_events(bench: Bench, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/events"
    case = Case(engine=publishing(endpoint), script="events")
    with Subscriber(endpoint) as subscriber:
        bench.run(case)
    replay = Replay(subscriber.batches)
    assert replay.problems == []
    assert replay.num_cleared == 1
    assert len(replay.media["GPU"]) > 50
