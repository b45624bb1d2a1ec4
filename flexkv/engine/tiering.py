"""The host tier and what is below it, as the engine sees them: SSD, or nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from flexkv.blocks import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flexkv.blocks import BlockKey, Blocks, KVLayout
    from flexkv.config import Config
    from flexkv.engine.disk import Disk
    from flexkv.engine.rising import Risings
    from flexkv.engine.runs import Lease
    from flexkv.engine.shared_index import SharedIndex
    from flexkv.engine.stats import TierStats
    from flexkv.engine.stores import Stores
    from flexkv.engine.transfers import Transfers
    from flexkv.engine.write_through import WriteThrough
    from flexkv.events.log import EventLog
    from flexkv.events.types import BlockStored, Event
    from flexkv.tiers.host import HostPool

_log = logging.getLogger(__name__)

_HOST_SHARE = 4  # of the host tier, a quarter may wait for the SSD: the rest takes stores


class Pin:
    """Keeps ``num_blocks`` of a chain from eviction, in whatever tier they are."""

    __slots__ = ("leases", "num_blocks")

    def __init__(self, num_blocks: int, leases: Sequence[tuple[SharedIndex, Lease]]) -> None:
        self.num_blocks = num_blocks
        self.leases = leases

    def release(self) -> None:
        """End it; once more does nothing. Any thread may."""
        for index, lease in self.leases:
            index.release(lease)


class Tiering:
    """Loads from host, and the tiers below it. Without ``enable_ssd`` every call is a no-op."""

    def __init__(
        self,
        config: Config,
        layout: KVLayout,
        identity: Mapping[str, object] | None,
        host: SharedIndex,
        announce: Callable[[Sequence[Event]], None],
    ) -> None:
        self._config = config
        self._host = host
        self._block_nbytes = layout.block_nbytes * layout.num_ranks
        self._loaded: Counter[Tier] = Counter()  # blocks
        self._disk: Disk | None = None
        self._risings: Risings | None = None
        self._writer: WriteThrough | None = None
        self._closing: asyncio.Future[tuple[None]] | None = None
        if config.enable_flexkv and config.cache.enable_ssd:
            from flexkv.engine.disk import Disk  # noqa: PLC0415  # needs Linux

            self._disk = Disk(config.cache, layout, identity, announce)

    @property
    def key_nbytes(self) -> int:
        """The width of the keys of what is kept here; 0: not known yet."""
        return 0 if self._disk is None else self._disk.key_nbytes

    @property
    def lanes(self) -> Mapping[str, int]:
        """Bytes in flight from SSD to host, and waiting for the other way."""
        if self._risings is None or self._writer is None:
            return {}
        return {"rise": self._risings.nbytes_in_flight, "sink": self._writer.nbytes}

    async def open(
        self, pool: HostPool, stores: Stores, tasks: asyncio.TaskGroup, events: EventLog
    ) -> None:
        """Bring back what was kept; then write what is offered, in a task of ``tasks``.

        Raises:
            ConfigError: a folder can't be used.
        """
        disk, cache = self._disk, self._config.cache
        if disk is None:
            return
        from flexkv.engine.rising import Risings  # noqa: PLC0415  # only where there is an SSD
        from flexkv.engine.write_through import WriteThrough  # noqa: PLC0415  # as above

        await disk.open(pool, tasks)
        events.begin_with(self.walk())
        host_nbytes = pool.num_slots * self._block_nbytes
        self._writer = WriteThrough(
            disk,
            self._host,
            block_nbytes=self._block_nbytes,
            max_nbytes=min(cache.ssd_write_queue_bytes, host_nbytes // _HOST_SHARE),
            second_sight=cache.ssd_admission == "second_sight",
        )
        self._risings = Risings(
            disk,
            self._host,
            stores,
            self._config,
            self._block_nbytes,
            tasks,
            pool.num_slots,
        )
        self._writing = tasks.create_task(self._writer.run())

    def match(self, blocks: Blocks) -> dict[Tier, int]:
        """How much of ``blocks`` could be loaded from host, and beyond that from each tier."""
        num_host = self._host.match(blocks).num_blocks
        return {Tier.HOST: num_host, **self._share(self._num_usable(blocks, num_host) - num_host)}

    def pin(self, blocks: Blocks) -> Pin:
        """Protect what could be loaded of ``blocks``; any thread may ask."""
        host_lease = self._host.lease(blocks)
        num_host = host_lease.num_blocks
        below = self._pin_below(blocks.part(0, self._num_usable(blocks, num_host)), num_host)
        return Pin(below.num_blocks, [(self._host, host_lease), *below.leases])

    async def load(
        self,
        transfers: Transfers,
        blocks: Blocks,
        block_ids: Sequence[int],
        first: int,
        marks: Mapping[int, object],
        pin: Pin | None,
    ) -> tuple[dict[Tier, int], int]:
        """Load ``blocks[first:]``: how many came from each tier, and how many were expected.

        ``pin`` is released at once: what waits for host slots must not hold any.
        """
        self.touch(blocks)
        plan = self._host.plan_load(blocks, first)
        num_resident = first + len(plan.slots)
        num_usable = pin.num_blocks if pin is not None else self._num_usable(blocks, num_resident)
        below = self._pin_below(blocks.part(0, min(num_usable, len(blocks))), num_resident)
        if pin is not None:
            pin.release()
        chain = blocks.part(0, below.num_blocks)
        risings = self._risings if len(chain) > num_resident else None
        rising = None
        num_below = 0
        try:
            try:
                if risings is not None and risings.has_room(chain):
                    rising = await risings.begin(chain)
                num_host = await transfers.load(plan.slots, block_ids, marks)
            finally:
                self._host.release(plan.lease)
            if risings is not None and num_host == len(plan.slots):
                rising = rising or await risings.begin(chain)
                if rising is not None:
                    num_below = await rising.load(transfers, block_ids, first, num_host, marks)
        finally:
            below.release()
            if rising is not None:
                rising.end()
        by_tier = {Tier.HOST: num_host, **self._share(num_below)}
        self._loaded.update(by_tier)
        return by_tier, max(len(plan.slots), below.num_blocks - first)

    async def prefetch(self, blocks: Blocks) -> None:
        """Bring up into host what is not there."""
        self.touch(blocks)
        num_host = self._host.match(blocks).num_blocks
        below = self._pin_below(blocks.part(0, self._num_usable(blocks, num_host)), num_host)
        rising = None
        try:
            if self._risings is not None and below.num_blocks > num_host:
                rising = await self._risings.begin(blocks.part(0, below.num_blocks))
            if rising is not None:
                await rising.finish()
        finally:
            below.release()
            if rising is not None:
                rising.end()

    def touch(self, blocks: Blocks) -> None:
        """What is here of ``blocks`` was used just now; any thread may say so."""
        if self._disk is not None:
            self._disk.index.touch(blocks)

    def offer(self, blocks: Blocks, num_again: int) -> None:
        """Copy what host holds of ``blocks`` down, in the background."""
        if self._writer is not None:
            self._writer.offer(blocks, num_again)

    def forget(self) -> asyncio.Future[bool] | None:
        """Nothing is here any more; announces nothing. The answer is that of ``Disk.clear``."""
        if self._disk is None or self._writer is None:
            return None
        self._writer.clear()
        return self._disk.clear()

    async def flush(self) -> None:
        """What was offered or forgotten so far has been written, or waits for too long."""
        if self._writer is not None:
            await self._writer.settled(self._config.transfers.deadline_s)

    def walk(self) -> Iterator[BlockStored]:
        """Everything resident, parents first."""
        return iter(()) if self._disk is None else self._disk.index.walk()

    def residency(self, tier: Tier) -> set[BlockKey]:
        """The keys of everything resident in ``tier``."""
        return self._disk.index.residency() if self._disk and tier == Tier.SSD else set()

    def stats(self, digests: Mapping[Tier, object]) -> dict[Tier, TierStats]:
        """Each tier's numbers; ``digests`` are those of what is resident."""
        tiers = {Tier.HOST: self._host.stats(digests[Tier.HOST])}
        if (disk := self._disk) is not None:
            tiers[Tier.SSD] = disk.index.stats(digests[Tier.SSD])
            if self._risings is not None and self._writer is not None:
                of_disk = tiers[Tier.SSD]
                tiers[Tier.SSD] = replace(
                    of_disk,
                    num_slots=of_disk.num_slots if disk.is_on else 0,
                    num_free=of_disk.num_free if disk.is_on else 0,
                    num_rotten=self._risings.num_lost,
                    num_unwritten=self._writer.num_dropped,
                )
        return {tier: replace(of, num_loaded=self._loaded[tier]) for tier, of in tiers.items()}

    async def settle(self, timeout_s: float) -> int:
        """Let reads and writes end; how many still run."""
        if self._risings is None or self._writer is None:
            return 0
        num_running = await self._risings.settle(timeout_s)
        if not await self._writer.settled(timeout_s):
            self._writer.drop()
            num_running += not await self._writer.settled(timeout_s)
        return num_running

    async def close(self, timeout_s: float) -> int:
        """End the writer, write the last journal, let go of the disk.

        Returns how much of that still runs, on a disk that hangs; once more waits once more.
        """
        if self._disk is None:
            return 0
        if self._closing is None:
            self._closing = asyncio.gather(self._close(self._disk))  # a task of this call's own
        await asyncio.wait([self._closing], timeout=timeout_s)
        if not self._closing.done():
            _log.error("ssd: the disk did not take the last journal within %s s", timeout_s)
            return 1
        self._closing.result()
        return 0

    async def _close(self, disk: Disk) -> None:
        if self._writer is not None:
            self._writer.close()
            await asyncio.wait([self._writing])
        try:
            await disk.close()
        except OSError as error:  # the rest of the engine is to be closed all the same
            _log.error("ssd: the disk was let go of with an error: %s", error)  # it says all

    def _num_usable(self, blocks: Blocks, num_host: int) -> int:
        return num_host if self._risings is None else self._risings.num_usable(blocks, num_host)

    def _share(self, num_blocks: int) -> dict[Tier, int]:
        return {} if self._disk is None else {Tier.SSD: num_blocks}

    def _pin_below(self, blocks: Blocks, num_host: int) -> Pin:
        """Protect what could rise of ``blocks``, behind ``num_host``."""
        if self._disk is None or len(blocks) <= num_host:
            return Pin(num_host, ())
        index = self._disk.index
        lease = index.lease(blocks)
        return Pin(max(num_host, lease.num_blocks), [(index, lease)])
