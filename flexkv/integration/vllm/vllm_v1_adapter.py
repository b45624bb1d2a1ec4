"""What vLLM's built-in ``FlexKVConnectorV1`` imports: both roles behind the calls it forwards."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from flexkv.integration.vllm.feed import feed_of
from flexkv.integration.vllm.log import join_vllms_log
from flexkv.integration.vllm.metadata import FlexKVMetadata
from flexkv.integration.vllm.scheduler import SchedulerRole
from flexkv.integration.vllm.service import EngineService
from flexkv.integration.vllm.settings import settings_of, unsupported, warn_of_keys
from flexkv.integration.vllm.worker import WorkerRole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import FrameType

    import torch

    from flexkv.integration.vllm.feed import Feed
    from flexkv.integration.vllm.settings import VllmSettings

_log = logging.getLogger(__name__)


class FlexKVConnectorV1Impl:
    """One role of the connector, by ``role``: in vLLM's scheduler or in one of its workers.

    The built-in class hands over neither the step's metadata nor ``reset_cache``: the former is
    fetched from vLLM; without the latter a reset of vLLM's connector cache leaves flexkv as it is.

    Raises:
        FlexKVError: flexkv's settings are wrong, or the engine's endpoint is taken.
    """

    _forwards_reset = False
    _follows_sleep = False

    def __init__(self, vllm_config: Any, role: Any) -> None:
        join_vllms_log()
        self._flexkv_config = vllm_config
        self._scheduler: SchedulerRole | None = None
        self._service: EngineService | None = None
        self._feed: Feed | None = None
        self._worker: WorkerRole | None = None
        settings = settings_of(vllm_config)
        if not settings.config.enable_flexkv:
            _log.info("enable_flexkv is false: the connector does nothing")
        elif reason := (
            unsupported(vllm_config, follows_sleep=self._follows_sleep) or self._reason_to_decline()
        ):
            _log.error("flexkv's cache is off: %s", reason)
        elif role.name == "SCHEDULER":
            self._begin_to_schedule(settings)
        else:
            self._worker = WorkerRole(settings)

    def shutdown(self) -> None:
        """End flexkv's thread in this role."""
        if self._service is not None:
            self._service.close()
        if self._worker is not None:
            self._worker.shutdown()

    # worker role

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the worker's caches; returns at once."""
        if self._worker is not None:
            self._worker.register_kv_caches(kv_caches, self._flexkv_config)

    def start_load_kv(self, _forward_context: Any, **_: Any) -> None:
        """The model's work of this step is under way."""
        if self._worker is not None and (metadata := self._metadata_of_step()) is not None:
            self._worker.start_step(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are complete before a request is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Nothing: blocks are stored when they are full."""

    def wait_for_save(self) -> None:
        """Nothing: stores never hold up a step."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests that are sent, and requests whose load has ended."""
        if self._worker is None:
            return None, None
        return self._worker.get_finished(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """GPU blocks whose load has failed."""
        return set() if self._worker is None else self._worker.get_block_ids_with_load_errors()

    def get_kv_connector_stats(self) -> Any:
        """None: vLLM has no Prometheus builder for the built-in class."""
        return None

    # scheduler role

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """How many tokens could be loaded, and that loads are asynchronous."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its GPU blocks."""
        if self._scheduler is not None:
            self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> FlexKVMetadata:
        """What the workers have to know of this step."""
        if self._scheduler is None:
            return FlexKVMetadata()
        assert self._feed is not None
        self._feed.watch(scheduler_output)
        return self._scheduler.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers said."""
        if self._scheduler is not None:
            self._scheduler.update_connector_output(connector_output)

    def request_finished(
        self, request: Any, block_ids: Sequence[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether vLLM must keep the request's blocks for now."""
        if self._scheduler is None:
            return False, None
        return self._scheduler.request_finished(request, block_ids), None

    def take_events(self) -> Iterable[Any]:
        """What has changed in flexkv's tiers, for vLLM's own event stream."""
        return () if self._feed is None else self._feed.take_events()

    def _begin_to_schedule(self, settings: VllmSettings) -> None:
        wanted = settings.config.load_failure_policy
        offers_loads = _recompute_failed_loads(self._flexkv_config, wanted)
        warn_of_keys(self._flexkv_config)
        for note in settings.notes:
            _log.warning("%s", note)
        if not self._forwards_reset:
            _log.warning(
                "FlexKVConnectorV1 does not pass on vLLM's reset of the connector's cache, so that "
                "after an update of the weights flexkv would serve the old ones' blocks; the class "
                "in flexkv.integration.vllm.connector does"
            )
        self._feed = feed_of(settings)
        self._service = EngineService(settings, self._feed.sinks)
        self._feed.attach(self._service.thread)
        self._scheduler = SchedulerRole(
            self._service, settings.block_size, offers_loads=offers_loads
        )

    def _reason_to_decline(self) -> str | None:
        """Why flexkv can't serve this model, as far as this role knows; the worker knows more."""
        return None

    def _metadata_of_step(self) -> FlexKVMetadata | None:
        """This step's metadata, which the built-in class keeps to itself."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: PLC0415  # a cycle

        metadata = get_kv_transfer_group()._get_connector_metadata()  # noqa: SLF001  # the only way
        for part in (metadata, *getattr(metadata, "metadata", ())):  # MultiConnector has several
            if isinstance(part, FlexKVMetadata):
                return part
        return None


def _recompute_failed_loads(vllm_config: Any, wanted: str) -> bool:
    """Have vLLM compute again what could not be loaded. False where flexkv must not load then."""
    transfer = vllm_config.kv_transfer_config
    parent = multi_connector_config()
    if parent is not None:
        if parent.kv_load_failure_policy == "recompute" or wanted == "fail":
            return True
        _log.warning(
            "flexkv loads nothing: a failed load would end its request, because vLLM reads the "
            "policy of the outer MultiConnector only; give kv_load_failure_policy: recompute "
            "beside kv_connector: MultiConnector in --kv-transfer-config"
        )
        return False
    if transfer.kv_load_failure_policy != wanted:
        transfer.kv_load_failure_policy = wanted  # vLLM reads it after this
        _log.info("kv_load_failure_policy is %s now (load_failure_policy of flexkv)", wanted)
    return True


def multi_connector_config() -> Any:
    """The transfer settings of the MultiConnector that is calling; None if none is.

    It hands its parts altered copies of vLLM's settings, and nothing that leads back to them.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # see above
    while frame is not None:
        caller = frame.f_locals.get("self", frame.f_locals.get("cls"))
        kind = caller if isinstance(caller, type) else type(caller)
        is_multi = any(base.__name__ == "MultiConnector" for base in kind.__mro__)
        if is_multi and "vllm_config" in frame.f_locals:
            return frame.f_locals["vllm_config"].kv_transfer_config
        frame = frame.f_back
    return None
