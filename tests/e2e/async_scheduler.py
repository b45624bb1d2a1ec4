"""vLLM's real AsyncScheduler with two batches in flight, and a runner that is a pure function.

    python -m tests.e2e.async_scheduler CASE

CASE is a JSON file: model, connector, config_path, steps, seed, faults. Prints one JSON line.

A step of the real runner writes KV only when it executes, which is after the next one was
scheduled. So does this one: at each position it writes a hash of all tokens up to there. Before
it does, it checks every position that attention would read: one wrong number is one wrong
position, wherever it came from. On a CPU vLLM forces this scheduler off, so no end-to-end run
sees what it sees.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import time
from collections import Counter, deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from tests.e2e import faults

BLOCK_SIZE = 32
NUM_BLOCKS = 40
MAX_SEQS = 8
VOCABULARY = 500
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
WIDTH = 8  # numbers of 64 bits that a layer holds for a token
_MASK = (1 << 62) - 1


def hashed(before: int, token: int) -> int:
    return (before * 6364136223846793005 + token * 1442695040888963407 + 99991) & _MASK


class Sequence:
    """One request as the runner knows it."""

    def __init__(self, tokens: list[int], block_ids: list[int]) -> None:
        self.tokens = list(tokens)
        self.block_ids = list(block_ids)
        self.hashes: list[int] = []

    def hashes_to(self, stop: int) -> list[int]:
        while len(self.hashes) < stop:
            before = self.hashes[-1] if self.hashes else 1
            self.hashes.append(hashed(before, self.tokens[len(self.hashes)]))
        return self.hashes[:stop]

    def cut(self, num_tokens: int) -> None:
        del self.tokens[num_tokens:]
        del self.hashes[num_tokens:]


class Runner:
    """Executes one step after another, each when it is told to."""

    def __init__(self, vllm_config: Any, connector: Any) -> None:
        shape = (len(LAYERS), NUM_BLOCKS, 1, BLOCK_SIZE, WIDTH)
        self._caches = torch.full(shape, -1, dtype=torch.int64)
        as_floats = self._caches.view(torch.float32)
        connector.register_kv_caches(dict(zip(LAYERS, as_floats, strict=True)))
        self.counts: Counter[str] = Counter()
        self._vllm_config = vllm_config
        self._connector = connector
        self._sequences: dict[str, Sequence] = {}

    def execute(self, payload: bytes) -> ModelRunnerOutput:
        """One step, from what the scheduler said when it scheduled it."""
        step = pickle.loads(payload)
        self._connector.handle_preemptions(step.kv_connector_metadata)
        self._learn(step)
        sampled: list[list[int]] = []
        with (
            set_forward_context(None, self._vllm_config),
            KVConnectorModelRunnerMixin._get_kv_connector_output(step) as output,
        ):
            sampled.extend(
                self._forward(request_id, num_tokens)
                for request_id, num_tokens in step.num_scheduled_tokens.items()
            )
        for request_id in step.finished_req_ids:
            self._sequences.pop(request_id, None)
        ids = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=output,
        )

    def _learn(self, step: Any) -> None:
        self._starts = {}
        for new in step.scheduled_new_reqs:
            self._sequences[new.req_id] = Sequence(new.prompt_token_ids, new.block_ids[0])
            self._starts[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            sequence = self._sequences[request_id]
            self._starts[request_id] = cached.num_computed_tokens[i]
            block_ids = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                self.counts["resumed"] += 1
                sequence.block_ids = list(block_ids[0])
                if tokens := cached.all_token_ids.get(request_id):
                    sequence.cut(len(tokens))
            elif block_ids is not None:
                sequence.block_ids += block_ids[0]

    def _forward(self, request_id: str, num_tokens: int) -> list[int]:
        sequence, start = self._sequences[request_id], self._starts[request_id]
        stop = start + num_tokens
        assert stop <= len(sequence.tokens), "the runner has sampled all that is scheduled"
        hashes = torch.tensor(sequence.hashes_to(stop))
        positions = torch.arange(stop)
        blocks = torch.tensor(sequence.block_ids)[positions // BLOCK_SIZE]
        rows = positions % BLOCK_SIZE
        for layer, cache in enumerate(self._caches):
            read = cache[blocks[:start], 0, rows[:start]]
            wrong = (read != (hashes[:start] + layer)[:, None]).any(dim=1)
            self.counts["wrong"] += int(wrong.sum())
            cache[blocks[start:], 0, rows[start:]] = (hashes[start:] + layer)[:, None]
        self.counts["checked"] += start
        if stop < len(sequence.tokens):
            return []
        token = int(hashes[-1]) // 7 % VOCABULARY
        sequence.tokens.append(token)
        return [token]


class Load:
    """Requests come, most over prefixes that they share; some are aborted."""

    def __init__(self, seed: int, hasher: Any) -> None:
        self.rng = random.Random(seed)
        self.expected: dict[str, list[int]] = {}
        self.num_aborted = 0
        self._hasher = hasher
        self._prefixes = [
            [self.rng.randrange(VOCABULARY) for _ in range(self.rng.randrange(64, 320))]
            for _ in range(8)
        ]
        self._num_requests = 0

    def feed(self, scheduler: Any) -> None:
        rng = self.rng
        while sum(scheduler.get_request_counts()) < MAX_SEQS + 2:
            self._num_requests += 1
            name = f"r{self._num_requests}"
            prefix = rng.choice(self._prefixes)
            tail = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 60))]
            prompt = prefix[: rng.randrange(32, len(prefix) + 1)] + tail
            sampling = SamplingParams(
                temperature=0, max_tokens=rng.randrange(1, 160), ignore_eos=True
            )
            sampling.update_from_generation_config({}, eos_token_id=0)
            request = Request(
                request_id=name,
                prompt_token_ids=prompt,
                sampling_params=sampling,
                pooling_params=None,
                block_hasher=self._hasher,
            )
            self.expected[name] = prompt
            scheduler.add_request(request)

    def maybe_abort(self, scheduler: Any) -> None:
        if self.rng.random() < 0.03 and scheduler.requests:
            name = self.rng.choice(list(scheduler.requests))
            self.num_aborted += len(scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED))


def make_config(case: dict[str, Any]) -> tuple[Any, KVCacheConfig]:
    vllm_config = EngineArgs(
        model=case["model"],
        block_size=BLOCK_SIZE,
        dtype="float32",
        enforce_eager=True,
        kv_transfer_config=case["connector"],
        max_model_len=1024,
        max_num_batched_tokens=160,
        max_num_seqs=MAX_SEQS,
        num_gpu_blocks_override=NUM_BLOCKS,
    ).create_engine_config()
    vllm_config.scheduler_config.async_scheduling = True
    vllm_config.cache_config.num_gpu_blocks = NUM_BLOCKS
    # K and V of 32-bit floats: as many bytes as the runner's numbers
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=WIDTH, dtype=torch.float32
    )
    page = spec.page_size_bytes
    assert page == BLOCK_SIZE * WIDTH * 8
    tensor = KVCacheTensor(
        size=len(LAYERS) * NUM_BLOCKS * page,
        layers=list(LAYERS),
        layer_stride=NUM_BLOCKS * page,
        block_stride=page,
    )
    return vllm_config, KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)],
    )


def run(case: dict[str, Any]) -> dict[str, Any]:
    vllm_config, kv_cache_config = make_config(case)
    with set_current_vllm_config(vllm_config):
        worker = KVConnectorFactory.create_connector(
            vllm_config, KVConnectorRole.WORKER, kv_cache_config
        )
        kv_transfer_state._KV_CONNECTOR_AGENT = worker
        runner = Runner(vllm_config, worker)
        scheduler = AsyncScheduler(
            vllm_config=vllm_config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        assert scheduler.defer_block_free, "two batches are in flight"
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        load = Load(case["seed"], get_request_block_hasher(BLOCK_SIZE, hash_fn))
        try:
            return drive(scheduler, runner, load, case["steps"])
        finally:
            scheduler.shutdown()
            worker.shutdown()


def drive(scheduler: Any, runner: Runner, load: Load, num_steps: int) -> dict[str, Any]:
    """As vLLM's EngineCore does it: schedule up to two steps, then take the older one's result."""
    in_flight: deque[tuple[Any, bytes]] = deque()
    counts, num_done = runner.counts, 0
    quiet_s = time.monotonic()
    while num_done < num_steps:
        load.feed(scheduler)
        output = scheduler.schedule()
        counts["preempted"] += len(output.preempted_req_ids or ())
        in_flight.append((output, pickle.dumps(output)))
        num_scheduled = output.total_num_scheduled_tokens
        if len(in_flight) < 2 and num_scheduled:
            continue
        if not num_scheduled or load.rng.random() < 0.2:
            time.sleep(load.rng.random() * 0.002)  # flexkv's threads may get ahead of the runner
        older, payload = in_flight.popleft()
        result = runner.execute(payload)
        load.maybe_abort(scheduler)
        for outputs in scheduler.update_from_output(older, result).values():
            counts["tokens"] += sum(len(out.new_token_ids) for out in outputs.outputs)
            stats = outputs.scheduler_stats
            if stats is not None and stats.connector_prefix_cache_stats is not None:
                counts["external"] += stats.connector_prefix_cache_stats.hits
        if older.total_num_scheduled_tokens:
            num_done += 1
            quiet_s = time.monotonic()
        assert time.monotonic() < quiet_s + 30, "nothing was scheduled for 30 s"
    return dict(counts) | {
        "steps": num_done,
        "aborted": load.num_aborted,
        "vllm": sys.modules["vllm"].__file__,
    }


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    if case.get("config_path"):
        os.environ["FLEXKV_CONFIG_PATH"] = case["config_path"]
    faults.install(case.get("faults") or {})
    with ExitStack() as stack:
        if case.get("too_early"):
            from flexkv.integration.vllm.requests import RequestState  # noqa: PLC0415

            stack.enter_context(mock.patch.object(RequestState, "num_storable", scheduled_blocks))
        answer = run(case)
    print(json.dumps(answer))  # noqa: T201


def scheduled_blocks(self: Any) -> int:
    """The mistake that this test is for: what is scheduled counts as written."""
    tokens = min(self.request.num_computed_tokens, self.request.num_tokens)
    return int(np.maximum(tokens, 0)) // int(self.block_size)


if __name__ == "__main__":
    main()
