"""The command line: launch a deployment, verify it, replay a trace, or see the demo."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexkv._version import __version__
from flexkv.errors import ConfigError, FlexKVError, InputError, LayoutError
from flexkv.launch import command as launching

if TYPE_CHECKING:
    from flexkv.replay.report import Report
    from flexkv.replay.stage import Settings
    from flexkv.replay.workload import Workload

_BAD_USAGE = (ConfigError, InputError, LayoutError)
_NUM_DEMO_REQUESTS = 1500

app = typer.Typer(
    help="Keeps the KV cache of LLM servers alive beyond the GPU, and tells routers the truth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors as plain lines, whole in a log
)

app.command(help=launching.HELP)(launching.launch)

_Workers = Annotated[int, typer.Option(min=1, max=64, help="Simulated workers.")]
_Deployment = Annotated[
    Path | None,
    typer.Option(help="Of flexkv launch. [default: ./flexkv-deployment, if it has a deployment]"),
]
_Capacity = Annotated[
    int | None,
    typer.Option(min=1, help="Host blocks per worker. [default: few enough to evict most blocks]"),
]
_SsdBlocks = Annotated[
    int, typer.Option("--ssd-blocks", min=0, help="SSD blocks per worker; 0: no SSD tier.")
]
_Restart = Annotated[
    bool, typer.Option("--restart", help="Close the engines half-way, and start them again.")
]
_Speed = Annotated[
    float | None,
    typer.Option(min=1e-6, help="Send requests this many times as fast as they came."),
]
_Fast = Annotated[
    bool, typer.Option("--as-fast-as-possible", help="Send requests at once. [the default]")
]
_InFlight = Annotated[int, typer.Option(min=1, max=1024, help="Requests at once per worker.")]
_BlockBytes = Annotated[int, typer.Option(min=1, help="Bytes of one block.")]
_EvictRatio = Annotated[float, typer.Option(help="Share of the tier freed at least.")]
_Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of tokens, workload and sample.")]
_Chains = Annotated[int, typer.Option(min=1, help="Chains of each kind to check at the end.")]
_Nats = Annotated[
    str | None, typer.Option("--nats", metavar="URL", help="Server. [default: an own one]")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _version(*, wanted: bool) -> None:
    if wanted:
        print(f"flexkv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version  # its callback has answered


@app.command()
def replay(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE.jsonl", help="One JSON object a line, in the Mooncake format."
        ),
    ],
    *,
    workers: _Workers = 2,
    capacity: _Capacity = None,
    ssd_blocks: _SsdBlocks = 0,
    restart: _Restart = False,
    speed: _Speed = None,
    as_fast_as_possible: _Fast = False,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first ones.")] = None,
    in_flight: _InFlight = 4,
    block_bytes: _BlockBytes = 16384,
    evict_ratio: _EvictRatio = 0.05,
    seed: _Seed = 0,
    chains: _Chains = 200,
    nats: _Nats = None,
    as_json: _Json = False,
) -> None:
    """Replay TRACE through engines behind Dynamo's real router; check bytes and beliefs."""
    from flexkv.replay.run import Pace  # noqa: PLC0415  # for this command alone
    from flexkv.replay.stage import Settings  # noqa: PLC0415  # as above
    from flexkv.replay.trace import read_trace  # noqa: PLC0415  # as above

    if speed is not None and as_fast_as_possible:
        raise typer.BadParameter("--speed and --as-fast-as-possible exclude each other")
    workload = read_trace(trace, requests)
    settings = Settings(
        num_workers=workers,
        capacity=capacity,
        num_ssd_blocks=ssd_blocks,
        restarts=restart,
        block_nbytes=block_bytes,
        evict_ratio=evict_ratio,
        seed=seed,
        pace=Pace(speed=speed, max_requests=in_flight),
        num_chains=chains,
        nats_url=nats,
    )
    report = _run(workload, settings, as_json=as_json)
    raise typer.Exit(0 if report.holds else 1)


@app.command()
def demo(
    *,
    requests: Annotated[int, typer.Option(min=1)] = _NUM_DEMO_REQUESTS,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Show it on made-up conversations: two workers, Dynamo's router, an own NATS server."""
    from flexkv.replay.stage import Settings  # noqa: PLC0415  # for this command alone
    from flexkv.replay.workload import conversations  # noqa: PLC0415  # as above

    workload = conversations(requests, seed=seed)
    report = _run(workload, Settings(seed=seed), as_json=as_json)
    shows = report.counts.hit_blocks > 0 and report.counts.evicted > 0
    if not shows:
        print("the workload was too small to show hits and evictions", file=sys.stderr)
    raise typer.Exit(0 if report.holds and shows else 1)


@app.command()
def verify(
    *,
    folder: _Deployment = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings. [default: as the engine finds them]")
    ] = None,
    settle: Annotated[float, typer.Option(min=0, help="Seconds the router has to agree.")] = 5.0,
    as_json: _Json = False,
) -> None:
    """Compare a live Dynamo router with the engines it routes to; print what differs."""
    from flexkv.doctor.gather.deployment import settings_of  # noqa: PLC0415  # for this command alone
    from flexkv.replay import verify as checks  # noqa: PLC0415  # as above

    events, tokens_per_block = settings_of(folder, config)
    work = checks.verify(events, tokens_per_block, settle_timeout_s=settle)
    comparisons = asyncio.run(work)
    print(checks.printed(comparisons, as_json=as_json))
    raise typer.Exit(0 if all(comparison.agrees for comparison in comparisons) else 1)


@app.command()
def doctor(
    *,
    folder: _Deployment = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings. [default: as the engine finds them]")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Check an installation and a running deployment; say what to do about each finding."""
    from flexkv.doctor import examine, findings  # noqa: PLC0415  # for this command alone

    found = asyncio.run(examine.examine(folder, config))
    print(findings.printed(found, as_json=as_json))
    raise typer.Exit(0 if findings.holds(found) else 1)


def _run(workload: Workload, settings: Settings, *, as_json: bool) -> Report:
    from rich.console import Console  # noqa: PLC0415  # as above

    from flexkv.replay import report as texts  # noqa: PLC0415  # as above
    from flexkv.replay import stage  # noqa: PLC0415  # as above

    # Lines instead of a live view where the output is for a program.
    progress = Console(stderr=True, force_terminal=False if as_json else None)
    report = asyncio.run(stage.replay(workload, settings, progress))
    if as_json:
        print(json.dumps(report.document(), indent=2))
        return report
    Console().print(texts.table_of(report))
    for line in texts.sentences_of(report):
        print(line)
    return report


def main() -> None:
    """Run the command. Exit 0: what was asked for holds; 1: it does not; 2: bad usage."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    errors: list[FlexKVError] = []
    try:
        app(prog_name="flexkv")
    except* FlexKVError as group:
        errors = _leaves(group)
    for error in errors:
        print(f"flexkv: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(errors[0], _BAD_USAGE) else 1)


def _leaves(group: BaseExceptionGroup[FlexKVError]) -> list[FlexKVError]:
    leaves: list[FlexKVError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
