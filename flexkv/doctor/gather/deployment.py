"""The deployment that ``flexkv launch`` has written down, and the settings of its workers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexkv.config import Config
from flexkv.config_sources import PATH_VARIABLE
from flexkv.doctor.facts import Worker
from flexkv.doctor.gather.processes import folder_of
from flexkv.errors import ConfigError
from flexkv.process import Process as Alive

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flexkv.doctor.facts import Process

FILE = "deployment.json"
_SHARED = ("DYN_", "NATS_", "ETCD_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the file says. ``lost``: which processes should run, and do not."""

    state: str
    http: str | None
    feed: str
    env: Mapping[str, str]
    pids: frozenset[int]
    endpoints: Mapping[int, str] = field(default_factory=dict)
    worker_ids: Mapping[int, int] = field(default_factory=dict)
    logs: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def read_deployment(folder: Path) -> Deployment:
    """What ``folder`` says.

    Raises:
        ConfigError: there is no deployment.json, or it is none.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_bytes())
        return _deployment(content)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}: name the folder of a deployment that flexkv launch started"
        ) from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path}: is no description of a deployment ({error!r})") from None


def shared_variables(process: Process) -> dict[str, str]:
    """Dynamo's, NATS' and etcd's variables: what the processes of a deployment have in common."""
    own = ("DYN_SYSTEM_", "DYN_FPM_")
    return {
        name: value
        for name, value in (process.env or {}).items()
        if name.startswith(_SHARED) and not name.startswith(own)
    }


def worker_of(process: Process) -> Worker:
    """A worker with the settings that flexkv finds inside it."""
    if process.env is None:
        return Worker(process=process)
    # Dynamo sets it inside the process
    env = {"DYN_FPM_WORKER_ID": str(process.worker_id or 0)} | dict(process.env)
    if path := env.get(PATH_VARIABLE):
        env[PATH_VARIABLE] = str(folder_of(process.pid) / path)
    try:
        return Worker(process=process, config=Config.load(env=env))
    except ConfigError as error:
        return Worker(process=process, error=str(error))


def _deployment(content: Any) -> Deployment:
    state = str(content["state"])
    named = _processes(content)
    lost = [] if state == "ended" else [text for name, pid in named if (text := _lost(name, pid))]
    workers = [one for one in content.get("workers") or [] if isinstance(one.get("pid"), int)]
    frontend = content.get("frontend") or {}
    logs = [one.get("log") for one in (frontend, *workers)]
    return Deployment(
        state=state,
        http=content.get("http"),
        feed=str(content.get("feed") or ""),
        env=_env(content),
        pids=frozenset(pid for _, pid in named),
        endpoints={w["pid"]: w["server_recv_port"] for w in workers if w.get("server_recv_port")},
        worker_ids={w["pid"]: w["worker_id"] for w in workers if w.get("worker_id")},
        logs=tuple(log for log in logs if log),
        lost=tuple(lost),
    )


def _processes(content: Any) -> list[tuple[str, int]]:
    found = [("launcher", content.get("pid")), ("nats-server", content.get("nats_pid"))]
    found.append(("frontend", (content.get("frontend") or {}).get("pid")))
    found += [(f"worker {w.get('index')}", w.get("pid")) for w in content.get("workers") or []]
    return [(name, pid) for name, pid in found if isinstance(pid, int)]


def _lost(name: str, pid: int) -> str:
    return "" if Alive(pid).is_alive() else f"{name} (process {pid}) is gone"


def _env(content: Any) -> dict[str, str]:
    env = {str(name): str(value) for name, value in (content.get("env") or {}).items()}
    if content.get("nats"):
        env["NATS_SERVER"] = str(content["nats"])
    discovery = content.get("discovery") or {}
    if discovery.get("backend") == "file":
        env |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(discovery["path"])}
    elif discovery.get("backend") == "etcd":
        env |= {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": str(discovery["endpoints"])}
    if content.get("namespace"):
        env["DYN_NAMESPACE"] = str(content["namespace"])
    return env
