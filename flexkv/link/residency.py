"""Asks an engine which blocks are where, and cuts the answer into messages."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import zmq
import zmq.asyncio

from flexkv.blocks import BlockKey, Tier
from flexkv.link.errors import LinkError
from flexkv.link.messages import (
    MAX_CHUNK_NBYTES,
    Refused,
    ResidencyChunk,
    ResidencyRequest,
    decode,
)
from flexkv.link.sockets import end_context, new_context, new_socket, receiving, send_now

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ResidencyParts: TypeAlias = "tuple[int, Iterable[tuple[Tier, int, bytes]]]"
"""The last event id, then pieces: a tier, the bytes of one key, keys end to end. Taken lazily."""


@dataclass(frozen=True, slots=True)
class Residency:
    """The keys that could be read from each tier, after ``last_event_id``."""

    last_event_id: int
    keys: Mapping[Tier, set[BlockKey]]


async def residency(endpoint: str, deadline_s: float) -> Residency:
    """Ask the engine at ``endpoint`` which blocks are where.

    Raises:
        LinkError: no engine, no answer within ``deadline_s``, or it is not ready.
    """
    context = new_context()
    socket = new_socket(context, zmq.DEALER)
    try:
        async with asyncio.timeout(deadline_s):
            socket.connect(endpoint)
            send_now(socket, ResidencyRequest())
            return await _answer(socket, endpoint)
    except TimeoutError:
        raise LinkError(endpoint, f"no engine answered within {deadline_s} s") from None
    except zmq.ZMQError as error:
        raise LinkError(endpoint, f"can't connect: {error.strerror}") from error
    finally:
        end_context(context, 0)


def chunks_of(parts: ResidencyParts) -> Iterator[ResidencyChunk]:
    """The messages of one answer; the last one, without keys, counts them all."""
    last_event_id, pieces = parts
    count = 0
    for tier, key_nbytes, keys in _gathered(pieces):
        step = MAX_CHUNK_NBYTES // key_nbytes * key_nbytes
        for at in range(0, len(keys), step):
            part = keys[at : at + step]
            count += len(part) // key_nbytes
            yield ResidencyChunk(
                tier=tier,
                keys=part,
                key_nbytes=key_nbytes,
                count=count,
                last=False,
                last_event_id=last_event_id,
            )
    yield ResidencyChunk(
        tier=Tier.HOST,
        keys=b"",
        key_nbytes=0,
        count=count,
        last=True,
        last_event_id=last_event_id,
    )


def _gathered(pieces: Iterable[tuple[Tier, int, bytes]]) -> Iterator[tuple[Tier, int, bytes]]:
    """Small neighbours together: a run may have one block."""
    kind: tuple[Tier, int] | None = None
    keys: list[bytes] = []
    nbytes = 0
    for tier, key_nbytes, more in pieces:
        if kind is not None and (kind != (tier, key_nbytes) or nbytes >= MAX_CHUNK_NBYTES):
            yield (*kind, b"".join(keys))
            keys, nbytes = [], 0
        kind = tier, key_nbytes
        keys.append(more)
        nbytes += len(more)
    if kind is not None:
        yield (*kind, b"".join(keys))


async def _answer(socket: zmq.asyncio.Socket, endpoint: str) -> Residency:
    keys: dict[Tier, set[BlockKey]] = {}
    count = 0
    while True:
        (payload,) = await receiving(socket)
        message = decode(payload, endpoint)
        match message:
            case LinkError():
                raise message
            case Refused():
                raise LinkError(endpoint, message.reason)
            case ResidencyChunk():
                width = message.key_nbytes
                count += len(message.keys) // width if width else 0
                if count != message.count:
                    raise LinkError(endpoint, "a part of the answer is missing")
                tier = keys.setdefault(message.tier, set())
                tier.update(
                    BlockKey(message.keys[at : at + width])
                    for at in range(0, len(message.keys), width or 1)
                )
                if message.last:
                    return Residency(message.last_event_id, keys)
            case _:
                raise LinkError(endpoint, f"the answer is a {type(message).__name__}")
