"""What the scheduler role tells the worker roles with every step. vLLM pickles it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata


@dataclass
class LoadJob:
    """A load that was promised to a request: these GPU blocks get its bytes."""

    job_id: int
    request_id: str
    block_ids: list[int]


@dataclass
class FlexKVMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not there for mypy
    """``step`` goes up by one with each. ``alive``: the engine's thread runs.

    ``loads`` and ``finishing`` are new with this step; the latter are requests that have ended and
    whose blocks vLLM keeps until every worker has reported them as sent.
    """

    step: int = 0
    loads: list[LoadJob] = field(default_factory=list)
    finishing: list[str] = field(default_factory=list)
    alive: bool = True
