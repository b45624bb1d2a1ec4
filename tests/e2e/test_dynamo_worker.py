"""A Dynamo worker whose own KV events are off: flexkv registers itself, and routers see host."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cases import Case
from tests.e2e.driving import PYTHON_031, Process
from tests.e2e.test_outputs import need

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.cases import Bench

TEXTS = [f"{word} tells a story of its own, and it is a long one " * 5 for word in "abcdef"]


def run(bench: Bench, folder: Path, connector: str) -> dict[str, Any]:
    document = bench.document(Case(connector=connector))
    document |= {"prompts": TEXTS, "folder": str(folder)}
    path = folder / "case.json"
    path.write_text(json.dumps(document))
    command = [PYTHON_031, "-m", "tests.e2e.dynamo_worker", path]
    with Process(command, folder / "log", {}) as process:
        try:
            process.wait_for(lambda: process.popen.poll() == 0, 240, "the answer is there")
        except AssertionError as error:
            worker = folder / "vllm.log"
            end = worker.read_text(errors="replace")[-4000:] if worker.exists() else ""
            raise AssertionError(f"{error}\nthe end of {worker}:\n{end}") from None
        answer: dict[str, Any] = json.loads(process.log().splitlines()[-1])
    return answer


def test_a_router_sees_what_is_in_host_memory(bench: Bench, tmp_path: Path) -> None:
    need("stock")
    answer = run(bench, tmp_path, "stock")
    assert answer["sources"] == 1
    assert answer["unknown"] == [0, 0]
    for (gpu, host), num_blocks in zip(answer["overlaps"], answer["num_blocks"], strict=True):
        assert gpu == 0  # nobody announces the GPU
        assert num_blocks - 1 <= host <= num_blocks


@pytest.mark.nightly
def test_without_flexkv_a_router_sees_nothing(bench: Bench, tmp_path: Path) -> None:
    answer = run(bench, tmp_path, "none")
    assert answer["sources"] == 0
    assert all(overlap == [0, 0] for overlap in answer["overlaps"])
