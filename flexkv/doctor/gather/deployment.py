"""The deployment that ``flexkv launch`` has written down, and the settings of its workers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv.config import Config
from flexkv.config_sources import PATH_VARIABLE
from flexkv.doctor.facts import Worker
from flexkv.doctor.gather.processes import folder_of
from flexkv.errors import ConfigError
from flexkv.process import Process as Alive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flexkv.config import EventsConfig
    from flexkv.doctor.facts import Process

FILE = "deployment.json"
DEFAULT_FOLDER = Path("flexkv-deployment")
WORKER_ID = "DYN_FPM_WORKER_ID"  # what is asked from outside needs none, the settings do
_SHARED = ("DYN_", "NATS_", "ETCD_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the file says.

    ``config``: the settings of a worker. ``lost``: which processes should run, and do not.
    ``starting``: workers that are not ready yet, by pid.
    """

    state: str
    http: str | None
    feed: str
    env: Mapping[str, str]
    pids: frozenset[int]
    block_size: int | None = None
    config: Path | None = None
    endpoints: Mapping[int, str] = field(default_factory=dict)
    worker_ids: Mapping[int, int] = field(default_factory=dict)
    logs: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    starting: Mapping[int, str] = field(default_factory=dict)


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


def deployment_in(folder: Path | None) -> Deployment | None:
    """That of ``folder``, or of the folder that ``flexkv launch`` takes where none is named.

    Raises:
        ConfigError: the folder that is named has none.
    """
    if folder is None and not (DEFAULT_FOLDER / FILE).is_file():
        return None
    return read_deployment(folder or DEFAULT_FOLDER)


def settings_of(
    folder: Path | None, config: Path | None, env: Mapping[str, str] = os.environ
) -> tuple[EventsConfig, int]:
    """Where a deployment's engines publish, and its block size, for who asks from outside.

    Raises:
        ConfigError: ``folder`` has no deployment, the settings can't be used, or no engine of the
            deployment publishes.
    """
    deployment = deployment_in(folder) if config is None or folder is not None else None
    if deployment is None:
        settings = Config.load(config, {WORKER_ID: "0"} | dict(env))
        return settings.events, settings.tokens_per_block
    if deployment.state == "ended":
        raise ConfigError("the deployment has ended: start it again with flexkv launch")
    if deployment.feed != "nats":
        raise ConfigError(
            f"the feed of this deployment is {deployment.feed}: only engines that publish "
            "themselves (launch without --gpu-events) can be compared"
        )
    settings = settings_in(deployment, config, env)
    return settings.events, deployment.block_size or settings.tokens_per_block


def settings_in(
    deployment: Deployment | None, config: Path | None, env: Mapping[str, str]
) -> Config:
    """The settings by which the deployment is reached; its own come first.

    Raises:
        ConfigError: they can't be used.
    """
    own = deployment.env if deployment is not None else {}
    path = config or (deployment.config if deployment is not None else None)
    return Config.load(path, {WORKER_ID: "0"} | dict(env) | dict(own))


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
    env = {WORKER_ID: str(process.worker_id or 0)} | dict(process.env)
    if path := env.get(PATH_VARIABLE):
        env[PATH_VARIABLE] = str(folder_of(process.pid) / path)
    try:
        return Worker(process=process, config=Config.load(env=env))
    except ConfigError as error:
        return Worker(process=process, error=str(error))


def _deployment(content: Any) -> Deployment:
    state = str(content["state"])
    named = _processes(content)
    lost = [text for name, pid in named if (text := _lost(name, pid))] + list(_dead(content))
    workers = [one for one in content.get("workers") or [] if isinstance(one.get("pid"), int)]
    frontend = content.get("frontend") or {}
    logs = [one.get("log") for one in (frontend, *workers)]
    return Deployment(
        state=state,
        http=content.get("http"),
        feed=str(content.get("feed") or ""),
        env=_env(content),
        block_size=content.get("block_size"),
        config=_config_of(content),
        pids=frozenset(pid for _, pid in named),
        endpoints={w["pid"]: w["server_recv_port"] for w in workers if w.get("server_recv_port")},
        worker_ids={w["pid"]: w["worker_id"] for w in workers if w.get("worker_id")},
        logs=tuple(log for log in logs if log),
        lost=tuple(lost) if state != "ended" else (),
        starting={
            w["pid"]: f"worker {w.get('index')}" for w in workers if w.get("state") == "starting"
        },
    )


def _config_of(content: Any) -> Path | None:
    """The settings of all workers are alike in what others have to know."""
    paths = [one.get("config") for one in content.get("workers") or []]
    return next((Path(path) for path in paths if path and Path(path).is_file()), None)


def _processes(content: Any) -> list[tuple[str, int]]:
    found = [("launcher", content.get("pid")), ("nats-server", content.get("nats_pid"))]
    found.append(("etcd", content.get("etcd_pid")))
    found.append(("frontend", (content.get("frontend") or {}).get("pid")))
    found += [(f"worker {w.get('index')}", w.get("pid")) for w in content.get("workers") or []]
    return [(name, pid) for name, pid in found if isinstance(pid, int)]


def _lost(name: str, pid: int) -> str:
    return "" if Alive(pid).is_alive() else f"{name} (process {pid}) is gone"


def _dead(content: Any) -> Iterator[str]:
    for one in content.get("workers") or []:
        if one.get("state") == "dead":
            again = f"was started again {one.get('restarts')} times"
            yield f"worker {one.get('index')} has died, and {again} (log: {one.get('log')})"


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
