"""Asks an engine which blocks are where, and cuts the answer into messages."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import zmq
import zmq.asyncio

from flexkv.blocks import BlockKey, Tier
from flexkv.events.digest import TierDigest, digest_of
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
    from collections.abc import Callable, Iterable, Iterator, Mapping


class Piece(NamedTuple):
    """Keys of ``key_nbytes`` each, end to end, in one tier. ``told``: routers hear of them."""

    tier: Tier
    key_nbytes: int
    keys: bytes
    told: bool = True


class ResidencyParts(NamedTuple):
    """``now``: the last event's id and the digest of each tier. ``pieces`` are taken lazily."""

    now: Callable[[], tuple[int, Mapping[Tier, str]]]
    pieces: Iterable[Piece]


@dataclass(frozen=True, slots=True)
class Residency:
    """The keys that could be read from each tier, after ``last_event_id``.

    ``digests`` are those of the end of the answer. ``is_settled``: nothing happened meanwhile, and
    the digests were found to be those of the keys.
    """

    last_event_id: int
    keys: Mapping[Tier, set[BlockKey]]
    digests: Mapping[Tier, str]
    is_settled: bool


async def residency(endpoint: str, deadline_s: float) -> Residency:
    """Ask the engine at ``endpoint`` which blocks are where.

    Raises:
        LinkError: no engine, no answer within ``deadline_s``, it is not ready, or its keys are not
            those of its digests.
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
    last_event_id, _ = parts.now()
    count = 0
    for tier, key_nbytes, keys, told in _gathered(parts.pieces):
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
                told=told,
            )
    digests_event_id, digests = parts.now()
    yield ResidencyChunk(
        tier=Tier.HOST,
        keys=b"",
        key_nbytes=0,
        count=count,
        last=True,
        last_event_id=last_event_id,
        digests=dict(digests),
        digests_event_id=digests_event_id,
    )


def _gathered(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Small neighbours together: a run may have one block."""
    first: Piece | None = None
    keys: list[bytes] = []
    nbytes = 0
    for piece in pieces:
        if first is not None and (
            first._replace(keys=b"") != piece._replace(keys=b"") or nbytes >= MAX_CHUNK_NBYTES
        ):
            yield first._replace(keys=b"".join(keys))
            first, keys, nbytes = None, [], 0
        first = first or piece
        keys.append(piece.keys)
        nbytes += len(piece.keys)
    if first is not None:
        yield first._replace(keys=b"".join(keys))


class _Collector:
    """Puts the chunks of one answer together."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._keys: dict[Tier, set[BlockKey]] = {}
        self._digests: dict[Tier, TierDigest] = {}  # of the keys that routers hear of
        self._count = 0

    def take(self, chunk: ResidencyChunk) -> Residency | None:
        """The whole, once the last chunk is there.

        Raises:
            LinkError: a chunk is missing, or the keys are not those of the digests.
        """
        width = chunk.key_nbytes or 1
        keys = [BlockKey(chunk.keys[at : at + width]) for at in range(0, len(chunk.keys), width)]
        self._count += len(keys)
        if self._count != chunk.count:
            raise LinkError(self._endpoint, "a part of the answer is missing")
        self._keys.setdefault(chunk.tier, set()).update(keys)
        if chunk.told and keys:
            before = self._digests.get(chunk.tier, TierDigest())
            more = digest_of(int.from_bytes(key[-8:], "big") for key in keys)
            self._digests[chunk.tier] = before.joined(more)
        return self._whole(chunk) if chunk.last else None

    def _whole(self, last: ResidencyChunk) -> Residency:
        is_settled = last.last_event_id == last.digests_event_id
        for tier in {*last.digests, *self._digests} if is_settled else ():
            arrived = str(self._digests.get(tier, TierDigest()))
            told = last.digests.get(tier, str(TierDigest()))
            if arrived != told:
                raise LinkError(
                    self._endpoint, f"tier {tier}: keys of digest {arrived}, but told was {told}"
                )
        return Residency(last.last_event_id, self._keys, last.digests, is_settled)


async def _answer(socket: zmq.asyncio.Socket, endpoint: str) -> Residency:
    collector = _Collector(endpoint)
    while True:
        (payload,) = await receiving(socket)
        message = decode(payload, endpoint)
        match message:
            case LinkError():
                raise message
            case Refused():
                raise LinkError(endpoint, message.reason)
            case ResidencyChunk():
                if (whole := collector.take(message)) is not None:
                    return whole
            case _:
                raise LinkError(endpoint, f"the answer is a {type(message).__name__}")
