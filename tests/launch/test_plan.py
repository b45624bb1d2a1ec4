"""What is planned, and what is refused, with which words. Nothing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flexkv.errors import ConfigError
from flexkv.launch.footprint import kv_nbytes_per_token
from flexkv.launch.plan import document_of, plan_of
from flexkv.launch.restarts import Restarts
from tests.launch.conftest import machine

if TYPE_CHECKING:
    from flexkv.launch.plan import Plan, Program
    from tests.launch.conftest import OptionsMaker

LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}
KEYS = ("server_recv_port", "config", "ssd", "system_port")


def value_of(program: Program, option: str) -> str:
    return program.argv[program.argv.index(option) + 1]


def settings_of(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(text) for text in plan.files.values()]


def test_flexkv_is_the_source_unless_gpu_events_are_asked_for(options: OptionsMaker) -> None:
    plan = plan_of(options(), machine())
    for worker, settings in zip(plan.workers, settings_of(plan), strict=True):
        events = json.loads(value_of(worker.program, "--kv-events-config"))
        assert events == {"enable_kv_cache_events": False}
        assert settings["events"]["sink"] == "nats"
        connector = json.loads(value_of(worker.program, "--kv-transfer-config"))
        assert connector == {"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"}
    assert value_of(plan.frontend, "--router-host-cache-hit-weight") == "1.0"
    assert value_of(plan.frontend, "--migration-limit") == "3"
    assert document_of(plan)["feed"] == "nats"


def test_gpu_events_put_flexkv_into_vllms_stream(options: OptionsMaker, tmp_path: Path) -> None:
    plan = plan_of(options(gpu_events=True), machine())
    endpoints = [
        json.loads(value_of(worker.program, "--kv-events-config"))["endpoint"]
        for worker in plan.workers
    ]
    assert endpoints == [f"ipc://{tmp_path}/d/kv{index}.ipc" for index in range(2)]
    assert {settings["events"]["sink"] for settings in settings_of(plan)} == {"vllm"}
    assert document_of(plan)["feed"] == "vllm"


@pytest.mark.parametrize(("listen_all", "host"), [(False, "[::ffff:127.0.0.1]"), (True, "*")])
def test_with_several_ranks_the_events_take_ports_that_no_two_share(
    options: OptionsMaker, *, listen_all: bool, host: str
) -> None:
    wanted = options(
        gpu_events=True, data_parallel_size=2, gpus_per_worker=2, listen_all=listen_all
    )
    plan = plan_of(wanted, machine())
    ports = []
    for worker in plan.workers:
        events = json.loads(value_of(worker.program, "--kv-events-config"))["endpoint"]
        assert events.startswith(f"tcp://{host}:")
        first = int(events.rpartition(":")[2])
        ports += [first, first + 1]
        assert "--tensor-parallel-size" not in worker.program.argv
    assert len(set(ports)) == 4


def test_every_process_has_the_same_planes_and_listens_here_only(options: OptionsMaker) -> None:
    plan = plan_of(options(), machine())
    for program in (plan.frontend, *(worker.program for worker in plan.workers)):
        assert program.env["DYN_EVENT_PLANE"] == value_of(program, "--event-plane") == "nats"
        assert program.env["DYN_REQUEST_PLANE"] == value_of(program, "--request-plane") == "tcp"
        assert value_of(program, "--discovery-backend") == "file"
        assert program.env["DYN_TCP_RESPONSE_STREAM_HOST"] == "127.0.0.1"
    hosts = {host for program in plan.programs for host, _, _ in program.ports}
    assert hosts == {"127.0.0.1"}


def test_the_log_has_no_line_for_each_question_of_ours(options: OptionsMaker) -> None:
    assert plan_of(options(), machine()).env["DYN_LOG"].endswith("service_v2=warn")
    assert plan_of(options(), machine(env={"DYN_LOG": "debug"})).env["DYN_LOG"] == "debug"


def test_listen_all_opens_them(options: OptionsMaker) -> None:
    plan = plan_of(options(listen_all=True), machine())
    assert {host for program in plan.programs for host, _, _ in program.ports} == {"0.0.0.0"}
    assert "DYN_TCP_RPC_HOST" not in plan.env


def test_gpus_are_slices_of_what_is_visible(options: OptionsMaker) -> None:
    plan = plan_of(options(gpus_per_worker=2, first_gpu=1), machine(num_gpus=5))
    assert [w.program.env["CUDA_VISIBLE_DEVICES"] for w in plan.workers] == ["1,2", "3,4"]
    assert value_of(plan.workers[0].program, "--tensor-parallel-size") == "2"
    visible = machine(env={"CUDA_VISIBLE_DEVICES": "4,6"})
    plan = plan_of(options(), visible)
    assert [w.program.env["CUDA_VISIBLE_DEVICES"] for w in plan.workers] == ["4", "6"]


def test_each_worker_has_an_endpoint_folder_and_port_of_its_own(options: OptionsMaker) -> None:
    template = {"cache_config": {"enable_ssd": True, "num_ssd_blocks": 9, "num_cpu_blocks": 3}}
    plan = plan_of(options(template=template), machine())
    first, second = document_of(plan)["workers"]
    assert all(first[key] != second[key] and first[key] for key in KEYS)
    assert first["ssd"].endswith("/d/ssd/worker0")
    flat = {"enable_flexkv": True, "ssd_cache_dir": "/a;/b/", "cpu_cache_gb": 0.25}
    mixed = flat | {"cache": {"enable_ssd": True, "num_ssd_blocks": 9}}
    plan = plan_of(options(template=mixed), machine())
    assert document_of(plan)["workers"][1]["ssd"] == ["/a/worker1", "/b/worker1"]
    placed = {"server_recv_port": "ipc:///tmp/kv_{worker}"}
    plan = plan_of(options(template=placed), machine())
    assert document_of(plan)["workers"][1]["server_recv_port"] == "ipc:///tmp/kv_1"


def test_the_templates_block_size_is_everybodys(options: OptionsMaker) -> None:
    plan = plan_of(options(template={"tokens_per_block": 16}), machine())
    assert plan.block_size == 16
    assert value_of(plan.workers[0].program, "--block-size") == "16"
    assert settings_of(plan)[0]["cache_config"]["tokens_per_block"] == 16


def test_without_flexkv_there_is_none(options: OptionsMaker) -> None:
    plan = plan_of(options(without_flexkv=True), machine())
    assert plan.files == {}
    for worker in plan.workers:
        assert "--kv-transfer-config" not in worker.program.argv
        assert "FLEXKV_CONFIG_PATH" not in worker.program.env
    assert "--no-router-kv-events" in plan.frontend.argv


def test_reused_servers_are_not_started(options: OptionsMaker) -> None:
    reused = options(nats_url="nats://127.0.0.1:9", etcd_url="http://127.0.0.1:8")
    plan = plan_of(reused, machine(programs={}))
    assert plan.servers == ()
    assert plan.env["ETCD_ENDPOINTS"] == "http://127.0.0.1:8"
    assert plan.env["DYN_DISCOVERY_BACKEND"] == "etcd"
    own = plan_of(options(with_etcd=True), machine())
    assert [program.name for program in own.servers] == ["nats", "etcd"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--connector", "flexkv"), ["--connector flexkv", "gone", "--kv-transfer-config"]),
        (("--no-enable-prefix-caching",), ["--no-enable-prefix-caching", "no block is ever kept"]),
        (("--no_enable_prefix_caching",), ["no block is ever kept"]),
        (("--block-size", "16"), ["--block-size 16", "blocks of 64 tokens"]),
        (("--block_size=16",), ["--block_size=16", "blocks of 64 tokens"]),
        (("--event-plane", "zmq"), ["--event-plane zmq", "0 % hits"]),
        (("--kv-transfer-config", "{}"), ["--own-connector", "--without-flexkv"]),
        (("--kv-events-config={}",), ["--gpu-events"]),
        (("--data-parallel-size", "2"), ["before the --"]),
        (("stray",), ["unexpected argument stray"]),
    ],
)
def test_extra_arguments_that_would_break_it(
    options: OptionsMaker, extra: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of(options(extra=extra), machine())
    assert all(word in str(refused.value) for word in words)


def test_harmless_extra_arguments_reach_every_worker(options: OptionsMaker) -> None:
    extra = ("--dtype", "float32", "--block-size", "64", "--event-plane=nats", "-tp", "1")
    plan = plan_of(options(extra=extra), machine())
    assert all(worker.program.argv[-len(extra) :] == extra for worker in plan.workers)


@pytest.mark.parametrize(
    ("changed", "env", "words"),
    [
        ({}, {"DYN_EVENT_PLANE": "zmq"}, ["DYN_EVENT_PLANE is zmq", "0 % hits"]),
        ({}, {"DYN_REQUEST_PLANE": "nats"}, ["DYN_REQUEST_PLANE is nats"]),
        ({}, {"DYN_CONNECTOR": "flexkv"}, ["DYN_CONNECTOR", "--kv-transfer-config"]),
        ({}, {"DYN_KV_CACHE_BLOCK_SIZE": "16"}, ["DYN_KV_CACHE_BLOCK_SIZE is 16"]),
        ({"system_port": 32767}, {}, ["32768", "above 32767", "give 32766 or less"]),
        ({"http_port": 8082}, {}, ["--http-port 8082", "8081 to 8082"]),
        ({"gpus_per_worker": 3}, {}, ["need 6", "the machine has 4"]),
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}, ["CUDA_VISIBLE_DEVICES=0 has 1"]),
        (
            {"template": {"server_recv_port": "ipc:///tmp/kv"}},
            {},
            ["ipc:///tmp/kv for worker 0 and worker 1", "{worker}"],
        ),
        (
            {
                "template": {"server_recv_port": "tcp://127.0.0.1:500{worker}"},
                "data_parallel_size": 2,
                "gpus_per_worker": 2,
            },
            {},
            ["tcp://127.0.0.1:5001 for worker 0 and worker 1"],
        ),
        (
            {"template": {"tokens_per_block": 16}, "block_size": 32},
            {},
            ["--block-size is 32", "is 16"],
        ),
        (
            {"block_size": 48, "gpus_per_worker": 0},
            {},
            ["have 48 tokens", "multiples of 32", "--block-size"],
        ),
        ({"template": {"events": {"sink": "zmq"}}}, {}, ["events.sink", "zmq", "leave it out"]),
        (
            {"template": {"events": {"nats_servers": "nats://other:4222"}}},
            {},
            ["events.nats_servers", "other:4222", "leave it out"],
        ),
        (
            {"template": {"events": {"worker_id": 7}}},
            {},
            ["events.worker_id in the template is 7", "leave it out"],
        ),
        (
            {"template": {"events": {"component": "vllm"}}},
            {},
            ["events.component in the template is vllm", "leave it out"],
        ),
        (
            {"template": {"events": {"recovery_port": 5000}}},
            {},
            ["events.recovery_port", "5000", "leave it out"],
        ),
        ({"template": {"num_cpu_block": 3}}, {}, ["num_cpu_block", "did you mean"]),
        ({"nats_url": "a:4222"}, {}, ['--nats is "a:4222"', "nats://HOST:PORT"]),
        ({"etcd_url": "a:2379"}, {}, ['--etcd is "a:2379"', "http://HOST:PORT"]),
        ({"etcd_url": "http://a:1", "with_etcd": True}, {}, ["give one of them"]),
        ({"folder": Path("/" + "x" * 100)}, {}, ["shorter one"]),
    ],
)
def test_what_can_not_be_had(
    options: OptionsMaker, changed: dict[str, Any], env: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of(options(**changed), machine(env=env, num_gpus=4))
    assert [word for word in words if word not in str(refused.value)] == []


def test_small_blocks_on_a_cpu_are_mlas(options: OptionsMaker) -> None:
    small = options(block_size=16, gpus_per_worker=0)
    assert plan_of(small, machine(model={"kv_lora_rank": 512})).block_size == 16
    with pytest.raises(ConfigError, match="have 16 tokens"):
        plan_of(small, machine(model=LLAMA))


def test_all_that_is_wrong_is_said_at_once(options: OptionsMaker) -> None:
    with pytest.raises(ConfigError, match="2 settings") as refused:
        plan_of(options(extra=("--connector", "flexkv"), system_port=40000), machine())
    assert "40001" in str(refused.value)


def test_host_tiers_that_do_not_fit(options: OptionsMaker) -> None:
    # 128 KiB a token, 64 tokens a block, 10,240 blocks: 80 GiB for each worker
    small = machine(model=LLAMA, available_bytes={"MemAvailable": 159 * 2**30})
    with pytest.raises(ConfigError, match=r"take 160.0 GiB, and 159.0 GiB .* by MemAvailable"):
        plan_of(options(), small)
    enough = machine(model=LLAMA, available_bytes={"MemAvailable": 160 * 2**30})
    assert plan_of(options(), enough).notes == ()
    bytes_said = {"cpu_cache_gb": 100}
    with pytest.raises(ConfigError, match=r"take 200.0 GiB"):
        plan_of(options(template=bytes_said), machine(available_bytes={"x": 199 * 2**30}))
    assert any("not checked" in note for note in plan_of(options(), machine()).notes)


def test_sizes_of_a_models_cache() -> None:
    assert kv_nbytes_per_token(LLAMA, None) == 32 * 2 * 8 * 128 * 2
    assert kv_nbytes_per_token(LLAMA, "fp8_e4m3") == 32 * 2 * 8 * 128
    assert kv_nbytes_per_token({"text_config": LLAMA}, "float32") == 32 * 2 * 8 * 128 * 4
    mla = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert kv_nbytes_per_token(mla, "bfloat16", num_ranks=8) == 61 * 576 * 2 * 8
    assert kv_nbytes_per_token({}, None) is None


def test_five_restarts_in_ten_minutes_each_after_a_longer_wait() -> None:
    restarts = Restarts()
    assert [restarts.delay_s(now_s) for now_s in range(6)] == [1, 2, 4, 8, 16, None]
    assert restarts.delay_s(601.5) == 8  # those at 0 and 1 count no longer
