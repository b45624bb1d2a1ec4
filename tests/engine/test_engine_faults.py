"""Single flight, deadlines, cancellation, failures and close, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from flexkv import EngineClosedError, ListSink, Stored, Tier
from flexkv.events.types import BlockStored
from tests.engine.chains import chain
from tests.engine.fakes import slow_engine
from tests.engine.followers import believed
from tests.virtual_time import run_virtual

A = chain(1, 2, 3, 4)
A_LONGER = chain(1, 2, 3, 4, 5, 6)
B = chain(9, 8, 7, 6)


def test_two_stores_of_the_same_blocks_share_one_copy() -> None:
    async def scenario() -> None:
        async with slow_engine() as (engine, copier, sink):
            copier.compute(A, range(4))
            copier.compute(A, range(10, 14))
            first, second = await asyncio.gather(
                engine.store(A, range(4)), engine.store(A, range(10, 14))
            )
            assert (first.num_stored, first.num_present) == (4, 0)
            assert (second.num_stored, second.num_present) == (0, 4)
            assert copier.num_blocks_by_copy == [("gather", 4)]
            assert len(sink.events) == 1

    run_virtual(scenario())


def test_a_store_whose_shared_copy_fails_copies_its_own_blocks() -> None:
    async def scenario() -> None:
        async with slow_engine() as (engine, copier, sink):
            copier.compute(A_LONGER, range(10, 16))
            copier.failing = 1
            first, second = await asyncio.gather(
                engine.store(A, range(4)), engine.store(A_LONGER, range(10, 16))
            )
            assert (first.num_stored, first.num_dropped) == (0, 4)
            assert (second.num_stored, second.num_dropped) == (6, 0)
            assert (await engine.load(A_LONGER, range(20, 26))).num_blocks == 6
            assert copier.wrong_blocks(A_LONGER, range(20, 26)) == 0
            assert believed(sink.events) == engine.residency(Tier.HOST) == set(A_LONGER)

    run_virtual(scenario())


def test_a_child_that_arrives_before_its_parent_waits_for_it() -> None:
    async def scenario() -> None:
        async with slow_engine() as (engine, copier, sink):
            slow = asyncio.ensure_future(engine.store(A, range(4)))
            await asyncio.sleep(0.1)
            copier.seconds = 0.1
            quick = asyncio.ensure_future(engine.store(A_LONGER, range(10, 16)))
            await asyncio.sleep(0.5)
            assert sink.events == []
            assert not quick.done()
            await asyncio.gather(slow, quick)
            assert [len(e.blocks) for e in sink.events if isinstance(e, BlockStored)] == [4, 2]
            assert believed(sink.events) == set(A_LONGER)

    run_virtual(scenario())


def test_a_cancelled_store_ends_with_its_copy_and_keeps_its_slots_until_then() -> None:
    async def scenario() -> None:
        async with slow_engine(num_slots=4) as (engine, copier, sink):
            store = asyncio.ensure_future(engine.store(A, range(4)))
            await asyncio.sleep(0.5)
            store.cancel()
            await asyncio.sleep(0.1)
            assert not store.done(), "the copy still reads the caller's GPU blocks"
            dropped = await engine.store(B, range(10, 14))
            assert dropped.num_dropped == 4, "the copy still owns every slot"
            with pytest.raises(asyncio.CancelledError):
                await store
            assert copier.num_running == 0
            assert sink.events == []
            assert (await engine.store(B, range(10, 14))).num_stored == 4

    run_virtual(scenario())


def test_a_cancelled_load_begins_no_further_chunk_and_holds_its_lease_to_the_end() -> None:
    async def scenario() -> None:
        async with slow_engine(num_slots=4, chunk_blocks=1, max_blocks_in_flight=1) as (
            engine,
            copier,
            _,
        ):
            copier.compute(A, range(4))
            assert (await engine.store(A, range(4))).num_stored == 4
            load = asyncio.ensure_future(engine.load(A, range(20, 24)))
            await asyncio.sleep(0.5)
            load.cancel()
            load.cancel()
            assert (await engine.store(B, range(10, 14))).num_dropped == 4
            with pytest.raises(asyncio.CancelledError):
                await load
            assert copier.num_blocks_by_copy.count(("scatter", 1)) == 1
            assert (await engine.store(B, range(10, 14))).num_stored == 4

    run_virtual(scenario())


def test_blocks_that_are_being_loaded_are_not_evicted() -> None:
    async def scenario() -> None:
        async with slow_engine(num_slots=8) as (engine, copier, _):
            copier.compute(A, range(4))
            await engine.store(A, range(4))
            load = asyncio.ensure_future(engine.load(A, range(20, 24)))
            await asyncio.sleep(0.5)
            many = chain(*range(30, 38))
            stored = await engine.store(many, range(30, 38))
            assert (stored.num_stored, stored.num_dropped) == (4, 4)
            assert (await load).num_blocks == 4
            assert copier.wrong_blocks(A, range(20, 24)) == 0

    run_virtual(scenario())


def test_a_load_that_waits_too_long_in_its_lane_is_a_miss() -> None:
    async def scenario() -> None:
        async with slow_engine(
            seconds=100.0, deadline_s=5.0, chunk_blocks=4, max_blocks_in_flight=4
        ) as (engine, copier, _):
            copier.seconds = 1.0
            await engine.store(A, range(4))
            copier.seconds = 100.0
            running = asyncio.ensure_future(engine.load(A, range(20, 24)))
            await asyncio.sleep(0.1)
            started = asyncio.get_running_loop().time()
            late = await engine.load(A, range(30, 34))
            assert asyncio.get_running_loop().time() - started == pytest.approx(5.0)
            assert (late.num_blocks, late.missing) == (0, (30, 31, 32, 33))
            assert (await running).num_blocks == 4

    run_virtual(scenario())


def test_a_failed_chunk_makes_a_load_end_before_it() -> None:
    async def scenario() -> None:
        async with slow_engine(chunk_blocks=2) as (engine, copier, _):
            copier.compute(A_LONGER, range(6))
            await engine.store(A_LONGER, range(6))
            copier.num_blocks_by_copy.clear()
            load = asyncio.ensure_future(engine.load(A_LONGER, range(20, 26)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert copier.num_running == 3
            await load
            copier.failing = 1
            loaded = await engine.load(A_LONGER, range(30, 36))
            assert (loaded.num_blocks, loaded.missing) == (0, tuple(range(30, 36)))
            assert engine.stats().num_load_failed == 6

    run_virtual(scenario())


def test_a_failed_chunk_makes_a_store_keep_the_leading_blocks() -> None:
    async def scenario() -> None:
        async with slow_engine(chunk_blocks=2, max_blocks_in_flight=2) as (engine, copier, sink):
            copier.compute(A_LONGER, range(6))
            store = asyncio.ensure_future(engine.store(A_LONGER, range(6)))
            await asyncio.sleep(1.5)
            copier.failing = 1  # the third chunk
            stored = await store
            assert (stored.num_stored, stored.num_dropped) == (4, 2)
            assert believed(sink.events) == engine.residency(Tier.HOST) == set(A)

    run_virtual(scenario())


def test_a_clear_in_mid_store_keeps_nothing_and_tries_nothing_again() -> None:
    async def scenario() -> None:
        async with slow_engine() as (engine, copier, sink):
            store = asyncio.ensure_future(engine.store(A, range(4)))
            await asyncio.sleep(0.5)
            await engine.clear()
            stored = await store
            assert (stored.num_stored, stored.num_dropped) == (0, 4)
            assert copier.num_blocks_by_copy == [("gather", 4)]
            assert believed(sink.events) == engine.residency(Tier.HOST) == set()
            assert engine.stats().tiers[Tier.HOST].num_free == 32

    run_virtual(scenario())


def test_closing_lets_running_copies_end_and_stops_the_others() -> None:
    async def scenario() -> None:
        async with slow_engine(chunk_blocks=1, max_blocks_in_flight=1, close_timeout_s=2.0) as (
            engine,
            copier,
            sink,
        ):
            store = asyncio.ensure_future(engine.store(A_LONGER, range(6)))
            await asyncio.sleep(0.5)
        assert copier.num_running == 0
        stored = await store
        assert (stored.num_stored, stored.num_dropped) == (3, 3)
        assert believed(sink.events) == set(chain(1, 2, 3))
        with pytest.raises(EngineClosedError):
            engine.lookup(A)
        with pytest.raises(EngineClosedError):
            await engine.load(A, range(4))

    run_virtual(scenario())


def test_closing_is_bounded_even_beside_a_copy_that_never_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with slow_engine(seconds=1000.0, close_timeout_s=2.0) as (engine, copier, _):
            store = asyncio.ensure_future(engine.store(A, range(4)))
            await asyncio.sleep(0.5)
            started = loop.time()
        assert loop.time() - started == pytest.approx(4.0)
        assert copier.num_running == 1
        assert "1 copies did not end within 4.0 s" in caplog.text
        await store

    run_virtual(scenario())


def test_an_error_in_the_body_comes_out_as_it_is() -> None:
    async def scenario() -> None:
        async with slow_engine() as (engine, _, _):
            store = asyncio.ensure_future(engine.store(A, range(4)))
            await asyncio.sleep(0.5)
            try:
                raise KeyError("mine")
            finally:
                assert not store.done()

    with pytest.raises(KeyError, match="mine"):
        run_virtual(scenario())


def test_what_was_present_before_a_clear_in_mid_store_does_not_count() -> None:
    async def scenario() -> None:
        async with slow_engine() as (engine, _, _):
            await engine.store(A, range(4))
            store = asyncio.ensure_future(engine.store(A_LONGER, range(6)))
            await asyncio.sleep(0.5)
            await engine.clear()
            stored = await store
            assert (stored.num_stored, stored.num_present, stored.num_dropped) == (0, 0, 6)

    run_virtual(scenario())


def test_a_store_waits_once_for_a_copy_that_it_joined() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with slow_engine(seconds=100.0, deadline_s=5.0) as (engine, _, _):
            first = asyncio.ensure_future(engine.store(A, range(4)))
            await asyncio.sleep(0.1)
            started = loop.time()
            assert (await engine.store(A, range(10, 14))).num_dropped == 4
            assert loop.time() - started == pytest.approx(5.0)
            await first

    run_virtual(scenario())


def test_a_long_copy_does_not_miss_its_own_deadline() -> None:
    async def scenario() -> None:
        async with slow_engine(chunk_blocks=1, max_blocks_in_flight=1, deadline_s=3.0) as (
            engine,
            _,
            _,
        ):
            assert (await engine.store(A_LONGER, range(6))).num_stored == 6

    run_virtual(scenario())


def test_a_cancelled_exit_still_closes_everything() -> None:
    async def scenario() -> None:
        sinks: list[ListSink] = []
        stores: list[asyncio.Future[Stored]] = []

        async def use() -> None:
            async with slow_engine() as (engine, _, sink):
                sinks.append(sink)
                stores.append(asyncio.ensure_future(engine.store(A, range(4))))
                await asyncio.sleep(0.1)

        user = asyncio.ensure_future(use())
        await asyncio.sleep(0.5)  # it closes, and waits for the copy
        user.cancel()
        with pytest.raises(asyncio.CancelledError):
            await user
        assert sinks[0]._source is None, "the sink is closed"
        assert (await stores[0]).num_stored == 4

    run_virtual(scenario())
