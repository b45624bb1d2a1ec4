"""A whole deployment of real processes: NATS, Dynamo's frontend, workers with flexkv."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flexkv.replay.deployment import dynamo_variables
from tests.deployment.asking import Answer, ask
from tests.e2e.cases import CONNECTORS
from tests.e2e.driving import ROOT, environment, http
from tests.e2e.models import make_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UP_S = 300.0  # a busy machine imports vLLM for minutes
BLOCK_SIZE = 32  # vLLM's attention for CPUs takes multiples of 32
_TAIL = 1500  # characters of a log in a failure


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stack is started with. ``cache``: flexkv's cache_config, but for the SSD folder."""

    num_workers: int = 2
    gpu_blocks: int = 64  # of the GPU's cache, which is host memory here
    max_num_seqs: int = 8
    cache: dict[str, Any] = field(default_factory=lambda: {"num_cpu_blocks": 256})
    config: dict[str, Any] = field(default_factory=dict)  # flexkv's other settings
    gpu_events: bool = False
    data_parallel_size: int = 1
    etcd_url: str = ""  # "": file discovery
    connector: str = "stock"
    frontend_options: Sequence[str] = ("--router-host-cache-hit-weight=1.0", "--migration-limit=3")
    worker_options: Sequence[str] = ()


@dataclass
class Child:
    """A process group of the stack."""

    popen: subprocess.Popen[bytes]
    log_path: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class Stack:
    """Everything on 127.0.0.1, free ports, one folder; all of it ends with the ``with`` block.

    ``children``: nats, frontend, worker0, worker1 and so on.
    """

    def __init__(self, folder: Path, plan: Plan | None = None, *, reference: bool = False) -> None:
        self.folder = folder
        self._has_reference = reference
        self.plan = plan or Plan()
        self.model = make_model(folder / "models", "llama")
        self.discovery: Path | str = self.plan.etcd_url or folder / "discovery"
        if isinstance(self.discovery, Path):
            self.discovery.mkdir(parents=True)
        backend = "etcd" if self.plan.etcd_url else "file"
        planes = {"discovery-backend": backend, "event-plane": "nats", "request-plane": "tcp"}
        self._planes = [f"--{name}={value}" for name, value in planes.items()]
        self.http_port, self.nats_port = low_port(), low_port()
        num_ranks = self.plan.data_parallel_size
        self._events_ports = [low_port(num_ranks) for _ in range(self.plan.num_workers)]
        self.system_ports = [low_port() for _ in range(self.plan.num_workers)]
        self.nats_url = f"nats://127.0.0.1:{self.nats_port}"
        self.children: dict[str, Child] = {}
        self._env = environment(
            dynamo_variables(self.nats_url, self.discovery)
            | {
                "DYN_SYSTEM_HOST": "127.0.0.1",
                "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0",
                "DYN_LOG": "info",
                "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
                "HOME": str(folder),  # the frontend keeps model cards below it
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "VLLM_CPU_KVCACHE_SPACE": "1",
            }
        )

    def __enter__(self) -> Self:
        try:
            self.start_nats()
            self.start_frontend()
            for index in range(self.plan.num_workers):
                self.start_worker(index)
            if self._has_reference:
                self.start_reference()
            self.wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        for child in self.children.values():
            if child.popen.poll() is None:
                child.popen.terminate()
        until_s = time.monotonic() + 10
        for child in self.children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.popen.wait(max(0.1, until_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # a worker has children
            child.popen.wait(10)

    # Processes.

    def start_nats(self) -> None:
        program = Path(sys.executable).with_name("nats-server")
        self._spawn("nats", program, "-a", "127.0.0.1", "-p", self.nats_port)

    def start_frontend(self) -> None:
        address = ["--http-host=127.0.0.1", f"--http-port={self.http_port}"]
        options = ["--router-mode=kv", *address, *self._planes, *self.plan.frontend_options]
        self._spawn("frontend", sys.executable, "-m", "dynamo.frontend", *options)

    def start_worker(self, index: int) -> None:
        path = self.folder / f"worker{index}.json"
        path.write_text(json.dumps(self.config_of(index)))
        variables = {
            "DYN_SYSTEM_PORT": str(self.system_ports[index]),
            "FLEXKV_CONFIG_PATH": str(path),
        }
        self._spawn_worker(f"worker{index}", self._worker_options(index), variables)

    def start_reference(self) -> None:
        """A plain vLLM, without flexkv and prefix cache: the model ``plain`` of the frontend."""
        options = [*self._vllm_options(), "--served-model-name=plain", "--no-enable-prefix-caching"]
        self._spawn_worker("plain", [*options, "--endpoint=dyn://dynamo.plain.generate"], {})

    def start_by_hand(self, name: str, config_path: Path) -> None:
        """One more worker, with flexkv's settings from ``config_path``."""
        options = [*self._worker_options(0), "--endpoint=dyn://dynamo.byhand.generate"]
        self._spawn_worker(name, options, {"FLEXKV_CONFIG_PATH": str(config_path)})

    def config_of(self, index: int) -> dict[str, Any]:
        cache = dict(self.plan.cache)
        if cache.get("enable_ssd"):
            cache["ssd_cache_dir"] = str(self.folder / f"ssd{index}")
        sink = {"sink": "vllm" if self.plan.gpu_events else "nats"}
        config = {"server_recv_port": self.endpoint(index), "cache_config": cache}
        return config | self.plan.config | {"events": self.plan.config.get("events", {}) | sink}

    def endpoint(self, index: int) -> str:
        """Where worker ``index``'s engine is asked what it holds."""
        return f"ipc://{self.folder}/link{index}"

    def events_endpoint(self, index: int) -> str:
        """Where vLLM publishes its events; of rank r of many, at the port that is r above it.

        There vLLM refuses ipc, and of loopback's addresses it binds those with "::" in them.
        """
        if self.plan.data_parallel_size == 1:
            return f"ipc://{self.folder}/kv{index}"
        return f"tcp://[::ffff:127.0.0.1]:{self._events_ports[index]}"

    def kill(self, name: str, *, group: bool = True) -> None:
        """kill -9, of the whole process group or of its main process alone."""
        child = self.children[name]
        os.killpg(child.pid, signal.SIGKILL) if group else os.kill(child.pid, signal.SIGKILL)
        child.popen.wait(10)

    def revive(self, index: int, deadline_s: float = UP_S) -> tuple[int, float]:
        """The new id of a worker whose main process was killed, and seconds until it is listed."""
        name = f"worker{index}"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.children[name].pid, signal.SIGKILL)
        listed = self.instances()
        since_s = time.monotonic()
        self.start_worker(index)
        self.until(lambda: self.instances() - listed, deadline_s, f"{name} is back")
        return self.worker_id(index), time.monotonic() - since_s

    def _worker_options(self, index: int) -> list[str]:
        events: dict[str, object] = {"enable_kv_cache_events": self.plan.gpu_events}
        if self.plan.gpu_events:
            events |= {"publisher": "zmq", "endpoint": self.events_endpoint(index)}
        options = [
            *self._vllm_options(),
            "--served-model-name=tiny",
            "--enable-prefix-caching",
            f"--num-gpu-blocks-override={self.plan.gpu_blocks}",
            f"--kv-events-config={json.dumps(events)}",
        ]
        if connector := CONNECTORS[self.plan.connector]:
            options.append(f"--kv-transfer-config={json.dumps(connector)}")
        if self.plan.data_parallel_size > 1:
            options.append(f"--data-parallel-size={self.plan.data_parallel_size}")
        return [*options, *self.plan.worker_options]

    def _vllm_options(self) -> list[str]:
        return [
            *self._planes,
            f"--model={self.model}",
            "--dtype=float32",
            f"--block-size={BLOCK_SIZE}",
            "--enforce-eager",
            "--max-model-len=1024",
            f"--max-num-seqs={self.plan.max_num_seqs}",
        ]

    def _spawn_worker(self, name: str, options: list[str], variables: dict[str, str]) -> None:
        self._spawn(name, sys.executable, "-m", "dynamo.vllm", *options, **variables)

    def _spawn(self, name: str, *command: object, **variables: str) -> None:
        log_path = self.folder / f"{name}.log"
        with log_path.open("ab") as log:
            popen = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env | variables,
                cwd=self.folder,
                start_new_session=True,  # the group ends as one
            )
        self.children[name] = Child(popen, log_path)

    # Waiting and asking.

    def wait_until_ready(self, deadline_s: float = UP_S) -> None:
        """The frontend lists the model and every worker."""
        self.until(lambda: len(self.instances()) >= self.plan.num_workers, deadline_s, "workers")
        self.until(lambda: self._lists("tiny"), deadline_s, "the model")
        if self._has_reference:
            self.wait_for_reference(deadline_s)

    def wait_for_reference(self, deadline_s: float = UP_S) -> None:
        self.until(lambda: self._lists("plain"), deadline_s, "the reference")

    def until(self, condition: Callable[[], object], deadline_s: float, what: str) -> float:
        """Seconds that it took; no process may end meanwhile."""
        since_s = time.monotonic()
        alive = {name for name, child in self.children.items() if child.popen.poll() is None}
        while not condition():
            for name in alive:
                if self.children[name].popen.poll() is not None:
                    raise self.failure(f"{name} ended before {what}", name)
            if time.monotonic() > since_s + deadline_s:
                raise self.failure(f"not within {deadline_s} s: {what}", *self.children)
            time.sleep(0.1)
        return time.monotonic() - since_s

    def failure(self, what: str, *names: str) -> AssertionError:
        ends = [f"the end of {n}.log:\n{self.children[n].log()[-_TAIL:]}" for n in names]
        return AssertionError("\n".join([what, *ends]))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def instances(self) -> set[int]:
        """The worker ids that the frontend lists; a killed one's for 10 s more."""
        status, text = http(self.url("/health"), deadline_s=5)
        instances = json.loads(text).get("instances", []) if status == 200 else []
        served = {"component": "backend", "endpoint": "generate"}
        return {one["instance_id"] for one in instances if served.items() <= one.items()}

    def worker_id(self, index: int) -> int:
        """As the worker's own processes know it; a restarted one has a new one."""
        group = self.children[f"worker{index}"].pid
        for process in Path("/proc").iterdir():
            with contextlib.suppress(ValueError, OSError):
                if os.getpgid(int(process.name)) == group:
                    environ = (process / "environ").read_text(errors="replace")
                    if found := re.search(r"\bDYN_FPM_WORKER_ID=(\d+)", environ):
                        return int(found[1])
        raise self.failure(f"no process of worker {index} knows its id", f"worker{index}")

    def worker_ids(self) -> list[int]:
        return [self.worker_id(index) for index in range(self.plan.num_workers)]

    def metric(self, index: int, name: str, label: str = "") -> float:
        """The sum over the worker's series whose line begins with ``name`` and has ``label``."""
        port = self.system_ports[index]
        status, text = http(f"http://127.0.0.1:{port}/metrics", deadline_s=5)
        assert status == 200, text
        named = [line for line in text.splitlines() if line.startswith(name)]
        assert named, f"worker {index} has no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in named if label in line)

    def chat(self, text: str, **options: Any) -> Answer:
        """Ask through the frontend; see ``asking.ask``."""
        return ask(self.url("/v1/chat/completions"), text, **options)

    def remove_folder(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lists(self, model: str) -> bool:
        status, text = http(self.url("/v1/models"), deadline_s=5)
        return status == 200 and f'"{model}"' in text


def low_port(how_many: int = 1) -> int:
    """The first of free ones below 32768: Dynamo wants that, and the kernel gives none away."""
    rng = random.SystemRandom()
    while True:
        port = rng.randrange(20000, 32000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for each in range(port, port + how_many):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", each))
            return port
