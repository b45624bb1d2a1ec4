"""A replay tells the truth: what holds is said to hold, and what was broken on purpose is found."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from flexkv.blocks import Tier
from flexkv.events.sinks import ListSink
from flexkv.replay import stage as stage_module
from flexkv.replay.run import Pace
from flexkv.replay.stage import Settings, default_capacity, replay
from flexkv.replay.workload import Request, Workload, conversations
from tests.replay.local_stage import (
    DeafToRemoved,
    DeafToStored,
    flip_a_bit,
    local_stage,
    replayed,
)

if TYPE_CHECKING:
    from flexkv.replay.report import Report

SETTINGS = Settings(block_nbytes=512, num_chains=40, settle_timeout_s=0.0)
WORKLOAD = conversations(200, seed=5, tokens_per_block=16)


async def reported(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings = SETTINGS,
    workload: Workload = WORKLOAD,
    make_sink: type[ListSink] = ListSink,
) -> Report:
    monkeypatch.setattr(stage_module, "staged", partial(local_stage, make_sink=make_sink))
    return await replay(workload, settings, Console(file=io.StringIO()))


async def test_a_replay_that_holds_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    report = await reported(monkeypatch)
    assert report.holds
    assert report.requests == 200
    assert 0 < report.counts.hit_blocks < report.counts.blocks
    assert report.checked_bytes >= report.counts.hit_blocks * 512
    assert report.counts.evicted * 2 >= report.counts.stored
    assert report.chains_checked == {"resident": 40, "partly_resident": 40, "evicted": 40}


async def test_every_worker_serves_and_the_sum_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    report = await reported(monkeypatch, replace(SETTINGS, num_workers=3))
    assert [row.worker for row in report.workers] == ["0", "1", "2"]
    assert all(row.counts.requests > 0 for row in report.workers)
    assert sum(row.counts.stored for row in report.workers) == report.counts.stored


async def test_a_flipped_bit_in_the_pool_is_one_wrong_byte() -> None:
    workload = Workload("twice", [Request(0.0, (1, 2, 3))], 16)
    async with local_stage(workload, replace(SETTINGS, num_workers=1)) as stage:
        await stage.run()
        flip_a_bit(stage, (1, 2, 3))
        await stage.run()
        tally = stage.workers[0].tally
        assert tally.num_hit == 3
        assert tally.num_wrong_bytes == 1


async def test_a_stored_event_that_the_router_missed_is_a_divergence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(SETTINGS, capacity=2 * WORKLOAD.num_distinct)
    report = await reported(monkeypatch, settings, make_sink=DeafToStored)
    assert report.counts.evicted == 0
    assert report.divergences > 0
    assert not report.holds
    assert report.wrong_bytes == 0


async def test_removed_events_that_the_router_missed_are_divergences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = await reported(monkeypatch, make_sink=DeafToRemoved)
    assert report.divergences > 0
    assert not report.holds


async def test_too_few_chains_of_a_kind_are_counted_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chains = [Request(0.0, (0, i)) for i in range(1, 4)]
    report = await reported(monkeypatch, workload=Workload("few", chains, 16))
    assert report.common_blocks == 1
    assert sum(report.chains_checked.values()) == 3
    assert report.chains_wanted == 40


async def test_a_request_without_a_full_block_is_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = await reported(monkeypatch, workload=Workload("empty", [Request(0.0, ())], 16))
    assert report.requests == 1
    assert report.counts.requests == 0
    assert report.counts.block_hit_rate == 0


async def test_requests_stay_within_the_bound_and_none_is_left_running() -> None:
    settings = replace(SETTINGS, pace=Pace(max_requests=2))
    async with local_stage(WORKLOAD, settings) as stage:
        router = stage.router
        best_worker, seen = router.best_worker, [0]

        async def counted(token_ids: list[int], *, request_id: str) -> int:
            seen.append(len(router.running))
            return await best_worker(token_ids, request_id=request_id)

        router.best_worker = counted
        await stage.run()
        assert 1 < max(seen) <= 4
        assert router.running == set()


async def test_the_events_of_every_engine_add_up_to_its_residency() -> None:
    async with local_stage(WORKLOAD, SETTINGS) as stage:
        await stage.run()
        for wid, worker in stage.workers.items():
            events = stage.router._sinks[wid].events
            assert replayed(events) == worker.engine.residency(Tier.HOST) != set()


async def test_a_seed_makes_the_same_keys_again_and_another_makes_others() -> None:
    keys = []
    for seed in (4, 4, 5):
        async with local_stage(WORKLOAD, replace(SETTINGS, seed=seed)) as stage:
            keys.append(list(stage.blocks_of((1, 2))))
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])


async def test_a_failing_router_ends_the_replay_with_its_error() -> None:
    async with local_stage(WORKLOAD, SETTINGS) as stage:

        async def fails(_token_ids: list[int], *, request_id: str) -> int:
            raise ConnectionError(request_id)

        stage.router.best_worker = fails
        with pytest.raises(ExceptionGroup) as caught:
            await stage.run()
        assert caught.group_contains(ConnectionError)


def test_the_default_capacity_evicts_more_than_half_but_fits_the_longest_request() -> None:
    distinct = WORKLOAD.num_distinct
    assert 2 * default_capacity(WORKLOAD, 2) < distinct / 2
    one = Workload("one", [Request(0.0, (1, 2, 3, 4))], 16)
    assert default_capacity(one, 2) == 4
