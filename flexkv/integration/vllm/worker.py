"""The connector's worker role: copies for the engine, and reports what has arrived."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from flexkv.engine.bridge import LoopThread
from flexkv.errors import EngineClosedError, LayoutError
from flexkv.integration.vllm.specs import reason_to_decline
from flexkv.link.client import LinkClient
from flexkv.link.messages import LoadDone, StoresDone, unpack_ids
from flexkv.tiers.gpu import make_copier
from flexkv.tiers.segments import segments_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import torch

    from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadJob
    from flexkv.integration.vllm.settings import VllmSettings
    from flexkv.tiers.base import PagedCopier

_DIAL_S = 600.0  # vLLM may profile and compile before the engine is constructed
_START_S = 5.0
_STOP_S = 15.0

_log = logging.getLogger(__name__)


class WorkerRole:
    """Called by the model's thread; nothing here waits for the engine.

    Whatever happens to the engine or to the link, each load that was promised is reported as
    finished exactly once, together with the blocks that did not arrive and after the last copy
    into them, and each request whose blocks vLLM keeps is reported as sent exactly once.
    """

    def __init__(self, settings: VllmSettings) -> None:
        self._settings = settings
        self._kv_caches: Mapping[str, torch.Tensor] = {}
        self._copier: PagedCopier | None = None
        self._client: LinkClient | None = None
        self._thread: LoopThread | None = None
        self._mark: object = None  # the model's work up to the latest step
        self._notes: deque[LoadDone | StoresDone] = deque()
        self._loads: dict[int, LoadJob] = {}  # promised
        self._early: dict[int, LoadDone] = {}  # done before we heard of the promise
        self._keeping: set[str] = set()  # requests whose blocks vLLM keeps
        self._stored: set[str] = set()  # of these, the engine is done with
        self._finished: set[str] = set()  # of these, vLLM told us
        self._failed_block_ids: set[int] = set()
        self._given_up: set[str] = set()  # requests whose load has failed, to be reported

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor], vllm_config: Any) -> None:
        """Copy to and from these caches from now on; dials the engine in the background."""
        if reason := reason_to_decline(vllm_config):
            _log.error("flexkv's cache is off: %s", reason)
            return
        self._kv_caches = kv_caches
        self.restore_kv_caches()

    def unregister_kv_caches(self) -> None:
        """Let go of the caches, once running copies have ended."""
        self.shutdown()
        if self._copier is not None:
            self._copier.abandon()
        self._give_up()  # the engine is not going to say more of what it has promised
        self._thread = self._client = self._copier = None

    def restore_kv_caches(self) -> None:
        """Take the caches, unless they are taken."""
        if not self._kv_caches or self._thread is not None:
            return
        settings, kv_caches = self._settings, self._kv_caches
        try:
            block_nbytes = segments_of(kv_caches, settings.block_size).block_nbytes
            self._copier = make_copier(kv_caches, settings.block_size, block_nbytes)
        except LayoutError as error:
            _log.error("flexkv's cache is off: these KV caches are of no use: %s", error)
            return
        self._mark = self._copier.mark()
        self._client = LinkClient(
            settings.endpoint,
            engine_id=settings.engine_id,
            rank=settings.rank,
            num_ranks=settings.num_ranks,
            tokens_per_block=settings.block_size,
            block_nbytes=block_nbytes,
            copier=self._copier,
            notes=self._notes.append,
            deadline_s=_DIAL_S,
            mark=lambda: self._mark,
            huge_pages=settings.config.transfers.huge_pages,
        )
        thread = LoopThread(f"flexkv-worker-{settings.rank}", self._serve)
        try:
            thread.start(_START_S)
        except EngineClosedError as error:
            _log.error("flexkv's cache is off: %s", error)
            return
        self._thread = thread

    def start_step(self, metadata: FlexKVMetadata) -> None:
        """The model's work of this step is in its stream: loads that wait for it may begin."""
        for job in metadata.loads:
            self._loads[job.job_id] = job
        self._keeping.update(metadata.finishing)
        if self._client is None or self._thread is None or self._copier is None:
            return
        self._mark = self._copier.mark()
        if not metadata.alive:
            self._thread.stop(0)
        elif metadata.loads:
            client, step = self._client, metadata.step
            self._thread.call(lambda: client.reached(step))

    def get_finished(self, finished: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests that are sent, and requests whose load has ended, each once."""
        self._finished |= finished & self._keeping
        received, self._given_up = self._given_up, set()
        while self._notes:
            note = self._notes.popleft()
            if isinstance(note, StoresDone):
                self._stored.add(note.request_id)
            elif note.job_id in self._loads:
                self._end_load(note, received)
            else:
                self._early[note.job_id] = note
        for job_id in self._early.keys() & self._loads.keys():
            self._end_load(self._early.pop(job_id), received)
        if self._loads or self._keeping:
            self._give_up_if_cut_off()
            received |= self._given_up
            self._given_up = set()
        sent = self._finished & self._stored
        self._finished -= sent
        self._stored -= sent
        self._keeping -= sent
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """GPU blocks of the loads just reported that did not arrive."""
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def shutdown(self) -> None:
        """End the link; running copies end first."""
        if self._thread is not None and not self._thread.stop(_STOP_S):
            _log.error("a flexkv worker's thread did not end within %s s", _STOP_S)

    def _end_load(self, note: LoadDone, received: set[str]) -> None:
        job = self._loads.pop(note.job_id)
        received.add(job.request_id)
        self._failed_block_ids.update(unpack_ids(note.missing))

    def _give_up_if_cut_off(self) -> None:
        if self._thread is not None and self._thread.alive:
            return
        if self._copier is not None:
            self._copier.abandon()  # the thread may have died in the middle of a copy
        self._give_up()

    def _give_up(self) -> None:
        """Nobody copies any more: what was promised has failed, what is kept is free."""
        for job in self._loads.values():
            self._failed_block_ids.update(job.block_ids)
            self._given_up.add(job.request_id)
        self._loads.clear()
        self._stored |= self._keeping

    async def _serve(self, thread: LoopThread) -> None:
        """Copy for the engine until it closes, is lost, or the thread is to stop."""
        assert self._client is not None
        assert self._copier is not None
        thread.ready()
        try:
            await thread.until_stopping(self._client.run())
        finally:
            await self._copier.close()
