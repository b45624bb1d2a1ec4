"""The engine beside vLLM's scheduler: its thread, and what the scheduler may ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import threading
from concurrent.futures import Future
from itertools import count
from typing import TYPE_CHECKING

from flexkv.blocks import KVLayout, Tier
from flexkv.engine.bridge import LoopThread
from flexkv.engine.engine import Engine
from flexkv.errors import FlexKVError
from flexkv.link.errors import LinkError
from flexkv.link.messages import LoadDone, StoresDone, pack_ids
from flexkv.link.residency import Piece, ResidencyParts
from flexkv.link.server import LinkServer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from flexkv.blocks import Blocks
    from flexkv.engine.stats import EngineStats
    from flexkv.engine.tiering import Pin
    from flexkv.events.sinks import EventSink
    from flexkv.integration.vllm.settings import VllmSettings

_START_S = 4.0
_REGISTER_S = 600.0  # vLLM may profile and compile between the two constructors
_STOP_S = 15.0
_CLEAR_S = 5.0
_PARENT_S = 1.0
_MAX_STORES = 256  # that wait or run; what comes then is offered again with the next step

_log = logging.getLogger(__name__)


class _Store:
    """A store that runs for a request; ``keep`` False: its blocks may be overwritten by now."""

    __slots__ = ("keep", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.keep = True


class EngineService:
    """An engine in a thread of its own. The scheduler's thread calls; nothing here holds it up.

    Raises:
        FlexKVError: the endpoint is taken, or can't be bound.
    """

    def __init__(self, settings: VllmSettings, sinks: Sequence[EventSink]) -> None:
        self._settings = settings
        self._sinks = sinks
        self._engine: Engine | None = None
        self._is_complete = False  # all ranks are here
        self._server: LinkServer | None = None
        self._jobs: asyncio.TaskGroup | None = None
        self._lock = threading.Lock()  # guards what follows
        self._stores: dict[str, set[_Store]] = {}
        self._finishing: set[str] = set()
        self._num_stores = 0
        self._job_ids = count(1)
        self._thread = LoopThread("flexkv-engine", self._main)
        self._thread.start(_START_S)

    @property
    def alive(self) -> bool:
        """Whether the thread runs; once False, nothing that was promised will be done."""
        return self._thread.alive

    @property
    def usable(self) -> bool:
        """Whether loads and stores are possible now."""
        return self._is_complete and self._thread.alive

    @property
    def thread(self) -> LoopThread:
        """For what else has to happen on the engine's loop."""
        return self._thread

    def stats(self) -> EngineStats | None:
        """What the engine has done; None while it is not there."""
        engine = self._engine
        return None if engine is None else engine.stats()

    def lease(self, blocks: Blocks) -> Pin | None:
        """Protect what could be loaded of ``blocks``; None while that is nothing."""
        engine = self._engine
        if engine is None or not self.usable:
            return None
        lease = engine.lease(blocks)
        return lease if lease.num_blocks else None

    def release(self, lease: Pin) -> None:
        """End a lease."""
        if (engine := self._engine) is not None:
            engine.release(lease)

    def touch(self, blocks: Blocks) -> None:
        """``blocks`` were used."""
        if (engine := self._engine) is not None:
            engine.touch(blocks)

    def count_request(self, num_requested: int, num_hit: int) -> None:
        """A request looked up so many blocks, and so many were there."""
        if (engine := self._engine) is not None:
            engine.count_request(num_requested, num_hit)

    def load(
        self,
        request_id: str,
        blocks: Blocks,
        block_ids: Sequence[int],
        first: int,
        step: int,
        pin: Pin | None,
    ) -> int:
        """Begin to load ``blocks[first:]``, after the workers have begun ``step``. The job's id.

        The workers hear of its end, whatever that is, unless this thread or theirs dies.
        """
        job_id = next(self._job_ids)
        self._start(self._load(job_id, request_id, blocks, block_ids, first, step, pin))
        return job_id

    def store(
        self, request_id: str, blocks: Blocks, block_ids: Sequence[int], num_again: int = 0
    ) -> bool:
        """Begin to store ``blocks``, the first ``num_again`` not for the first time.

        False if that is not possible now.
        """
        if not self.usable:
            return False
        with self._lock:
            if self._num_stores >= _MAX_STORES:
                return False
            self._num_stores += 1
            store = _Store(request_id)
            self._stores.setdefault(request_id, set()).add(store)
        self._start(self._store(store, blocks, block_ids, num_again))
        return True

    def discard(self, request_id: str) -> None:
        """The request's GPU blocks are no longer its own: keep nothing that comes from them."""
        with self._lock:
            for store in self._stores.get(request_id, ()):
                store.keep = False
            if request_id not in self._finishing:  # else the workers wait to hear of its end
                self._stores.pop(request_id, None)

    def finish(self, request_id: str) -> bool:
        """The request has ended. True: stores run; the workers will hear when they have ended."""
        with self._lock:
            if request_id not in self._stores:
                return False
            self._finishing.add(request_id)
            return True

    def clear(self) -> bool:
        """Forget everything, for good. False if that did not happen in time.

        Without an engine nothing is in host memory, but what is on SSD stays.
        """
        with self._lock:  # a store that has not begun would begin after the clear
            for stores in self._stores.values():
                for store in stores:
                    store.keep = False
        cleared: Future[bool] = Future()
        has_ssd = self._settings.config.cache.enable_ssd

        def begin() -> None:
            if self._jobs is not None:
                self._jobs.create_task(self._clear(cleared))
            else:
                cleared.set_result(not has_ssd)

        is_cleared = not has_ssd
        if self._thread.call(begin):
            try:
                is_cleared = cleared.result(_CLEAR_S)
            except TimeoutError:
                is_cleared = not (has_ssd or self._thread.alive)
        if not is_cleared:
            _log.error("the cache was not cleared for good: ask again, or end this process")
        return is_cleared

    def close(self) -> None:
        """End the thread."""
        if not self._thread.stop(_STOP_S):
            _log.error("the engine's thread did not end within %s s", _STOP_S)

    # What follows runs on the engine's loop.

    async def _clear(self, cleared: Future[bool]) -> None:
        is_cleared = False
        try:
            is_cleared = self._engine is None or await self._engine.clear()
        except FlexKVError as error:
            _log.warning("the cache was not cleared: %s", error)
        finally:
            cleared.set_result(is_cleared)

    def _start(self, job: Coroutine[None, None, None]) -> None:
        def begin() -> None:
            if self._jobs is not None:
                self._jobs.create_task(job)
            else:
                job.close()

        if not self._thread.call(begin):
            job.close()

    async def _load(
        self,
        job_id: int,
        request_id: str,
        blocks: Blocks,
        block_ids: Sequence[int],
        first: int,
        step: int,
        pin: Pin | None,
    ) -> None:
        missing: Sequence[int] = block_ids
        try:
            if self._engine is not None:
                loaded = await self._engine.load(blocks, block_ids, first, after=step, pin=pin)
                missing = loaded.missing
        except FlexKVError as error:
            _log.warning("a load failed, its blocks are computed again: %s", error)
        finally:
            if pin is not None:
                self.release(pin)
            if self._server is not None:
                self._server.tell(LoadDone(job_id, request_id, pack_ids(missing)))

    async def _store(
        self, store: _Store, blocks: Blocks, block_ids: Sequence[int], num_again: int
    ) -> None:
        try:
            if self._engine is not None:
                await self._engine.store(
                    blocks, block_ids, keep=lambda: store.keep, num_again=num_again
                )
        except FlexKVError as error:
            _log.warning("a store failed, its blocks are dropped: %s", error)
        finally:
            self._end(store)

    def _end(self, store: _Store) -> None:
        request_id = store.request_id
        with self._lock:
            self._num_stores -= 1
            running = self._stores.get(request_id)
            if running is None or store not in running:
                return
            running.discard(store)
            if running:
                return
            del self._stores[request_id]
            if request_id not in self._finishing:
                return
            self._finishing.discard(request_id)
        if self._server is not None:
            self._server.tell(StoresDone(request_id))

    async def _main(self, thread: LoopThread) -> None:
        settings = self._settings
        async with (
            LinkServer(
                settings.endpoint, engine_id=settings.engine_id, num_ranks=settings.num_ranks
            ) as server,
            asyncio.TaskGroup() as tasks,
        ):
            thread.ready()
            ends = [
                tasks.create_task(self._serve(server)),
                tasks.create_task(_until(thread.stopping)),
                tasks.create_task(_until_orphaned()),
            ]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                task.cancel()

    async def _serve(self, server: LinkServer) -> None:
        """From the registration of all ranks on. What fails here turns the cache off."""
        settings = self._settings
        try:
            hellos = await server.registered(_REGISTER_S)
            layout = KVLayout(
                tokens_per_block=settings.block_size,
                block_nbytes=max(hello.block_nbytes for hello in hellos.values()),
                num_ranks=settings.num_ranks,
            )
            async with contextlib.AsyncExitStack() as exits:
                engine = Engine(
                    settings.config, layout, sinks=self._sinks, identity=settings.identity
                )
                await exits.enter_async_context(engine)
                for rank, copier in server.copiers.items():
                    engine.attach_copier(copier, rank)
                server.residency = lambda: ResidencyParts(
                    lambda: _digests(engine), _resident(engine)
                )
                self._server, self._engine = server, engine
                exits.callback(self._forget_engine)
                self._jobs = await exits.enter_async_context(asyncio.TaskGroup())
                exits.callback(self._take_no_more)
                while True:
                    self._is_complete = True
                    _log.info(
                        "flexkv serves %s at %s: %d host blocks of %d bytes",
                        "1 rank" if settings.num_ranks == 1 else f"{settings.num_ranks} ranks",
                        settings.endpoint,
                        engine.stats().tiers[Tier.HOST].num_slots,
                        layout.block_nbytes * layout.num_ranks,
                    )
                    losses = await server.lost()
                    self._is_complete = False
                    _log.info("no loads and stores for now: %s", "; ".join(losses.values()))
                    await _registered_again(server)
        except FlexKVError as error:
            _log.error("the cache is off: %s", error)

    def _take_no_more(self) -> None:
        self._is_complete = False
        self._jobs = None

    def _forget_engine(self) -> None:
        self._engine = None


