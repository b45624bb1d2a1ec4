"""One rank's GPU worker as the engine sees it: a PagedCopier whose copies run over the link."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from typing import TYPE_CHECKING

from flexkv.errors import EngineClosedError, InputError, TransferError
from flexkv.link.messages import (
    MAX_COPIES,
    MAX_COPY_BLOCKS,
    Copy,
    Welcome,
    pack_ids,
    pack_slots,
)
from flexkv.link.waiting import until_done
from flexkv.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flexkv.link.messages import CopyDone, Hello, Message
    from flexkv.tiers.host import HostPool

_log = logging.getLogger(__name__)


class LinkCopier:
    """Has one rank's GPU worker copy. The server makes it, and tells it what the worker says.

    A rank is lost when its worker left, died or fell silent: ``loss`` says why. Its copies, the
    running ones too, then raise TransferError. Its place is free for another worker once the
    old one's copies have surely ended: it said so, or its process is gone.
    """

    def __init__(
        self, send: Callable[[LinkCopier, Message], None], route: bytes, hello: Hello
    ) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._running: dict[int, asyncio.Future[TransferError | None]] = {}
        self._load_places = asyncio.Semaphore(MAX_COPIES)
        self._store_places = asyncio.Semaphore(MAX_COPIES)
        self._welcome: Welcome | None = None
        self._closed = False
        self.join(route, hello)

    def join(self, route: bytes, hello: Hello) -> None:
        """The worker at ``route`` takes this rank, whose place is free."""
        self.route = route
        self.hello = hello
        self.process = Process(hello.pid)
        self.loss: str | None = None
        self.is_free = False
        self.num_missed = 0  # heartbeats since the worker said something
        _log.debug("rank %d is here: process %d", hello.rank, hello.pid)
        self.welcome()

    @property
    def num_blocks(self) -> int:
        """Blocks of the rank's paged cache."""
        return self.hello.num_blocks

    @property
    def is_welcomed(self) -> bool:
        """Has it a worker that knows the pool?"""
        return self._welcome is not None and self.loss is None

    def attach_pool(self, pool: HostPool, rank: int) -> None:
        """Let the worker in: it maps ``pool``.

        Raises:
            InputError: the worker is another rank's.
        """
        if rank != self.hello.rank:
            raise InputError(f"this worker is rank {self.hello.rank}, not {rank}")
        self._welcome = Welcome(
            pool_path=pool.path(),
            num_slots=pool.num_slots,
            slot_nbytes=pool.slot_nbytes,
            num_ranks=pool.num_ranks,
            engine_pid=os.getpid(),
        )
        self.welcome()

    def welcome(self) -> None:
        """Tell the worker about the pool, if there is one by now."""
        if self._welcome is not None and self.loss is None:
            self._send(self, self._welcome)

    def mark(self) -> object:
        """Nothing: the worker orders its copies after its model's work."""
        return None

    async def gather(
        self,
        block_ids: Sequence[int],
        slots: Sequence[int],
        after: object,  # noqa: ARG002  # see mark
    ) -> None:
        """Copy blocks of the rank's cache into slots.

        Raises:
            InputError: ids out of range, or not as many as slots. Nothing was copied.
            TransferError: the copy failed or the rank is lost; the slots' bytes are undefined.
            EngineClosedError: closed. Nothing was copied.
        """
        await self._copy_all(block_ids, slots, is_load=False)

    async def scatter(
        self, slots: Sequence[int], block_ids: Sequence[int], after: object = None
    ) -> None:
        """Copy slots into blocks of the rank's cache.

        ``after``: the number of a step that the worker's model thread has to have begun by then.

        Raises:
            InputError: ids out of range, or not as many as slots. Nothing was copied.
            TransferError: the copy failed or the rank is lost; the blocks' bytes are undefined.
            EngineClosedError: closed. Nothing was copied.
        """
        after_step = after if isinstance(after, int) else 0
        await self._copy_all(block_ids, slots, is_load=True, after_step=after_step)

    def abandon(self) -> None:
        """As ``close``; the copies are the worker's."""
        self._closed = True

    async def close(self) -> None:
        """Ask for no more copies; nothing may be copying."""
        self._closed = True

    def ended(self, done: CopyDone) -> bool:
        """The worker's copy has ended. False if there was no such copy."""
        copy = self._running.pop(done.copy_id, None)
        if copy is None:
            return False
        rank = self.hello.rank
        failed = None if done.error is None else TransferError(f"rank {rank}: {done.error}")
        copy.set_result(failed)
        return True

    def lose(self, reason: str) -> None:
        """No copy of this worker counts any more."""
        self.loss = f"rank {self.hello.rank} (process {self.hello.pid}) {reason}"
        running, self._running = self._running, {}
        for copy in running.values():
            copy.set_result(TransferError(f"a copy was lost: {self.loss}"))

    async def _copy_all(
        self, block_ids: Sequence[int], slots: Sequence[int], *, is_load: bool, after_step: int = 0
    ) -> None:
        if len(block_ids) != len(slots):
            raise InputError(f"{len(block_ids)} block ids do not go with {len(slots)} slots")
        ids, places = pack_ids(block_ids), pack_slots(slots)
        if ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise InputError(f"a block id is out of range: there are {self.num_blocks}")
        for at in range(0, len(block_ids), MAX_COPY_BLOCKS):
            end = at + MAX_COPY_BLOCKS
            async with self._load_places if is_load else self._store_places:
                await self._copy(
                    ids[4 * at : 4 * end],
                    places[8 * at : 8 * end],
                    is_load=is_load,
                    after_step=after_step,
                )

    async def _copy(
        self, block_ids: bytes, slots: bytes, *, is_load: bool, after_step: int
    ) -> None:
        if self._closed:
            raise EngineClosedError("the copier is closed")
        if self.loss is not None:
            raise TransferError(f"nothing was copied: {self.loss}")
        if self._welcome is None:
            raise InputError("no host pool is attached: call attach_pool first")
        copy_id = next(self._ids)
        ended: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()
        self._running[copy_id] = ended
        copy = Copy(
            copy_id=copy_id,
            is_load=is_load,
            block_ids=block_ids,
            slots=slots,
            after_step=after_step,
        )
        self._send(self, copy)
        await until_done(ended)
        if failure := ended.result():
            raise failure
