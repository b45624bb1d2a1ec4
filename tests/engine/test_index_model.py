"""TierIndex and EventLog against a dictionary of single blocks that knows nothing of runs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from flexkv.blocks import BlockKey, Tier
from flexkv.engine.index import TierIndex
from flexkv.errors import TierFullError
from flexkv.events.log import EventLog
from flexkv.events.types import AllBlocksCleared
from tests.engine.chains import chain, key_of
from tests.engine.followers import follow, single_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.blocks import Blocks
    from flexkv.engine.runs import Lease, Reservation
    from flexkv.events.types import Event

Path = tuple[int, ...]
PATHS = st.lists(st.sampled_from([0, 0, 1]), min_size=1, max_size=7).map(tuple)


@dataclass(eq=False)
class ModelBlock:
    """One block, for as long as anybody uses its slot."""

    path: Path
    slot: int
    parent: ModelBlock | None
    state: str = "writing"
    used_at: int = 0
    attached: bool = True

    def lineage(self) -> Iterator[ModelBlock]:
        block: ModelBlock | None = self
        while block is not None:
            yield block
            block = block.parent


@dataclass
class Model:
    """What a tier holds, block by block."""

    blocks: dict[Path, ModelBlock] = field(default_factory=dict)
    held: list[ModelBlock] = field(default_factory=list)  # taken out, slot still in use
    leases: dict[int, list[ModelBlock]] = field(default_factory=dict)
    clock: Iterator[int] = field(default_factory=lambda: count(1))

    def prefix(self, path: Path, *states: str) -> list[ModelBlock]:
        found: list[ModelBlock] = []
        for i in range(len(path)):
            block = self.blocks.get(path[: i + 1])
            if block is None or (states and block.state not in states):
                break
            found.append(block)
        return found

    def touch(self, blocks: list[ModelBlock]) -> None:
        for block in reversed(blocks):
            block.used_at = next(self.clock)

    def pinned(self) -> set[ModelBlock]:
        unfinished = [
            b for b in (*self.blocks.values(), *self.held) if b.state in {"writing", "written"}
        ]
        leased = [b for lease in self.leases.values() for b in lease]
        return {a for b in (*unfinished, *leased) for a in b.lineage()}

    def num_free(self, capacity: int) -> int:
        return capacity - len(self.blocks) - len(self.held)

    def take_out(self, block: ModelBlock) -> None:
        del self.blocks[block.path]
        block.attached = False
        if block.state == "written":
            block.state = "ended"
        self.held.append(block)

    def subtree(self, path: Path) -> list[ModelBlock]:
        return [b for p, b in self.blocks.items() if p[: len(path)] == path]

    def drop_unused(self) -> None:
        pinned = self.pinned()
        self.held = [b for b in self.held if b in pinned]

    def evict(self, num_blocks: int) -> list[Path]:
        victims: list[Path] = []
        while len(victims) < num_blocks:
            oldest = min(self.blocks.values(), key=lambda b: b.used_at)
            if oldest in self.pinned():
                self.touch(list(oldest.lineage())[::-1])
            else:
                victims.append(oldest.path)
                del self.blocks[oldest.path]
                assert len(self.subtree(oldest.path)) == 0, "least recently used, and no leaf"
        return victims

    def settle(self) -> set[Path]:
        settled: set[Path] = set()
        for path in sorted(self.blocks, key=len):
            block = self.blocks[path]
            if block.state == "written" and (
                block.parent is None or block.parent.state == "resident"
            ):
                block.state = "resident"
                settled.add(path)
        return settled


@dataclass
class Writing:
    reservation: Reservation
    blocks: list[ModelBlock]


class IndexMachine(RuleBasedStateMachine):
    writings = Bundle("writings")
    leases = Bundle("leases")

    @initialize(capacity=st.integers(1, 16), evict_ratio=st.sampled_from([0.0, 0.2, 0.5]))
    def begin(self, capacity: int, evict_ratio: float) -> None:
        self.capacity = capacity
        self.evict_ratio = evict_ratio
        self.index = TierIndex(Tier.HOST, capacity, evict_ratio=evict_ratio)
        self.model = Model()
        self.log = EventLog(ring=6, max_event_blocks=3)
        self.cursor = 0
        self.believed: set[BlockKey] = set()
        self.view: set[BlockKey] = set()
        self.walk: Iterator[Blocks] | None = None
        self.must_see: set[ModelBlock] = set()
        self.seen: set[BlockKey] = set()

    def emit(self, events: list[Event]) -> None:
        """What a router does with the events."""
        for event in events:
            follow(self.believed, event)
        self.log.append(events)

    @rule(target=writings, path=PATHS)
    def reserve(self, path: Path) -> object:
        writing = self.begin_writing(path)
        return multiple() if writing is None else writing

    def begin_writing(self, path: Path) -> Writing | None:
        model, index = self.model, self.index
        present = model.prefix(path)
        needed = len(path) - len(present)
        pinned = model.pinned() | set(present)
        evictable = len(set(model.blocks.values()) - pinned)
        short = needed - model.num_free(self.capacity)
        if short > evictable:
            with pytest.raises(TierFullError) as full:
                index.reserve(chain(*path))
            assert full.value.needed == needed
            assert full.value.available == model.num_free(self.capacity) + evictable
            return None
        reservation, events = index.reserve(chain(*path))
        assert reservation.num_present == len(present)
        new: list[ModelBlock] = []
        for i in range(len(present), len(path)):
            parent = new[-1] if new else (present[-1] if present else None)
            new.append(ModelBlock(path[: i + 1], -1, parent))
        model.touch([*present, *new])
        victims: list[Path] = []
        if short > 0:
            goal = min(max(short, math.ceil(round(self.evict_ratio * self.capacity, 6))), evictable)
            victims = model.evict(goal)
        assert single_steps(events) == [("removed", key_of(v)) for v in victims]
        in_use = {b.slot for b in (*model.blocks.values(), *model.held)}
        for block, slot in zip(new, reservation.slots, strict=True):
            assert slot not in in_use, "a slot is given to one block at a time"
            block.slot = slot
            model.blocks[block.path] = block
        self.emit(events)
        return Writing(reservation, new) if new else None

    @rule(path=PATHS)
    def store(self, path: Path) -> None:
        """Reserve and commit at once: what happens most."""
        writing = self.begin_writing(path)
        if writing is not None:
            self.end(writing, len(writing.blocks))

    def end(self, writing: Writing, num_blocks: int) -> None:
        model = self.model
        events = self.index.commit(writing.reservation, num_blocks)
        if not writing.blocks[0].attached:
            assert events == []
            for block in writing.blocks:
                block.state = "ended"
            model.drop_unused()
            return
        for block in writing.blocks[:num_blocks]:
            block.state = "written"
        if num_blocks < len(writing.blocks):
            first_gone = writing.blocks[num_blocks]
            model.touch(model.prefix(first_gone.path[:-1]))
            for block in model.subtree(writing.blocks[num_blocks].path):
                model.take_out(block)
            for block in writing.blocks[num_blocks:]:
                block.state = "ended"
            model.drop_unused()
        settled = model.settle()
        steps = single_steps(events)
        assert {key for _, key in steps} == {key_of(path) for path in settled}
        assert all(kind == "stored" for kind, _ in steps)
        assert len(steps) == len(settled)
        self.emit(events)

    @rule(writing=consumes(writings))
    def commit(self, writing: Writing) -> None:
        self.end(writing, len(writing.blocks))

    @rule(writing=consumes(writings), share=st.floats(0, 1))
    def commit_part(self, writing: Writing, share: float) -> None:
        self.end(writing, int(share * len(writing.blocks)))

    @rule(path=PATHS)
    def touch(self, path: Path) -> None:
        self.index.touch(chain(*path))
        self.model.touch(self.model.prefix(path))

    @rule(path=PATHS)
    def match(self, path: Path) -> None:
        match = self.index.match(chain(*path))
        expected = self.model.prefix(path, "resident")
        assert match.num_blocks == len(expected)
        assert list(match.slots) == [b.slot for b in expected]

    @rule(target=leases, path=PATHS)
    def lease(self, path: Path) -> Lease:
        lease = self.index.lease(chain(*path))
        expected = self.model.prefix(path, "resident")
        assert list(lease.slots) == [b.slot for b in expected]
        self.model.leases[id(lease)] = expected
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        del self.model.leases[id(lease)]
        self.index.release(lease)
        self.index.release(lease)  # once more does nothing
        self.model.drop_unused()

    @rule(path=PATHS)
    def lose(self, path: Path) -> None:
        model = self.model
        events = self.index.lose(chain(*path))
        expected: list[ModelBlock] = []
        if len(model.prefix(path, "resident")) == len(path):
            expected = model.subtree(path)
            model.touch(model.prefix(path[:-1]))
        residents = {key_of(b.path) for b in expected if b.state == "resident"}
        for block in expected:
            model.take_out(block)
        steps = single_steps(events)
        assert {key for _, key in steps} == residents
        assert len(steps) == len(residents)
        gone: set[BlockKey] = set()
        depth = {key_of(b.path): b for b in expected}
        for _, key in steps:
            below = {key_of(b.path) for b in expected if depth[key] in list(b.lineage())[1:]}
            assert below & residents <= gone, "children leave before parents"
            gone.add(key)
        model.drop_unused()
        self.emit(events)

    @rule()
    def clear(self) -> None:
        self.index.clear()
        for block in list(self.model.blocks.values()):
            self.model.take_out(block)
        self.model.drop_unused()
        self.emit([AllBlocksCleared()])

    @rule()
    def begin_walk(self) -> None:
        if self.walk is None:
            self.walk = self.index.walk()
            self.must_see = {b for b in self.model.blocks.values() if b.state == "resident"}
            self.seen = set()

    @rule()
    def step_walk(self) -> None:
        if self.walk is None:
            return
        blocks = next(self.walk, None)
        if blocks is None:
            alive = {b for b in self.must_see if self.model.blocks.get(b.path) is b}
            assert {key_of(b.path) for b in alive} <= self.seen
            self.walk = None
        else:
            assert blocks.parent is None or blocks.parent in self.seen, "parents come first"
            self.seen |= set(blocks)

    @rule()
    def catch_up(self) -> None:
        """A consumer that reads the log now and then, and a dump when it comes too late."""
        entries = self.log.since(self.cursor)
        if entries is None:
            self.view = {key for blocks in self.index.walk() for key in blocks}
        else:
            assert [e.event_id for e in entries] == list(
                range(self.cursor + 1, self.log.last_id + 1)
            )
            for entry in entries:
                follow(self.view, entry.event)
        self.cursor = self.log.last_id
        assert self.view == self.believed

    @invariant()
    def the_router_believes_the_truth(self) -> None:
        if not hasattr(self, "index"):
            return
        model, index = self.model, self.index
        resident = {key_of(b.path) for b in model.blocks.values() if b.state == "resident"}
        assert self.believed == resident
        assert index.residency() == resident
        assert index.num_resident == len(resident)
        assert index.num_free == model.num_free(self.capacity)
        assert index.num_evictable == len(set(model.blocks.values()) - model.pinned())


NIGHTLY = os.environ.get("FLEXKV_HYPOTHESIS") == "nightly"
TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(
    max_examples=2000 if NIGHTLY else 300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
