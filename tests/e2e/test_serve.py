"""`vllm serve` over HTTP: the cache is seen where users see it; two data-parallel ranks."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.cases import CONNECTORS, ENGINE, Case
from tests.e2e.driving import PYTHON, Process, free_port, http
from tests.e2e.test_outputs import later, need

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.cases import Bench

UP_S = 120.0
TEXT = "in the beginning there was a cache and the cache was with the engine " * 4


class Server:
    def __init__(self, port: int, process: Process) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def complete(self, text: str) -> tuple[str, int]:
        """The text, and how many tokens of the prompt came from a cache."""
        request = {"model": "tiny", "prompt": text, "max_tokens": 24, "temperature": 0}
        status, reply = http(f"{self.url}/v1/completions", request | {"ignore_eos": True})
        assert status == 200, reply
        answer = json.loads(reply)
        details = answer["usage"].get("prompt_tokens_details") or {}
        return answer["choices"][0]["text"], details.get("cached_tokens") or 0

    def reset(self) -> None:
        def done() -> bool:
            status, reply = http(f"{self.url}/reset_prefix_cache", {})
            return status == 200 and json.loads(reply)["success"]

        self.process.wait_for(done, 20, "the prefix cache is reset")

    def metrics(self) -> dict[str, float]:
        """Per name, the sum over all labels."""
        sums: dict[str, float] = {}
        for line in http(f"{self.url}/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name = series.partition("{")[0]
                sums[name] = sums.get(name, 0) + float(value)
        return sums


@contextmanager
def serving(bench: Bench, folder: Path, connector: str, *more: str) -> Iterator[Server]:
    document: dict[str, Any] = bench.document(Case(connector=connector))
    port = free_port()
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in ENGINE.items()
        if not isinstance(value, bool)
    ]
    flags = ["--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
    if transfer := CONNECTORS[connector]:
        options.append(f"--kv-transfer-config={json.dumps(transfer)}")
    command = [
        PYTHON.with_name("vllm"),
        "serve",
        document["model"],
        "--served-model-name=tiny",
        "--host=127.0.0.1",
        f"--port={port}",
        *options,
        *flags,
        *more,
    ]
    env = {"FLEXKV_CONFIG_PATH": document["config_path"]} if "config_path" in document else {}
    with Process(command, folder / "serve.log", env) as process:
        server = Server(port, process)
        up = f"{server.url}/health"
        process.wait_for(lambda: http(up, deadline_s=2)[0] == 200, UP_S, "the server is up")
        yield server


@pytest.mark.parametrize("connector", [later("offloading"), "stock", "own"])
def test_a_reset_server_answers_from_the_host(bench: Bench, tmp_path: Path, connector: str) -> None:
    need(connector)
    with serving(bench, tmp_path, connector) as server:
        text, num_cached = server.complete(TEXT)
        assert num_cached == 0
        server.reset()
        again, num_cached = server.complete(TEXT)
        assert again == text
        assert num_cached >= 64
        metrics = server.metrics()
    assert metrics["vllm:external_prefix_cache_hits_total"] >= 64
    if connector == "own":
        assert metrics["vllm:flexkv_loaded_blocks_total"] >= 2


@pytest.mark.parametrize("connector", ["stock", later("own")])
def test_two_data_parallel_ranks_each_have_their_cache(
    bench: Bench, tmp_path: Path, connector: str
) -> None:
    need(connector)
    with serving(bench, tmp_path, connector, "--data-parallel-size=2") as server:
        texts = [f"{i} {TEXT}" for i in range(6)]
        first = [server.complete(text) for text in texts]
        assert all(num_cached == 0 for _, num_cached in first)
        server.reset()
        # a request may go to either rank, so not all of them hit
        again = [server.complete(text) for text in texts * 3]
        log = server.process.log()
    assert [text for text, _ in again] == [text for text, _ in first] * 3
    assert sum(num_cached for _, num_cached in again) > 0
    assert "the cache is off" not in log
