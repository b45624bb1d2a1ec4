"""The engine: what programs talk to. It owns the index, the host pool and the event log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Self

from flexkv.blocks import Tier
from flexkv.engine.arguments import check_chain, check_settings, checked_block_ids
from flexkv.engine.closing import to_its_end
from flexkv.engine.index import TierIndex
from flexkv.engine.results import Loaded, Match, Stored
from flexkv.engine.shared_index import SharedIndex
from flexkv.engine.stats import EngineStats
from flexkv.engine.stores import Stores
from flexkv.engine.tiering import Tiering
from flexkv.engine.transfers import Transfers
from flexkv.errors import EngineClosedError, InputError
from flexkv.events.configured import sinks_of
from flexkv.events.log import EventLog
from flexkv.events.sinks import counts_of
from flexkv.tiers.gpu import make_copier
from flexkv.tiers.host import HostPool, slot_stride
from flexkv.tiers.memory import require_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    import torch

    from flexkv.blocks import BlockKey, Blocks, KVLayout
    from flexkv.config import Config
    from flexkv.engine.tiering import Pin
    from flexkv.events.sinks import EventSink
    from flexkv.events.types import BlockStored, Event
    from flexkv.tiers.base import PagedCopier

_log = logging.getLogger(__name__)


class Engine:
    """Keeps blocks of a paged KV cache in tiers below the GPU.

    Use it as an asynchronous context manager, once, from one event loop. ``sinks`` carry its
    events; None takes the one that ``config.events`` asks for. Every chain of blocks that is
    handed in begins with its first block. ``identity`` says what bytes and keys of blocks depend on
    (model, weights, data type, hash) in values that JSON has: where it is the same after a restart,
    the SSD tier's blocks are kept.

    Raises:
        InputError: ``config`` or ``layout`` is something else.
        LayoutError: they differ in their tokens per block.
        ConfigError: not even one block fits into the host tier, there is not enough memory, or
            the events are to join vLLM's, and this is not inside vLLM.
        FeedError: on entry, a sink can't work.
    """

    def __init__(
        self,
        config: Config,
        layout: KVLayout,
        sinks: Sequence[EventSink] | None = None,
        *,
        identity: Mapping[str, object] | None = None,
    ) -> None:
        check_settings(config, layout)
        self._config = config
        self._layout = layout
        self._block_nbytes = layout.block_nbytes * layout.num_ranks
        nbytes = layout.num_ranks * slot_stride(layout.block_nbytes)
        num_slots = config.cache.num_host_slots(nbytes) if config.enable_flexkv else 0
        require_memory(num_slots * nbytes)
        self._num_host_slots = num_slots
        index = TierIndex(Tier.HOST, num_slots, evict_ratio=config.cache.evict_ratio)
        self._host = SharedIndex(index, self._emit)
        self._below = Tiering(config, layout, identity, self._host, self._emit)
        events = config.events
        self._events = EventLog(
            ring=events.ring, max_event_blocks=events.max_event_blocks, walk=self._walk
        )
        self._sinks = sinks_of(config.events) if sinks is None else list(sinks)
        self._pool: HostPool | None = None
        self._entered = self._open = False
        self._exits = contextlib.AsyncExitStack()
        self._transfers: Transfers
        self._stores: Stores
        self._key_nbytes = 0
        self._counts: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        if self._entered:
            raise EngineClosedError("an engine is used once: make a new one")
        self._entered = True
        for note in self._config.notes:
            _log.warning("%s", note)
        try:
            await self._enter()
        except BaseException:
            await to_its_end(self._exits.aclose())
            raise
        self._open = True
        return self

    async def _enter(self) -> None:
        settings, layout, exits = self._config.transfers, self._layout, self._exits
        if self._config.enable_flexkv:
            self._pool = pool = HostPool(
                self._num_host_slots,
                layout.block_nbytes,
                layout.num_ranks,
                settings.touch_threads,
                huge_pages=settings.huge_pages,
            )
            exits.callback(pool.close)  # each copier touches its own region
        tasks = asyncio.TaskGroup()
        await tasks.__aenter__()
        # not told of other errors, which it would wrap
        exits.push_async_callback(tasks.__aexit__, None, None, None)
        self._transfers = Transfers(settings, layout.block_nbytes, tasks)
        self._stores = Stores(self._host, self._transfers, settings.deadline_s)
        if self._pool is not None:
            exits.push_async_callback(self._close_below)
            await self._below.open(self._pool, self._stores, tasks, self._events)
        for sink in self._sinks if self._config.enable_flexkv else ():
            await sink.start(self._events, tasks)
            exits.push_async_callback(sink.close)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let running copies end, deliver the last events, let go of the memory."""
        self._open = False
        self._stores.close()
        await to_its_end(self._close())

    async def _close(self) -> None:
        timeout_s, loop = self._config.transfers.close_timeout_s, asyncio.get_running_loop()
        began_s = loop.time()
        num_running = await self._transfers.settle(timeout_s)
        num_running += await self._below.settle(timeout_s)
        if num_running := num_running or await self._below.close(timeout_s):
            # their memory stays as it is, and the task group stays open: nothing else is safe
            _log.error("%d copies did not end within %.1f s", num_running, loop.time() - began_s)
            for sink in self._sinks:
                await sink.close()
            return
        try:
            for copier in self._transfers.copiers.values():
                await copier.close()
        finally:
            await self._exits.aclose()
            self._host.forget()

    async def _close_below(self) -> None:
        if await self._below.close(self._config.transfers.close_timeout_s):
            self._exits.pop_all()  # threads use the pool: it stays, and the task group stays open

    def attach(
        self, kv_caches: Mapping[str, torch.Tensor], *, rank: int = 0, block_axis: int | None = None
    ) -> None:
        """Load into and store from these paged caches: one tensor for each layer name.

        ``rank``: which part of every block they hold. ``block_axis``: the axis of the blocks,
        where a shape leaves it open.

        Raises:
            LayoutError: the tensors do not hold such blocks as the layout says.
            InputError: there is no such rank, or it has its caches already.
            EngineClosedError: the engine is not open.
        """
        self._check_open()
        layout = self._layout
        copier = make_copier(kv_caches, layout.tokens_per_block, layout.block_nbytes, block_axis)
        self.attach_copier(copier, rank)

    def attach_copier(self, copier: PagedCopier, rank: int) -> None:
        """Load and store through ``copier``, which belongs to the engine from now on.

        Raises:
            InputError: there is no such rank, or it has its caches already.
            EngineClosedError: the engine is not open.
        """
        self._check_open()
        if not 0 <= rank < self._layout.num_ranks:
            raise InputError(f"rank {rank} is not one of the layout's {self._layout.num_ranks}")
        if rank in self._transfers.copiers:
            raise InputError(f"rank {rank} has its caches already")
        if self._pool is not None:
            copier.attach_pool(self._pool, rank)
        self._transfers.copiers[rank] = copier

    def lookup(self, blocks: Blocks) -> Match:
        """How much of ``blocks`` could be loaded now. Each call counts as a request."""
        self._check_open()
        self._check_chain(blocks)
        by_tier = self._below.match(blocks)
        num_blocks = sum(by_tier.values())
        self.count_request(len(blocks), num_blocks)
        return Match(num_blocks, by_tier)

    def count_request(self, num_requested: int, num_hit: int) -> None:
        """Count a request, for who looks up by ``lease``; any one thread may do so."""
        counts = self._counts
        counts["requests"] += 1
        counts["requested"] += num_requested
        counts["hit"] += num_hit
        interval = self._config.num_log_interval_requests
        if interval and counts["requests"] % interval == 0:
            _log.info("%s", self.stats().line())

    async def load(
        self,
        blocks: Blocks,
        gpu_block_ids: Sequence[int],
        first: int = 0,
        *,
        after: object = None,
        pin: Pin | None = None,
    ) -> Loaded:
        """Copy blocks into the paged caches: ``blocks[first + i]`` to ``gpu_block_ids[i]``.

        Loads as far as the resident prefix of ``blocks`` reaches. On CUDA the copies follow the
        work that is on the caller's current stream now; ``after`` replaces it by another mark of
        the copiers' kind. ``pin``, a lease on ``blocks``, is released. When it returns, every
        stream sees the bytes. When it is cancelled, it ends as soon as no copy uses the GPU blocks.

        Raises:
            InputError: the ids do not go with the blocks. Nothing was copied.
            EngineClosedError: the engine is not open.
        """
        started_s = time.perf_counter()
        block_ids = self._checked_ids(blocks, gpu_block_ids, first)
        marks = self._marks() if after is None else dict.fromkeys(self._transfers.copiers, after)
        blocks = blocks.part(0, first + len(block_ids))
        by_tier, num_expected = await self._below.load(
            self._transfers, blocks, block_ids, first, marks, pin
        )
        num_blocks = sum(by_tier.values())
        self._counts["loaded"] += num_blocks
        self._counts["nbytes_loaded"] += num_blocks * self._block_nbytes
        self._counts["load_failed"] += num_expected - num_blocks
        return Loaded(
            num_blocks,
            tuple(block_ids[num_blocks:]),
            {tier: num * self._block_nbytes for tier, num in by_tier.items()},
            time.perf_counter() - started_s,
        )

    async def store(
        self,
        blocks: Blocks,
        gpu_block_ids: Sequence[int],
        first: int = 0,
        *,
        keep: Callable[[], bool] | None = None,
        num_again: int = 0,
    ) -> Stored:
        """Copy blocks from the paged caches: ``blocks[first + i]`` from ``gpu_block_ids[i]``.

        Copies what is absent, as far as it fits. On CUDA the copies follow the work that is on the
        caller's current stream now. When it is cancelled, it ends as soon as no copy uses the GPU
        blocks, and keeps nothing. ``keep`` is asked when the copies have ended: False, where their
        source was overwritten. So many blocks as ``num_again`` came before in the same request.

        Raises:
            InputError: the ids do not go with the blocks. Nothing was copied.
            EngineClosedError: the engine is not open.
        """
        block_ids = self._checked_ids(blocks, gpu_block_ids, first)
        self._key_nbytes = blocks.key_nbytes
        blocks = blocks.part(0, first + len(block_ids))
        stored = await self._stores.store(blocks, block_ids, first, self._marks(), keep)
        self._below.offer(blocks, num_again)
        self._counts["store_dropped"] += stored.num_dropped
        return stored

    def lease(self, blocks: Blocks) -> Pin:
        """Keep what could be loaded of ``blocks`` from eviction until ``release``.

        This, ``release`` and ``touch`` may be called from any thread.
        """
        return self._below.pin(blocks)

    def release(self, lease: Pin) -> None:
        """End a lease; once more does nothing."""
        lease.release()

    def touch(self, blocks: Blocks) -> None:
        """What is resident of ``blocks`` was used just now."""
        self._host.touch(blocks)
        self._below.touch(blocks)

    async def prefetch(self, blocks: Blocks) -> int:
        """Bring blocks up from SSD into the host tier. Returns how much of the prefix is there."""
        self._check_open()
        self._check_chain(blocks)
        self._host.touch(blocks)
        await self._below.prefetch(blocks)
        return self._host.match(blocks).num_blocks

    async def flush(self) -> None:
        """Wait until what was stored so far is on SSD as well, or was dropped."""
        await self._below.flush()

    def residency(self, tier: Tier) -> set[BlockKey]:
        """The keys of all blocks that can be read from ``tier`` now.

        Raises:
            InputError: there is no such tier.
        """
        if tier not in set(Tier):
            raise InputError(f"tier is {tier!r}: give one of {', '.join(Tier)}")
        return self._host.residency() if tier == Tier.HOST else self._below.residency(tier)

    def walk(self, tier: Tier) -> Iterator[Blocks]:
        """What ``residency`` names, run by run, parents first; the tier may change meanwhile."""
        if tier == Tier.HOST:
            yield from (stored.blocks for stored in self._host.walk())
        elif tier == Tier.SSD:
            yield from (stored.blocks for stored in self._below.walk())

    async def clear(self) -> bool:
        """Forget every block, those on their way included.

        Nothing of it is served from now on, whatever the answer is. False: the disk failed or took
        too long, so that it may be back after a restart.
        """
        self._check_open()
        self._stores.note_clear()
        emptied = self._below.forget()
        self._host.clear()
        if emptied is None:
            return True
        await asyncio.wait([emptied], timeout=self._config.transfers.deadline_s)
        return emptied.done() and emptied.result()

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        tiers, counts = self._below.stats(self._events.digests()), self._counts
        host = tiers[Tier.HOST]
        return EngineStats(
            tiers=tiers,
            num_requests=counts["requests"],
            num_requested=counts["requested"],
            num_hit=counts["hit"],
            num_loaded=counts["loaded"],
            num_load_failed=counts["load_failed"],
            num_stored=host.num_stored,
            num_store_dropped=counts["store_dropped"],
            nbytes_loaded=counts["nbytes_loaded"],
            nbytes_stored=host.num_stored * self._block_nbytes,
            lanes={**self._transfers.lanes, **self._below.lanes} if self._open else {},
            last_event_id=self._events.last_id,
            feed=counts_of(self._sinks),
        )

    def _emit(self, events: Sequence[Event]) -> None:
        """Number and announce, in the step that made the events true."""
        if events:
            self._events.append(events)
            for sink in self._sinks:
                sink.wake()

    def _walk(self) -> Iterator[BlockStored]:
        yield from self._host.walk()
        yield from self._below.walk()

    def _marks(self) -> dict[int, object]:
        return {rank: copier.mark() for rank, copier in self._transfers.copiers.items()}

    def _check_open(self) -> None:
        if not self._open:
            raise EngineClosedError("the engine is not open: use it within `async with engine`")

    def _check_chain(self, blocks: Blocks) -> None:
        key_nbytes = self._key_nbytes or self._below.key_nbytes
        check_chain(blocks, self._layout.tokens_per_block, key_nbytes)

    def _checked_ids(self, blocks: Blocks, gpu_block_ids: Sequence[int], first: int) -> list[int]:
        self._check_open()
        self._check_chain(blocks)
        copiers = self._transfers.copiers
        if len(copiers) < self._layout.num_ranks:
            raise InputError(
                f"{len(copiers)} of {self._layout.num_ranks} ranks have their caches: "
                "call engine.attach first"
            )
        num_gpu_blocks = min(copier.num_blocks for copier in copiers.values())
        return checked_block_ids(gpu_block_ids, len(blocks), first, num_gpu_blocks)
