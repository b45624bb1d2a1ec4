"""A dynamo.vllm worker whose own KV events are off, and a router that watches what flexkv tells.

    python -m tests.e2e.dynamo_worker CASE

Runs in Dynamo's environment. CASE is a JSON file: model, connector, prompts (texts), folder,
config_path. Prints one JSON line: per prompt the router's overlap, and that of an unknown prompt.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from flexkv.replay.deployment import NatsServer, Router, dynamo_variables
from tests.e2e.driving import free_port, http

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv.replay.deployment import Overlap

UP_S = 120.0
SEEN_S = 20.0
BLOCK_SIZE = 32
PLANES = ["--discovery-backend", "file", "--event-plane", "nats", "--request-plane", "tcp"]


class Stack:
    """A frontend and a worker; they are in this process's group, which the caller ends."""

    def __init__(self, case: dict[str, Any], nats_url: str, discovery: Path) -> None:
        self.port = free_port()
        self._folder = Path(case["folder"])
        self._env = (
            os.environ
            | dynamo_variables(nats_url, discovery)
            | {
                "DYN_EVENT_PLANE": "nats",
                "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
                "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
                "DYN_TCP_RPC_HOST": "127.0.0.1",
            }
        )
        if case.get("config_path"):
            self._env["FLEXKV_CONFIG_PATH"] = case["config_path"]
        address = ["--http-host", "127.0.0.1", "--http-port", str(self.port)]
        self._processes = [self._spawn("frontend", "--router-mode", "kv", *address)]
        options = [
            f"--model={case['model']}",
            "--served-model-name=tiny",
            "--dtype=float32",
            f"--block-size={BLOCK_SIZE}",
            "--enforce-eager",
            "--enable-prefix-caching",
            "--gpu-memory-utilization=0.1",
            f"--kv-cache-memory-bytes={64 << 20}",
            "--max-model-len=1024",
            "--max-num-seqs=8",
            "--num-gpu-blocks-override=256",
        ]
        if case["connector"]:
            options.append(f"--kv-transfer-config={json.dumps(case['connector'])}")
        self._processes.append(self._spawn("vllm", *options))

    def _spawn(self, module: str, *options: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{module}.log").open("wb") as log:
            command = [sys.executable, "-m", f"dynamo.{module}", *PLANES, *options]
            return subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env
            )

    def end(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(20)

    def chat(self, text: str) -> bool:
        request = {
            "model": "tiny",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 4,
            "temperature": 0,
        }
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        return http(url, request, deadline_s=20)[0] == 200

    def worker_id(self) -> int:
        """As the worker's own processes know it."""
        for process in Path("/proc").iterdir():
            try:
                if os.getpgid(int(process.name)) != os.getpgid(0):
                    continue
                environ = (process / "environ").read_text(errors="replace")
            except (ValueError, OSError):
                continue
            if found := re.search(r"\bDYN_FPM_WORKER_ID=(\d+)", environ):
                return int(found[1])
        raise AssertionError("no process knows a worker's id")

    def until(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        until_s = time.monotonic() + deadline_s
        while not condition():
            for process in self._processes:
                assert process.poll() is None, f"{process.args} ended before {what}"
            assert time.monotonic() < until_s, f"not within {deadline_s} s: {what}"
            time.sleep(0.2)


async def run(case: dict[str, Any]) -> dict[str, Any]:
    discovery = Path(case["folder"]) / "discovery"
    discovery.mkdir()
    tokenizer = Tokenizer.from_file(str(Path(case["model"]) / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        prompt = f"user: {text}\nassistant:"
        encoded: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
        return encoded

    async with NatsServer() as nats:
        with ExitStack() as stack:
            dynamo = Stack(case, nats.url, discovery)
            stack.callback(dynamo.end)
            first, *others = case["prompts"]
            dynamo.until(lambda: dynamo.chat(first), UP_S, "the first answer")
            worker_id = dynamo.worker_id()
            assert all(dynamo.chat(text) for text in others)
            async with Router(
                nats.url,
                discovery,
                tokens_per_block=BLOCK_SIZE,
                endpoint="dynamo.backend.generate",
            ) as router:
                await router.wait_for_workers([worker_id], deadline_s=SEEN_S)

                async def seen(text: str) -> Overlap:
                    return (await router.overlap(ids(text)))[worker_id]

                until_s = time.monotonic() + SEEN_S
                while True:
                    overlaps = [await seen(text) for text in case["prompts"]]
                    enough = all(overlap.host >= 3 for overlap in overlaps)
                    if enough or time.monotonic() > until_s or not case["connector"]:
                        break
                    await asyncio.sleep(0.2)
                unknown = await seen("nobody has asked this " * 12)
            sources = discovery / "v1" / "event_sources"
            return {
                "overlaps": [[overlap.gpu, overlap.host] for overlap in overlaps],
                "num_blocks": [len(ids(text)) // BLOCK_SIZE for text in case["prompts"]],
                "unknown": [unknown.gpu, unknown.host],
                "sources": len(list(sources.iterdir())) if sources.exists() else 0,
            }


if __name__ == "__main__":
    answer = asyncio.run(run(json.loads(Path(sys.argv[1]).read_text())))
    print(json.dumps(answer), flush=True)  # noqa: T201
