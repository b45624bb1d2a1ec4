"""Discovery in etcd, which is what `dynamo.vllm` takes unless it is told otherwise."""

from __future__ import annotations

import contextlib
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from tests.deployment.all_tiers import HOST, SSD, AllTiers
from tests.deployment.stack import Plan, Stack, low_port
from tests.deployment.truth import Deployment, report
from tests.e2e.driving import Process, http

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.deployment.observing import Loop

SETTLES_S = 15.0
CACHE = {"num_cpu_blocks": 96, "enable_ssd": True, "num_ssd_blocks": 160}


@pytest.fixture
def etcd_url(tmp_path: Path) -> Iterator[str]:
    program = shutil.which("etcd")
    if program is None:
        pytest.skip("no etcd (Debian's etcd-server has it)")
    client, peer = (f"http://127.0.0.1:{low_port()}" for _ in range(2))
    command = [
        program,
        *("--data-dir", tmp_path / "etcd", "--log-level", "error"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}"),
    ]
    with Process(command, tmp_path / "etcd.log", {}) as process:
        process.wait_for(lambda: http(f"{client}/health", deadline_s=5)[0] == 200, 30, "health")
        yield client


@pytest.mark.nightly
@pytest.mark.parametrize("gpu_events", [False, True], ids=["direct", "GPU events"])
def test_the_index_is_true_with_etcd(
    loop: Loop, tmp_path: Path, etcd_url: str, *, gpu_events: bool
) -> None:
    plan = Plan(gpu_events=gpu_events, cache=CACHE, etcd_url=etcd_url)
    with contextlib.ExitStack() as exits:
        stack = exits.enter_context(Stack(tmp_path / "stack", plan))
        deployment = Deployment(stack, loop)
        tiers = exits.enter_context(AllTiers(deployment))
        time.sleep(0.5)  # the streams' readers have connected
        observer = exits.enter_context(deployment.observer())
        observer.wait_for_workers(stack.worker_ids())
        for _ in range(70):
            deployment.ask(deployment.fresh())
        seconds = tiers.until_true(observer, SETTLES_S, tiers.step_all)
        assert tiers.wrong_overlaps(observer, deployment.ids) == []
        for where in tiers.wheres():
            held = tiers.held(where)
            counts = {tier: len(blocks) for tier, blocks in held.items()}
            report(f"{where}, after {seconds:.2f} s: {counts}")
            assert held[HOST]
            assert held[SSD] - held[HOST]
