"""An engine service and a worker role that share an endpoint, without vLLM."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from flexkv.config import CacheConfig, Config
from flexkv.integration.vllm.service import EngineService
from flexkv.integration.vllm.settings import VllmSettings
from flexkv.integration.vllm.worker import WorkerRole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flexkv.blocks import Blocks

TOKENS_PER_BLOCK = 2
NUM_BLOCKS = 64
LIMIT_S = 20.0
MODEL = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))


@dataclass
class LoadJob:
    job_id: int
    request_id: str
    block_ids: list[int]


@dataclass
class Metadata:
    step: int
    loads: list[LoadJob] = field(default_factory=list)
    finishing: list[str] = field(default_factory=list)
    alive: bool = True


def settings(endpoint: str, *, num_host_blocks: int = 32, **other: Any) -> VllmSettings:
    cache = CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=num_host_blocks)
    given: dict[str, Any] = {
        "config": Config(cache=cache),
        "endpoint": endpoint,
        "engine_id": "an-engine",
        "block_size": TOKENS_PER_BLOCK,
        "num_ranks": 1,
        "rank": 0,
        "publishes": False,
    }
    return VllmSettings(**(given | other))


def until(condition: Callable[[], Any]) -> Any:
    """What ``condition`` comes to, once that is true."""
    until_s = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < until_s, "it did not come true"
        time.sleep(0.002)
    return found


class Roles:
    """``caches`` on ``device``: two layers, filled with random numbers."""

    def __init__(self, settings: VllmSettings, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_BLOCKS, 1, TOKENS_PER_BLOCK, 8)
        self.caches = {
            f"layer.{i}": torch.randn(shape, generator=generator).to(device) for i in range(2)
        }
        self.step = 0
        self.worker = WorkerRole(settings)
        self.worker.register_kv_caches(self.caches, MODEL)
        self.service = EngineService(settings, [])

    def until_usable(self) -> None:
        until(lambda: self.service.usable)

    def begin_step(self, **metadata: Any) -> None:
        self.step += 1
        self.worker.start_step(Metadata(self.step, **metadata))  # type: ignore[arg-type]

    def store(self, blocks: Blocks, block_ids: list[int], request_id: str = "stored") -> None:
        assert self.service.store(request_id, blocks, block_ids)

    def resident(self, blocks: Blocks) -> int:
        lease = self.service.lease(blocks)
        if lease is None:
            return 0
        self.service.release(lease)
        return lease.num_blocks

    def promise(self, blocks: Blocks, block_ids: list[int], request_id: str = "loaded") -> LoadJob:
        """A load that the next step promises."""
        pin = self.service.lease(blocks)
        assert pin is not None
        job_id = self.service.load(request_id, blocks, block_ids, 0, self.step + 1, pin)
        return LoadJob(job_id, request_id, block_ids)

    def reports(self, finished: set[str] | None = None) -> tuple[set[str], set[str], set[int]]:
        """Sent, received and failed block ids, as vLLM asks for them in a step."""
        sent, received = self.worker.get_finished(finished or set())
        return sent or set(), received or set(), self.worker.get_block_ids_with_load_errors()

    def bytes_of(self, block_ids: list[int]) -> torch.Tensor:
        return torch.stack([cache[block_ids] for cache in self.caches.values()]).cpu()

    def end(self) -> None:
        self.service.close()
        self.worker.shutdown()


@contextmanager
def roles(endpoint: str, device: str = "cpu", **other: Any) -> Iterator[Roles]:
    with ExitStack() as stack:
        made = Roles(settings(endpoint, **other), device)
        stack.callback(made.end)
        made.until_usable()
        yield made
