"""Traces: what is read from them, and what a bad line is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.errors import InputError
from flexkv.replay.trace import TOKENS_PER_BLOCK, read_trace

if TYPE_CHECKING:
    from pathlib import Path

GOOD = {"timestamp": 1500, "input_length": 1100, "output_length": 9, "hash_ids": [3, 4, 5]}


def written(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "trace.jsonl"
    texts = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def test_a_request_keeps_its_full_blocks_and_drops_the_partial_one(tmp_path: Path) -> None:
    workload = read_trace(written(tmp_path, json.dumps(GOOD)))
    assert workload.tokens_per_block == 512
    (request,) = workload.requests
    assert request.block_ids == (3, 4)
    assert request.arrival_s == 1.5


def test_only_the_first_requests_are_read_if_a_number_is_given(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(GOOD), json.dumps(GOOD), "not read, so never a problem")
    assert len(read_trace(path, 2).requests) == 2


def test_an_empty_line_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(GOOD), "", json.dumps(GOOD))
    assert len(read_trace(path).requests) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        (b'{"timestamp": "\xff"}', "timestamp"),
        (json.dumps(GOOD | {"hash_ids": [1, -2, 3]}), "$.hash_ids[1]"),
        (json.dumps(GOOD | {"hash_ids": ["1", 2, 3]}), "$.hash_ids[0]"),
        (json.dumps(GOOD | {"hash_ids": [2**63, 2, 3]}), "$.hash_ids[0]"),
        (json.dumps(GOOD | {"hash_ids": [1]}), "2 full blocks"),
        (json.dumps(GOOD | {"input_length": -1}), "$.input_length"),
        (json.dumps(GOOD | {"input_length": True}), "$.input_length"),
        (json.dumps(GOOD | {"timestamp": -0.5}), "$.timestamp"),
        (json.dumps({name: GOOD[name] for name in ("timestamp", "input_length")}), "output_length"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_number(
    tmp_path: Path, line: str | bytes, says: str
) -> None:
    path = written(tmp_path, json.dumps(GOOD), line)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        read_trace(tmp_path / "none.jsonl")


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no request"):
        read_trace(written(tmp_path, ""))


@given(
    entries=st.lists(
        st.tuples(
            st.integers(0, 10**9),
            st.integers(0, TOKENS_PER_BLOCK - 1),
            st.lists(st.integers(0, 2**63 - 1), max_size=9),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, int, list[int]]]
) -> None:
    lines = [
        json.dumps(
            {
                "timestamp": timestamp,
                "input_length": TOKENS_PER_BLOCK * len(ids) + rest,
                "output_length": 1,
                "hash_ids": [*ids, 7] if rest else ids,
            }
        )
        for timestamp, rest, ids in entries
    ]
    workload = read_trace(written(tmp_path_factory.mktemp("trace"), *lines))
    assert [request.block_ids for request in workload.requests] == [tuple(e[2]) for e in entries]
    assert [request.arrival_s for request in workload.requests] == [e[0] / 1000 for e in entries]
