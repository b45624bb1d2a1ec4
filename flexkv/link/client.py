"""A GPU worker's end of the link: finds its engine, then copies what that asks for."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from flexkv.errors import FlexKVError
from flexkv.link.errors import LinkError
from flexkv.link.messages import (
    MAX_COPIES,
    PROTOCOL_VERSION,
    Bye,
    Copy,
    CopyDone,
    Hello,
    LoadDone,
    Ping,
    Pong,
    Refused,
    StoresDone,
    Welcome,
    decode,
    reason_of,
    unpack_ids,
    unpack_slots,
)
from flexkv.link.sockets import LINGER_MS, end_context, new_context, new_socket, receiving, send_now
from flexkv.link.waiting import until_done
from flexkv.process import Process, host_name, machine_id
from flexkv.tiers.host import HostPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv.link.messages import Message, Note
    from flexkv.tiers.base import PagedCopier

_log = logging.getLogger(__name__)


class LinkClient:
    """One rank's worker of engine ``engine_id``, which listens at ``endpoint``, or will.

    ``copier`` copies on its behalf; each copy is told to follow ``mark()``, by default the
    copier's own. ``notes`` gets what the engine tells the model thread, on this loop: it must not
    wait. An engine that says nothing for ``silence_s`` is lost; ``heartbeat_s`` is as the engine's.
    A load that has to wait for a step fails if ``reached`` does not tell of it within
    ``step_deadline_s``. ``huge_pages``: ask for them, as the engine does.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        engine_id: str,
        rank: int,
        num_ranks: int,
        tokens_per_block: int,
        copier: PagedCopier,
        block_nbytes: int,
        notes: Callable[[Note], None],
        deadline_s: float,
        heartbeat_s: float = 1.0,
        silence_s: float = 10.0,
        mark: Callable[[], object] | None = None,
        step_deadline_s: float = 30.0,
        huge_pages: bool = False,
    ) -> None:
        self.num_dropped = 0  # messages that made no sense
        self.is_linked = False
        self._endpoint = endpoint
        self._hello = Hello(
            version=PROTOCOL_VERSION,
            engine_id=engine_id,
            rank=rank,
            num_ranks=num_ranks,
            host=host_name(),
            machine=machine_id(),
            pid=os.getpid(),
            tokens_per_block=tokens_per_block,
            block_nbytes=block_nbytes,
            num_blocks=copier.num_blocks,
        )
        self._copier = copier
        self._notes = notes
        self._mark = mark or copier.mark
        self._deadline_s = deadline_s
        self._heartbeat_s = heartbeat_s
        self._silence_s = silence_s
        self._step_deadline_s = step_deadline_s
        self._huge_pages = huge_pages
        self._step = 0
        self._stepped = asyncio.Event()
        self._welcome: Welcome | None = None
        self._engine: Process | None = None
        self._pool: HostPool | None = None
        self._copies: set[asyncio.Task[None]] = set()
        self._socket: zmq.asyncio.Socket
        self._tasks: asyncio.TaskGroup
        self._hears_us = True  # as far as we know: somebody may read our last words
        self._end: asyncio.Future[LinkError | None]  # None: in order
        self._attached: asyncio.Event

    async def run(self) -> None:
        """Serve the engine until it closes. However this ends, no copy runs any more.

        Raises:
            LinkError: the engine did not let us in within ``deadline_s``, or refused us, or is
                lost, or its pool is of no use here.
        """
        context = new_context()
        self._socket = new_socket(context, zmq.DEALER)
        self._end = asyncio.get_running_loop().create_future()
        self._attached = asyncio.Event()
        try:
            try:
                self._socket.connect(self._endpoint)
            except zmq.ZMQError as error:
                raise LinkError(self._endpoint, f"can't connect: {error.strerror}") from error
            async with asyncio.TaskGroup() as self._tasks:
                await self._serve()
                for copy in self._copies:
                    copy.cancel()  # those that have not begun never do
        finally:
            self._leave()
            end_context(context, LINGER_MS if self._hears_us else 0)
        if failure := self._end.result():
            raise failure

    def reached(self, step: int) -> None:
        """The model thread has begun ``step``; to be called on this loop."""
        self._step = max(self._step, step)
        self._stepped.set()
        self._stepped = asyncio.Event()

    def _leave(self) -> None:
        self.is_linked = False
        failure = self._end.result() if self._end.done() and not self._end.cancelled() else None
        self._send(Bye(reason_of(failure.reason) if failure else ""))
        if self._pool is not None:
            self._pool.close()

    async def _serve(self) -> None:
        """Take messages until the link ends."""
        loop = asyncio.get_running_loop()
        dial_until_s = loop.time() + self._deadline_s
        num_missed = 0
        self._send(self._hello)
        message = receiving(self._socket)
        while not self._end.done():
            either: list[asyncio.Future[Any]] = [message, self._end]
            timeout_s = self._heartbeat_s
            if self._welcome is None:
                timeout_s = max(0.0, min(timeout_s, dial_until_s - loop.time()))
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                num_missed = 0
                self._take(message.result())
                message = receiving(self._socket)
                await asyncio.sleep(0)
            elif self._welcome is None:
                self._send(self._hello)  # whoever got the last one may be dead
            else:
                num_missed += 1
                self._check(num_missed)
            if self._welcome is None and loop.time() >= dial_until_s:
                self._finish(f"no engine let us in within {self._deadline_s} s")
        message.cancel()

    def _finish(self, reason: str | None) -> None:
        if not self._end.done():
            self._end.set_result(None if reason is None else LinkError(self._endpoint, reason))

    def _check(self, num_missed: int) -> None:
        """Has the engine died or fallen silent? Silence is counted in our own heartbeats."""
        if self._engine is not None and not self._engine.is_alive():
            self._hears_us = False
            self._finish(f"the engine (process {self._engine.pid}) is gone")
        elif num_missed > self._silence_s / self._heartbeat_s:
            self._finish(f"the engine gave no sign of life for {self._silence_s} s")

    def _send(self, message: Message) -> None:
        try:
            send_now(self._socket, message)
        except zmq.Again:  # the engine does not read: _check and its own check see it
            _log.debug("%s: %s was not sent", self._endpoint, type(message).__name__)

    def _take(self, frames: list[bytes]) -> None:
        message = decode(frames[0], self._endpoint)
        match message:
            case _ if len(frames) > 1:
                self._drop(f"a message has {len(frames)} parts")
            case Ping():
                self._send(Pong())
            case Copy() if self._welcome is not None:
                self._start(message)
            case LoadDone() | StoresDone():
                self._notes(message)
            case Welcome():
                if self._welcome is None:
                    self._welcome = message
                    self._engine = Process(message.engine_pid)
                    self._tasks.create_task(self._attach(message))
            case Refused():
                self._finish(f"refused by the engine: {message.reason}")
            case Bye():
                self._hears_us = False
                self._finish(None if self._welcome else "the engine closed before it let us in")
            case LinkError():
                self._drop(message.reason)
            case _:
                self._drop(f"the engine sent {type(message).__name__}")

    def _drop(self, reason: str) -> None:
        self.num_dropped += 1
        level = logging.WARNING if self.num_dropped == 1 else logging.DEBUG
        _log.log(level, "%s: message dropped: %s", self._endpoint, reason)

    async def _attach(self, welcome: Welcome) -> None:
        # in a thread: pinning takes seconds, and heartbeats go on
        attaching = asyncio.get_running_loop().run_in_executor(None, self._attach_now, welcome)
        try:
            await until_done(attaching)
        finally:
            error = attaching.exception()  # seen, even if cancelled
        if isinstance(error, FlexKVError):
            self._finish(f"the engine's host pool is of no use here: {error}")
            return
        attaching.result()
        self.is_linked = True
        self._attached.set()
        _log.info(
            "%s: rank %d serves engine %s (process %d)",
            self._endpoint,
            self._hello.rank,
            self._hello.engine_id,
            welcome.engine_pid,
        )

    def _attach_now(self, welcome: Welcome) -> None:
        self._pool = HostPool.open(
            welcome.pool_path,
            welcome.num_slots,
            welcome.slot_nbytes,
            welcome.num_ranks,
            huge_pages=self._huge_pages,
        )
        self._copier.attach_pool(self._pool, self._hello.rank)

    def _start(self, copy: Copy) -> None:
        if len(self._copies) >= 2 * MAX_COPIES:
            self._send(CopyDone(copy.copy_id, f"more than {2 * MAX_COPIES} copies at a time"))
            return
        task = self._tasks.create_task(self._copy(copy))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copy(self, copy: Copy) -> None:
        block_ids, slots = unpack_ids(copy.block_ids), unpack_slots(copy.slots)
        mark = self._mark()
        await self._attached.wait()  # ends with the link at the latest
        error = None
        try:
            if copy.is_load:
                await self._step_begun(copy.after_step)
                await self._copier.scatter(slots, block_ids, self._mark())
            else:
                await self._copier.gather(block_ids, slots, mark)
        except TimeoutError:
            error = f"the model did not begin step {copy.after_step} in {self._step_deadline_s} s"
        except FlexKVError as failure:
            error = reason_of(failure)
        self._send(CopyDone(copy.copy_id, error))

    async def _step_begun(self, step: int) -> None:
        async with asyncio.timeout(self._step_deadline_s):
            while self._step < step:
                await self._stepped.wait()
