"""Reads traces in the Mooncake format: one JSON object per line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from flexkv.errors import InputError
from flexkv.replay.workload import Request, Workload

if TYPE_CHECKING:
    from pathlib import Path

TOKENS_PER_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""

_MS_PER_S = 1000.0
_Count = Annotated[int, msgspec.Meta(ge=0)]
_HashId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Count
    output_length: _Count
    hash_ids: list[_HashId]


_decoder = msgspec.json.Decoder(_Line)


def read_trace(path: Path, num_requests: int | None = None) -> Workload:
    """The requests of a trace, or the first ``num_requests`` of them.

    A request keeps its full blocks; the partial last one, which nothing can reuse, is dropped.

    Raises:
        InputError: the file can't be read, holds no request, or a line is malformed (the error
            names file and line).
    """
    requests: list[Request] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if num_requests is not None and len(requests) == num_requests:
                    break
                if line.strip():
                    requests.append(_request(line, f"{path}:{number}"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}: give a trace, one JSON object a line"
        ) from None
    if not requests:
        raise InputError(f"{path} holds no request: give a trace, one JSON object a line")
    return Workload(path.name, requests, TOKENS_PER_BLOCK)


def _request(line: bytes, place: str) -> Request:
    try:
        entry = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is one of them
        raise InputError(f"{place}: {error}") from None
    num_full = entry.input_length // TOKENS_PER_BLOCK
    if len(entry.hash_ids) < num_full:
        raise InputError(
            f"{place}: {len(entry.hash_ids)} hash_ids for input_length {entry.input_length}: "
            f"{num_full} full blocks of {TOKENS_PER_BLOCK} tokens need one each"
        )
    return Request(entry.timestamp / _MS_PER_S, tuple(entry.hash_ids[:num_full]))
