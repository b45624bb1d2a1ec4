"""What joins vLLM's stream is told parents first, also while all of it is told anew."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from flexkv.blocks import Tier
from flexkv.events.log import EventLog
from flexkv.events.types import BlockRemoved, BlockStored
from flexkv.integration.vllm import stream
from flexkv.integration.vllm.net_changes import Stored
from flexkv.integration.vllm.stream import StreamSink
from tests.engine.chains import chain

if TYPE_CHECKING:
    import pytest

    from flexkv.blocks import Blocks

CHAIN = chain(1, 2, 3, 4)
PARENTS, CHILDREN = CHAIN[:2], CHAIN[2:]


class Stage:
    """A log whose residency is a list, and a sink that reads it."""

    def __init__(self, ring: int = 100) -> None:
        self.resident: list[BlockStored] = []
        self.log = EventLog(ring=ring, max_event_blocks=100, walk=lambda: iter(list(self.resident)))
        self.sink = StreamSink(step_blocks=512)

    def store(self, blocks: Blocks) -> None:
        self.resident.append(BlockStored(blocks, Tier.SSD))
        self.log.append(self.resident[-1:])
        self.sink.wake()

    async def told(self) -> list[Blocks]:
        for _ in range(10):
            await asyncio.sleep(0)
        return [c.blocks for c in self.sink._changes.take(512) if isinstance(c, Stored)]


async def test_a_child_that_comes_after_a_reset_is_told_behind_its_parents() -> None:
    stage = Stage()
    async with asyncio.TaskGroup() as tasks:
        await stage.sink.start(stage.log, tasks)
        stage.store(PARENTS)
        assert await stage.told() == [PARENTS]
        stage.sink.forget_told()
        stage.store(CHILDREN)
        assert await stage.told() == [], "who reads does not know the parents any more"
        stage.sink.tell_all()
        assert await stage.told() == [PARENTS, CHILDREN]
        await stage.sink.close()


async def test_a_second_reset_during_the_walk_begins_it_anew() -> None:
    stage = Stage()
    async with asyncio.TaskGroup() as tasks:
        await stage.sink.start(stage.log, tasks)
        stage.store(PARENTS)
        stage.store(CHILDREN)
        stage.sink.tell_all()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stage.sink.forget_told()
        stage.sink.tell_all()
        assert await stage.told() == [PARENTS, CHILDREN]
        await stage.sink.close()


async def test_what_is_removed_while_a_reset_is_half_way_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "_PIECE_BLOCKS", 2)
    stage = Stage()
    async with asyncio.TaskGroup() as tasks:
        await stage.sink.start(stage.log, tasks)
        assert await stage.told() == []
        chains = [chain(number, 2, 3) for number in range(3)]
        stage.resident += [BlockStored(blocks, Tier.SSD) for blocks in chains]
        stage.log.append(stage.resident)
        stage.sink.wake()  # more than a piece: the rest is to be looked at next
        stage.sink.forget_told()  # in the scheduler's thread, which then calls the loop's
        await asyncio.sleep(0)
        assert len(stage.sink._changes) == 2, "the walk has begun meanwhile"
        stage.log.append([BlockRemoved(stage.resident.pop(0).blocks, Tier.SSD)])
        stage.sink.wake()
        stage.sink.tell_all()
        assert {key for told in await stage.told() for key in told} == {*chains[1], *chains[2]}
        await stage.sink.close()


async def test_a_change_that_is_larger_than_the_ring_is_told_all_the_same() -> None:
    stage = Stage(ring=1)
    async with asyncio.TaskGroup() as tasks:
        await stage.sink.start(stage.log, tasks)
        assert await stage.told() == []
        stage.resident += [BlockStored(PARENTS, Tier.SSD), BlockStored(CHILDREN, Tier.SSD)]
        stage.log.append(stage.resident)
        stage.sink.wake()
        assert await stage.told() == [PARENTS, CHILDREN]
        await stage.sink.close()


async def test_a_large_change_is_looked_at_in_pieces_and_told_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "_PIECE_BLOCKS", 4)
    stage = Stage()
    async with asyncio.TaskGroup() as tasks:
        await stage.sink.start(stage.log, tasks)
        assert await stage.told() == []
        chains = [chain(number, 2, 3) for number in range(8)]
        stage.resident += [BlockStored(blocks, Tier.SSD) for blocks in chains]
        stage.log.append(stage.resident)
        stage.sink.wake()
        assert len(stage.sink._changes) == 6, "two chains at once, the rest when others had a turn"
        assert stage.sink.num_waiting == 6 + 6, "vLLM goes on stepping for it"
        assert await stage.told() == chains
        assert stage.sink.num_waiting == 0
        stage.log.append([BlockRemoved(blocks, Tier.SSD) for blocks in chains])
        stage.sink.wake()
        await stage.told()
        assert stage.sink._changes._told == {}
        await stage.sink.close()
