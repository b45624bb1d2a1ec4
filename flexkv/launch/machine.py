"""What the machine has: ports, programs, memory, GPUs; and what in it stands in the plan's way."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flexkv.config_checks import shown
from flexkv.errors import ConfigError
from flexkv.launch.options import MAX_SYSTEM_PORT, Machine
from flexkv.launch.settings import endpoints_of
from flexkv.link.endpoint import EndpointLock
from flexkv.link.errors import LinkError
from flexkv.tiers.memory import available_memory

if TYPE_CHECKING:
    from flexkv.launch.options import Options
    from flexkv.launch.plan import Plan

_LOWEST_PORT = 20000
_MAX_TRIES = 200
_CONNECT_S = 3.0
_IMPORTS_S = 60.0
_GPUS = Path("/proc/driver/nvidia/gpus")
_PATH_STARTS = ("/", "./", "../", "~")
_MODEL_FILES = ("config.json", "params.json")  # the second one is Mistral's own
_NEEDED = ("dynamo.frontend", "dynamo.vllm", "vllm")


def machine_of(options: Options) -> Machine:
    """This machine, for the plan."""
    beside = Path(options.python).parent
    programs = {}
    for name in ("nats-server", "etcd"):
        own = beside / name
        if found := str(own) if os.access(own, os.X_OK) else shutil.which(name):
            programs[name] = found
    return Machine(
        env=dict(os.environ),
        num_cpus=len(os.sched_getaffinity(0)),
        free_port=FreePorts().take,
        programs=programs,
        num_gpus=len(list(_GPUS.iterdir())) if _GPUS.is_dir() else None,
        available_bytes=available_memory(Path("/proc"), Path("/sys/fs/cgroup")),
        model=_model_config(options.model),
    )


class FreePorts:
    """Free ports of this machine, none given out twice, all below the kernel's own range."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self, preferred: int | None, width: int) -> int:
        """The first of ``width`` in a row: ``preferred`` if it is free.

        Raises:
            ConfigError: none was found.
        """
        for attempt in range(_MAX_TRIES):
            first = random.randrange(_LOWEST_PORT, MAX_SYSTEM_PORT - width)  # noqa: S311  # no secret
            if attempt == 0 and preferred is not None:
                first = preferred
            ports = range(first, first + width)
            if not self._taken & set(ports) and all(is_free("127.0.0.1", port) for port in ports):
                self._taken |= set(ports)
                return first
        raise ConfigError(f"no {width} free ports in a row were found above {_LOWEST_PORT}")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections don't matter
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True


def obstacles(plan: Plan) -> list[str]:
    """What of this machine keeps the plan from running, with remedies."""
    return [
        *_model_obstacles(plan.options.model),
        *_port_obstacles(plan),
        *_endpoint_obstacles(plan),
        *_server_obstacles(plan),
        *_interpreter_obstacles(plan.options.python, without=plan.options.without_flexkv),
    ]


def _model_obstacles(model: str) -> list[str]:
    """A folder must be a model's: vLLM takes one that is not there for a name on the hub."""
    folder = Path(model)
    if not folder.exists() and model.startswith(_PATH_STARTS):
        return [f"--model {model} is not there: give a folder, or a name on the model hub"]
    if folder.is_dir() and not any((folder / name).is_file() for name in _MODEL_FILES):
        return [f"--model {model} has no {_MODEL_FILES[0]}: give the folder of a model"]
    return []


def _port_obstacles(plan: Plan) -> list[str]:
    found = []
    for program in plan.programs:
        for host, port, remedy in program.ports:
            if not _resolves(host):
                found.append(
                    f"{program.name} can't listen at {host}: it is no address of this machine"
                )
            elif not is_free(host, port):
                found.append(f"port {port} of {host}, for {program.name}, is in use: {remedy}")
    return found


def _endpoint_obstacles(plan: Plan) -> list[str]:
    found = []
    for worker in plan.workers:
        if worker.config is None:
            continue
        for endpoint in endpoints_of(worker.config, plan.options.data_parallel_size):
            folder = Path(endpoint.removeprefix("ipc://")).parent
            if not endpoint.startswith("ipc://"):
                continue
            if folder.is_dir():
                found += [f"{worker.program.name}: {error}" for error in _taken(endpoint)]
            elif folder != plan.options.folder:
                found.append(f"server_recv_port is {endpoint}: make the folder {folder} first")
    return found


def _taken(endpoint: str) -> list[LinkError]:
    lock = EndpointLock(endpoint)
    try:
        lock.take()
    except LinkError as error:
        return [error]
    lock.release()
    return []


def _server_obstacles(plan: Plan) -> list[str]:
    """The servers that are reused must be there."""
    found = []
    options = plan.options
    for option, urls in (("--nats", options.nats_url), ("--etcd", options.etcd_url)):
        for url in (urls or "").split(","):
            if not url:
                continue
            parts = urlsplit(url)
            default = 4222 if option == "--nats" else 2379
            try:
                address = (parts.hostname or "", parts.port or default)
                socket.create_connection(address, _CONNECT_S).close()
            except (OSError, ValueError) as error:
                own = (
                    "leave it out for an own one"
                    if option == "--nats"
                    else "--with-etcd starts one"
                )
                found.append(f"{option} {shown(url)} does not answer ({error}): start it, or {own}")
    return found


def _interpreter_obstacles(python: str, *, without: bool) -> list[str]:
    """The workers' interpreter must have what it is to run."""
    needed = [*_NEEDED, *([] if without else ["flexkv"])]
    code = (
        "import importlib.util as u, json, sys\n"
        "def has(name):\n"
        "    try:\n        return u.find_spec(name) is not None\n"
        "    except ImportError:\n        return False\n"
        f"print(json.dumps([name for name in {needed!r} if not has(name)]))"
    )
    try:
        done = subprocess.run(  # noqa: S603  # the user names the interpreter
            [python, "-c", code],
            capture_output=True,
            check=True,
            text=True,
            timeout=_IMPORTS_S,
            stdin=subprocess.DEVNULL,
        )
        missing = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return [f"--python {python} can't be run: {error}"]
    if not missing:
        return []
    remedy = "name the interpreter of Dynamo's environment with --python, or install them there"
    return [f"{python} has no {', '.join(missing)}: {remedy}"]


def _model_config(model: str) -> dict[str, Any]:
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        path = _downloaded(model) or path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a name, whose files are not here yet
    return config if isinstance(config, dict) else {}


def _downloaded(model: str) -> Path | None:
    """Where the model hub's client keeps the config.json of a model with that name."""
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # Dynamo has it

        found = try_to_load_from_cache(model, "config.json")
    except (ImportError, ValueError):  # a folder is no name of a model
        return None
    return Path(found) if isinstance(found, str) else None


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return True


def prepare(plan: Plan) -> None:
    """The folder as the plan needs it: files written, what the last run has left behind removed.

    Raises:
        ConfigError: the folder can't be written.
    """
    folder = plan.options.folder
    try:
        for name in ("discovery", "etcd"):  # records of processes that are gone
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("discovery", "logs"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        for worker in plan.workers:
            if worker.config is not None and worker.config.cache.enable_ssd:
                for tier in worker.config.cache.ssd_cache_dir:
                    Path(tier).mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, text in plan.files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--folder {folder} can't be prepared: {error}") from None
