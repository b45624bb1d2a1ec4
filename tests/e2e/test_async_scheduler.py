"""Two batches in flight: what is stored was written, what is loaded is right."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cases import Case
from tests.e2e.driving import IN_PROCESS, PYTHON, ROOT, Process
from tests.e2e.test_outputs import need

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.cases import Bench

STEPS = 10_000
FILES_033 = ROOT / ".venv-e2e-033"


def run(
    bench: Bench, folder: Path, case: Case, env: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    document = bench.document(case) | {"steps": STEPS, "seed": 1} | more
    path = folder / "case.json"
    path.write_text(json.dumps(document))
    command = [PYTHON, "-m", "tests.e2e.async_scheduler", path]
    with Process(command, folder / "log", IN_PROCESS | (env or {})) as process:
        deadline_s = 60 + document["steps"] / 50
        process.wait_for(lambda: process.popen.poll() == 0, deadline_s, "the steps are done")
        answer: dict[str, Any] = json.loads(process.log().splitlines()[-1])
    return answer


def assert_right(answer: dict[str, Any]) -> None:
    assert answer["wrong"] == 0, answer
    assert answer["steps"] >= STEPS
    assert answer["external"] > 5000, answer
    assert answer["preempted"] > 50, answer
    assert answer["aborted"] > 50, answer


@pytest.mark.parametrize("connector", ["stock", "own"])
def test_no_wrong_byte_with_two_batches_in_flight(
    bench: Bench, tmp_path: Path, connector: str
) -> None:
    need(connector)
    case = Case(connector=connector, cache={"num_cpu_blocks": 150})
    assert_right(run(bench, tmp_path, case))


@pytest.mark.nightly
@pytest.mark.parametrize("connector", ["stock", "own"])
def test_no_wrong_byte_with_failing_loads(bench: Bench, tmp_path: Path, connector: str) -> None:
    need(connector)
    case = Case(connector=connector, cache={"num_cpu_blocks": 150}, faults={"fail_every": 3})
    assert_right(run(bench, tmp_path, case))


def test_a_store_of_scheduled_tokens_is_seen(bench: Bench, tmp_path: Path) -> None:
    need("stock")
    answer = run(bench, tmp_path, Case(connector="stock"), too_early=True, steps=2000)
    assert answer["wrong"] > 0


def test_garbage_is_seen(bench: Bench, tmp_path: Path) -> None:
    answer = run(bench, tmp_path, Case(connector="garbage"), steps=1000)
    assert answer["wrong"] > 0


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("connector", ["offloading", "stock", "own"])
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_no_wrong_byte_in_a_long_run(
    bench: Bench, tmp_path: Path, connector: str, seed: int, version: str
) -> None:
    need(connector)
    env = {} if version == "0.32" else {"PYTHONPATH": f"{FILES_033}{os.pathsep}{ROOT}"}
    case = Case(connector=connector, cache={"num_cpu_blocks": 150})
    answer = run(bench, tmp_path, case, env, seed=seed)
    assert_right(answer)
    assert answer["vllm"].startswith(str(FILES_033)) == (version == "0.33")
