"""Shows how far a replay is: live on a terminal, as a line now and then elsewhere."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flexkv.replay.report import counts_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.console import Console

    from flexkv.replay.run import Replay
    from flexkv.replay.worker import SimulatedWorker

_LIVE_S = 0.25
_LINE_S = 5.0
_MIB = 1 << 20


@asynccontextmanager
async def shown(replay: Replay, console: Console) -> AsyncIterator[None]:
    """Show the replay on ``console`` as long as the body runs."""
    show = _show_live if console.is_terminal else _show_lines
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(show(replay, console, ended))
        try:
            yield
        finally:
            ended.set()


async def _show_live(replay: Replay, console: Console, ended: asyncio.Event) -> None:
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    task = bar.add_task(replay.workload.name, total=len(replay.workload.requests))
    # Redrawn by this coroutine alone: a thread of rich's would read the engines beside the loop.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not ended.is_set():
            bar.update(task, completed=replay.num_done)
            live.update(Group(bar, _workers_table(replay)), refresh=True)
            await _ended_within(ended, _LIVE_S)


async def _show_lines(replay: Replay, console: Console, ended: asyncio.Event) -> None:
    total = len(replay.workload.requests)
    while not await _ended_within(ended, _LINE_S):
        rates = ", ".join(
            f"{worker.name} {counts_of(worker).block_hit_rate:.1%}"
            for worker in replay.workers.values()
        )
        console.print(f"{replay.num_done} of {total} requests; hit rate: {rates}", highlight=False)


async def _ended_within(ended: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(ended.wait(), seconds)
    except TimeoutError:
        return False
    return True


def _workers_table(replay: Replay) -> Table:
    table = Table()
    for name in ("worker", "requests", "hit rate", "blocks per tier", "evicted", "events", "lanes"):
        table.add_column(name)
    for worker in replay.workers.values():
        table.add_row(*_worker_cells(worker))
    return table


def _worker_cells(worker: SimulatedWorker) -> list[str]:
    counts = counts_of(worker)
    stats = worker.engine.stats()
    tiers = ", ".join(
        f"{tier} {held.num_resident}/{held.num_slots}" for tier, held in stats.tiers.items()
    )
    lanes = ", ".join(f"{name} {nbytes / _MIB:.1f} MiB" for name, nbytes in stats.lanes.items())
    return [
        worker.name,
        str(counts.requests),
        f"{counts.block_hit_rate:.1%}",
        tiers,
        str(counts.evicted),
        str(stats.last_event_id),
        lanes,
    ]
