"""What an engine answers who wants to compare it with a router: everything resident, in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec
import numpy as np

from flexkv.events.dynamo import TIERS
from flexkv.events.sample import SampledChain, Sampler
from flexkv.events.types import BlockStored, plain, split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flexkv.blocks import Tier
    from flexkv.events.digest import TierDigest
    from flexkv.events.log import EventSource

MAX_CHUNK_NBYTES = 256 * 1024
_HASH = np.dtype(">u8")
_MAX_HASHES = 4096  # at a time, of a long run

Held: TypeAlias = "dict[str, set[int]]"
"""Router hashes, by Dynamo's name of the tier."""


def audit_subject(namespace: str, worker_id: int, dp_rank: int) -> str:
    """Where the engine of a worker and rank is asked."""
    return f"flexkv.{namespace}.audit.{worker_id}.{dp_rank}"


class Chunk(msgspec.Struct):
    """``hashes`` are resident in ``tier``; ``number`` counts from 0, the ``last`` has none.

    ``chain``: one of the sample. ``refused``, in the last: addresses of routers that got no answer.
    """

    number: int
    last: bool
    last_event_id: int
    digests: dict[str, str]
    tier: str = ""
    hashes: bytes = b""
    refused: list[str] = []
    chain: SampledChain | None = None


class Audit(NamedTuple):
    """A whole answer: what was resident while it was made, and the digests at its end.

    ``refused``: addresses at which routers wanted recovery answers, and got none. ``sample``: some
    of the chains, of each tier.
    """

    last_event_id: int
    digests: Mapping[str, str]
    held: Held
    refused: Sequence[str] = ()
    sample: Sequence[SampledChain] = ()


class AuditError(ValueError):
    """A chunk that no engine sends, or one that is missing."""


def chunks(
    source: EventSource, digests: Mapping[Tier, TierDigest], refused: Sequence[str] = ()
) -> Iterator[bytes]:
    """The messages of one answer, a run at a time: b"" means that there is more to do.

    They name what a router can know of: see ``plain``.
    """
    last_id, resident = source.dump()
    named = {TIERS[tier]: str(digest) for tier, digest in digests.items()}
    number, tier, hashes = 0, "", bytearray()
    sampler = Sampler()
    for told in (piece for event in resident for piece in split(plain(event), _MAX_HASHES)):
        if isinstance(told, BlockStored):
            if hashes and (tier != TIERS[told.tier] or len(hashes) >= MAX_CHUNK_NBYTES):
                yield _encode(Chunk(number, False, last_id, {}, tier, bytes(hashes)))  # noqa: FBT003
                number, hashes = number + 1, bytearray()
            tier = TIERS[told.tier]
            hashes += np.array(told.blocks.router_hashes(), _HASH).tobytes()
            sampler.follow(told)
        yield b""
    if hashes:
        yield _encode(Chunk(number, False, last_id, {}, tier, bytes(hashes)))  # noqa: FBT003
        number += 1
    for chain in sampler.chains(MAX_CHUNK_NBYTES):
        yield _encode(Chunk(number, False, last_id, {}, chain=chain))  # noqa: FBT003
        number += 1
    yield _encode(Chunk(number, True, last_id, named, refused=list(refused)))  # noqa: FBT003


class Collector:
    """Puts the messages of one answer together."""

    def __init__(self) -> None:
        self._number = 0
        self._held: Held = {tier: set() for tier in TIERS.values()}
        self._sample: list[SampledChain] = []

    def take(self, message: bytes) -> Audit | None:
        """The whole, once the last message is there.

        Raises:
            AuditError: the message is not the next one.
        """
        try:
            chunk = _decoder.decode(message)
            hashes = np.frombuffer(chunk.hashes, _HASH).tolist()
            if chunk.chain is not None:
                _check(chunk.chain)
                self._sample.append(chunk.chain)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise AuditError(f"not a chunk: {error}") from None
        if chunk.number != self._number or (hashes and chunk.tier not in self._held):
            raise AuditError(f"chunk {chunk.number} of tier {chunk.tier[:20]!r} is not the next")
        self._number += 1
        if hashes:
            self._held[chunk.tier].update(hashes)
        if not chunk.last:
            return None
        return Audit(chunk.last_event_id, chunk.digests, self._held, chunk.refused, self._sample)


def _check(chain: SampledChain) -> None:
    num_blocks, num_tokens = len(chain.router_hashes()), len(chain.tokens())
    if not num_blocks or not num_tokens or num_tokens % num_blocks:
        raise ValueError(f"a chain of {num_blocks} blocks and {num_tokens} tokens")


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Chunk)
