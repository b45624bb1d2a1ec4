"""What was seen of an installation, a machine and a deployment; the checks read nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexkv.config import Config

Role = Literal["frontend", "worker", "engine", "nats", "etcd", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """The packages of one interpreter: ``versions`` has those that are there.

    ``resizes_by_torchvision``: dynamo.vllm imports smart_resize from a module that needs it.
    ``driver``: NVIDIA's, None without one.
    """

    interpreter: str
    python: str
    versions: Mapping[str, str]
    machine: str = "x86_64"
    resizes_by_torchvision: bool = False
    nats_server: str | None = None
    driver: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """``env`` is None where it can't be read. ``family``: pids of the process and below it.

    ``has_leader``: the process is there that its group is named after. ``is_foreign``: it does not
    belong to the deployment that is examined.
    """

    pid: int
    role: Role
    command: Sequence[str] = ()
    env: Mapping[str, str] | None = None
    parent: int = 0
    group: int = 0
    is_orphan: bool = False
    is_foreign: bool = False
    has_leader: bool = True
    family: frozenset[int] = frozenset()
    worker_id: int | None = None
    memlock: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.role or 'process'} {self.pid}"

    def option(self, *flags: str) -> str | None:
        """The value of the last of ``flags`` on the command line."""
        found = None
        words = list(self.command)
        for i, word in enumerate(words):
            flag, has_value, value = word.partition("=")
            if flag.startswith("--") and flag.replace("_", "-") in flags:
                found = value if has_value else next(iter(words[i + 1 : i + 2]), "")
        return found

    def has_flag(self, *flags: str) -> bool:
        """Whether one of ``flags`` stands on the command line."""
        return any(word.replace("_", "-").partition("=")[0] in flags for word in self.command)

    def variable(self, name: str) -> str | None:
        """Of its environment; what is set to nothing is not set."""
        return (self.env or {}).get(name) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A process that serves the model, with flexkv's settings as that process finds them."""

    process: Process
    config: Config | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listening TCP socket of a process."""

    host: str
    port: int
    process: Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One entry of discovery. ``age_s``: since it was touched; 0 where a lease keeps it."""

    place: str
    content: Mapping[str, Any]
    age_s: float = 0.0
    owner_is_gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """``where``: the folder, or etcd's endpoints. ``error``: why it could not be read."""

    backend: str
    where: str
    cards: Sequence[Record] = ()
    sources: Sequence[Record] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an engine listens: ``owner`` has the lock; ``signed`` is who the file names."""

    endpoint: str
    worker: str
    family: frozenset[int] = frozenset()
    owner: int | None = None
    signed: str = ""
    is_expected: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Nats:
    """``greeting``: what the server says of itself; ``error``: why our credentials don't do."""

    servers: str
    greeting: Mapping[str, Any] | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of asking the engine of a worker and rank, and a router about it.

    ``error``: the engine did not answer. ``agrees`` is None where no router could be asked.
    """

    worker_id: int
    dp_rank: int
    num_held: Mapping[str, int] = field(default_factory=dict)
    refused: Sequence[str] = ()
    agrees: bool | None = None
    difference: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontend:
    """``applied``: KV events by (kind, status). ``error``: it does not answer."""

    url: str
    process: Process | None = None
    applied: Mapping[tuple[str, str], int] = field(default_factory=dict)
    num_requests: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdFolder:
    """``refusal``: why it can't be used; ``buffered``: why direct I/O does not work there."""

    path: str
    refusal: str = ""
    buffered: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the kernel and the file systems allow. ``uring``: "" means yes, else why not."""

    ssd_folders: Sequence[SsdFolder] = ()
    uring: str = ""
    has_uring_extra: bool = False
    shmem_enabled: str = ""
    memlock: int | None = None
    available: Mapping[str, int] = field(default_factory=dict)
    card_folder: str = ""
    card_folder_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line of a log that a check knows."""

    log: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything. ``feed``: who tells the router: nats, vllm or none; "" if nobody says.

    ``starting``: what launch still waits for, by pid.
    """

    installations: Sequence[Installation] = ()
    config: Config | None = None
    config_error: str = ""
    state: str = ""
    starting: Mapping[int, str] = field(default_factory=dict)
    feed: str = ""
    processes: Sequence[Process] = ()
    lost: Sequence[str] = ()
    workers: Sequence[Worker] = ()
    listeners: Sequence[Listener] = ()
    discovery: Discovery | None = None
    endpoints: Sequence[Endpoint] = ()
    nats: Nats | None = None
    recovery: Mapping[str, str] = field(default_factory=dict)
    answers: Sequence[Answer] = ()
    frontends: Sequence[Frontend] = ()
    machine: Machine = field(default_factory=Machine)
    pool_nbytes: int | None = None
    log_lines: Sequence[LogLine] = ()
    unfinished: Sequence[str] = ()
