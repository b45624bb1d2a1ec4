"""The SSD tier in a real vLLM: outputs stay the same; a restart finds its own blocks, no others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cases import BF16, Case
from tests.e2e.models import lone_prompts
from tests.e2e.test_outputs import assert_same, need

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.cases import Bench

pytestmark = pytest.mark.xdist_group("in-process")

NUM_HOST_BLOCKS = 48  # a quarter of what the prompts need
HOST_TOKENS = 32 * NUM_HOST_BLOCKS
PROMPTS = lone_prompts(32)  # nothing is shared, so no block counts twice


def on_ssd(
    folder: Path,
    connector: str,
    *,
    script: str = "passes",
    copies: dict[str, str] | None = None,
    **case: Any,
) -> Case:
    cache = {
        "num_cpu_blocks": NUM_HOST_BLOCKS,
        "enable_ssd": True,
        "num_ssd_blocks": 512,
        "ssd_cache_dir": str(folder),
    }
    more = {"prompts": PROMPTS, "num_new_tokens": 8, "copies": copies}
    return Case(connector=connector, cache=cache, script=script, more=more, **case)


def test_what_host_evicted_comes_from_ssd_and_is_there_after_a_restart(
    bench: Bench, tmp_path: Path
) -> None:
    """With the built-in class, which passes no numbers on; few at a time, so the disk keeps up."""
    need("stock")
    case = on_ssd(tmp_path, "stock", engine={"max_num_seqs": 2})
    first, second = bench.run(case), bench.run(replace(case, script="cold"))
    assert_same(bench, case, first)
    assert second["cold"]["tokens"] == bench.baseline(case)
    assert first["cold"]["external"] == 0
    assert "; 0 blocks are back" in first["log"]
    assert first["reset"]["external"] > HOST_TOKENS, "host alone does not have so much"
    assert second["cold"]["external"] > HOST_TOKENS


def test_loads_from_ssd_at_the_same_time_all_arrive(bench: Bench, tmp_path: Path) -> None:
    need("own")
    case = on_ssd(tmp_path, "own")
    first, second = bench.run(case), bench.run(replace(case, script="cold"))
    assert_same(bench, case, first)
    assert second["cold"]["tokens"] == bench.baseline(case)
    assert first["reset"]["ssd_loaded"] > 0
    assert second["cold"]["ssd_loaded"] == second["cold"]["external"] // 32 > 0
    assert not any(passed["failed"] for passed in (first["reset"], first["warm"], second["cold"]))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"engine": BF16}, "dtype 'torch.float32', not 'torch.bfloat16'"),
        pytest.param({"model": "qwen2"}, "/qwen2'", marks=pytest.mark.nightly),
    ],
    ids=["dtype", "model"],
)
def test_blocks_of_another_model_or_data_type_are_not_served(
    bench: Bench, tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    need("own")
    bench.run(on_ssd(tmp_path, "own", script="cold"))
    case = on_ssd(tmp_path, "own", script="cold", **other)
    answer = bench.run(case)
    assert answer["cold"]["external"] == 0
    assert answer["cold"]["tokens"] == bench.baseline(case)
    assert "starting empty" in answer["log"]
    assert said in answer["log"]
    assert "; 0 blocks are back" in answer["log"]


def test_a_reset_of_the_connector_empties_ssd_for_good(bench: Bench, tmp_path: Path) -> None:
    need("own")
    copies = {name: str(tmp_path / name) for name in ("of", "before", "after")}
    case = on_ssd(tmp_path / "of", "own", script="cleared", copies=copies)
    answer = bench.run(case)
    assert not any(answer["residency"]["keys"].values())
    assert answer["reset"]["external"] == 0
    assert answer["reset"]["tokens"] == bench.baseline(case)
    before = bench.run(on_ssd(tmp_path / "before", "own", script="cold"))
    after = bench.run(on_ssd(tmp_path / "after", "own", script="cold"))
    assert before["cold"]["external"] > 0, "else the copies show nothing"
    assert after["cold"]["external"] == 0
    assert "; 0 blocks are back" in after["log"]
