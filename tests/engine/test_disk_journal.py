"""The journal of an engine's SSD tier: how long it gets, and in which steps it is written."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from flexkv import Tier, blocks_of
from flexkv.engine import disk_records
from flexkv.tiers.ssd_journal import DiskCalls
from tests.engine.chains import TOKENS_PER_BLOCK, chain
from tests.engine.test_disk import A, C, bench
from tests.tiers.disks import writes_held_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from flexkv import Blocks


async def test_the_journal_is_shortened_when_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv.engine.disk_records.MIN_JOURNAL_NBYTES", 4096)
    longest = 0
    async with bench(tmp_path / "ssd", num_slots=8) as b:
        for i in range(100):
            await b.store(chain(i, i, i))
            longest = max(longest, b.engine._below._disk.store.journal_nbytes)
        held = b.held(Tier.SSD)
        crashed = tmp_path / "crashed"
        shutil.copytree(tmp_path / "ssd", crashed)
    assert longest < 8192
    async with bench(crashed, num_slots=8) as b:
        assert b.engine.residency(Tier.SSD) == held


@pytest.mark.parametrize("num_names_nbytes", [160, 161])  # the key of a parent, which is not there
async def test_many_runs_of_one_block_with_long_names_stay_below_the_cap(
    tmp_path: Path,
    num_names_nbytes: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("flexkv.engine.disk_records.MIN_JOURNAL_NBYTES", 4096)
    cap = 400_000
    most = 0

    def watched(fd: int, frames: memoryview) -> int:
        nonlocal most
        num_written = os.write(fd, frames)
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*")))
        return num_written

    calls = replace(DiskCalls(), write=watched)
    options: Any = {"num_slots": None, "ssd_cache_bytes": cap, "num_host_slots": 64}
    async with bench(tmp_path / "ssd", calls=calls, **options) as b:
        num_slots = b.engine.stats().tiers[Tier.SSD].num_slots
        for first in range(0, 6 * num_slots, 8):
            for token in range(first, first + 8):
                tokens = [token] * TOKENS_PER_BLOCK
                blocks = blocks_of(tokens, TOKENS_PER_BLOCK, namespace="x" * num_names_nbytes)
                b.copier.compute(blocks, [0])
                await b.engine.store(blocks, [0])
            await b.engine.flush()
        held = b.held(Tier.SSD)
    assert len(held) > num_slots // 2
    assert cap // 2 < most <= cap
    async with bench(tmp_path / "ssd", **options) as b:
        is_kept = num_names_nbytes == 160
        assert b.engine.residency(Tier.SSD) == (held if is_kept else set())
        assert ("are not kept across restarts" in caplog.text) == (not is_kept)


class Turns:
    """Counts the loop's turns, and how much of something happened in each."""

    def __init__(self) -> None:
        self._now = 0
        self.sizes: dict[int, int] = {}

    def note(self, size: int) -> None:
        self.sizes[self._now] = self.sizes.get(self._now, 0) + size

    async def count(self) -> None:
        while True:
            self._now += 1
            await asyncio.sleep(0)


@pytest.fixture
async def turns() -> AsyncIterator[Turns]:
    made = Turns()
    counting = asyncio.ensure_future(made.count())
    yield made
    counting.cancel()
    await asyncio.wait([counting])


async def test_the_last_journal_is_put_together_in_small_steps(
    tmp_path: Path, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_records, "_NUM_BLOCKS_AT_ONCE", 8)
    chains = [chain(*[i] * num_blocks) for i, num_blocks in enumerate((30, 1, 3, 1, 4, 8, 9))]
    async with bench(tmp_path / "ssd", num_slots=64, num_host_slots=64) as b:
        for blocks in chains:
            await b.store(blocks)
        held = b.held(Tier.SSD)
        real_added = disk_records.added

        def watched(blocks: Blocks, *arguments: Any, **names: Any) -> bytes:
            turns.note(len(blocks))
            return real_added(blocks, *arguments, **names)

        monkeypatch.setattr(disk_records, "added", watched)
    assert sum(turns.sizes.values()) == len(held) == 56
    assert max(turns.sizes.values()) <= 8
    async with bench(tmp_path / "ssd", num_slots=64) as b:
        assert b.engine.residency(Tier.SSD) == held


async def test_chains_that_wait_for_the_disk_get_their_slots_in_turns_of_their_own(
    tmp_path: Path, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    calls = writes_held_until(go_on)
    async with bench(tmp_path / "ssd", num_slots=64, num_host_slots=128, calls=calls) as b:
        index = b.engine._below._disk.index
        for method in ("plan_store", "commit"):
            real = getattr(index, method)

            def watched(*arguments: Any, real: Any = real) -> Any:
                turns.note(1)
                return real(*arguments)

            monkeypatch.setattr(index, method, watched)
        for i in range(12):
            b.copier.compute(chain(i, i), [0, 1])
            await b.engine.store(chain(i, i), [0, 1])
        assert len(b.engine._below._writer._queue) > 1, "they go together"
        go_on.set()
        await b.engine.flush()
        assert b.held(Tier.SSD) == {key for i in range(12) for key in chain(i, i)}
    assert sum(turns.sizes.values()) == 24
    assert max(turns.sizes.values()) == 1


async def test_a_disk_that_fails_between_two_chains_takes_what_was_reserved_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    async with bench(*folders, num_host_slots=64) as b:
        of_ssd = b.engine._below._disk
        real = of_ssd.index.plan_store

        def failing(*arguments: Any) -> Any:
            plan = real(*arguments)
            of_ssd.fail(of_ssd.store, OSError(5, "lost", str(folders[0] / "slots-1of2")))
            return plan

        monkeypatch.setattr(of_ssd.index, "plan_store", failing)
        await b.store(A)
        assert b.held(Tier.SSD) == set()
        index = of_ssd.index
        assert index._disk.num_free == index.num_slots == 16, "a new one, nothing of the old in it"
        await b.store(C)
        await b.store(A)
        assert b.held(Tier.SSD) == {*A, *C}
