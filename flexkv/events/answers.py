"""What a recoverable source tells a router that has missed something: events, or everything."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

from flexkv.events import reqplane
from flexkv.events.types import changes, num_named, split

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexkv.events.dynamo import DynamoCodec, WorkerRank
    from flexkv.events.log import EventSource
    from flexkv.events.reqplane import Parts, Query
    from flexkv.events.types import Event

_PIECE_S = 0.0005  # of encoding; then the loop is free
_SLAB_NBYTES = 256 * 1024
_MAX_EVENT_BLOCKS = 512
_DUMP_S = 20.0  # a router waits for 30


class Answer(NamedTuple):
    """``parts``: its msgpack. ``is_filling``: real events that a router had missed.

    ``counted``: as what; an answer that tells no events is neither of the gaps nor the dumps.
    """

    parts: Parts
    num_blocks: int = 0
    is_filling: bool = False
    counted: str = ""


class Answers:
    """Answers the queries for one source. Dumps are made one at a time and shared."""

    def __init__(self, source: EventSource, codec: DynamoCodec, worker: WorkerRank) -> None:
        self._source = source
        self._codec = codec
        self._worker = worker
        self._making = asyncio.Lock()
        self._num_begun = 0
        self._num_waiting = 0
        self._latest: tuple[int, Answer] = (0, Answer([]))

    async def to(self, query: Query) -> Answer:
        """What has happened from ``query.start`` on, up to now or later; a dump where that is gone.

        A dump too may hold more than its number says: what is later comes again, and changes
        nothing more.
        """
        worker, source = self._worker, self._source
        if (query.worker_id, query.dp_rank) != (worker.worker_id, worker.dp_rank):
            message = f"not worker {query.worker_id}, rank {query.dp_rank}"
            return Answer(reqplane.error_answer(message))
        start = query.start
        if start is not None and start > source.last_id:
            return Answer(reqplane.too_new_answer(start, source.last_id))
        if start is None or start <= source.last_hole_id:
            return await self._dump_in_time()
        entries = source.since(start - 1)
        if entries is None:
            return await self._dump_in_time()
        last_id = source.last_id
        encoded = await self._encoded(entries)
        parts = reqplane.events_answer(encoded.slabs, encoded.num_events, last_id)
        is_filling = any(changes(entry.event) for entry in entries)
        return Answer(parts, encoded.num_blocks, is_filling, "gaps")

    async def _dump_in_time(self) -> Answer:
        try:
            async with asyncio.timeout(_DUMP_S):
                return await self._dump()
        except TimeoutError:
            message = f"no dump within {_DUMP_S} s"
            return Answer(reqplane.failed_answer(self._source.last_id, message))

    async def _dump(self) -> Answer:
        """One that begins after this call: who asks during one shares the next."""
        wanted = self._num_begun + 1
        self._num_waiting += 1
        try:
            async with self._making:
                number, answer = self._latest
                if number < wanted:
                    self._num_begun += 1
                    number = self._num_begun
                    answer = await self._made()
                    self._latest = (number, answer)
                return answer
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._latest = (0, Answer([]))

    async def _made(self) -> Answer:
        last_id, resident = self._source.dump()
        pieces = (piece for event in resident for piece in split(event, _MAX_EVENT_BLOCKS))
        encoded = await self._encoded(enumerate(pieces, 1))
        parts = reqplane.dump_answer(encoded.slabs, encoded.num_events, last_id)
        return Answer(parts, encoded.num_blocks, counted="dumps")

    async def _encoded(self, numbered: Iterable[tuple[int, Event]]) -> _Encoded:
        slabs: list[bytes | bytearray] = [bytearray()]
        num_events = num_blocks = 0
        encode = self._codec.recovered_event
        began_s = time.perf_counter()
        for event_id, event in numbered:
            slabs[-1] += encode(event_id, event)
            num_events += 1
            num_blocks += num_named(event)
            if len(slabs[-1]) > _SLAB_NBYTES:
                slabs.append(bytearray())
            if time.perf_counter() - began_s > _PIECE_S:
                await asyncio.sleep(0)
                began_s = time.perf_counter()
        return _Encoded(slabs, num_events, num_blocks)


class _Encoded(NamedTuple):
    slabs: list[bytes | bytearray]
    num_events: int
    num_blocks: int
