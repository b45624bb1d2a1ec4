"""Greedy outputs are the same with and without flexkv, whatever happens; in-process engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cases import BF16, MLA, QWEN2, TINY_POOL, Case, is_built
from tests.e2e.driving import PYTHON
from tests.e2e.models import lone_prompts

if TYPE_CHECKING:
    from pathlib import Path

    from _pytest.mark import ParameterSet

    from tests.e2e.cases import Bench

pytestmark = pytest.mark.xdist_group("in-process")

FLEXKV = ["stock", "own"]


def later(connector: str) -> ParameterSet:
    """A case that only the nightly run needs."""
    return pytest.param(connector, marks=pytest.mark.nightly)


CACHES = [later("offloading"), "stock", "own", "multi"]


def need(connector: str) -> None:
    if not is_built(connector):
        pytest.skip(f"{connector}: not built yet")


def assert_same(bench: Bench, case: Case, answer: dict[str, Any], python: Path = PYTHON) -> None:
    """Every pass gave the baseline's tokens, and none ended by an error."""
    expected = bench.baseline(case, python)
    for name in ("cold", "reset", "warm"):
        tokens = answer[name]["tokens"]
        same = [mine == theirs for mine, theirs in zip(tokens, expected, strict=True)]
        assert all(same), f"{name}: {same}"
        assert set(answer[name]["reasons"]) == {"length"}, name


@pytest.mark.parametrize("connector", CACHES)
def test_outputs_are_the_same_and_loads_really_happen(bench: Bench, connector: str) -> None:
    need(connector)
    case = Case(connector=connector)
    answer = bench.run(case)
    assert_same(bench, case, answer)
    assert answer["cold"]["external"] == 0
    assert answer["reset"]["external"] > 1500


@pytest.mark.parametrize("connector", CACHES)
def test_outputs_are_the_same_in_a_tiny_pool_with_preemptions(bench: Bench, connector: str) -> None:
    need(connector)
    case = Case(connector=connector, engine=TINY_POOL)
    answer = bench.run(case)
    assert_same(bench, case, answer)
    assert sum(answer[name]["preemptions"] for name in ("cold", "reset", "warm")) > 0
    assert answer["reset"]["external"] > 0


@pytest.mark.parametrize(
    ("connector", "engine"),
    [("stock", {}), ("own", {}), ("multi", {}), ("stock", TINY_POOL), ("own", TINY_POOL)],
    ids=["stock", "own", "multi", "stock-tiny", "own-tiny"],
)
def test_failed_loads_are_computed_again(
    bench: Bench, connector: str, engine: dict[str, Any]
) -> None:
    need(connector)
    case = Case(connector=connector, engine=engine, faults={"fail_every": 3})
    answer = bench.run(case)
    assert_same(bench, case, answer)
    assert answer["injected"] > 0


@pytest.mark.parametrize("connector", FLEXKV)
@pytest.mark.parametrize("thread", ["flexkv-engine", "flexkv-worker"])
def test_vllm_goes_on_when_a_flexkv_thread_dies(bench: Bench, connector: str, thread: str) -> None:
    need(connector)
    case = Case(connector=connector, faults={"kill": thread, "at": 2, "delay_s": 0.05})
    answer = bench.run(case)
    assert_same(bench, case, answer)
    assert answer["injected"] > 0


@pytest.mark.parametrize("connector", FLEXKV)
def test_aborts_during_loads_harm_nobody(bench: Bench, connector: str) -> None:
    need(connector)
    case = Case(connector=connector, script="aborts", faults={"delay_s": 0.3})
    answer = bench.run(case)
    expected = bench.baseline(case)
    assert len(answer["aborted"]) >= 3
    others = {int(name.split("-")[1]): tokens for name, tokens in answer["others"].items()}
    assert len(others) + len(answer["aborted"]) == len(expected)
    assert others == {i: expected[i] for i in others}
    for name in ("cold", "after"):
        assert answer[name]["tokens"] == expected, name


@pytest.mark.parametrize("connector", [later("offloading"), "stock", "own"])
@pytest.mark.parametrize(
    ("model", "engine"),
    [("qwen2", QWEN2), ("llama", BF16)],
    ids=["qwen2", "bf16"],
)
def test_outputs_are_the_same_with_other_models(
    bench: Bench, connector: str, model: str, engine: dict[str, Any]
) -> None:
    need(connector)
    case = Case(connector=connector, model=model, engine=engine)
    answer = bench.run(case)
    assert_same(bench, case, answer)
    assert answer["reset"]["external"] > 1000


@pytest.mark.parametrize(
    ("model", "engine"),
    [("llama", {}), ("qwen2", QWEN2), ("llama", BF16)],
    ids=["llama", "qwen2", "bf16"],
)
def test_the_comparison_sees_garbage(bench: Bench, model: str, engine: dict[str, Any]) -> None:
    case = Case(connector="garbage", model=model, engine=engine)
    answer = bench.run(case)
    expected = bench.baseline(case)
    assert answer["cold"]["tokens"] == expected
    same = [a == b for a, b in zip(answer["reset"]["tokens"], expected, strict=True)]
    assert not any(same)


@pytest.mark.parametrize("connector", ["garbage", later("offloading"), "stock", "own"])
def test_outputs_are_the_same_with_mla(bench: Bench, connector: str) -> None:
    """vLLM's MLA for CPUs reads the cache only where it computes a single token.

    (It ignores it elsewhere, and so turns vLLM's prefix cache off.) Such a token comes out a
    little different than in a prompt. So what is loaded is all but the last token, and that one
    was computed on its own the first time, too.
    """
    need(connector)
    case = Case(connector=connector, model="mla", engine=MLA, script="continued")
    answer = bench.run(case)
    first = answer["cold"]["tokens"]
    assert first == bench.baseline(case)
    pairs = zip(answer["reset"]["tokens"], first, strict=True)
    same = [again[:-1] == tokens[1:] for again, tokens in pairs]
    assert answer["reset"]["external"] > 3000
    assert not any(same) if connector == "garbage" else all(same), same


@pytest.mark.parametrize("connector", FLEXKV)
def test_the_comparison_sees_garbage_that_flexkv_loads(bench: Bench, connector: str) -> None:
    need(connector)
    case = Case(connector=connector, faults={"garbage": True})
    answer = bench.run(case)
    assert answer["injected"] > 0
    assert answer["reset"]["tokens"] != bench.baseline(case)


def test_a_reset_of_the_connector_clears_every_tier(bench: Bench) -> None:
    need("own")
    case = Case(connector="own", script="cleared")
    answer = bench.run(case)
    assert not any(answer["residency"]["keys"].values())
    assert answer["reset"]["external"] == 0
    assert answer["reset"]["tokens"] == bench.baseline(case)


@pytest.mark.parametrize("connector", FLEXKV)
def test_a_hot_prefix_survives_host_pressure(bench: Bench, connector: str) -> None:
    need(connector)
    hot, *others = lone_prompts(8, num_prompts=25)
    case = Case(
        connector=connector,
        script="hot_prefix",
        cache={"num_cpu_blocks": 60},
        more={"prompts": [hot, *others]},
    )
    answer = bench.run(case)
    assert answer["rounds"]["external"] == 0  # the GPU had it all the time
    assert answer["hot"]["external"] == (len(hot) - 1) // 32 * 32 > 0
    assert answer["once"]["external"] == 0  # the pressure was real
