"""What engine and GPU workers tell each other, and its bytes: msgpack, no pickle."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from flexkv.blocks import Tier  # noqa: TC001  # msgspec looks it up
from flexkv.errors import InputError
from flexkv.link.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROTOCOL_VERSION = 1
MAX_MESSAGE_NBYTES = 8 << 20
MAX_COPY_BLOCKS = 1 << 18
MAX_COPIES = 128
"""How many loads, and how many stores, one rank may be asked for at a time."""
MAX_CHUNK_NBYTES = 1 << 16
"""The keys in one ResidencyChunk."""
_MAX_REASON = 1000  # characters

_Text = Annotated[str, Meta(max_length=4096)]
_Reason = Annotated[str, Meta(max_length=_MAX_REASON)]
_Number = Annotated[int, Meta(ge=0, lt=2**62)]
_Count = Annotated[int, Meta(ge=1, lt=2**62)]
_Path = Annotated[str, Meta(pattern=r"^/proc/[0-9]+/fd/[0-9]+$", max_length=64)]
_Ids = Annotated[bytes, Meta(max_length=4 * MAX_COPY_BLOCKS)]
_Slots = Annotated[bytes, Meta(max_length=8 * MAX_COPY_BLOCKS)]
_Keys = Annotated[bytes, Meta(max_length=MAX_CHUNK_NBYTES)]
_Digest = Annotated[str, Meta(max_length=64)]


class Hello(Struct, frozen=True, tag=True, kw_only=True):
    """Worker: I am ``rank``, let me in. Sent until it is answered.

    ``host`` is for people; ``machine`` is equal where one process sees the other's pid.
    """

    version: int
    engine_id: _Text
    rank: _Number
    num_ranks: _Count
    host: _Text
    machine: _Text
    pid: _Count
    tokens_per_block: _Count
    block_nbytes: _Count
    num_blocks: _Count


class CopyDone(Struct, frozen=True, tag=True):
    """Worker: no byte of this copy moves any more. ``error``: it failed."""

    copy_id: _Number
    error: _Reason | None = None


class Pong(Struct, frozen=True, tag=True):
    """Worker: I am alive."""


class Bye(Struct, frozen=True, tag=True):
    """Either side: I leave, in order. A worker's copies have ended by then."""

    reason: _Reason = ""


class Welcome(Struct, frozen=True, tag=True, kw_only=True):
    """Engine: you are in, and this is the host pool."""

    pool_path: _Path
    num_slots: _Count
    slot_nbytes: _Count
    num_ranks: _Count
    engine_pid: _Count


class Refused(Struct, frozen=True, tag=True):
    """Engine: no, and asking again is of no use. The same in every version."""

    reason: _Reason


class Copy(Struct, frozen=True, tag=True, kw_only=True):
    """Engine: copy ``slots`` (int64) into ``block_ids`` (int32), or the other way round.

    Not before the worker's model thread has begun step ``after_step``.
    """

    copy_id: _Number
    is_load: bool
    block_ids: _Ids
    slots: _Slots
    after_step: _Number = 0

    def __post_init__(self) -> None:
        if len(self.block_ids) % 4 or len(self.slots) != 2 * len(self.block_ids):
            raise ValueError("block ids and slots do not go together")


class Ping(Struct, frozen=True, tag=True):
    """Engine: are you there?"""


class LoadDone(Struct, frozen=True, tag=True):
    """Engine, for the model thread: the load has ended. ``missing``: block ids (int32)."""

    job_id: _Number
    request_id: _Text
    missing: _Ids = b""

    def __post_init__(self) -> None:
        if len(self.missing) % 4:
            raise ValueError("the block ids are cut")


class StoresDone(Struct, frozen=True, tag=True):
    """Engine, for the model thread: no copy uses the request's blocks any more."""

    request_id: _Text


class ResidencyRequest(Struct, frozen=True, tag=True):
    """Anybody: which blocks are where?"""


class ResidencyChunk(Struct, frozen=True, tag=True, kw_only=True):
    """Engine: ``keys`` can be read from ``tier``. ``count``: keys sent so far, these included.

    ``last_event_id`` was the last one before the first key was looked up. ``told``: routers hear of
    these keys, so the digest of the tier counts them. The last chunk has ``digests`` and the id of
    the event up to which they go.
    """

    tier: Tier
    keys: _Keys
    key_nbytes: _Number
    count: _Number
    last: bool
    last_event_id: int
    told: bool = True
    digests: dict[Tier, _Digest] = {}
    digests_event_id: int = -1

    def __post_init__(self) -> None:
        if self.keys and (not self.key_nbytes or len(self.keys) % self.key_nbytes):
            raise ValueError("the keys are cut")


Note: TypeAlias = LoadDone | StoresDone
Message: TypeAlias = (
    Hello
    | CopyDone
    | Pong
    | Bye
    | Welcome
    | Refused
    | Copy
    | Ping
    | LoadDone
    | StoresDone
    | ResidencyRequest
    | ResidencyChunk
)


class _AnyHello(Struct, frozen=True, tag="Hello"):
    version: int


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_hello_decoder = msgspec.msgpack.Decoder(_AnyHello)


def encode(message: Message) -> bytes:
    """The bytes of ``message``."""
    return _encoder.encode(message)


def decode(payload: bytes, endpoint: str) -> Message | LinkError:
    """The message in ``payload``, which came over ``endpoint``; an error if there is none."""
    if len(payload) > MAX_MESSAGE_NBYTES:
        return LinkError(endpoint, f"a message of {len(payload)} bytes is too long")
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return LinkError(endpoint, f"a message can't be read: {error}")


def version_of(payload: bytes) -> int | None:
    """The version of a worker's Hello, which may have other fields than ours."""
    try:
        return _hello_decoder.decode(payload).version
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def reason_of(error: object) -> str:
    """The text of ``error``, short enough for a message."""
    return str(error)[:_MAX_REASON]


def pack_ids(block_ids: Sequence[int]) -> bytes:
    """Block ids as int32.

    Raises:
        InputError: one is not a whole number of 32 bits.
    """
    return _packed("i", "block id", block_ids)


def unpack_ids(packed: bytes) -> array[int]:
    """What ``pack_ids`` packed."""
    return array("i", packed)


def pack_slots(slots: Sequence[int]) -> bytes:
    """Slots as int64.

    Raises:
        InputError: one is not a whole number of 64 bits.
    """
    return _packed("q", "slot", slots)


def unpack_slots(packed: bytes) -> array[int]:
    """What ``pack_slots`` packed."""
    return array("q", packed)


def _packed(code: str, name: str, numbers: Sequence[int]) -> bytes:
    try:
        return array(code, numbers).tobytes()
    except (TypeError, OverflowError) as error:
        raise InputError(f"a {name} can't be sent: {error}") from error
