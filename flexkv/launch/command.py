"""``flexkv launch``: its options, and what is done with them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from flexkv.launch.options import Options
    from flexkv.launch.plan import Plan


def launch(
    extra: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGUMENTS FOR vLLM]", help="Handed to every worker."),
    ] = None,
    *,
    model: Annotated[
        str, typer.Option(metavar="PATH_OR_NAME", help="A folder, or a name on the model hub.")
    ],
    served_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name in requests. [default: --model]"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="vLLM workers.")] = 2,
    gpus_per_worker: Annotated[
        int, typer.Option(min=0, max=64, help="0: a CPU build of vLLM. More: tensor parallel.")
    ] = 1,
    first_gpu: Annotated[
        int,
        typer.Option(min=0, help="The first worker's first GPU (of CUDA_VISIBLE_DEVICES, if set)."),
    ] = 0,
    folder: Annotated[
        Path, typer.Option(help="Settings, logs, sockets, discovery; deployment.json says all.")
    ] = Path("flexkv-deployment"),
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="TEMPLATE",
            envvar="FLEXKV_CONFIG_PATH",
            help="flexkv's settings (JSON, YAML) for every worker; {worker} stands for its number.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where the frontend listens. [default: 127.0.0.1]")
    ] = None,
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Of the frontend.")] = 8000,
    system_port: Annotated[
        int,
        typer.Option(
            metavar="BASE",
            min=1,
            max=65535,
            help="Health and metrics: worker i has BASE + i, at most 32767.",
        ),
    ] = 8081,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65536,
            help="Tokens of a block, for vLLM, flexkv and the router. [default: the template's "
            "tokens_per_block, else 64]",
        ),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="INTERPRETER", help="Where Dynamo, vLLM and flexkv are.")
    ] = sys.executable,
    nats: Annotated[
        str | None, typer.Option(metavar="URL", help="Reuse this server. [default: an own one]")
    ] = None,
    etcd: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Discovery in this etcd. [default: in files below the folder]"
        ),
    ] = None,
    with_etcd: Annotated[
        bool, typer.Option("--with-etcd", help="Discovery in an etcd that is started.")
    ] = False,
    gpu_events: Annotated[
        bool,
        typer.Option(
            "--gpu-events",
            help="vLLM's own KV events on, flexkv joins their stream: GPU, host and SSD in the "
            "router's index. Without: flexkv is the source, for host and SSD.",
        ),
    ] = False,
    own_connector: Annotated[
        bool,
        typer.Option("--own-connector", help="flexkv's connector class instead of vLLM's own."),
    ] = False,
    without_flexkv: Annotated[
        bool, typer.Option("--without-flexkv", help="The same without flexkv, to compare.")
    ] = False,
    router_mode: Annotated[
        Literal["kv", "round-robin"], typer.Option(help="How the frontend chooses a worker.")
    ] = "kv",
    data_parallel_size: Annotated[
        int, typer.Option(min=1, max=64, help="Data-parallel ranks within each worker.")
    ] = 1,
    listen_all: Annotated[
        bool,
        typer.Option(
            "--listen-all", help="Listen on every interface, for other machines. Unprotected!"
        ),
    ] = False,
    migration_limit: Annotated[
        int, typer.Option(min=0, help="How often a request may move on from a dead worker.")
    ] = 3,
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="Do not start again what died.")
    ] = False,
    ready_timeout: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds until all must be ready.")
    ] = 600.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every file and command, start nothing.")
    ] = False,
) -> None:
    """Start NATS, Dynamo's frontend and vLLM workers, each with flexkv; keep them running.

    A line "ready: URL" on standard output says that the frontend serves the model with all workers.
    Ctrl-C or SIGTERM ends everything that was started, and nothing else.
    """
    from flexkv.config_sources import read_mapping  # noqa: PLC0415  # for this command alone
    from flexkv.launch.options import Options  # noqa: PLC0415  # as above

    options = Options(
        model=model,
        served_model_name=served_model_name,
        num_workers=workers,
        gpus_per_worker=gpus_per_worker,
        first_gpu=first_gpu,
        folder=folder.expanduser().absolute(),
        template=dict(read_mapping(config)) if config is not None else {},
        host=host,
        http_port=http_port,
        system_port=system_port,
        block_size=block_size,
        python=python,
        nats_url=nats,
        etcd_url=etcd,
        with_etcd=with_etcd,
        gpu_events=gpu_events,
        own_connector=own_connector,
        without_flexkv=without_flexkv,
        router_mode=router_mode,
        data_parallel_size=data_parallel_size,
        listen_all=listen_all,
        migration_limit=migration_limit,
        restarts=not no_restart,
        ready_timeout_s=ready_timeout,
        extra=tuple(extra or ()),
    )
    raise typer.Exit(_dry(options) if dry_run else _run(options))


def _run(options: Options) -> int:
    from flexkv.config_checks import listed  # noqa: PLC0415  # for this command alone
    from flexkv.launch import machine, plan, record, supervisor, terminal  # noqa: PLC0415

    wanted = plan.plan_of(options, machine.machine_of(options))
    with record.Record(options.folder) as kept:
        if problems := machine.obstacles(wanted):
            raise listed(problems, "")
        machine.prepare(wanted)
        with terminal.Terminal(sys.stderr) as shown:
            for note in wanted.notes:
                shown.line("launch", note)
            timing = supervisor.Timing(ready_s=options.ready_timeout_s)

            async def supervise() -> int:
                return await supervisor.Supervisor(wanted, kept, shown, timing).run()

            return asyncio.run(supervise())


def _dry(options: Options) -> int:
    from flexkv.launch import machine, plan  # noqa: PLC0415  # for this command alone

    wanted = plan.plan_of(options, machine.machine_of(options))
    sys.stdout.write(printed(wanted))
    problems = machine.obstacles(wanted)
    for problem in problems:
        sys.stderr.write(f"flexkv: {problem}\n")
    return 2 if problems else 0


def printed(plan: Plan) -> str:
    """Every file and command of a plan, as a shell would take them."""
    parts = [f"# {path}\n{text}" for path, text in plan.files.items()]
    parts += [
        f"# {program.name}, log: {program.log}\n{program.command_line()}\n"
        for program in plan.programs
    ]
    return "\n".join(parts)
