"""The engine's end of the link: lets GPU workers in, watches them, and answers who asks."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Self

import zmq
import zmq.asyncio

from flexkv.link.copier import LinkCopier
from flexkv.link.endpoint import EndpointLock, socket_path
from flexkv.link.errors import EndpointTakenError, LinkError
from flexkv.link.messages import (
    PROTOCOL_VERSION,
    Bye,
    CopyDone,
    Hello,
    Ping,
    Pong,
    Refused,
    ResidencyRequest,
    decode,
    reason_of,
    version_of,
)
from flexkv.link.residency import chunks_of
from flexkv.link.sockets import LINGER_MS, end_context, new_context, new_socket, send_now
from flexkv.process import host_name, machine_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from flexkv.link.messages import Message, Note
    from flexkv.link.residency import ResidencyParts

_log = logging.getLogger(__name__)

_MAX_ANSWERS = 4  # residency requests at a time
_MAX_AT_ONCE = 16  # messages taken before others have a turn
_RETRY_S = 0.005


class LinkServer:
    """Listens at ``endpoint`` for the ``num_ranks`` GPU workers of engine ``engine_id``.

    Use it as an asynchronous context manager, from one event loop. A worker is asked for a sign of
    life every ``heartbeat_s``; one that gives none for ``silence_s`` is lost. ``residency`` answers
    whoever asks which blocks are where; it may be set later.

    Raises:
        EndpointTakenError: on entry, at once: another engine listens there.
        LinkError: on entry, at once: nobody can listen there.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        engine_id: str,
        num_ranks: int,
        heartbeat_s: float = 1.0,
        silence_s: float = 10.0,
        residency: Callable[[], ResidencyParts] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.residency = residency
        self.copiers: dict[int, LinkCopier] = {}
        self.num_dropped = 0  # messages that made no sense
        self._engine_id = engine_id
        self._num_ranks = num_ranks
        self._heartbeat_s = heartbeat_s
        self._silence_s = silence_s
        self._machine = machine_id()
        self._lock = EndpointLock(endpoint)
        self._routes: dict[bytes, LinkCopier] = {}
        self._last_refusal = ""
        self._closed = False
        self._changed = asyncio.Event()
        self._num_answers = 0
        self._loops: list[asyncio.Task[None]] = []
        self._socket_path: Path | None = None
        self._context: zmq.asyncio.Context
        self._socket: zmq.asyncio.Socket
        self._tasks: asyncio.TaskGroup

    async def __aenter__(self) -> Self:
        self._lock.take()
        self._context = new_context()
        self._socket = new_socket(self._context, zmq.ROUTER)
        try:
            self._bind()
        except BaseException:
            self._hang_up()
            raise
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        self._loops = [
            self._tasks.create_task(self._receive()),
            self._tasks.create_task(self._beat()),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say goodbye; copies that still run count as failed."""
        self._closed = True
        for copier in self.copiers.values():
            if copier.loss is None:
                self._send(copier, Bye("the engine has closed"))
        for copier in self.copiers.values():
            if copier.loss is None:
                copier.lose("was told that the engine has closed")
        self._tell_waiters()
        for task in self._loops:
            task.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            self._hang_up()

    async def registered(self, deadline_s: float) -> dict[int, Hello]:
        """Wait until every rank's worker is here.

        Raises:
            LinkError: some are not within ``deadline_s``, or the link was closed.
        """
        try:
            async with asyncio.timeout(deadline_s):
                while missing := self._missing():
                    await self._change()
        except TimeoutError:
            reason = f"of {self._num_ranks} GPU workers, rank {missing} did not come within "
            reason += f"{deadline_s} s"
            if self._last_refusal:
                reason += f"; refused: {self._last_refusal}"
            raise LinkError(self.endpoint, reason) from None
        return {rank: copier.hello for rank, copier in sorted(self.copiers.items())}

    async def lost(self) -> dict[int, str]:
        """Wait until ranks are lost that were here once. Which, and why.

        Raises:
            LinkError: the link was closed.
        """
        while True:
            losses = {
                rank: copier.loss
                for rank, copier in self.copiers.items()
                if copier.loss is not None
            }
            if losses and not self._closed:
                return losses
            await self._change()

    def tell(self, note: Note) -> None:
        """Pass ``note`` on to the model threads of all ranks that are here."""
        for copier in self.copiers.values():
            if copier.is_welcomed:
                self._send(copier, note)

    async def _change(self) -> None:
        if self._closed:
            raise LinkError(self.endpoint, "the link is closed")
        await self._changed.wait()

    def _tell_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _missing(self) -> str:
        here = {rank for rank, copier in self.copiers.items() if copier.loss is None}
        return ", ".join(str(rank) for rank in range(self._num_ranks) if rank not in here)

    def _bind(self) -> None:
        # unlike others, this option tells of peers that are gone
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self._socket.bind(self.endpoint)
            self._socket_path = socket_path(self.endpoint)
            if self._socket_path is not None:
                self._socket_path.chmod(0o600)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise EndpointTakenError(self.endpoint, None) from error
            raise LinkError(self.endpoint, f"can't listen: {error.strerror}") from error
        except OSError as error:
            raise LinkError(self.endpoint, f"can't listen: {error.strerror}") from error

    def _hang_up(self) -> None:
        end_context(self._context, LINGER_MS)  # waits for the socket's end
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)  # before the next engine may make its own
        self._lock.release()

    def _send(self, copier: LinkCopier, message: Message) -> None:
        """Send, and lose the rank where that is impossible."""
        try:
            send_now(self._socket, message, copier.route)
        except zmq.Again:
            self._lose(copier, "does not take its messages")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._lose(copier, "has hung up")

    def _reply(self, route: bytes, message: Message) -> None:
        """Send to somebody who may be gone by now."""
        try:
            send_now(self._socket, message, route)
        except zmq.ZMQError as error:
            if error.errno not in {zmq.EHOSTUNREACH, zmq.EAGAIN}:
                raise

    def _lose(self, copier: LinkCopier, reason: str, level: int = logging.WARNING) -> None:
        copier.lose(reason)
        _log.log(level, "%s: %s", self.endpoint, copier.loss)
        self._tell_waiters()

    # Who says what.

    async def _receive(self) -> None:
        while True:
            for _ in range(_MAX_AT_ONCE):
                self._take(await self._socket.recv_multipart())
            await asyncio.sleep(0)

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 2:  # noqa: PLR2004  # the sender, the message
            self._drop(f"a message has {len(frames) - 1} parts")
            return
        route, payload = frames
        message = decode(payload, self.endpoint)
        if isinstance(message, LinkError | Hello):
            version = version_of(payload)
            if version is not None and version != PROTOCOL_VERSION:
                self._refuse(
                    route, f"a worker speaks version {version}, the engine {PROTOCOL_VERSION}"
                )
                return
        match message:
            case LinkError():
                self._drop(message.reason)
            case Hello():
                self._greet(route, message)
            case ResidencyRequest():
                self._answer(route)
            case _:
                self._hear(route, message)

    def _hear(self, route: bytes, message: Message) -> None:
        copier = self._routes.get(route)
        if copier is None:
            self._drop(f"a stranger sent {type(message).__name__}")
            return
        copier.num_missed = 0
        match message:
            case Bye():
                del self._routes[route]
                if copier.loss is None:
                    level = logging.WARNING if message.reason else logging.INFO
                    self._lose(copier, f"has left: {message.reason or 'it has ended'}", level)
                copier.is_free = True
            case Pong() | CopyDone() if copier.loss is not None:
                self._reply(route, Refused(reason_of(copier.loss)))
            case Pong():
                pass
            case CopyDone():
                if not copier.ended(message):
                    self._drop(f"no copy {message.copy_id} is under way")
            case _:
                self._drop(f"a worker sent {type(message).__name__}")

    def _drop(self, reason: str) -> None:
        self.num_dropped += 1
        level = logging.WARNING if self.num_dropped == 1 else logging.DEBUG
        _log.log(level, "%s: message dropped: %s", self.endpoint, reason)

    def _greet(self, route: bytes, hello: Hello) -> None:
        copier = self.copiers.get(hello.rank)
        if copier is not None and copier.route == route and copier.loss is None:
            copier.num_missed = 0
            copier.welcome()  # it asks again
            return
        if copier is not None and copier.loss is None:
            self._check(copier)  # it may be dead, and the newcomer its successor
        if reason := self._refusal(hello):
            self._refuse(route, reason)
            return
        if copier is None:
            copier = LinkCopier(self._send, route, hello)
            self.copiers[hello.rank] = copier
        else:
            self._routes.pop(copier.route, None)
            copier.join(route, hello)
        self._routes[route] = copier
        self._tell_waiters()

    def _refusal(self, hello: Hello) -> str | None:
        """Why this worker can't be let in."""
        if hello.engine_id != self._engine_id:
            return (
                f"the endpoint belongs to engine {self._engine_id} (process {os.getpid()}), not to "
                f"{hello.engine_id}: give each instance its own server_recv_port"
            )
        if hello.machine != self._machine:
            return (
                f"rank {hello.rank} is on host {hello.host}, the engine on {host_name()}: they "
                "must share a host and its process ids"
            )
        if hello.num_ranks != self._num_ranks or hello.rank >= self._num_ranks:
            return (
                f"rank {hello.rank} of {hello.num_ranks} can't join an engine of "
                f"{self._num_ranks} ranks"
            )
        for rank, other in self.copiers.items():
            if hello.tokens_per_block != other.hello.tokens_per_block:
                return (
                    f"rank {hello.rank} has {hello.tokens_per_block} tokens per block, rank {rank} "
                    f"{other.hello.tokens_per_block}"
                )
        copier = self.copiers.get(hello.rank)
        if copier is None or copier.is_free:
            return None
        return f"rank {hello.rank} is taken by process {copier.hello.pid}" + (
            f", lost but not gone: {copier.loss}" if copier.loss else ""
        )

    def _refuse(self, route: bytes, reason: str) -> None:
        self._last_refusal = reason
        _log.warning("%s: worker refused: %s", self.endpoint, reason)
        self._reply(route, Refused(reason_of(reason)))

    # Who is still there.

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            for copier in list(self.copiers.values()):
                if not copier.is_free:
                    self._check(copier)

    def _check(self, copier: LinkCopier) -> None:
        """Has this worker died or fallen silent? Silence is counted in our own heartbeats.

        So a pause of this process is no silence of the others.
        """
        if not copier.process.is_alive():
            if copier.loss is None:
                self._lose(copier, "is gone")
            copier.is_free = True
            self._routes.pop(copier.route, None)
        elif copier.loss is None:
            copier.num_missed += 1
            if copier.num_missed > self._silence_s / self._heartbeat_s:
                self._lose(copier, f"gave no sign of life for {self._silence_s} s")
            else:
                self._send(copier, Ping())

    # Which blocks are where.

    def _answer(self, route: bytes) -> None:
        if self.residency is None or self._num_answers >= _MAX_ANSWERS:
            why = "not ready" if self.residency is None else "busy"
            self._reply(route, Refused(f"the engine is {why}: ask again later"))
            return
        self._num_answers += 1
        self._tasks.create_task(self._send_residency(route, self.residency()))

    async def _send_residency(self, route: bytes, parts: ResidencyParts) -> None:
        try:
            async with asyncio.timeout(self._silence_s):
                for chunk in chunks_of(parts):
                    while True:
                        if self._fits(route, chunk):
                            break
                        await asyncio.sleep(_RETRY_S)
                    await asyncio.sleep(0)
        except TimeoutError:
            _log.warning("%s: a residency request was not read to its end", self.endpoint)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        finally:
            self._num_answers -= 1

    def _fits(self, route: bytes, message: Message) -> bool:
        try:
            send_now(self._socket, message, route)
        except zmq.Again:
            return False
        return True
