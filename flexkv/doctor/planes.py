"""Checks that the processes of a deployment speak over the same planes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv.doctor.findings import ok, problem, warning
from flexkv.launch.options import MAX_SYSTEM_PORT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flexkv.doctor.facts import Facts, Process, Worker
    from flexkv.doctor.findings import Finding

_PLANES = {
    "event plane": ("--event-plane", "DYN_EVENT_PLANE"),
    "request plane": ("--request-plane", "DYN_REQUEST_PLANE"),
    "discovery backend": ("--discovery-backend", "DYN_DISCOVERY_BACKEND"),
}
_DEFAULTS = {"event plane": "zmq", "request plane": "tcp", "discovery backend": "etcd"}


def check_planes(facts: Facts) -> Iterator[Finding]:
    """Every process of the deployment, as its command line and environment say."""
    parties = [one for one in facts.processes if one.role in {"frontend", "worker"}]
    if not parties:
        yield warning(
            "processes",
            "no Dynamo frontend or worker runs here",
            "start the deployment (flexkv launch), or name its folder with --folder",
        )
        return
    readable = [one for one in parties if one.env is not None]
    for process in parties:
        if process.env is None:
            yield warning(
                "processes",
                f"the environment of {process.name} can't be read",
                "run doctor as the user of the deployment",
            )
    yield from _event_plane(readable, facts.feed)
    yield from _request_plane(readable, facts.feed)
    yield from _backend(readable)
    for worker in facts.workers:
        yield from _unseen_options(worker)
    for process in readable:
        yield from _ports(process)


def plane(process: Process, which: str) -> str:
    """What a process speaks: the command line wins."""
    flag, variable = _PLANES[which]
    return process.option(flag) or process.variable(variable) or _DEFAULTS[which]


def _event_plane(parties: Sequence[Process], feed: str) -> Iterator[Finding]:
    wrong = [one for one in parties if plane(one, "event plane") != "nats"]
    if not parties or feed == "none":
        return
    if wrong:
        named = ", ".join(f"{one.name}: {plane(one, 'event plane')}" for one in wrong)
        yield problem(
            "event plane",
            f"not on NATS ({named}): what flexkv publishes there is heard by nobody, without an "
            "error",
            "set DYN_EVENT_PLANE=nats for every process (Dynamo's own default is zmq)",
        )
    else:
        yield ok("event plane", f"nats for all {len(parties)} processes")


def _request_plane(parties: Sequence[Process], feed: str) -> Iterator[Finding]:
    planes = {plane(one, "request plane") for one in parties}
    if len(planes) > 1:
        named = ", ".join(f"{one.name}: {plane(one, 'request plane')}" for one in parties)
        yield problem("request plane", f"differs: {named}", "set one DYN_REQUEST_PLANE for all")
    elif planes and planes != {"tcp"} and feed != "none":
        yield warning(
            "request plane",
            f"{planes.pop()}: routers can't ask for what they have missed, and one that starts "
            "late stays cold",
            "set DYN_REQUEST_PLANE=tcp for every process",
        )
    elif planes:
        yield ok("request plane", planes.pop())


def _backend(parties: Sequence[Process]) -> Iterator[Finding]:
    where = {one.pid: _discovery_of(one) for one in parties}
    if len(set(where.values())) > 1:
        named = ", ".join(f"{one.name}: {where[one.pid]}" for one in parties)
        yield problem(
            "discovery",
            f"the processes look for each other in different places ({named})",
            "set one DYN_DISCOVERY_BACKEND, and one DYN_FILE_KV or ETCD_ENDPOINTS, for all; where "
            "they are several deployments, name the folder of one with --folder",
        )


def _discovery_of(process: Process) -> str:
    backend = plane(process, "discovery backend")
    if backend == "etcd":
        return f"etcd {process.variable('ETCD_ENDPOINTS') or 'http://localhost:2379'}"
    if backend == "file":
        temporary = (process.variable("TMPDIR") or "/tmp").rstrip("/")  # noqa: S108  # as Dynamo
        return f"file {process.variable('DYN_FILE_KV') or f'{temporary}/dynamo_store_kv'}"
    return backend


def _unseen_options(worker: Worker) -> Iterator[Finding]:
    """flexkv, in a child of the worker, sees variables only: Dynamo does not export its options."""
    process, config = worker.process, worker.config
    if process.env is None or config is None or not config.enable_flexkv:
        return
    events = config.events
    is_on_nats = plane(process, "event plane") == "nats"
    if is_on_nats and events.event_plane != "nats" and events.sink == "auto":
        yield problem(
            "event plane",
            f"{process.name} has --event-plane nats on its command line alone, where flexkv "
            "inside it can't see it: no events are published",
            "set DYN_EVENT_PLANE=nats in its environment",
        )
    backend = plane(process, "discovery backend")
    if events.sink in {"auto", "nats"} and backend != events.discovery:
        yield problem(
            "discovery",
            f"{process.name} uses the discovery {backend}, flexkv inside it {events.discovery}",
            f"set DYN_DISCOVERY_BACKEND={backend} in its environment (dynamo.vllm's own default "
            "is etcd), or events.discovery",
        )


def _ports(process: Process) -> Iterator[Finding]:
    port = process.variable("DYN_SYSTEM_PORT") or ""
    if port.isdecimal() and int(port) > MAX_SYSTEM_PORT:
        yield problem(
            "system port",
            f"{process.name}: DYN_SYSTEM_PORT is {port}, and above {MAX_SYSTEM_PORT} Dynamo ends",
            "give it a smaller port",
        )
    if process.role == "frontend" and process.variable("DYN_TCP_RESPONSE_STREAM_HOST") is None:
        yield warning(
            "response host",
            f"{process.name} has no DYN_TCP_RESPONSE_STREAM_HOST: it listens at this machine's "
            "network address, and asks engines to answer there",
            "on one machine: DYN_TCP_RESPONSE_STREAM_HOST=127.0.0.1",
        )
