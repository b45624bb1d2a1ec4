"""Arguments and variables of the frontend and the workers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flexkv.launch.arguments import values_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexkv.launch.options import Machine, Options

SHUTDOWN_TIMEOUT_S = 20
"""How long vLLM lets its engine withdraw flexkv's record; without it, it is killed at once."""

# How much of a block's worth the router sees in one that host memory or SSD holds. Where flexkv is
# the source, host residency stands for the GPU's copies too.
_WEIGHTS = {"nats": ("1.0", "0.75"), "vllm": ("0.75", "0.5"), "none": ("0.75", "0.5")}
_WEIGHT_OPTIONS = (
    ("--router-host-cache-hit-weight", "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT"),
    ("--router-disk-cache-hit-weight", "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT"),
)
_LOOPBACK = (
    "DYN_TCP_RPC_HOST",
    "DYN_TCP_RESPONSE_STREAM_HOST",
    "DYN_EVENT_PLANE_HOST",
    "DYN_SYSTEM_HOST",
    "VLLM_HOST_IP",
)
_GRACE = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"  # served on after leaving discovery; Dynamo: 5
_LOG = "info,dynamo_llm::http::service::service_v2=warn"  # no line for each answer that is right
_PARALLEL = {"--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"}


def variables_of(
    options: Options, env: Mapping[str, str], nats_url: str, etcd_url: str | None
) -> dict[str, str]:
    """What every process of the deployment has."""
    variables = {
        "NATS_SERVER": nats_url,
        "DYN_EVENT_PLANE": "nats",
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_LOG": env.get("DYN_LOG") or _LOG,
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        _GRACE: env.get(_GRACE) or "1",
    }
    if etcd_url:
        variables |= {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd_url}
    else:
        folder = str(options.folder / "discovery")
        variables |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": folder}
    if not options.listen_all:
        variables |= dict.fromkeys(_LOOPBACK, "127.0.0.1")
    return variables


def frontend_arguments(options: Options, env: Mapping[str, str]) -> list[str]:
    """Of dynamo.frontend."""
    arguments = [
        *("--router-mode", options.router_mode),
        *("--http-host", options.http_host, "--http-port", str(options.http_port)),
        *("--migration-limit", str(options.migration_limit)),
        *planes_of(options),
    ]
    if options.router_mode != "kv":
        return arguments
    if options.feed == "none":
        return [*arguments, "--no-router-kv-events"]  # nobody tells it: it has to guess
    for (option, variable), weight in zip(_WEIGHT_OPTIONS, _WEIGHTS[options.feed], strict=True):
        arguments += [option, env.get(variable) or weight]
    return arguments


def worker_arguments(options: Options, block_size: int, events: str | None) -> list[str]:
    """Of dynamo.vllm; ``events``: where vLLM's own KV events are published."""
    given = values_of(options.extra)
    arguments = ["--model", options.model, "--served-model-name", options.model_name]
    arguments += planes_of(options)
    arguments += ["--block-size", str(block_size), "--enable-prefix-caching"]
    arguments += ["--kv-events-config", json.dumps(_events_config(events))]
    if not options.without_flexkv:
        arguments += ["--kv-transfer-config", json.dumps(_connector(options))]
    if "--shutdown-timeout" not in given:
        arguments += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)]
    num_ranks = options.gpus_per_worker // options.data_parallel_size
    if num_ranks > 1 and not _PARALLEL & given.keys():
        arguments += ["--tensor-parallel-size", str(num_ranks)]
    if options.data_parallel_size > 1:
        arguments += ["--data-parallel-size", str(options.data_parallel_size)]
    return [*arguments, *options.extra]


def worker_variables(options: Options, machine: Machine, index: int) -> dict[str, str]:
    """Which GPUs, or how much of the CPU, one worker has; what the user has set stays."""
    if options.gpus_per_worker:
        visible = machine.env.get("CUDA_VISIBLE_DEVICES")
        first = options.first_gpu + index * options.gpus_per_worker
        last = first + options.gpus_per_worker
        devices = visible.split(",") if visible else [str(number) for number in range(last)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices[first:last])}
    threads = max(1, machine.num_cpus // (options.num_workers * options.data_parallel_size))
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }
    return {name: machine.env.get(name) or value for name, value in defaults.items()}


def planes_of(options: Options) -> list[str]:
    """Said to each process, so that none falls back on Dynamo's own defaults."""
    backend = "etcd" if options.with_etcd or options.etcd_url else "file"
    return ["--discovery-backend", backend, "--event-plane", "nats", "--request-plane", "tcp"]


def _events_config(endpoint: str | None) -> dict[str, object]:
    if endpoint is None:
        return {"enable_kv_cache_events": False}
    return {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}


def _connector(options: Options) -> dict[str, str]:
    if not options.own_connector:
        return {"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"}
    return {
        "kv_connector": "FlexKVConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "flexkv.integration.vllm.connector",
    }
