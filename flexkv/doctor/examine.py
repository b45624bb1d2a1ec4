"""Looks at everything, side by side and each for a limited time, and lets the checks judge."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flexkv.doctor.facts import Facts, Machine, Nats
from flexkv.doctor.gather import engines, limits, logs, network, packages, records
from flexkv.doctor.gather.deadlines import within
from flexkv.doctor.gather.deployment import (
    deployment_in,
    settings_in,
    shared_variables,
    worker_of,
)
from flexkv.doctor.gather.processes import output_of, processes
from flexkv.doctor.index import check_index, check_logs, check_nats
from flexkv.doctor.installation import check_installation
from flexkv.doctor.machine import check_machine, check_settings
from flexkv.doctor.planes import check_planes
from flexkv.doctor.registry import (
    card_of,
    check_discovery,
    check_endpoints,
    recovery_address,
    sources,
)
from flexkv.doctor.serving import (
    check_listeners,
    check_orphans,
    check_serving,
    has_flexkv,
    publishes,
)
from flexkv.errors import ConfigError
from flexkv.link.endpoint import with_dp_rank
from flexkv.link.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flexkv.config import Config, EventsConfig
    from flexkv.doctor.facts import Discovery, Endpoint, Frontend, Process, Record, Worker
    from flexkv.doctor.findings import Finding
    from flexkv.doctor.gather.deployment import Deployment

_LOOK_S = 5.0
_ALL_S = 18.0  # with what engines and a router answer, which comes last

_T = TypeVar("_T")


class _Looking:
    """Looks for a limited time each; ``unfinished`` names what took longer."""

    def __init__(self) -> None:
        self.unfinished: list[str] = []

    async def at(self, name: str, step: Callable[[], _T]) -> _T | None:
        found = await within(_LOOK_S, step)
        if found is None:
            self.unfinished.append(name)
        return found


@dataclass(frozen=True, slots=True)
class _Scene:
    """What is examined: a deployment that is written down, or all that runs here."""

    deployment: Deployment | None
    processes: Sequence[Process]
    workers: Sequence[Worker]
    config: Config | None
    config_error: str


async def examine(
    folder: Path | None, config: Path | None, env: Mapping[str, str] = os.environ
) -> list[Finding]:
    """Every finding, within about 20 s.

    Raises:
        ConfigError: ``folder`` has no deployment, or there is no file ``config``.
    """
    facts = await gathered(_scene(folder, config, env))
    return list(judged(facts))


def judged(facts: Facts) -> Iterator[Finding]:
    """What the checks say of ``facts``."""
    for installation in facts.installations:
        yield from check_installation(installation)
    yield from check_settings(facts)
    yield from check_machine(facts)
    yield from check_planes(facts)
    yield from check_serving(facts)
    yield from check_orphans(facts)
    yield from check_listeners(facts)
    yield from check_endpoints(facts.endpoints)
    yield from check_nats(facts.nats)
    yield from check_discovery(facts)
    yield from check_index(facts)
    yield from check_logs(facts)


async def gathered(scene: _Scene) -> Facts:
    """Look at everything."""
    look = _Looking()
    configs = [one.config for one in scene.workers if one.config is not None]
    configs = configs or ([scene.config] if scene.config is not None else [])
    async with asyncio.TaskGroup() as tasks:
        installed = tasks.create_task(
            look.at("packages", lambda: packages.installations(scene.processes))
        )
        machine = tasks.create_task(look.at("disks", lambda: limits.machine(configs, _home(scene))))
        sockets = tasks.create_task(look.at("sockets", lambda: network.listeners(_members(scene))))
        lines = tasks.create_task(look.at("logs", lambda: logs.known_lines(_logs(scene))))
        fronts = tasks.create_task(look.at("frontends", lambda: _frontends(scene)))
        owners = tasks.create_task(look.at("endpoints", lambda: list(_endpoints(scene))))
        remote = tasks.create_task(_remote(scene, look))
    pool = logs.pool_nbytes(lines.result() or []) or max(
        (config.cache.cpu_cache_bytes or 0 for config in configs), default=0
    )
    return replace(
        remote.result(),
        installations=installed.result() or [],
        config=scene.config,
        config_error=scene.config_error,
        state=scene.deployment.state if scene.deployment is not None else "",
        starting=scene.deployment.starting if scene.deployment is not None else {},
        processes=scene.processes,
        lost=scene.deployment.lost if scene.deployment is not None else (),
        workers=scene.workers,
        listeners=sockets.result() or [],
        endpoints=owners.result() or [],
        frontends=fronts.result() or [],
        machine=machine.result() or Machine(),
        pool_nbytes=pool or None,
        log_lines=lines.result() or [],
        unfinished=[*look.unfinished, *remote.result().unfinished],
    )


async def _remote(scene: _Scene, look: _Looking) -> Facts:
    """NATS, discovery and the engines, as far as the settings say where they are."""
    deadline_s = asyncio.get_running_loop().time() + _ALL_S
    feed = _feed(scene)
    if scene.config is None:
        return Facts(feed=feed)
    events = scene.config.events
    discovery = await look.at("discovery", lambda: records.discovery(events))
    facts = Facts(feed=feed, discovery=discovery)
    if feed == "none":
        return facts
    greeted = await look.at("nats", lambda: network.nats(events.nats_servers))
    silent = Nats(servers=", ".join(events.nats_servers), error=f"nothing in {_LOOK_S} s")
    facts = replace(facts, nats=greeted or silent)
    if discovery is not None:
        facts = replace(facts, recovery=await _unreachable(discovery))
    if greeted is None or greeted.greeting is None or discovery is None:
        return facts
    return await _engines(facts, discovery, events, deadline_s)


async def _engines(
    facts: Facts, discovery: Discovery, events: EventsConfig, deadline_s: float
) -> Facts:
    assert facts.nats is not None
    ours = [
        source
        for source in sources(discovery)
        if "flexkv_owner" in source.record.content["metadata"] and _is_alive(source.record)
    ]
    sizes = {card_of(card).get("kv_cache_block_size") for card in discovery.cards}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    settings = events.model_copy(update={"connect_timeout_s": min(_LOOK_S, 3.0)})
    try:
        async with asyncio.timeout_at(deadline_s):
            asked = await engines.asked(settings, ours, size)
    except TimeoutError:
        return replace(facts, unfinished=("engines",))
    return replace(facts, nats=replace(facts.nats, error=asked.error), answers=asked.answers)


async def _unreachable(discovery: Discovery) -> dict[str, str]:
    """The recovery servers that nobody can connect to."""
    places = {
        place
        for source in sources(discovery)
        if _is_alive(source.record) and (place := recovery_address(source)) is not None
    }
    refusals = await asyncio.gather(
        *(within(_LOOK_S, partial(network.refusal, place)) for place in places)
    )
    return {
        place: "no answer" if refusal is None else refusal
        for place, refusal in zip(places, refusals, strict=True)
        if refusal != ""
    }


def _is_alive(record: Record) -> bool:
    return record.age_s < _LOOK_S * 2 and not record.owner_is_gone


def _scene(folder: Path | None, config: Path | None, env: Mapping[str, str]) -> _Scene:
    if config is not None and not config.is_file():
        raise ConfigError(f"--config: there is no file {config}")
    deployment = deployment_in(folder)
    found = processes(deployment.pids if deployment is not None else None)
    if deployment is not None:
        ids = deployment.worker_ids
        found = [replace(p, worker_id=p.worker_id or ids.get(p.pid)) for p in found]
    env = _shared(deployment, found) | dict(env)
    workers = [worker_of(process) for process in found if process.role == "worker"]
    try:
        return _Scene(deployment, found, workers, settings_in(deployment, config, env), "")
    except ConfigError as error:
        return _Scene(deployment, found, workers, None, str(error))


def _shared(deployment: Deployment | None, found: Sequence[Process]) -> dict[str, str]:
    """Where nothing is written down: what a process that runs here was told."""
    told = [one for one in found if one.role in {"worker", "frontend"} and one.env]
    return shared_variables(told[0]) if deployment is None and told else {}


def _feed(scene: _Scene) -> str:
    """Who tells the router of the blocks."""
    if scene.deployment is not None and scene.deployment.feed:
        return scene.deployment.feed
    for worker in scene.workers:
        if worker.config is not None and has_flexkv(worker.process):
            sink = worker.config.events.sink
            if sink == "auto":
                return "vllm" if publishes(worker.process) else "nats"
            return sink
    if scene.config is None:
        return ""
    return scene.config.events.effective_sink() if not scene.workers else ""


def _members(scene: _Scene) -> list[Process]:
    return [one for one in scene.processes if one.role != "engine"]


def _home(scene: _Scene) -> str:
    for process in scene.processes:
        if process.role == "frontend" and (home := process.variable("HOME")):
            return home
    return str(Path.home())


def _logs(scene: _Scene) -> list[str]:
    written = list(scene.deployment.logs) if scene.deployment is not None else []
    outputs = [output_of(process.pid) for process in _members(scene)]
    return written + [path for path in outputs if path is not None]


def _frontends(scene: _Scene) -> list[Frontend]:
    found = [one for one in scene.processes if one.role == "frontend"]
    if scene.deployment is not None and scene.deployment.http:
        return [network.frontend(scene.deployment.http, next(iter(found), None))]
    return [network.frontend(network.url_of(process), process) for process in found]


def _endpoints(scene: _Scene) -> Iterator[Endpoint]:
    for worker in scene.workers:
        process = worker.process
        where = worker.config.server_recv_port if worker.config is not None else None
        if scene.deployment is not None:
            where = where or scene.deployment.endpoints.get(process.pid)
        if where is None or not has_flexkv(process):
            continue
        size = process.option("--data-parallel-size") or "1"
        ranks = range(int(size)) if size.isdecimal() and int(size) > 1 else [None]
        for rank in ranks:
            try:
                own = where if rank is None else with_dp_rank(where, rank)
            except LinkError:
                continue
            starting = scene.deployment.starting if scene.deployment is not None else {}
            is_expected = process.pid not in starting
            yield records.endpoint(own, process.name, process.family, is_expected=is_expected)
