"""Checks of how workers and frontends were started."""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Any

from flexkv.doctor.findings import ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.doctor.facts import Facts, Frontend, Listener, Process, Worker
    from flexkv.doctor.findings import Finding

_CONNECTORS = ("FlexKVConnectorV1", "FlexKVConnector", "MultiConnector")
_REPLACEMENT = '--kv-transfer-config \'{"kv_connector":"FlexKVConnectorV1","kv_role":"kv_both"}\''


def check_serving(facts: Facts) -> Iterator[Finding]:
    """Options of workers and frontends that would break something silently."""
    for worker in facts.workers:
        yield from _settings(worker)
        yield from _connector(worker.process)
        yield from _kv_events(worker, facts.feed)
        yield from _prefix_caching(worker.process)
        yield from _block_size(worker)
    for process in facts.processes:
        if process.role == "frontend":
            yield from _frontend(process, facts.feed)
    for frontend in facts.frontends:
        yield from _answers(frontend)


def check_orphans(facts: Facts) -> Iterator[Finding]:
    """Processes that a killed worker has left behind hold memory, GPU and ports."""
    orphans = [one for one in facts.processes if one.is_orphan]
    for one in orphans:
        level = warning if one.is_foreign else problem
        yield level(
            "orphans",
            f"process {one.pid} ({' '.join(one.command)[:40].strip()}) was left behind by a "
            "killed worker",
            f"kill {one.pid}" if one.has_leader else f"end its group: kill -- -{one.group}",
        )
    for text in facts.lost:
        yield problem("processes", text, "look at its log, and start it again")
    if not orphans and facts.workers:
        yield ok("orphans", "no process of a killed worker is left")


def check_listeners(facts: Facts) -> Iterator[Finding]:
    """Who can be reached from other machines, and does not ask who comes."""
    exposed = [one for one in facts.listeners if not _is_loopback(one.host)]
    greeting = facts.nats.greeting if facts.nats is not None else None
    for one in exposed:
        if one.process.role == "nats" and greeting is not None and greeting.get("auth_required"):
            continue
        host = f"[{one.host}]" if ":" in one.host else one.host
        yield warning(
            "listeners",
            f"{one.process.name} listens at {host}:{one.port}, for other machines, too, and "
            "lets everybody in",
            _closed(one),
        )
    if facts.listeners and not exposed:
        yield ok("listeners", f"all {len(facts.listeners)} sockets are on loopback")


def events_of(process: Process) -> dict[str, Any]:
    """What --kv-events-config says; empty where there is none or it is broken."""
    return _json_of(process, "--kv-events-config")


def has_flexkv(process: Process) -> bool:
    """Whether the worker was told to use flexkv."""
    return _json_of(process, "--kv-transfer-config").get("kv_connector") in _CONNECTORS


def publishes(process: Process) -> bool:
    """Whether vLLM's own KV events are on."""
    return bool(events_of(process).get("enable_kv_cache_events"))


