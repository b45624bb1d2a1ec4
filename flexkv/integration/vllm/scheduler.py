"""The connector's scheduler role: what to load, what to store, and when."""

from __future__ import annotations

import logging
from itertools import count
from typing import TYPE_CHECKING, Any

from flexkv.integration.vllm.metadata import FlexKVMetadata, LoadJob
from flexkv.integration.vllm.requests import RequestState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexkv.integration.vllm.service import EngineService

_NULL_BLOCK = 0  # vLLM's placeholder, which belongs to nobody

_log = logging.getLogger(__name__)


class SchedulerRole:
    """Called by vLLM's scheduler thread, several times a step; nothing here waits.

    ``offers_loads`` False: it stores, but promises nothing.
    """

    def __init__(self, service: EngineService, block_size: int, *, offers_loads: bool) -> None:
        self._service = service
        self._block_size = block_size
        self._offers_loads = offers_loads
        self._requests: dict[str, RequestState] = {}
        self._pinned: set[RequestState] = set()
        self._steps = count(1)
        self._step = next(self._steps)
        self._new_loads: list[LoadJob] = []
        self._new_finishing: list[str] = []
        self._was_alive = True

    def on_new_request(self, request: Any) -> None:
        """What is resident of a request that has to wait is not to age out meanwhile."""
        self._service.touch(self._state(request).chain())

    def get_num_new_matched_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        """How many tokens behind the GPU's own ``num_computed`` could be loaded.

        What is offered stays protected until the ``build_connector_meta`` of this step.
        """
        state = self._state(request)
        state.restart()
        state.num_local = num_computed // self._block_size
        self._unpin(state)
        state.is_offered = False
        # at least one token must be left to compute
        chain = state.chain((request.num_tokens - 1) // self._block_size)
        # One that waits again without having run has failed to load. Offering a load once more can
        # stop vLLM for good: the reservation for it may not fit beside what others hold.
        offers = self._offers_loads and not state.was_promised
        lease = self._service.lease(chain) if offers else None
        self._count(state, len(chain), lease.num_blocks if lease else 0)
        if lease is None:
            return 0, False
        num_new = lease.num_blocks - state.num_local
        if num_new <= 0:
            self._service.release(lease)
            return 0, False
        state.pin = lease
        state.is_offered = True
        self._pinned.add(state)
        return num_new * self._block_size, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external: int) -> None:
        """The request has its GPU blocks; load what was offered, as far as vLLM took it."""
        state = self._state(request)
        if not num_external or not state.is_offered:
            return
        state.is_offered = False
        first = state.num_local
        last = first + -(-num_external // self._block_size)
        pin, state.pin = state.pin, None  # None: vLLM took its time; what is gone counts as failed
        self._pinned.discard(state)
        block_ids = list(blocks.get_block_ids()[0][first:last])
        request_id = request.request_id
        job_id = self._service.load(
            request_id, state.chain(last), block_ids, first, self._step, pin
        )
        state.is_loading = state.was_promised = True
        self._new_loads.append(LoadJob(job_id, request_id, block_ids))

    def build_connector_meta(self, scheduler_output: Any) -> FlexKVMetadata:
        """Begin the stores of this step, and tell the workers what was promised."""
        for pinned in list(self._pinned):
            self._unpin(pinned)  # vLLM did not take it
        for request_id in scheduler_output.preempted_req_ids or ():
            self._service.discard(request_id)
            if state := self._requests.get(request_id):
                state.restart()
        block_state = scheduler_output.kv_connector_block_state
        for request_id in scheduler_output.num_scheduled_tokens:
            if state := self._requests.get(request_id):
                self._run(state, block_state)
        alive = self._service.alive
        if self._was_alive and not alive:
            _log.error("flexkv's thread has ended: vLLM goes on without a cache")
        self._was_alive = alive
        metadata = FlexKVMetadata(self._step, self._new_loads, self._new_finishing, alive)
        self._step = next(self._steps)
        self._new_loads, self._new_finishing = [], []
        return metadata

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> bool:
        """Store what is left. True: vLLM must keep the blocks until the workers say so."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return False
        self._unpin(state)
        if not state.is_running or state.is_loading:
            return False  # its blocks may hold nothing yet
        self._store(state, block_ids)
        if not self._service.finish(request.request_id):
            return False
        self._new_finishing.append(request.request_id)
        return True

    def update_connector_output(self, output: Any) -> None:
        """Requests whose loads have ended may be stored from."""
        for request_id in output.finished_recving or ():
            if state := self._requests.get(request_id):
                state.is_loading = False

    def _state(self, request: Any) -> RequestState:
        state = self._requests.get(request.request_id)
        if state is None:
            state = self._requests[request.request_id] = RequestState(request, self._block_size)
        state.request = request
        return state

    def _count(self, state: RequestState, num_requested: int, num_hit: int) -> None:
        if not state.is_counted:
            state.is_counted = True
            self._service.count_request(num_requested, num_hit)

    def _unpin(self, state: RequestState) -> None:
        pin, state.pin = state.pin, None
        self._pinned.discard(state)
        if pin is not None:
            self._service.release(pin)

    def _run(self, state: RequestState, block_state: Any) -> None:
        """The request runs in this step: store what is new; its chain is in use in any case."""
        if not state.is_running:
            state.begin()
            self._service.touch(state.chain())
        if state.has_news():
            block_ids = block_state.get_block_ids(state.request.request_id)
            if block_ids is not None:
                self._store(state, block_ids[0])

    def _store(self, state: RequestState, block_ids: Sequence[int]) -> None:
        """The whole chain each time: an ancestor that was evicted meanwhile is copied again."""
        num_blocks = min(state.num_storable(), len(block_ids), len(state.request.block_hashes))
        if num_blocks <= state.num_handed:
            return
        block_ids = block_ids[:num_blocks]
        if _NULL_BLOCK in block_ids:
            block_ids = block_ids[: block_ids.index(_NULL_BLOCK)]
        chain = state.chain(len(block_ids))
        if self._service.store(state.request.request_id, chain, block_ids, state.num_handed):
            state.num_handed = num_blocks
