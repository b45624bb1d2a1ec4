"""The whole command, on a small deployment: real NATS, record and engine, planted processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from flexkv import cli
from flexkv.doctor import examine
from tests.doctor.sound import CONNECTOR
from tests.doctor.test_gather import METRICS, serving_metrics
from tests.dynamo.shelf import TOKENS_PER_BLOCK, Shelf, chain, feeding, settings

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator

    from flexkv.doctor.findings import Finding
    from flexkv.replay.deployment import FakeWorker, NatsServer
    from tests.doctor.conftest import Spawn

_FRONTEND = (
    *("-m", "dynamo.frontend", "--router-mode", "kv", "--migration-limit", "3"),
    *("--router-host-cache-hit-weight", "1.0"),
)
_WORKER = ("-m", "dynamo.vllm", "--block-size", str(TOKENS_PER_BLOCK), "--kv-transfer-config")


class Deployment:
    """What ``flexkv launch`` would have written down, and its worker."""

    def __init__(self, folder: Path, worker: subprocess.Popen[str], content: Any) -> None:
        self.folder = folder
        self.worker = worker
        self.content = content
        self.write()

    def write(self, **changed: Any) -> None:
        (self.folder / "deployment.json").write_text(json.dumps(self.content | changed))

    async def problems(self) -> list[Finding]:
        found = await examine.examine(self.folder, None, {})
        return [finding for finding in found if finding.level == "problem"]


@pytest_asyncio.fixture
async def deployment(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path, spawn: Spawn
) -> AsyncIterator[Deployment]:
    env = {
        "DYN_EVENT_PLANE": "nats",
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path),
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "NATS_SERVER": nats_server.url,
        "HOME": str(tmp_path),
    }
    config = tmp_path / "worker0.json"
    endpoint = f"ipc://{tmp_path}/engine"
    config.write_text(json.dumps({"server_recv_port": endpoint, "events": {"sink": "nats"}}))
    own = {
        "FLEXKV_CONFIG_PATH": str(config),
        "DYN_FPM_WORKER_ID": str(worker.worker_id),
    }
    locking = (
        "import fcntl, os\n"
        f"lock = open({str(tmp_path / 'engine.lock')!r}, 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print(os.getpid(), 'here', file=lock, flush=True)"
    )
    frontend = spawn(*_FRONTEND, env=env)
    planted = spawn(*_WORKER, CONNECTOR, env=env | own, program=locking)
    shelf = Shelf()
    shelf.store(chain(5))
    with serving_metrics(METRICS.replace('status="invalid_block"} 1e0', 'status="x"} 0')) as url:
        content = {
            "state": "ready",
            "pid": os.getpid(),
            "http": url,
            "feed": "nats",
            "nats": nats_server.url,
            "nats_pid": nats_server.pid,
            "discovery": {"backend": "file", "path": str(tmp_path)},
            "namespace": "flexkv",
            "env": env,
            "frontend": {"pid": frontend.pid, "log": None},
            "workers": [{"index": 0, "pid": planted.pid, "log": None}],
        }
        async with feeding(shelf, settings(nats_server.url, tmp_path, worker.worker_id)):
            yield Deployment(tmp_path, planted, content)


async def test_a_sound_deployment_is_no_problem_and_exits_with_0(deployment: Deployment) -> None:
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("flexkv"),
        *("doctor", "--folder", str(deployment.folder), "--json"),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    document = json.loads(out)
    wrong = [one for one in document["findings"] if one["level"] == "problem"]
    assert wrong == []
    assert process.returncode == 0
    said = {one["check"]: one["seen"] for one in document["findings"]}
    assert "believes what the engine holds (5 blocks in host_pinned)" in said["index"]
    assert said["endpoints"].endswith(f"belongs to process {deployment.worker.pid}")
    assert said["events"].endswith("has applied 5 KV events")
    assert "1 workers, 1 sources" in said["discovery"]
    assert said["nats"].startswith("nats-server 2.")


async def test_what_is_planted_in_it_is_found_alone(deployment: Deployment, spawn: Spawn) -> None:
    other = spawn(*_FRONTEND, env=deployment.content["env"] | {"DYN_EVENT_PLANE": "zmq"})
    deployment.write(frontend={"pid": other.pid, "log": None})
    (found,) = await deployment.problems()
    assert found.check == "event plane"
    assert f"frontend {other.pid}: zmq" in found.seen

    os.kill(other.pid, 9)
    other.wait()
    deployment.write()
    (record,) = (deployment.folder / "v1" / "event_sources").iterdir()
    content = json.loads(record.read_text())
    content["publisher_id"] += 1
    twin = record.with_name("twin")
    twin.write_text(json.dumps(content))
    found = next(one for one in await deployment.problems() if one.check == "records")
    assert "has 2 event sources" in found.seen
    twin.unlink()

    deployment.worker.kill()
    deployment.worker.wait()
    (found,) = await deployment.problems()
    assert found.seen == f"worker 0 (process {deployment.worker.pid}) is gone"


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["flexkv", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_bad_usage_exits_with_2_and_says_what_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--folder", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert "deployment.json: No such file" in capsys.readouterr().err
    assert run("--config", str(tmp_path / "no.json"), monkeypatch=monkeypatch) == 2
    assert "there is no file" in capsys.readouterr().err
    assert run("--fodler", "x", monkeypatch=monkeypatch) == 2


def test_settings_that_are_wrong_are_a_problem_and_exit_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "flexkv.json"
    config.write_text('{"cache_config": {"evict_ratio": 2}}')
    assert run("--config", str(config), monkeypatch=monkeypatch) == 1
    assert "problem  settings: " in (out := capsys.readouterr().out)
    assert "evict_ratio" in out


def test_nats_that_is_away_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "flexkv.json"
    events = {"sink": "nats", "nats_servers": "nats://127.0.0.1:1", "discovery_path": str(tmp_path)}
    config.write_text(json.dumps({"events": events}))
    assert run("--config", str(config), "--json", monkeypatch=monkeypatch) == 1
    document = json.loads(capsys.readouterr().out)
    assert "nats" in {one["check"] for one in document["findings"] if one["level"] == "problem"}
