"""What a deployment is asked to be, and what its machine has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MAX_SYSTEM_PORT = 32767
"""Dynamo reads DYN_SYSTEM_PORT as a signed number of 16 bits."""

Feed = Literal["nats", "vllm", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line said. ``folder`` is absolute; ``template``: flexkv's settings."""

    model: str
    folder: Path
    python: str
    served_model_name: str | None = None
    num_workers: int = 2
    gpus_per_worker: int = 1
    first_gpu: int = 0
    template: Mapping[Any, object] = field(default_factory=dict)
    host: str | None = None
    http_port: int = 8000
    system_port: int = 8081
    block_size: int | None = None
    nats_url: str | None = None
    etcd_url: str | None = None
    with_etcd: bool = False
    gpu_events: bool = False
    own_connector: bool = False
    without_flexkv: bool = False
    router_mode: Literal["kv", "round-robin"] = "kv"
    data_parallel_size: int = 1
    listen_all: bool = False
    migration_limit: int = 3
    restarts: bool = True
    ready_timeout_s: float = 600.0
    extra: tuple[str, ...] = ()

    @property
    def feed(self) -> Feed:
        """Whose events reach the router."""
        if self.gpu_events:
            return "vllm"
        return "none" if self.without_flexkv else "nats"

    @property
    def model_name(self) -> str:
        """The name in requests."""
        return self.served_model_name or self.model

    @property
    def listen_host(self) -> str:
        """Where what this deployment starts listens."""
        return "0.0.0.0" if self.listen_all else "127.0.0.1"  # noqa: S104  # asked for

    @property
    def http_host(self) -> str:
        """Where the frontend listens."""
        return self.host or self.listen_host


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the plan has to know of the machine.

    ``free_port(preferred, width)``: the first of ``width`` free ports in a row, given out once.
    ``model``: the model's config.json; empty if it is not here. ``num_gpus``: None: unknown.
    """

    env: Mapping[str, str]
    num_cpus: int
    free_port: Callable[[int | None, int], int]
    programs: Mapping[str, str] = field(default_factory=dict)
    num_gpus: int | None = None
    available_bytes: Mapping[str, int] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)
