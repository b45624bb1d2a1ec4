"""A small real Dynamo deployment for replay, demo and tests: NATS, fake workers, a router."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from flexkv.errors import FeedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

_POLL_S = 0.01
_LOG = "error,dynamo_runtime::storage::kv::file=off"  # a router that was closed goes on watching
_REMEDY = "install it with: pip install 'flexkv[demo]'"


class Overlap(NamedTuple):
    """How many leading blocks of a prompt a worker has, as its router believes.

    ``host`` counts what host memory adds behind ``gpu``, ``ssd`` what disk adds behind both.
    """

    gpu: int
    host: int
    ssd: int


def dynamo_variables(
    nats_url: str, discovery_path: Path | str, tcp_host: str | None = "127.0.0.1"
) -> dict[str, str]:
    """What every Dynamo process of one deployment must find in its environment.

    ``discovery_path``: a folder; a text is the URL of an etcd. ``tcp_host``: where a process can
    be reached; None: at the address that Dynamo chooses.
    """
    names = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST")
    reached_at = dict.fromkeys(names, tcp_host) if tcp_host is not None else {}
    discovery = {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": str(discovery_path)}
    if isinstance(discovery_path, Path):
        discovery = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(discovery_path)}
    return (
        discovery
        | reached_at
        | {
            "NATS_SERVER": nats_url,
            "DYN_EVENT_PLANE": "nats",
            "DYN_EVENT_PLANE_HOST": "127.0.0.1",
            "DYN_LOG": os.environ.get("DYN_LOG", _LOG),
        }
    )


@contextlib.contextmanager
def dynamo_environment(
    nats_url: str, discovery_path: Path | str, tcp_host: str | None = "127.0.0.1"
) -> Iterator[None]:
    """This process as one of the deployment: Dynamo reads the variables when a runtime starts."""
    variables = dynamo_variables(nats_url, discovery_path, tcp_host)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class NatsServer:
    """A nats-server on a free port of 127.0.0.1, for as long as the ``async with`` lasts.

    ``arguments``: more of them; ``-m -1`` gives it a ``monitoring_url``.

    Raises:
        FeedError: there is no nats-server program, or it was not ready in time.
    """

    def __init__(self, *arguments: str, deadline_s: float = 10.0) -> None:
        self._arguments = arguments
        self._deadline_s = deadline_s
        self._folder = Path()
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        self.monitoring_url = ""

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="flexkv-nats-"))
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int | None:
        """The server's process, None while it is stopped."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start, on the port of the time before if there was one; return when it is ready."""
        port = self.url.rpartition(":")[2] or "-1"  # -1: the server picks a free one
        ports = ["--ports_file_dir", str(self._folder)]
        log = ["-l", str(self._folder / "nats.log")]
        self._process = await asyncio.create_subprocess_exec(
            _nats_program(), "-a", "127.0.0.1", "-p", port, *ports, *log, *self._arguments
        )
        try:
            async with asyncio.timeout(self._deadline_s):
                self.url = await self._url_when_ready(self._process)
        except TimeoutError:
            await self.stop()
            raise FeedError(f"nats-server was not ready in {self._deadline_s} s") from None

    async def stop(self) -> None:
        """End the server as a crash would: at once."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _url_when_ready(self, process: asyncio.subprocess.Process) -> str:
        written = self._folder / f"nats-server_{process.pid}.ports"
        while process.returncode is None:
            with contextlib.suppress(OSError, ValueError):  # not there yet, or half of it
                urls = json.loads(written.read_text())
                self.monitoring_url = str(urls.get("monitoring", [""])[0])
                return str(urls["nats"][0])
            await asyncio.sleep(_POLL_S)
        log = (self._folder / "nats.log").read_text(errors="replace")
        raise FeedError(f"nats-server ended at once, with status {process.returncode}: {log}")


class FakeWorker:
    """A process that a router takes for a worker: it has a model card and no KV events.

    ``endpoint``: namespace.component.endpoint. ``relayed``: a ZMQ address from which Dynamo's
    relay takes vLLM's event stream. ``model``: the folder of the model's files, which workers that
    a frontend may choose between must share. ``worker_id`` is known inside the ``async with``.

    Raises:
        FeedError: it did not register in time.
    """

    def __init__(
        self,
        nats_url: str,
        discovery_path: Path | str,
        *,
        tokens_per_block: int,
        endpoint: str = "flexkv.backend.generate",
        num_ranks: int = 1,
        relayed: str | None = None,
        model: Path | None = None,
        deadline_s: float = 30.0,
    ) -> None:
        self._variables = dynamo_variables(nats_url, discovery_path)
        self._tokens_per_block = tokens_per_block
        self._endpoint = endpoint
        self._num_ranks = num_ranks
        self._model = model
        self._relayed = ["--zmq", relayed] if relayed is not None else []
        self._deadline_s = deadline_s
        self._folder = Path()
        self._process: asyncio.subprocess.Process | None = None
        self.worker_id = 0

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="flexkv-worker-"))
        # as a file: it needs nothing of flexkv, whose import takes a second
        program = [sys.executable, "-P", str(Path(__file__).with_name("worker_card.py"))]
        model = self._model or self._folder / "model"
        sizes = [str(self._tokens_per_block), str(model), str(self._num_ranks)]
        arguments = [self._endpoint, *sizes, *self._relayed]
        pipe = asyncio.subprocess.PIPE
        self._process = process = await asyncio.create_subprocess_exec(
            *program, *arguments, stdin=pipe, stdout=pipe, env=os.environ | self._variables
        )
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(process.stdout.readline(), self._deadline_s)
        if not line:
            await self.__aexit__(None, None, None)
            raise FeedError(
                f"a fake Dynamo worker did not register within {self._deadline_s} s: see what it "
                f"printed above; if ai-dynamo-runtime is missing, {_REMEDY}"
            )
        self.worker_id = json.loads(line)["worker_id"]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Router:
    """Dynamo's own KV router, in this process, over file discovery and NATS events.

    Several may live in one process, one after another or at once. ``tcp_host``: the address at
    which it takes the answers of engines; None: the one that Dynamo chooses.

    Raises:
        FeedError: ai-dynamo-runtime is not installed.
    """

    def __init__(
        self,
        nats_url: str,
        discovery_path: Path | str,
        *,
        tokens_per_block: int,
        endpoint: str = "flexkv.backend.generate",
        tcp_host: str | None = "127.0.0.1",
    ) -> None:
        self._nats_url = nats_url
        self._tcp_host = tcp_host
        self._discovery_path = discovery_path
        self._tokens_per_block = tokens_per_block
        self._endpoint = endpoint
        self._runtime: Any = None
        self._router: Any = None

    async def __aenter__(self) -> Self:
        with dynamo_environment(self._nats_url, self._discovery_path, self._tcp_host):
            try:
                from dynamo.llm import KvRouter, KvRouterConfig  # noqa: PLC0415  # an extra
                from dynamo.runtime import DistributedRuntime  # noqa: PLC0415  # as above
            except ImportError:
                raise FeedError(f"ai-dynamo-runtime is missing: {_REMEDY}") from None
            loop = asyncio.get_running_loop()
            backend = os.environ["DYN_DISCOVERY_BACKEND"]
            self._runtime = DistributedRuntime(loop, backend, "tcp", event_plane="nats")
            endpoint = self._runtime.endpoint(self._endpoint)
            self._router = KvRouter(endpoint, self._tokens_per_block, KvRouterConfig())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._router = None
        self._runtime.shutdown()
        self._runtime = None

    async def wait_for_workers(self, worker_ids: Iterable[int], *, deadline_s: float = 10) -> None:
        """Return once the router lists all of them.

        Raises:
            FeedError: it does not, in time.
        """
        missing = set(worker_ids)
        prompt = [0] * self._tokens_per_block
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    missing -= set(await self.overlap(prompt))
                    if not missing:
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise FeedError(
                f"in {deadline_s} s no router lists worker {', '.join(map(str, sorted(missing)))} "
                f"of {self._endpoint}: is it running, under that id, and has it registered its "
                "model (register_model)?"
            ) from None

    async def overlap(
        self,
        token_ids: Sequence[int],
        *,
        namespace: str | None = None,
        lora: str | None = None,
    ) -> dict[int, Overlap]:
        """What the router believes each worker (of data-parallel rank 0) has of the prompt."""
        of_ranks = await self.overlap_of_ranks(token_ids, namespace=namespace, lora=lora)
        return {worker_id: overlap for (worker_id, rank), overlap in of_ranks.items() if not rank}

    async def overlap_of_ranks(
        self,
        token_ids: Sequence[int],
        *,
        namespace: str | None = None,
        lora: str | None = None,
    ) -> dict[tuple[int, int], Overlap]:
        """The same for every worker and rank."""
        scores = await self._router.get_overlap_scores(
            list(token_ids), lora_name=lora, cache_namespace=namespace
        )
        return {
            (row["worker_id"], row["dp_rank"]): Overlap(
                row["device_blocks"],
                row["host_pinned_extension_blocks"],
                row["disk_extension_blocks"],
            )
            for row in scores["workers"]
        }

    async def best_worker(
        self,
        token_ids: Sequence[int],
        *,
        namespace: str | None = None,
        lora: str | None = None,
        request_id: str | None = None,
    ) -> int:
        """The worker that the router would send the prompt to.

        With a ``request_id`` the router counts the request as running there until ``free``.
        """
        worker_id, _rank, _blocks = await self._router.best_worker(
            list(token_ids), request_id=request_id, lora_name=lora, cache_namespace=namespace
        )
        return int(worker_id)

    async def free(self, request_id: str) -> None:
        """The request has ended."""
        await self._router.free(request_id)

    async def dump_events(self) -> list[dict[str, Any]]:
        """Everything in the router's index, as the events that would build it again."""
        events: list[dict[str, Any]] = json.loads(await self._router.dump_events())
        return events


def _nats_program() -> str:
    """The nats-server of this environment, else the one on PATH."""
    beside = Path(sys.executable).with_name("nats-server")
    program = str(beside) if beside.exists() else shutil.which("nats-server")
    if program is None:
        raise FeedError(f"no nats-server beside {sys.executable} or on PATH: {_REMEDY}")
    return program
