"""The bytes of Dynamo's request plane over TCP, as far as a recovery query needs them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

Parts: TypeAlias = "Sequence[bytes | bytearray]"
"""An answer's msgpack, end to end."""

MAX_PATH_NBYTES = 1024
MAX_HEADERS_NBYTES = 16 * 1024
MAX_PAYLOAD_NBYTES = 64 * 1024
"""A query is a few hundred bytes; who sends more is no router."""

ACCEPTED = bytes(4)
"""Acknowledges a request: zero bytes of complaint."""

LENGTHS = struct.Struct(">QQQ")
"""What a frame begins with: length of header and body, and a checksum (0: none)."""

_MAX_ID = 2**64 - 1


class MalformedError(ValueError):
    """Bytes that no router sends."""


class Query(NamedTuple):
    """A router's question to the source of (worker, rank): what happened since ``start``?

    ``start``: the first event that it has missed; None: it has none.
    """

    worker_id: int
    dp_rank: int
    start: int | None


class Request(NamedTuple):
    """A query, and where the answer goes: a new connection to ``address``, for ``subject``."""

    query: Query
    address: tuple[str, int]
    subject: str


class _ConnectionInfo(msgspec.Struct):
    transport: str
    info: str


class _Control(msgspec.Struct):
    connection_info: _ConnectionInfo
    payload_codec: str = "json"


class _Info(msgspec.Struct):
    address: str
    subject: str


class _WireQuery(msgspec.Struct):
    worker_id: int
    dp_rank: int
    start_event_id: int | None = None
    kind: object = "recovery"


_control = msgspec.json.Decoder(_Control)
_info = msgspec.json.Decoder(_Info)


def request_of(payload: bytes) -> Request:
    """What a request's payload asks.

    Raises:
        MalformedError: it is no recovery query.
    """
    try:
        header_nbytes, body_nbytes, _ = LENGTHS.unpack_from(payload)
        if LENGTHS.size + header_nbytes + body_nbytes != len(payload):
            raise MalformedError(f"lengths {header_nbytes} and {body_nbytes} of {len(payload)}")
        header_end = LENGTHS.size + header_nbytes
        control = _control.decode(payload[LENGTHS.size : header_end])
        if control.payload_codec != "msgpack":
            raise MalformedError(f"payload codec {control.payload_codec[:20]!r}")
        info = _info.decode(control.connection_info.info)
        asked = msgspec.msgpack.decode(payload[header_end:], type=_WireQuery)
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(str(error)) from None
    if asked.kind != "recovery":
        raise MalformedError(f"kind {str(asked.kind)[:20]!r}")
    numbers = (asked.worker_id, asked.dp_rank, asked.start_event_id or 0)
    if not all(0 <= number <= _MAX_ID for number in numbers):
        raise MalformedError(f"numbers {numbers}")
    query = Query(asked.worker_id, asked.dp_rank, asked.start_event_id)
    return Request(query, _address(info.address), info.subject)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 2**16:
        raise MalformedError(f"address {text[:80]!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def greeting(subject: str) -> bytes:
    """The first frames of an answer: which one it is, and that there is no error."""
    who = msgspec.json.encode({"subject": subject, "stream_type": "response"})
    return _frame(header=who) + _frame(header=b'{"error":null}')


def answer_frame(parts: Parts) -> Parts:
    """The frame with the answer, whose msgpack is ``parts`` end to end."""
    opening, closing = b"\x82\xa4data", b"\xaecomplete_final\xc2"
    nbytes = sum(map(len, parts)) + len(opening) + len(closing)
    return [LENGTHS.pack(0, nbytes, 0), opening, *parts, closing]


def farewell() -> bytes:
    """The last frames: nothing follows."""
    end = msgspec.msgpack.encode({"data": None, "complete_final": True})
    return _frame(body=end) + _frame(header=b'"sentinel"')


def _frame(*, header: bytes = b"", body: bytes = b"") -> bytes:
    return LENGTHS.pack(len(header), len(body), 0) + header + body


def events_answer(events: Parts, num_events: int, last_id: int) -> Parts:
    """The events since the first one asked for, to be added."""
    return [b"\x81\xa6Events\x82\xa6events", _array(num_events), *events, _last(last_id)]


def dump_answer(events: Parts, num_events: int, last_id: int) -> Parts:
    """Everything resident as of ``last_id``, in the place of all that is known."""
    scope = b"\xabreset_scope\xa3all"
    head = b"\x81\xa8TreeDump\x83\xa6events"
    return [head, _array(num_events), *events, _last(last_id), scope]


def failed_answer(last_id: int, message: str) -> Parts:
    """There is no answer now: the router keeps what it knows, and asks again."""
    failure = {"last_event_id": last_id, "message": message}
    return [msgspec.msgpack.encode({"TreeDumpFailed": failure})]


def too_new_answer(start: int, last_id: int) -> Parts:
    """``start`` has not happened yet."""
    known = {"requested_start": start, "requested_end": last_id, "newest_available": last_id}
    return [msgspec.msgpack.encode({"TooNew": known})]


def error_answer(message: str) -> Parts:
    """The question went to the wrong place."""
    return [msgspec.msgpack.encode({"Error": message})]


def _array(length: int) -> bytes:
    return b"\xdd" + length.to_bytes(4, "big")


def _last(last_id: int) -> bytes:
    return b"\xadlast_event_id\xcf" + last_id.to_bytes(8, "big")