def _digests(engine: Engine) -> tuple[int, dict[Tier, str]]:
    stats = engine.stats()
    return stats.last_event_id, {tier: of.digest for tier, of in stats.tiers.items()}


def _resident(engine: Engine) -> Iterator[Piece]:
    for tier in (Tier.HOST, Tier.SSD):
        for blocks in engine.walk(tier):
            plain, rest = blocks[: blocks.num_plain], blocks[blocks.num_plain :]
            for part, told in ((plain, True), (rest, False)):
                if len(part):
                    yield Piece(tier, part.key_nbytes, part.packed_keys(), told)


async def _registered_again(server: LinkServer) -> None:
    """Wait for ranks that have left, to sleep perhaps; nobody waits for this."""
    while True:
        with contextlib.suppress(LinkError):
            await server.registered(_REGISTER_S)
            return


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _until_orphaned() -> None:
    """Return once the process that started this one for vLLM is gone; where none did, never."""
    parent = multiprocessing.parent_process()
    while parent is None or parent.pid == os.getppid():  # noqa: ASYNC110  # nobody tells us
        await asyncio.sleep(_PARENT_S)
    _log.error(
        "process %s, which started this one, is gone: flexkv withdraws; end process %s and vLLM's "
        "workers, which go on without it",
        parent.pid,
        os.getpid(),
    )
