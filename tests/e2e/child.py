"""Runs cases with a real vLLM: one JSON line each on standard input, one in answer.

    python -m tests.e2e.child FD

The answer goes to file descriptor FD, since vLLM writes to the standard ones. In-process engines
are made and ended one after another, so that vLLM is imported once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from tests.e2e import faults

if TYPE_CHECKING:
    from collections.abc import Iterator

DRAIN_S = 30.0
_COUNTERS = {
    "external": "vllm:external_prefix_cache_hits",
    "preemptions": "vllm:num_preemptions",
    "ssd_loaded": "vllm:flexkv_ssd_loaded_blocks",  # of our own class
    "failed": "vllm:flexkv_load_failed_blocks",
}


class Engine:
    """vLLM with a case's settings."""

    def __init__(self, case: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams  # noqa: PLC0415  # takes seconds

        kwargs = dict(case["engine"])
        if case.get("connector"):
            kwargs["kv_transfer_config"] = case["connector"]
        self.case = case
        self.llm = LLM(model=case["model"], disable_log_stats=False, seed=0, **kwargs)
        self._sampling = SamplingParams(temperature=0, ignore_eos=True)
        self.set_num_new_tokens(case["num_new_tokens"])

    @property
    def core(self) -> Any:
        """The in-process core; None if it is in another process."""
        return getattr(self.llm.llm_engine.engine_core, "engine_core", None)

    def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        """One pass: tokens and reasons to finish per prompt, and what vLLM counted meanwhile."""
        before = self._counted()
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, self._sampling, use_tqdm=False)
        after = self._counted()
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "reasons": [output.outputs[0].finish_reason for output in outputs],
            **{name: after[name] - before[name] for name in after},
        }

    def set_num_new_tokens(self, num_tokens: int) -> None:
        self._sampling.max_tokens = num_tokens

    def drain(self) -> None:
        """An in-process engine steps in ``generate`` only: let it finish what it put off."""
        until_s = time.monotonic() + DRAIN_S
        while self.core is not None and self.core.scheduler.has_requests():
            assert time.monotonic() < until_s, f"still busy after {DRAIN_S} s"
            self.core.step_fn()

    def reset(self, *, connector: bool = False) -> None:
        """Forget what the GPU holds, and with ``connector`` what the connector holds, too."""
        until_s = time.monotonic() + DRAIN_S
        while True:
            self.drain()
            if self.llm.reset_prefix_cache(reset_connector=connector):
                return
            assert time.monotonic() < until_s, f"blocks are still in use after {DRAIN_S} s"
            time.sleep(0.05)

    def add(self, name: str, prompt: list[int]) -> None:
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, self._sampling)

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory  # noqa: PLC0415

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _counted(self) -> dict[str, int]:
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        return {name: int(values.get(metric, 0)) for name, metric in _COUNTERS.items()}


