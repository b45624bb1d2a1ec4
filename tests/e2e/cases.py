"""What a case is: a model, vLLM's settings, a connector, faults, a script."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.e2e.driving import IN_PROCESS, PYTHON, Child
from tests.e2e.faults import num_injected
from tests.e2e.models import NUM_NEW_TOKENS, lone_prompts, make_model, prompts

ENGINE: dict[str, Any] = {
    "block_size": 32,
    "dtype": "float32",
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.1,  # of the host's memory, on a CPU: it must be free at the start
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 1024,
    "max_num_seqs": 12,
    "num_gpu_blocks_override": 512,
}
TINY_POOL = {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 64}
QWEN2 = {"block_size": 64}
# One at a time: a token that is a batch of its own comes out different with vLLM's MLA for CPUs.
MLA = {"block_size": 16, "num_gpu_blocks_override": 1024, "max_num_seqs": 1}
BF16 = {"dtype": "bfloat16"}

_OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "CpuSpec",
        "spec_module_path": "tests.e2e.cpu_offload_spec",
        "cpu_bytes_to_use": 64 << 20,
    },
}
_STOCK = {"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"}
_OWN = {
    "kv_connector": "FlexKVConnector",
    "kv_connector_module_path": "flexkv.integration.vllm.connector",
    "kv_role": "kv_both",
}
CONNECTORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "offloading": _OFFLOADING,
    "garbage": _OFFLOADING
    | {
        "kv_connector_extra_config": {
            **_OFFLOADING["kv_connector_extra_config"],  # type: ignore[dict-item]  # it is one
            "spec_name": "GarbageSpec",
        }
    },
    "stock": _STOCK,
    "own": _OWN,
    "multi": {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [_OWN, _OFFLOADING]},
    },
}
_OF_THE_ANSWER = {"prompts", "num_new_tokens"}
NEEDS = {
    "stock": "flexkv.integration.vllm.vllm_v1_adapter",
    "own": "flexkv.integration.vllm.connector",
    "multi": "flexkv.integration.vllm.connector",
}


def is_built(connector: str) -> bool:
    """Whether flexkv has what ``connector`` needs; True for those that need nothing of it."""
    try:
        return connector not in NEEDS or find_spec(NEEDS[connector]) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True, kw_only=True)
class Case:
    connector: str = "none"
    model: str = "llama"
    engine: dict[str, Any] = field(default_factory=dict)
    script: str = "passes"
    faults: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=lambda: {"num_cpu_blocks": 1024})
    seed: int = 0
    num_prompts: int = 12
    more: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Runs cases; remembers the answers of a vLLM without connector and prefix cache."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self._folder = folder
        self._shared = shared  # by the processes of one test run
        self._children: dict[tuple[Any, ...], Child] = {}
        self._num_cases = 0

    def child(self, env: dict[str, str] | None = None, python: Path = PYTHON) -> Child:
        """The child with this environment."""
        env = IN_PROCESS if env is None else env
        key = (str(python), *sorted(env.items()))
        if key not in self._children:
            folder = self._folder / f"child{len(self._children)}"
            self._children[key] = Child(folder, env, python)
        return self._children[key]

    def document(self, case: Case) -> dict[str, Any]:
        """``case`` as the child wants it; its files lie in a folder of its own."""
        self._num_cases += 1
        folder = self._folder / f"case{self._num_cases}"
        folder.mkdir(parents=True)
        document: dict[str, Any] = {
            "model": str(make_model(self._shared / "models", case.model)),
            "engine": ENGINE | case.engine,
            "connector": CONNECTORS[case.connector],
            "script": case.script,
            "prompts": lone_prompts(MLA["block_size"])
            if case.model == "mla"
            else prompts(case.seed, num_prompts=case.num_prompts),
            "num_new_tokens": NUM_NEW_TOKENS,
            "faults": case.faults and case.faults | {"log": str(folder / "faults")},
        }
        if case.connector in NEEDS:
            endpoint = f"ipc://{folder}/link"
            config = {"server_recv_port": endpoint, "cache_config": case.cache}
            (folder / "config.json").write_text(json.dumps(config))
            document |= {"endpoint": endpoint, "config_path": str(folder / "config.json")}
        return document | case.more

    def run(
        self,
        case: Case,
        env: dict[str, str] | None = None,
        python: Path = PYTHON,
        deadline_s: float = 90.0,
    ) -> dict[str, Any]:
        """What came of ``case``; ``injected``: how many faults were."""
        document = self.document(case)
        if env is not None and case.faults:  # read by the processes that vLLM starts
            env = env | {"E2E_FAULTS": json.dumps(document["faults"])}
        answer = self.child(env, python).run(document, deadline_s)
        assert answer["threads_left"] == []
        if case.faults:
            answer["injected"] = num_injected(Path(document["faults"]["log"]))
        return answer

    def baseline(self, case: Case, python: Path = PYTHON) -> list[list[int]]:
        """The tokens that ``case`` must come to."""
        only_of_the_case = {"tensor_parallel_size", "kv_events_config"}
        kept = {k: v for k, v in case.engine.items() if k not in only_of_the_case}
        plain = Case(
            model=case.model,
            engine=kept | {"enable_prefix_caching": False},
            script="cold",
            seed=case.seed,
            num_prompts=case.num_prompts,
            more={name: value for name, value in case.more.items() if name in _OF_THE_ANSWER},
        )
        name = hashlib.sha256(repr((plain, str(python))).encode()).hexdigest()[:16]
        path = self._shared / f"{name}.json"
        if not path.exists():
            tokens = self.run(plain, python=python)["cold"]["tokens"]
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(tokens))
            draft.rename(path)
        expected: list[list[int]] = json.loads(path.read_text())
        return expected

    def end(self) -> None:
        for child in self._children.values():
            child.end()
