"""A deployment without a fault: two workers, a frontend and NATS on one machine, as facts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexkv.config import Config
from flexkv.doctor.facts import (
    Answer,
    Discovery,
    Endpoint,
    Facts,
    Frontend,
    Installation,
    Listener,
    Machine,
    Nats,
    Process,
    Record,
    SsdFolder,
    Worker,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

SHARED = {
    "DYN_EVENT_PLANE": "nats",
    "DYN_DISCOVERY_BACKEND": "file",
    "DYN_FILE_KV": "/run/kv",
    "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
    "DYN_SYSTEM_PORT": "9100",
}
CONNECTOR = json.dumps({"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"})
WORKER = ("python", "-m", "dynamo.vllm", "--block-size", "32", "--kv-transfer-config", CONNECTOR)
FRONTEND = (
    *("python", "-m", "dynamo.frontend", "--router-mode", "kv", "--migration-limit", "3"),
    *("--router-host-cache-hit-weight", "1.0"),
)
WORKER_PID, OTHER_PID, FRONTEND_PID, NATS_PID = 100, 200, 300, 400


def settings(**sections: Any) -> Config:
    cache = {"enable_ssd": True, "num_ssd_blocks": 10, "ssd_cache_dir": "/data"}
    whole = {"cache_config": cache, "transfers": {"huge_pages": True}} | sections
    return Config.from_mapping(whole, SHARED | {"DYN_FPM_WORKER_ID": "7"})


def worker(pid: int, worker_id: int) -> Process:
    return Process(
        pid=pid,
        role="worker",
        command=WORKER,
        env=SHARED,
        group=pid,
        family=frozenset({pid, pid + 1}),
        worker_id=worker_id,
        memlock=2**30,
    )


def card(worker_id: int, **changed: Any) -> Record:
    inner = {"kv_cache_block_size": 32, "worker_type": "aggregated"} | changed
    where = {"namespace": "dynamo", "component": "backend", "endpoint": "generate"}
    content = where | {"instance_id": worker_id, "card_json": inner}
    return Record(place=f"/run/kv/v1/mdc/{worker_id}", content=content, age_s=1.0)


def source(worker_id: int, *, publisher_id: int = 1, **changed: Any) -> Record:
    where = {"namespace": "dynamo", "component": "backend", "name": "generate"}
    metadata: dict[str, Any] = {
        "kv_state_endpoint": where,
        "worker": {"worker_id": worker_id, "dp_rank": 0},
        "flexkv_owner": {"host": "here", "pid": WORKER_PID + 1},
        "recovery_target": {"transport": {"tcp": "127.0.0.1:9000/1/dynamo/backend/source"}},
    }
    content = {"topic": "kv-events", "publisher_id": publisher_id, "metadata": metadata | changed}
    return Record(place=f"/run/kv/v1/event_sources/{publisher_id}", content=content, age_s=1.0)


def without(record: Record, key: str) -> Record:
    metadata = {k: v for k, v in record.content["metadata"].items() if k != key}
    return replace(record, content={**record.content, "metadata": metadata})


def sound(**changed: Any) -> Facts:
    processes = [
        worker(WORKER_PID, 7),
        worker(OTHER_PID, 8),
        Process(pid=FRONTEND_PID, role="frontend", command=FRONTEND, env=SHARED),
        Process(pid=NATS_PID, role="nats", command=("nats-server",), env={}),
    ]
    facts = Facts(
        installations=[installation()],
        config=settings(),
        state="ready",
        feed="nats",
        processes=processes,
        workers=[Worker(process=process, config=settings()) for process in processes[:2]],
        listeners=[Listener(host="127.0.0.1", port=4222, process=processes[3])],
        discovery=Discovery(
            backend="file",
            where="/run/kv",
            cards=[card(7), card(8)],
            sources=[source(7, publisher_id=1), source(8, publisher_id=2)],
        ),
        endpoints=[
            Endpoint(endpoint=f"ipc:///run/{pid}", worker=f"worker {pid}", owner=pid + 1)
            for pid in (WORKER_PID, OTHER_PID)
        ],
        nats=Nats(servers="nats://127.0.0.1:4222", greeting={"version": "2.15.1"}),
        answers=[Answer(worker_id=7, dp_rank=0, num_held={"host_pinned": 3}, agrees=True)],
        frontends=[Frontend(url="http://127.0.0.1:8000", applied={("stored", "ok"): 5})],
        machine=machine(),
        pool_nbytes=2**20,
    )
    return replace(facts, **changed)


def installation(**changed: Any) -> Installation:
    versions: Mapping[str, str] = {
        "ai-dynamo": "1.6.1",
        "ai-dynamo-runtime": "1.6.1",
        "nats-py": "2.16.0",
        "torch": "2.13.0+cu130",
        "vllm": "0.33.0",
    }
    whole = {
        "interpreter": "/venv/bin/python",
        "python": "3.12.1",
        "versions": versions,
        "nats_server": "nats-server: v2.15.1",
        "driver": "580.65.06",
    }
    return Installation(**(whole | changed))


def machine(**changed: Any) -> Machine:
    whole = {
        "ssd_folders": [SsdFolder(path="/data")],
        "has_uring_extra": True,
        "shmem_enabled": "always within_size [advise] never",
        "memlock": None,
        "available": {"MemAvailable": 2**34},
        "card_folder": "/var/me/.cache/dynamo/mdc",
    }
    return Machine(**(whole | changed))


def with_worker(*more: str, env: Mapping[str, str] | None = None, **changed: Any) -> Facts:
    """The first worker has more options, other variables, or other settings."""
    facts = sound()
    process = replace(
        facts.processes[0], command=(*WORKER, *more), env=SHARED if env is None else env
    )
    config = changed.pop("config", settings())
    first = Worker(process=process, config=config, error=changed.pop("error", ""))
    return replace(
        facts,
        processes=[process, *facts.processes[1:]],
        workers=[first, *facts.workers[1:]],
        **changed,
    )


def with_frontend(*command: str, env: Mapping[str, str] | None = None) -> Facts:
    facts = sound()
    one = Process(
        pid=FRONTEND_PID,
        role="frontend",
        command=command or FRONTEND,
        env=SHARED if env is None else env,
    )
    return replace(facts, processes=[*facts.processes[:2], one, facts.processes[3]])


def with_sources(*sources: Record) -> Facts:
    facts = sound()
    assert facts.discovery is not None
    return replace(facts, discovery=replace(facts.discovery, sources=sources))


def with_cards(*cards: Record) -> Facts:
    facts = sound()
    assert facts.discovery is not None
    return replace(facts, discovery=replace(facts.discovery, cards=cards))