def passes(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Cold, after the GPU's cache was reset, warm."""
    yield "cold", engine.run(case["prompts"])
    engine.reset()
    yield "reset", engine.run(case["prompts"])
    engine.drain()
    yield "warm", engine.run(case["prompts"])
    engine.drain()


def cold(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "cold", engine.run(case["prompts"])


def cleared(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A reset that includes the connector; ``copies``: of the SSD's folder, just before and after.

    A copy is what a kill -9 would leave at that moment.
    """
    yield "cold", engine.run(case["prompts"])
    copies = case.get("copies")
    if copies:
        engine.drain()
        shutil.copytree(copies["of"], copies["before"])
    engine.reset(connector=True)
    if copies:
        shutil.copytree(copies["of"], copies["after"])
    yield "residency", held(case)
    yield "reset", engine.run(case["prompts"])
    engine.drain()


def continued(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each prompt, then, after a reset, with the first token that came of it."""
    first = engine.run(case["prompts"])
    yield "cold", first
    engine.reset()
    longer = [
        prompt + tokens[:1] for prompt, tokens in zip(case["prompts"], first["tokens"], strict=True)
    ]
    yield "reset", engine.run(longer)
    engine.drain()


def aborts(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every second request that waits for its load is aborted; the others go on."""
    yield "cold", engine.run(case["prompts"])
    engine.reset()
    tokens: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for i, prompt in enumerate(case["prompts"]):
        engine.add(f"again-{i}", prompt)
    vllm, scheduler = engine.llm.llm_engine, engine.core.scheduler
    until_s = time.monotonic() + DRAIN_S
    while vllm.has_unfinished_requests():
        assert time.monotonic() < until_s, f"requests still run after {DRAIN_S} s"
        for output in vllm.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        loading = [
            "-".join(name.split("-")[:2])  # vLLM has put something behind our name
            for name, request in scheduler.requests.items()
            if request.status.name == "WAITING_FOR_REMOTE_KVS"
        ]
        victims = [name for name in loading if int(name.split("-")[1]) % 2 and name not in aborted]
        if victims:
            vllm.abort_request(victims)
            aborted.update(victims)
    yield "aborted", sorted(aborted)
    yield "others", {name: t for name, t in tokens.items() if name not in aborted}
    engine.reset()
    yield "after", engine.run(case["prompts"])
    engine.drain()


def hot_prefix(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The first prompt comes in each round, with others that come once."""
    hot, *others = case["prompts"]
    rounds = [engine.run([hot, *others[i : i + 2]]) for i in range(0, len(others), 2)]
    yield "rounds", {name: sum(r[name] for r in rounds) for name in _COUNTERS}
    engine.reset()
    yield "hot", engine.run([hot])
    engine.reset()
    yield "once", engine.run([others[0]])
    engine.drain()


def events(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """As ``passes``, with more steps at the end: vLLM publishes only while it steps."""
    yield from passes(engine, case)
    for _ in range(3):
        time.sleep(0.2)
        engine.run([case["prompts"][0][:40]])
        engine.drain()
    time.sleep(0.5)  # the publisher is a thread
    yield "residency", held(case)


def hold(engine: Engine, case: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Stay until the file ``until`` is there."""
    yield "cold", engine.run(case["prompts"][:1])
    with open(case["holding"], "w"):  # noqa: PTH123
        pass
    until_s = time.monotonic() + case["hold_s"]
    while not os.path.exists(case["until"]) and time.monotonic() < until_s:  # noqa: PTH110
        time.sleep(0.05)


SCRIPTS = {
    script.__name__: script
    for script in (passes, cold, cleared, continued, aborts, hot_prefix, events, hold)
}


def wait_until_it_serves(case: dict[str, Any]) -> None:
    """The engine is there a while after vLLM: what is computed before is not stored."""
    if not case.get("endpoint"):
        return
    from flexkv.link.errors import LinkError  # noqa: PLC0415  # absent where flexkv is
    from flexkv.link.residency import residency  # noqa: PLC0415

    until_s = time.monotonic() + DRAIN_S
    while True:
        try:
            asyncio.run(residency(case["endpoint"], 2.0))
        except LinkError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
        else:
            time.sleep(0.05)  # it answers a moment before it serves
            return


def held(case: dict[str, Any]) -> dict[str, Any] | None:
    """What flexkv's engine says it holds: its last event, and the keys of every tier."""
    if not case.get("endpoint"):
        return None
    from flexkv.link.residency import residency  # noqa: PLC0415  # absent before the link was

    found = asyncio.run(residency(case["endpoint"], 5.0))
    keys = {tier.name: sorted(key.hex() for key in found.keys[tier]) for tier in found.keys}
    return {"last_event_id": found.last_event_id, "keys": keys}


def watch_connectors() -> list[float]:
    """Filled with the times at which vLLM begins to make a connector in this process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import (  # noqa: PLC0415
        KVConnectorFactory,
    )

    times: list[float] = []
    make = getattr(KVConnectorFactory.create_connector, "wrapped", None)
    make = make or KVConnectorFactory.create_connector

    def timed(*args: Any, **kwargs: Any) -> Any:
        times.append(time.monotonic())
        return make(*args, **kwargs)

    timed.wrapped = make  # type: ignore[attr-defined]
    KVConnectorFactory.create_connector = timed
    return times


def run(case: dict[str, Any]) -> dict[str, Any]:
    os.environ["FLEXKV_CONFIG_PATH"] = case.get("config_path", "")
    if not case.get("config_path"):
        del os.environ["FLEXKV_CONFIG_PATH"]
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        faults.install(case.get("faults") or {})
    start_s = time.monotonic()
    engine = None
    answer: dict[str, Any] = {}
    connectors = watch_connectors() if case.get("connector") else []
    try:
        engine = Engine(case)
        wait_until_it_serves(case)
        answer["up_s"] = time.monotonic() - start_s
        answer |= SCRIPTS[case["script"]](engine, case)
    except Exception as error:  # noqa: BLE001  # whatever it is, the test wants to see it
        traceback.print_exc()
        answer["error"] = f"{type(error).__name__}: {error}"
        answer["error_s"] = time.monotonic() - start_s
        answer["connector_s"] = connectors[0] - start_s if connectors else None
    finally:
        if engine is not None:
            engine.close()
        faults.install({})
    answer["threads_left"] = [
        thread.name for thread in threading.enumerate() if thread.name.startswith("flexkv")
    ]
    answer["seconds"] = time.monotonic() - start_s
    return answer


def main() -> None:
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)  # noqa: FBT003
    with os.fdopen(fd, "w") as answers:
        for line in sys.stdin:
            sys.stdout.write(f"=== {line[:300]}\n")
            sys.stdout.flush()
            answer = run(json.loads(line))
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if "error" in answer:
                return  # what vLLM left behind would spoil the next case


if __name__ == "__main__":
    main()
