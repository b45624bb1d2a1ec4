"""What flexkv costs a real vLLM per step when nothing hits, and what a hit saves.

Three in-process vLLMs of one model (dummy weights) take turns: without a cache below the GPU,
with flexkv, with vLLM's own OffloadingConnector. Needs the environment of `make e2e`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks._model import MODEL
from benchmarks._report import Report
from tests.e2e.cases import CONNECTORS, ENGINE
from tests.e2e.driving import IN_PROCESS, Child
from tests.e2e.models import make_model

SIDES = {"none": "none", "flexkv": "own", "offloading": "offloading"}
NUM_BLOCKS = 512
NUM_TOKENS = 1024


def start(folder: Path, side: str, connector: str) -> Child:
    """A child that has its engine up."""
    model = make_model(folder / "models", "llama")
    case: dict[str, Any] = {
        "model": str(model),
        "connector": CONNECTORS[connector],
        "num_new_tokens": 1,
        "engine": ENGINE
        | {
            "hf_overrides": MODEL,
            "load_format": "dummy",
            "max_model_len": 4096,
            "max_num_batched_tokens": 4096,
            "num_gpu_blocks_override": NUM_BLOCKS,
            "kv_cache_memory_bytes": 2 << 30,
        },
    }
    if connector == "offloading":
        transfer = json.loads(json.dumps(CONNECTORS[connector]))
        transfer["kv_connector_extra_config"]["cpu_bytes_to_use"] = 4 << 30
        case["connector"] = transfer
    if side == "flexkv":
        config = {
            "server_recv_port": f"ipc://{folder}/link",
            "cache_config": {"num_cpu_blocks": 1024},
        }
        (folder / "config.json").write_text(json.dumps(config))
        case["config_path"] = str(folder / "config.json")
    child = Child(folder / side, IN_PROCESS, module="benchmarks._vllm_side")
    child.run(case, deadline_s=120)
    return child


def measure_steps(sides: dict[str, Child], report: Report, num_pairs: int) -> None:
    """Turns of fresh prompts, so that flexkv stores everything and loads nothing."""
    turn = {"num_prompts": 8, "num_tokens": 96, "num_new_tokens": 24}
    pairs: list[tuple[float, float]] = []
    step_s: list[float] = []
    for seed in range(num_pairs + 1):
        order = ["none", "flexkv"] if seed % 2 else ["flexkv", "none"]
        results = {side: sides[side].run(turn | {"seed": seed}, 120) for side in order}
        assert results["flexkv"]["external"] == 0
        if seed:  # the first turn warms up
            pairs.append((results["flexkv"]["seconds"], results["none"]["seconds"]))
            step_s += results["none"]["steps_s"]
    report.add("step without flexkv", 1e3 * median(step_s), "ms", better="higher", target=50.0)
    overhead = median(with_s / without_s for with_s, without_s in pairs) - 1
    report.add("a step's overhead with flexkv, 0 % hits", 100 * overhead, "%", target=2.0)


def measure_first_token(sides: dict[str, Child], report: Report, num_turns: int) -> None:
    """The same long prompt: computed, then loaded after the GPU's cache was reset."""
    turn = {"num_prompts": 1, "num_tokens": NUM_TOKENS + 1, "num_new_tokens": 1, "reset": True}
    times: list[dict[str, float]] = []
    for seed in range(num_turns + 1):
        order = list(sides) if seed % 2 else list(reversed(sides))
        computed = {side: sides[side].run(turn | {"seed": 1000 + seed}, 120) for side in order}
        assert not any(result["external"] for result in computed.values())
        loaded = {
            side: sides[side].run(turn | {"seed": 1000 + seed}, 120)
            for side in order
            if side != "none"
        }
        assert all(result["external"] >= NUM_TOKENS for result in loaded.values())
        results = loaded | {"none": computed["none"]}
        if seed:  # the first turn warms up
            times.append({side: result["seconds"] for side, result in results.items()})
    for side in sides:
        p50_s = median(turn_s[side] for turn_s in times)
        report.add(f"first token of {NUM_TOKENS + 1}, {side}", 1e3 * p50_s, "ms")
    for side, target in (("none", 0.3), ("offloading", 1.1)):
        ratio = median(turn_s["flexkv"] / turn_s[side] for turn_s in times)
        report.add(f"first token, flexkv / {side}", ratio, "", target=target)


def main() -> None:
    """Start the three sides, and let them take turns."""
    report = Report(__doc__)
    sides: dict[str, Child] = {}
    with tempfile.TemporaryDirectory(prefix="flexkv-bench-") as name:
        try:
            for side, connector in SIDES.items():
                sides[side] = start(Path(name), side, connector)
            measure_steps(sides, report, 10 if report.quick else 20)
            measure_first_token(sides, report, 10 if report.quick else 20)
        finally:
            for child in sides.values():
                child.end()
    report.finish()


if __name__ == "__main__":
    main()
