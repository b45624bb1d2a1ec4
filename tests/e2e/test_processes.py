"""vLLM in several processes: its default, tensor parallel, data parallel; and vLLM 0.31."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cases import Case
from tests.e2e.driving import IN_PROCESS, MULTI_PROCESS, PYTHON_031
from tests.e2e.test_outputs import assert_same, later, need

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.cases import Bench

DEADLINE_S = 150.0
TP2 = {"tensor_parallel_size": 2}
TP2_ENV = MULTI_PROCESS | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.parametrize("connector", ["stock", later("own"), later("multi")])
def test_outputs_are_the_same_with_several_processes(bench: Bench, connector: str) -> None:
    need(connector)
    case = Case(connector=connector)
    answer = bench.run(case, MULTI_PROCESS, deadline_s=DEADLINE_S)
    assert_same(bench, case, answer)
    assert answer["reset"]["external"] > 1500


def test_failed_loads_are_computed_again_with_several_processes(bench: Bench) -> None:
    need("stock")
    case = Case(connector="stock", faults={"fail_every": 3})
    answer = bench.run(case, MULTI_PROCESS, deadline_s=DEADLINE_S)
    assert_same(bench, case, answer)
    assert answer["injected"] > 0


@pytest.mark.parametrize("thread", ["flexkv-engine", "flexkv-worker"])
def test_vllm_goes_on_when_a_thread_in_another_process_dies(bench: Bench, thread: str) -> None:
    need("stock")
    case = Case(connector="stock", faults={"kill": thread, "at": 2, "delay_s": 0.05})
    answer = bench.run(case, MULTI_PROCESS, deadline_s=DEADLINE_S)
    assert_same(bench, case, answer)
    assert answer["injected"] > 0


@pytest.mark.parametrize("connector", [later("offloading"), "stock", later("own")])
def test_outputs_are_the_same_with_two_ranks(bench: Bench, connector: str) -> None:
    need(connector)
    case = Case(connector=connector, engine=TP2)
    answer = bench.run(case, TP2_ENV, deadline_s=DEADLINE_S)
    assert_same(bench, case, answer)
    assert answer["reset"]["external"] > 1500


@pytest.mark.parametrize("faults", [{}, {"fail_every": 3}], ids=["sound", "failing"])
def test_outputs_are_the_same_with_vllm_031(bench: Bench, faults: dict[str, Any]) -> None:
    need("stock")
    case = Case(connector="stock", faults=faults)
    answer = bench.run(case, IN_PROCESS, PYTHON_031, DEADLINE_S)
    assert_same(bench, case, answer, PYTHON_031)
    assert answer["reset"]["external"] > 1500
    assert not faults or answer["injected"] > 0


def test_outputs_are_the_same_with_vllm_031_in_several_processes(bench: Bench) -> None:
    need("stock")
    case = Case(connector="stock")
    answer = bench.run(case, MULTI_PROCESS, PYTHON_031, DEADLINE_S)
    assert_same(bench, case, answer, PYTHON_031)
    assert answer["reset"]["external"] > 1500


@pytest.mark.parametrize("connector", ["stock", later("own")])
def test_a_second_instance_on_one_endpoint_ends_at_once(
    bench: Bench, tmp_path: Path, connector: str
) -> None:
    need(connector)
    marks = {"holding": str(tmp_path / "holding"), "until": str(tmp_path / "until"), "hold_s": 90}
    first = bench.document(Case(connector=connector, script="hold", more=marks))
    second = bench.document(Case(connector=connector, script="cold"))
    second["config_path"] = first["config_path"]
    owner = bench.child(IN_PROCESS | {"E2E_ROLE": "owner"})
    process = owner.send(first)
    process.wait_for((tmp_path / "holding").exists, 90, "the first instance is up")
    late = bench.child(IN_PROCESS | {"E2E_ROLE": "late"})
    try:
        late.send(second)
        answer = late.answer(60)
    finally:
        (tmp_path / "until").touch()
        late.end()
    assert "server_recv_port" in answer["error"]
    assert first["endpoint"] in answer["error"]
    assert str(process.popen.pid) in answer["error"]
    assert answer["error_s"] - answer["connector_s"] < 5
    answer = owner.answer(60)
    assert "error" not in answer
    assert answer["threads_left"] == []


def test_a_multi_process_instance_on_a_taken_endpoint_ends_and_names_the_owner(
    bench: Bench, tmp_path: Path
) -> None:
    need("stock")
    marks = {"holding": str(tmp_path / "holding"), "until": str(tmp_path / "until"), "hold_s": 90}
    first = bench.document(Case(connector="stock", script="hold", more=marks))
    second = bench.document(Case(connector="stock", script="cold"))
    second["config_path"] = first["config_path"]
    owner = bench.child(IN_PROCESS | {"E2E_ROLE": "owner"})
    process = owner.send(first)
    process.wait_for((tmp_path / "holding").exists, 90, "the first instance is up")
    late = bench.child(MULTI_PROCESS | {"E2E_ROLE": "late"})
    start_s = time.monotonic()
    try:
        log = late.send(second)
        answer = late.answer(90)
    finally:
        (tmp_path / "until").touch()
        late.end()
    assert "error" in answer
    assert time.monotonic() - start_s < 60
    assert f"taken by process {process.popen.pid}" in log.log()
    owner.answer(60)
