"""ZMQ sockets with our limits, and sends that never wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import zmq
import zmq.asyncio

from flexkv.link.messages import MAX_MESSAGE_NBYTES, encode

if TYPE_CHECKING:
    import asyncio

    from flexkv.link.messages import Message

_MAX_QUEUED = 4096  # messages, toward one peer and from one
LINGER_MS = 200
"""How long closing may take, so that the last messages arrive."""


_open: set[zmq.asyncio.Context] = (
    set()
)  # collecting one that a dead thread left would wait for ever


def new_context() -> zmq.asyncio.Context:
    """A context of its own, to be ended by ``end_context``."""
    context = zmq.asyncio.Context()
    _open.add(context)
    return context


def end_context(context: zmq.asyncio.Context, linger_ms: int) -> None:
    """Close its sockets; wait at most so long for what they have to send."""
    context.destroy(linger=linger_ms)
    _open.discard(context)


def new_socket(context: zmq.asyncio.Context, kind: int) -> zmq.asyncio.Socket:
    """A socket with bounded queues and messages."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_NBYTES)
    socket.setsockopt(zmq.SNDHWM, _MAX_QUEUED)
    socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    # IMMEDIATE stays off: with it, a disconnect discards what has arrived and is not yet read
    return socket


def receiving(socket: zmq.asyncio.Socket) -> asyncio.Future[list[bytes]]:
    """The next message's frames. Wait with asyncio.wait: `await` can lose it when cancelled."""
    return cast("asyncio.Future[list[bytes]]", socket.recv_multipart())


def send_now(socket: zmq.asyncio.Socket, message: Message, route: bytes | None = None) -> None:
    """Hand ``message`` to ZMQ.

    Raises:
        zmq.Again: the peer's queue is full, or nobody is connected.
        zmq.ZMQError: EHOSTUNREACH, the peer at ``route`` is not connected.
    """
    frames = [encode(message)] if route is None else [route, encode(message)]
    sent = cast("asyncio.Future[object]", socket.send_multipart(frames, zmq.NOBLOCK))
    sent.result()  # with NOBLOCK it is done by now
