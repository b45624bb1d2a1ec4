"""The sink ``vllm``: flexkv's events join vLLM's own stream whenever vLLM asks for some."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from flexkv.blocks import BlockKey, Tier
from flexkv.events.types import AllBlocksCleared, num_named, split
from flexkv.integration.vllm.net_changes import NetChanges, Stored

if TYPE_CHECKING:
    from asyncio import TaskGroup
    from collections.abc import Iterator, Mapping

    from flexkv.blocks import Blocks
    from flexkv.events.log import Entry, EventSource

_PIECE_BLOCKS = 512  # looked at in one go: a third of a millisecond
_SIGN_S = 2.0
_NOBODY = BlockKey(b"flexkv: a block that is never announced"[-32:])
_MEDIUM = {Tier.HOST: "CPU", Tier.SSD: "STORAGE", Tier.REMOTE: "STORAGE"}

_log = logging.getLogger(__name__)


class StreamSink:
    """Collects net changes on the engine's loop; the scheduler's thread takes them.

    A step's events name at most ``step_blocks`` blocks: what a restart has to tell must not hold up
    a step.
    Every 2 s one removal of a block that nobody was ever told of goes along: Dynamo's relay asks
    for what it has missed only when it sees something that it can't place.
    """

    def __init__(self, step_blocks: int) -> None:
        self._step_blocks = step_blocks
        self._changes = NetChanges()
        self._lock = threading.Lock()
        self._source: EventSource | None = None
        self._last_id = 0
        self._num_wanted = self._num_walked = 0  # walks through all that is resident
        self._num_told = 0
        self._next_sign_s = 0.0
        self._news: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, source: EventSource, tasks: TaskGroup) -> None:
        """Begin with what is resident already."""
        self._source = source
        self._news = asyncio.Event()
        self.tell_all()
        self._task = tasks.create_task(self._tell())

    def wake(self) -> None:
        """Take what is new; what comes while all is told anew waits for its parents to be told.

        Of much only the first part: the rest follows in pieces.
        """
        with self._lock:
            if self._source is None or self._num_walked != self._num_wanted:
                return
            entries = self._source.since(self._last_id, _PIECE_BLOCKS)
            if entries is None:  # one change was larger than the log's ring
                self._last_id = self._source.last_id
                self._changes.add(AllBlocksCleared())
                self._num_wanted += 1
            else:
                self._take_in(entries)
            is_all = entries is not None and self._last_id == self._source.last_id
        if not is_all and self._news is not None:
            self._news.set()

    def _take_in(self, entries: list[Entry]) -> None:
        num_blocks = 0
        for entry in entries:
            self._changes.add(entry.event)
            self._last_id = entry.event_id
            num_blocks += num_named(entry.event)
            if num_blocks >= _PIECE_BLOCKS:
                return

    def forget_told(self) -> None:
        """Whoever reads the stream has forgotten every tier; ``tell_all`` must follow."""
        with self._lock:
            self._changes.forget_told()
            self._num_wanted += 1

    def tell_all(self) -> None:
        """Tell what is resident, as far as it is not told; to be called on the engine's loop."""
        if self._news is not None:
            with self._lock:
                if self._num_walked == self._num_wanted:  # else the walk that is due does it
                    self._num_wanted += 1
            self._news.set()

    async def close(self) -> None:
        """Take no more."""
        self._source = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @property
    def num_waiting(self) -> int:
        """Blocks whose change has not been taken; from any thread.

        An event that was not looked at yet counts as one.
        """
        source = self._source
        num_behind = 0 if source is None else source.last_id - self._last_id
        return len(self._changes) + num_behind

    def counts(self) -> Mapping[str, int]:
        """Blocks that were told, and that wait to be; from any thread."""
        return {"blocks": self._num_told, "waiting": self.num_waiting}

    def take(self) -> Iterator[Any]:
        """Events of vLLM's kind, for the step that ends now; from the scheduler's thread."""
        with self._lock:
            changes = self._changes.take(self._step_blocks)
        for change in changes:
            self._num_told += len(change.blocks if isinstance(change, Stored) else change.keys)
            yield _stored(change) if isinstance(change, Stored) else _removed(*change)
        now_s = time.monotonic()
        if now_s >= self._next_sign_s:
            self._next_sign_s = now_s + _SIGN_S
            yield _removed([_NOBODY], Tier.HOST)

    async def _tell(self) -> None:
        assert self._news is not None
        while True:
            await self._news.wait()
            self._news.clear()
            if self._source is None:
                return
            if self._num_walked != self._num_wanted:
                await self._walk(self._source)
            self.wake()
            await asyncio.sleep(0)

    async def _walk(self, source: EventSource) -> None:
        """Add what is resident, in pieces; ends early where all is to be told anew again."""
        with self._lock:
            number = self._num_wanted
            self._last_id, resident = source.dump()
        for event in resident:
            for piece in split(event, _PIECE_BLOCKS):
                with self._lock:
                    if self._num_wanted != number:
                        return
                    self._changes.add(piece)
                await asyncio.sleep(0)
        with self._lock:
            self._num_walked = number


def _stored(stored: Stored) -> Any:
    from vllm.distributed.kv_events import BlockStored  # noqa: PLC0415  # who asks has vLLM

    blocks = stored.blocks
    return BlockStored(
        block_hashes=[_hash(key) for key in blocks],
        parent_block_hash=None if blocks.parent is None else _hash(blocks.parent),
        token_ids=np.frombuffer(blocks.token_ids, "<u4").tolist(),
        block_size=blocks.tokens_per_block,
        lora_id=None,
        medium=_MEDIUM[stored.tier],
        lora_name=blocks.lora,
        extra_keys=_extra_keys(blocks),
    )


def _removed(keys: list[BlockKey], tier: Tier) -> Any:
    from vllm.distributed.kv_events import BlockRemoved  # noqa: PLC0415  # as above

    return BlockRemoved(block_hashes=[_hash(key) for key in keys], medium=_MEDIUM[tier])


def _hash(key: BlockKey) -> Any:
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash  # noqa: PLC0415  # as above

    return maybe_convert_block_hash(key)


def _extra_keys(blocks: Blocks) -> list[tuple[Any, ...] | None] | None:
    """Of each block what vLLM's own events say: adapter, inputs, tenant, embeddings, in its order.

    The tenant is in a chain's first block only.
    """
    of_blocks: list[tuple[Any, ...] | None] = []
    for i in range(len(blocks)):
        own = blocks.extra_keys[i] if blocks.extra_keys is not None else None
        keys: list[Any] = [] if blocks.lora is None else [blocks.lora]
        keys += [key for key in own or () if isinstance(key, tuple)]
        if i == 0 and blocks.parent is None and blocks.namespace is not None:
            keys.append(blocks.namespace)
        keys += [key for key in own or () if not isinstance(key, tuple)]
        of_blocks.append(tuple(keys) or None)
    return of_blocks if any(of_blocks) else None
