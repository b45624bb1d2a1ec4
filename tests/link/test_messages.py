"""What is sent is what arrives, and what can't be read is a value, not an exception."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.blocks import Tier
from flexkv.errors import InputError
from flexkv.link.errors import LinkError
from flexkv.link.messages import (
    MAX_COPY_BLOCKS,
    MAX_MESSAGE_NBYTES,
    Bye,
    Copy,
    CopyDone,
    Hello,
    LoadDone,
    Message,
    Ping,
    Pong,
    Refused,
    ResidencyChunk,
    ResidencyRequest,
    StoresDone,
    Welcome,
    decode,
    encode,
    pack_ids,
    pack_slots,
    unpack_ids,
    unpack_slots,
    version_of,
)

HELLO = Hello(
    version=1,
    engine_id="e",
    rank=1,
    num_ranks=2,
    host="h",
    machine="m",
    pid=9,
    tokens_per_block=16,
    block_nbytes=4096,
    num_blocks=100,
)
WELCOME = Welcome(
    pool_path="/proc/12/fd/7", num_slots=8, slot_nbytes=64, num_ranks=2, engine_pid=12
)
COPY = Copy(copy_id=3, is_load=True, block_ids=pack_ids([5, 6]), slots=pack_slots([0, 2**40]))
CHUNK = ResidencyChunk(
    tier=Tier.HOST, keys=bytes(64), key_nbytes=32, count=2, last=False, last_event_id=-1
)
LAST_CHUNK = ResidencyChunk(
    tier=Tier.HOST,
    keys=b"",
    key_nbytes=0,
    count=2,
    last=True,
    last_event_id=-1,
    digests={Tier.HOST: "2:0000000000000000"},
    digests_event_id=3,
)
EVERY_MESSAGE: list[Message] = [
    HELLO,
    WELCOME,
    COPY,
    CHUNK,
    LAST_CHUNK,
    CopyDone(3),
    CopyDone(3, "broken"),
    Pong(),
    Ping(),
    Bye("done"),
    Refused("no"),
    LoadDone(7, "request", pack_ids([1])),
    StoresDone("request"),
    ResidencyRequest(),
]


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda m: type(m).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert decode(encode(message), "ipc://x") == message


def test_ids_and_slots_arrive_as_they_were_packed() -> None:
    assert list(unpack_ids(pack_ids([0, 2**31 - 1]))) == [0, 2**31 - 1]
    assert list(unpack_slots(pack_slots(range(3)))) == [0, 1, 2]


@pytest.mark.parametrize("ids", [[2**31], ["1"], [1.5]])
def test_an_id_that_fits_no_int32_is_refused(ids: list[int]) -> None:
    with pytest.raises(InputError, match="block id"):
        pack_ids(ids)


def with_field(message: Message, **fields: object) -> bytes:
    """The bytes of ``message`` with other fields, which its class may not allow."""
    plain = msgspec.msgpack.decode(encode(message))
    return msgspec.msgpack.encode(plain | fields)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode(HELLO)[:-1],
        encode(HELLO) + b"\0",
        with_field(HELLO, rank=-1),
        with_field(HELLO, num_ranks=0),
        with_field(HELLO, engine_id="x" * 5000),
        with_field(HELLO, pid="9"),
        with_field(WELCOME, pool_path="/etc/passwd"),
        with_field(WELCOME, pool_path="/proc/1/fd/2/../../environ"),
        with_field(COPY, slots=bytes(8)),
        with_field(COPY, block_ids=bytes(7), slots=bytes(14)),
        with_field(COPY, block_ids=bytes(4 * MAX_COPY_BLOCKS + 4)),
        with_field(CopyDone(1), error="x" * 1001),
        with_field(LoadDone(1, "r"), missing=bytes(3)),
        with_field(CHUNK, key_nbytes=0),
        with_field(CHUNK, key_nbytes=33),
        with_field(CHUNK, tier="attic"),
        with_field(LAST_CHUNK, digests={"attic": "0:0"}),
        with_field(LAST_CHUNK, digests={"host": "x" * 65}),
        with_field(Ping(), type="Gossip"),
        b"\x91" * 100_000,
        bytes(MAX_MESSAGE_NBYTES + 1),
    ],
    ids=range(23),
)
def test_a_message_that_makes_no_sense_is_an_error_value(payload: bytes) -> None:
    assert isinstance(decode(payload, "ipc://x"), LinkError)


@given(st.binary(max_size=200))
def test_no_bytes_make_decoding_raise(payload: bytes) -> None:
    message = decode(payload, "ipc://x")
    assert isinstance(message, LinkError) or decode(encode(message), "ipc://x") == message
    version_of(payload)


@given(st.sampled_from(EVERY_MESSAGE), st.data())
def test_no_damage_makes_decoding_raise(message: Message, data: st.DataObject) -> None:
    payload = bytearray(encode(message))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    decode(bytes(payload), "ipc://x")
    version_of(bytes(payload))


def test_another_versions_hello_is_known_by_its_version() -> None:
    later = msgspec.msgpack.encode({"type": "Hello", "version": 2, "something": "else"})
    assert isinstance(decode(later, "ipc://x"), LinkError)
    assert version_of(later) == 2
    assert version_of(encode(HELLO)) == 1
    assert version_of(encode(Ping())) is None
