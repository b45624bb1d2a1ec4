"""A whole deployment of real processes, started by `flexkv launch`: NATS to workers with flexkv."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.deployment.asking import Answer, ask
from tests.e2e.driving import ROOT, Process, http
from tests.e2e.models import make_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UP_S = 300.0  # a busy machine imports vLLM for minutes
BLOCK_SIZE = 32  # vLLM's attention for CPUs takes multiples of 32
SEEN_S = 30.0
_TAIL = 2500  # characters of a log in a failure
_FLEXKV = "from flexkv.cli import main; main()"


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
    launch_options: Sequence[str] = ()
    vllm_options: Sequence[str] = ()


class Stack:
    """Everything on 127.0.0.1, free ports, one folder; all of it ends with the ``with`` block.

    NATS is ours, since tests decide when it is back; all else is the launcher's. ``record`` is
    what its deployment.json says now. Names: frontend, worker0, worker1 and so on.
    """

    def __init__(self, folder: Path, plan: Plan | None = None, *, reference: bool = False) -> None:
        self.folder = folder
        self.plan = plan or Plan()
        self.model = make_model(folder / "models", "llama")
        self.http_port, self.nats_port = low_ports(1), low_ports(1)
        self.nats_url = f"nats://127.0.0.1:{self.nats_port}"
        self.nats: Process | None = None
        self._launcher: Process | None = None
        self._reference: Process | None = None
        self._has_reference = reference

    def __enter__(self) -> Self:
        try:
            self.start_nats()
            self._launcher = self.launch(self.folder / "deployment", "launch")
            self.until(lambda: "env" in self.record, SEEN_S, "deployment.json is there")
            if self._has_reference:
                self._reference = self.start_reference()
            self.wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        record = self.record
        if self._launcher is not None:
            self._launcher.end(40)
        groups = [record.get("frontend", {}), *record.get("workers", [])]
        for group in groups if record.get("state") != "ended" else []:
            with contextlib.suppress(ProcessLookupError):  # the launcher failed to do so
                os.killpg(group["pid"], signal.SIGKILL)
        for process in (self._reference, self.nats):
            if process is not None:
                process.end(3)

    # Processes.

    def start_nats(self) -> None:
        program = Path(sys.executable).with_name("nats-server")
        command = [program, "-a", "127.0.0.1", "-p", self.nats_port]
        self.nats = Process(command, self.folder / "nats.log", {})
        self.until(lambda: listens(self.nats_port), SEEN_S, "NATS listens")

    def kill_nats(self) -> None:
        """kill -9."""
        assert self.nats is not None
        self.nats.end(grace_s=0)

    def launch(self, folder: Path, name: str, *more: str) -> Process:
        """`flexkv launch` of what the plan says, in ``folder``; its log is ``name``.log."""
        plan = self.plan
        cache = dict(plan.cache)
        if cache.get("enable_ssd"):
            cache["ssd_cache_dir"] = str(folder / "ssd")
        template = self.folder / f"{name}.json"
        template.write_text(json.dumps(plan.config | {"cache_config": cache}))
        options = [
            f"--model={self.model}",
            "--served-model-name=tiny",
            f"--workers={plan.num_workers}",
            "--gpus-per-worker=0",
            f"--folder={folder}",
            f"--config={template}",
            f"--http-port={self.http_port}",
            f"--system-port={low_ports(plan.num_workers)}",
            f"--block-size={BLOCK_SIZE}",
            f"--nats={self.nats_url}",
            f"--data-parallel-size={plan.data_parallel_size}",
            *(["--gpu-events"] if plan.gpu_events else []),
            *plan.launch_options,
            *more,
        ]
        of_vllm = [
            *self._vllm_options(),
            f"--num-gpu-blocks-override={plan.gpu_blocks}",
            *plan.vllm_options,
        ]
        command = [sys.executable, "-c", _FLEXKV, "launch", *options, "--", *of_vllm]
        return Process(command, self.folder / f"{name}.log", self._variables())

    def start_reference(self) -> Process:
        """A plain vLLM, without flexkv and prefix cache: the model ``plain`` of the frontend."""
        options = ["--served-model-name=plain", "--no-enable-prefix-caching"]
        return self.start_by_hand("plain", options, {})

    def start_by_hand(self, name: str, options: Sequence[str], env: dict[str, str]) -> Process:
        """One more worker of the same deployment, of a component of its own."""
        command = [sys.executable, "-m", "dynamo.vllm", f"--endpoint=dyn://dynamo.{name}.generate"]
        common = [f"--model={self.model}", f"--block-size={BLOCK_SIZE}", *self._vllm_options()]
        variables = self._variables() | self.record["env"] | env
        planes = ["--discovery-backend=file", "--event-plane=nats", "--request-plane=tcp"]
        return Process(
            [*command, *planes, *common, *options], self.folder / f"{name}.log", variables
        )

    def kill(self, name: str, *, group: bool = True) -> int:
        """kill -9, of the whole process group or of its main process alone; the pid."""
        pid: int = self.entry(name)["pid"]
        os.killpg(pid, signal.SIGKILL) if group else os.kill(pid, signal.SIGKILL)
        return pid

    def wait_for_successor(self, name: str, pid: int) -> float:
        """Return when the launcher has started ``name`` again; the time.monotonic() of that."""
        self.until(lambda: self.entry(name)["pid"] not in {pid, None}, SEEN_S, f"a new {name}")
        return time.monotonic()

    def _vllm_options(self) -> list[str]:
        return [
            "--dtype=float32",
            "--enforce-eager",
            "--max-model-len=1024",
            f"--max-num-seqs={self.plan.max_num_seqs}",
        ]

    def _variables(self) -> dict[str, str]:
        return {
            "DYN_LOG": "info",
            "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
            "HOME": str(self.folder),  # the frontend keeps model cards below it
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }

    # What the launcher says.

    @property
    def record(self) -> dict[str, Any]:
        path = self.folder / "deployment" / "deployment.json"
        try:
            document: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        return document

    @property
    def discovery(self) -> Path | str:
        """A folder, or the URL of an etcd."""
        discovery = self.record["discovery"]
        return Path(discovery["path"]) if "path" in discovery else str(discovery["endpoints"])

    def entry(self, name: str) -> dict[str, Any]:
        """Of ``frontend`` or a worker."""
        record = self.record
        entry: dict[str, Any] = (
            record["frontend"]
            if name == "frontend"
            else record["workers"][int(name.removeprefix("worker"))]
        )
        return entry

    def worker_id(self, index: int) -> int:
        """As the router knows it; a restarted worker has a new one."""
        worker_id: int | None = self.entry(f"worker{index}")["worker_id"]
        assert worker_id is not None, f"worker {index} is not ready"
        return worker_id

    def worker_ids(self) -> list[int]:
        return [self.worker_id(index) for index in range(self.plan.num_workers)]

    def endpoint(self, index: int) -> str:
        """Where worker ``index``'s engine is asked what it holds."""
        endpoint: str = self.entry(f"worker{index}")["server_recv_port"]
        return endpoint

    def events_endpoint(self, index: int) -> str:
        """Where vLLM publishes with --gpu-events, unless it has several ranks."""
        return f"ipc://{self.folder}/deployment/kv{index}.ipc"

    def log(self, name: str) -> str:
        return Path(self.entry(name)["log"]).read_text(errors="replace")

    # Waiting and asking.

    def wait_until_ready(self, deadline_s: float = UP_S) -> None:
        """The launcher says so, and every worker, restarted ones too, is ready."""

        def all_are_ready() -> bool:
            record = self.record
            workers = [one["state"] == "ready" for one in record["workers"]]
            return record["state"] == "ready" and all(workers)

        self.until(all_are_ready, deadline_s, "all are ready")
        if self._has_reference:
            self.until(lambda: self._lists("plain"), deadline_s, "the reference is listed")

    def until(self, condition: Callable[[], object], deadline_s: float, what: str) -> float:
        """Seconds that it took; the launcher must not end meanwhile."""
        since_s = time.monotonic()
        while not condition():
            if self._launcher is not None and self._launcher.popen.poll() is not None:
                raise self.failure(f"the launcher ended before {what}")
            if time.monotonic() > since_s + deadline_s:
                raise self.failure(f"not within {deadline_s} s: {what}")
            time.sleep(0.1)
        return time.monotonic() - since_s

    def failure(self, what: str) -> AssertionError:
        """``what``, and the ends of all logs."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("deployment/logs/*.log")]
        texts = {path.name: path.read_text(errors="replace") for path in paths}
        ends = [f"the end of {name}:\n{text[-_TAIL:]}" for name, text in texts.items()]
        return AssertionError("\n".join([what, *ends]))

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def instances(self) -> set[int]:
        """The worker ids that the frontend lists; a killed one's for 10 s more."""
        status, text = http(self.url("/health"), deadline_s=5)
        instances = json.loads(text).get("instances", []) if status == 200 else []
        served = {"component": "backend", "endpoint": "generate"}
        return {one["instance_id"] for one in instances if served.items() <= one.items()}

    def metric(self, index: int, name: str, label: str = "") -> float:
        """The sum over the worker's series whose line begins with ``name`` and has ``label``."""
        port = self.entry(f"worker{index}")["system_port"]
        status, text = http(f"http://127.0.0.1:{port}/metrics", deadline_s=5)
        assert status == 200, text
        named = [line for line in text.splitlines() if line.startswith(name)]
        assert named, f"worker {index} has no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in named if label in line)

    def chat(self, text: str, **options: Any) -> Answer:
        """Ask through the frontend; see ``asking.ask``."""
        return ask(self.url("/v1/chat/completions"), text, **options)

    def _lists(self, model: str) -> bool:
        status, text = http(self.url("/v1/models"), deadline_s=5)
        return status == 200 and f'"{model}"' in text


def listens(port: int) -> bool:
    """Whether somebody does, at this port of 127.0.0.1."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def low_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, all of them below 32768.

    Dynamo wants that, and the kernel gives none of them away.
    """
    rng = random.SystemRandom()
    while True:
        first = rng.randrange(20000, 32000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + count):
                probe = probes.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first