def _json_of(process: Process, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(process.option(flag) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _settings(worker: Worker) -> Iterator[Finding]:
    name = worker.process.name
    if worker.error:
        yield problem("settings", f"{name}: {worker.error}", "correct the file, and start it again")
    elif worker.config is not None and not worker.config.enable_flexkv:
        yield warning("settings", f"{name}: enable_flexkv is false", "set it to true to use flexkv")
    elif worker.config is not None:
        yield ok("settings", f"{name}: read without an error")


def _connector(process: Process) -> Iterator[Finding]:
    asked = process.option("--connector") or process.variable("DYN_CONNECTOR") or ""
    if "flexkv" in asked.lower():
        yield problem(
            "connector",
            f"{process.name}: --connector flexkv (DYN_CONNECTOR) is gone in Dynamo 1.6.1",
            f"instead: {_REPLACEMENT}",
        )
    elif not has_flexkv(process):
        yield warning("connector", f"{process.name} does not use flexkv", f"add {_REPLACEMENT}")


def _kv_events(worker: Worker, feed: str) -> Iterator[Finding]:
    process, config = worker.process, worker.config
    if not publishes(process):
        if feed == "vllm":
            yield problem(
                "kv events",
                f"{process.name}: the feed is vLLM's stream, and vLLM's KV events are off",
                "give it --kv-events-config with enable_kv_cache_events true, and an ipc endpoint",
            )
        return
    endpoint = str(events_of(process).get("endpoint", "tcp://*:5557"))
    if feed == "nats" or (config is not None and config.events.sink == "nats"):
        yield problem(
            "kv events",
            f"{process.name}: vLLM's own KV events are on beside flexkv's source on NATS: Dynamo "
            "accepts one source for a worker and rank, and believes neither of two",
            "take --kv-events-config away, or set events.sink to vllm or auto",
        )
    if endpoint.startswith("tcp://"):
        yield from _tcp_events(process, endpoint)
    else:
        yield ok("kv events", f"{process.name}: vLLM's events at {endpoint}")


def _tcp_events(process: Process, endpoint: str) -> Iterator[Finding]:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    if host in {"*", "0.0.0.0", "[::]"}:  # noqa: S104  # what is warned of
        yield warning(
            "kv events",
            f"{process.name}: {endpoint} opens a port on every interface, without a password",
            "ipc:///PATH in one process; with data parallelism tcp://[::ffff:127.0.0.1]:PORT",
        )
    elif "::" not in host:  # vLLM binds *, :: and ipc, and connects to all others
        yield problem(
            "kv events",
            f"{process.name}: vLLM connects to {endpoint}, Dynamo does as well, and nobody binds: "
            "no event arrives, without an error",
            "use ipc:///PATH; with data parallelism tcp://[::ffff:127.0.0.1]:PORT",
        )
    else:
        yield ok("kv events", f"{process.name}: vLLM's events at {endpoint}")


def _prefix_caching(process: Process) -> Iterator[Finding]:
    if process.has_flag("--no-enable-prefix-caching"):
        yield problem(
            "prefix caching",
            f"{process.name}: --no-enable-prefix-caching leaves vLLM without block hashes: "
            "nothing is kept and nothing announced",
            "take the option away",
        )


def _block_size(worker: Worker) -> Iterator[Finding]:
    process, config = worker.process, worker.config
    asked = process.option("--block-size")
    if config is None or asked is None or "tokens_per_block" not in config.cache.model_fields_set:
        return
    if asked.isdecimal() and int(asked) != config.cache.tokens_per_block:
        yield problem(
            "block size",
            f"{process.name}: --block-size {asked}, but tokens_per_block is "
            f"{config.cache.tokens_per_block}",
            "leave tokens_per_block out: vLLM's is taken",
        )


def _frontend(process: Process, feed: str) -> Iterator[Finding]:
    limit = process.option("--migration-limit") or process.variable("DYN_MIGRATION_LIMIT") or "0"
    if limit == "0":
        yield warning(
            "migration",
            f"{process.name} has no --migration-limit: the requests of a worker that dies fail",
            "start the frontend (not the workers) with --migration-limit 3",
        )
    else:
        yield ok("migration", f"{process.name}: --migration-limit {limit}")
    mode = process.option("--router-mode") or process.variable("DYN_ROUTER_MODE") or "round-robin"
    if mode != "kv":
        yield warning(
            "router",
            f"{process.name} routes {mode}: no event counts",
            "start it with --router-mode kv",
        )
        return
    if process.has_flag("--no-router-kv-events"):
        yield problem(
            "router",
            f"{process.name}: --no-router-kv-events: the router guesses, and hears no event",
            "take the option away",
        )
    if feed == "nats":
        yield _host_weight(process)


def _host_weight(process: Process) -> Finding:
    weight = (
        process.option("--router-host-cache-hit-weight")
        or process.variable("DYN_ROUTER_HOST_CACHE_HIT_WEIGHT")
        or "0.75"
    )
    try:
        is_full = float(weight) >= 1
    except ValueError:
        is_full = False
    if is_full:
        return ok("host weight", f"{process.name}: --router-host-cache-hit-weight {weight}")
    return warning(
        "host weight",
        f"{process.name} counts a block in host memory as {weight} of one: with flexkv as the only "
        "source it stands for the GPU's copy, too",
        "start the frontend with --router-host-cache-hit-weight 1.0",
    )


def _answers(frontend: Frontend) -> Iterator[Finding]:
    if frontend.error:
        yield problem(
            "frontend",
            f"{frontend.url} does not answer ({frontend.error})",
            "wait until it is up, or look at its log",
        )
    else:
        yield ok("frontend", f"{frontend.url} answers")


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _closed(one: Listener) -> str:
    remedies = {
        "nats": "on one machine: nats-server -a 127.0.0.1; else give it users (authorization) or "
        "TLS",
        "frontend": "on one machine: --http-host 127.0.0.1 and "
        "DYN_TCP_RESPONSE_STREAM_HOST=127.0.0.1; else put something before it that asks",
        "etcd": "on one machine: --listen-client-urls http://127.0.0.1:PORT",
    }
    return remedies.get(
        one.process.role,
        "on one machine: DYN_TCP_RPC_HOST, DYN_SYSTEM_HOST and VLLM_HOST_IP=127.0.0.1, and an ipc "
        "endpoint in --kv-events-config",
    )
