"""What a replay found out: the final document, and the table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flexkv.blocks import Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flexkv.replay.check import Verdict
    from flexkv.replay.run import Replay
    from flexkv.replay.worker import SimulatedWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Requests, and blocks; ``block_hit_rate`` is hit_blocks / blocks, 0 where there are none."""

    requests: int
    blocks: int
    hit_blocks: int
    block_hit_rate: float
    missing: int
    stored: int
    evicted: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """One worker. ``wrong_bytes`` are out of ``checked_bytes`` that were loaded."""

    worker: str
    counts: Counts
    capacity: int
    resident: int
    checked_bytes: int
    wrong_bytes: int
    divergences: int
    differing_blocks: int

    @property
    def agrees(self) -> bool:
        """Whether the router believes what this worker's engine holds."""
        return self.divergences == self.differing_blocks == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The whole replay. Counts end with the last request of the workload; checks come after.

    ``back_after_restart``: blocks on SSD, where the engines were restarted in the middle.
    """

    workload: str
    requests: int
    tokens_per_block: int
    block_nbytes: int
    seed: int
    counts: Counts
    workers: Sequence[WorkerReport]
    checked_bytes: int
    wrong_bytes: int
    common_blocks: int
    chains_wanted: int
    chains_checked: Mapping[str, int]
    heads_served_again: int
    back_after_restart: int
    divergences: int
    differing_blocks: int
    seconds: float
    settle_seconds: float

    @property
    def holds(self) -> bool:
        """Whether no loaded byte was wrong and the router believes the truth."""
        return self.wrong_bytes == 0 and self.agrees

    @property
    def agrees(self) -> bool:
        """Whether the router believes what each worker's engine holds."""
        return all(row.agrees for row in self.workers)

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints: the counts lie flat beside the rest."""
        flat = asdict(self)
        flat |= {**flat.pop("counts"), "requests": self.requests}
        flat["workers"] = [{**row.pop("counts"), **row} for row in flat["workers"]]
        return flat | {"agrees": self.agrees, "holds": self.holds}


def counts_of(worker: SimulatedWorker) -> Counts:
    """What a worker has done so far."""
    tally = worker.tally
    host = worker.engine.stats().tiers[Tier.HOST]
    return Counts(
        requests=tally.num_requests,
        blocks=tally.num_blocks,
        hit_blocks=tally.num_hit,
        block_hit_rate=_rate(tally.num_hit, tally.num_blocks),
        missing=tally.num_missing,
        stored=tally.num_stored + host.num_stored,
        evicted=tally.num_evicted + host.num_evicted,
        dropped=tally.num_dropped,
    )


def report_of(
    replay: Replay,
    counts: Mapping[int, Counts],
    verdict: Verdict,
    *,
    block_nbytes: int,
    seed: int,
    num_chains: int,
    seconds: float,
) -> Report:
    """Put together what was counted (per worker id) and checked."""
    rows = [
        _worker_report(worker, counts[wid], verdict.divergences[wid], verdict.differing_blocks[wid])
        for wid, worker in replay.workers.items()
    ]
    return Report(
        workload=replay.workload.name,
        requests=replay.num_done,
        tokens_per_block=replay.workload.tokens_per_block,
        block_nbytes=block_nbytes,
        seed=seed,
        counts=_summed(counts.values()),
        workers=rows,
        checked_bytes=sum(row.checked_bytes for row in rows),
        wrong_bytes=sum(row.wrong_bytes for row in rows),
        common_blocks=replay.workload.num_common,
        chains_wanted=num_chains,
        chains_checked={str(kind): n for kind, n in verdict.num_checked.items()},
        heads_served_again=verdict.num_heads,
        back_after_restart=sum(worker.tally.num_back for worker in replay.workers.values()),
        divergences=sum(row.divergences for row in rows),
        differing_blocks=sum(row.differing_blocks for row in rows),
        seconds=round(seconds, 3),
        settle_seconds=round(verdict.seconds, 3),
    )


def table_of(report: Report) -> Table:
    """One row a worker, and one for all."""
    title = f"{report.workload}: {report.requests} requests, {report.seconds:.1f} s"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("worker")
    for name in ("requests", "blocks", "hits", "stored", "evicted", "resident"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.workers:
        resident = f"{row.resident}/{row.capacity}"
        table.add_row(row.worker, *_cells(row.counts, resident))
    table.add_section()
    resident = str(sum(row.resident for row in report.workers))
    cells = _cells(report.counts, resident)
    table.add_row("all", *cells)
    return table


def sentences_of(report: Report) -> list[str]:
    """What was checked, and per worker whether router and engine agree: the last lines."""
    checked = report.chains_checked
    kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in checked.items())
    lines = [f"{report.checked_bytes} loaded bytes compared, {report.wrong_bytes} wrong"]
    num_resident = sum(row.resident for row in report.workers)
    lines.append(f"checked against the router: {kinds} chains; all {num_resident} resident blocks")
    if report.heads_served_again:
        lines.append(f"heads of evicted chains served again for it: {report.heads_served_again}")
    if report.back_after_restart:
        lines.append(f"restarted in the middle: {report.back_after_restart} blocks back on SSD")
    lines += [
        f"only {n} chains were {kind.replace('_', ' ')}: {report.chains_wanted} were wanted"
        for kind, n in checked.items()
        if n < report.chains_wanted
    ]
    for row in report.workers:
        says = "router == residency"
        if not row.agrees:
            says = (
                f"router != residency: {row.divergences} chains and "
                f"{row.differing_blocks} blocks of the whole index differ"
            )
        lines.append(f"worker {row.worker}: {says}")
    return lines


def _worker_report(
    worker: SimulatedWorker, counts: Counts, divergences: int, differing_blocks: int
) -> WorkerReport:
    host = worker.engine.stats().tiers[Tier.HOST]
    return WorkerReport(
        worker=worker.name,
        counts=counts,
        capacity=host.num_slots,
        resident=host.num_resident,
        checked_bytes=worker.tally.num_checked_bytes,
        wrong_bytes=worker.tally.num_wrong_bytes,
        divergences=divergences,
        differing_blocks=differing_blocks,
    )


def _summed(counts: Iterable[Counts]) -> Counts:
    total = {name: 0 for name in Counts.__dataclass_fields__ if name != "block_hit_rate"}
    for row in counts:
        for name in total:
            total[name] += getattr(row, name)
    return Counts(**total, block_hit_rate=_rate(total["hit_blocks"], total["blocks"]))


def _rate(num_hit: int, num_blocks: int) -> float:
    return round(num_hit / num_blocks, 4) if num_blocks else 0.0


def _cells(counts: Counts, resident: str) -> list[str]:
    hits = f"{counts.block_hit_rate:.1%}"
    numbers = (counts.requests, counts.blocks, hits, counts.stored, counts.evicted)
    return [str(cell) for cell in (*numbers, resident)]
