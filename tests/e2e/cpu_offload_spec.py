"""Lets vLLM's OffloadingConnector run on a CPU: its own manager, with a copy thread of ours.

vLLM's own spec refuses to make a worker without a GPU.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.kv_offload.base import BlockIDsLoadStoreSpec, CanonicalKVCaches

_WAIT_S = 60.0


class CopyThread(OffloadingWorker):
    """Copies whole blocks between vLLM's caches and plain tensors, in the order of the calls."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        (refs,) = kv_caches.group_data_refs
        self.gpu = [kv_caches.tensors[ref.tensor_idx].tensor for ref in refs]
        self._host = [torch.zeros(num_chunks, *t.shape[1:], dtype=t.dtype) for t in self.gpu]
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], int]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._running: set[int] = set()
        self._results: list[TransferResult] = []
        self._thread = threading.Thread(target=self._serve, name="offload-copy", daemon=True)
        self._thread.start()

    def submit_store(
        self, job_id: int, src_spec: BlockIDsLoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec
    ) -> bool:
        source, target = _rows(src_spec), _rows(dst_spec)
        return self._submit(job_id, lambda: self._copy(self.gpu, source, self._host, target))

    def submit_load(
        self, job_id: int, src_spec: BlockIDsLoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec
    ) -> bool:
        source, target = _rows(src_spec), _rows(dst_spec)
        return self._submit(job_id, lambda: self.load(source, target))

    def get_finished(self) -> list[TransferResult]:
        with self._changed:
            results, self._results = self._results, []
            return results

    def wait(self, job_ids: set[int]) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: not job_ids & self._running, _WAIT_S)
        assert done, f"{job_ids & self._running} still run after {_WAIT_S} s"

    def shutdown(self) -> None:
        self._jobs.put(None)
        self._thread.join(_WAIT_S)

    def load(self, source: torch.Tensor, target: torch.Tensor) -> int:
        return self._copy(self._host, source, self.gpu, target)

    def _copy(
        self,
        sources: list[torch.Tensor],
        source: torch.Tensor,
        targets: list[torch.Tensor],
        target: torch.Tensor,
    ) -> int:
        for here, there in zip(sources, targets, strict=True):
            there[target] = here[source]
        return sum(here[0].nbytes for here in sources) * len(source)

    def _submit(self, job_id: int, work: Callable[[], int]) -> bool:
        with self._changed:
            self._running.add(job_id)
        self._jobs.put((job_id, work))
        return True

    def _serve(self) -> None:
        while job := self._jobs.get():
            job_id, work = job
            start_s = time.perf_counter()
            nbytes = work()
            with self._changed:
                seconds = time.perf_counter() - start_s
                self._results.append(TransferResult(job_id, True, nbytes, seconds))  # noqa: FBT003
                self._running.discard(job_id)
                self._changed.notify_all()


class GarbageThread(CopyThread):
    """The negative control: every load says that it went well, and wrote something else."""

    def load(self, source: torch.Tensor, target: torch.Tensor) -> int:
        nbytes = super().load(source, target)
        for cache in self.gpu:
            cache[target] = cache[target].flip(0, -1)
        return nbytes


class CpuSpec(CPUOffloadingSpec):
    """``spec_name`` for ``kv_connector_extra_config``, beside ``cpu_bytes_to_use``."""

    worker_class: type[CopyThread] = CopyThread

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1, "a chunk is a block here"
        worker: Any = self._worker  # typed as vLLM's own
        if worker is None:
            worker = self._worker = self.worker_class(kv_caches, self.num_chunks)
        return worker


class GarbageSpec(CpuSpec):
    """As ``CpuSpec``, but loads garbage."""

    worker_class = GarbageThread


def _rows(spec: BlockIDsLoadStoreSpec) -> torch.Tensor:
    return torch.from_numpy(spec.block_ids.astype("int64"))
