"""Discovery in etcd, which is what `dynamo.vllm` takes unless it is told otherwise."""

from __future__ import annotations

import contextlib
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from tests.deployment.all_tiers import HOST, SSD, AllTiers
from tests.deployment.stack import Plan, Stack
from tests.deployment.truth import Deployment, report

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deployment.observing import Loop

SETTLES_S = 15.0
CACHE = {"num_cpu_blocks": 96, "enable_ssd": True, "num_ssd_blocks": 160}


HAS_ETCD = shutil.which("etcd") is not None


@pytest.mark.skipif(not HAS_ETCD, reason="no etcd (Debian's etcd-server has it)")
@pytest.mark.nightly
@pytest.mark.parametrize("gpu_events", [False, True], ids=["direct", "GPU events"])
def test_the_index_is_true_with_etcd(loop: Loop, tmp_path: Path, *, gpu_events: bool) -> None:
    plan = Plan(gpu_events=gpu_events, cache=CACHE, launch_options=["--with-etcd"])
    with contextlib.ExitStack() as exits:
        stack = exits.enter_context(Stack(tmp_path, plan))
        deployment = Deployment(stack, loop)
        tiers = exits.enter_context(AllTiers(deployment))
        time.sleep(0.5)  # the streams' readers have connected
        observer = exits.enter_context(deployment.observer())
        observer.wait_for_workers(stack.worker_ids())
        for _ in range(70):
            deployment.ask(deployment.fresh())
        texts = list(deployment.ids)
        seconds = tiers.until_true(observer, SETTLES_S, tiers.step_all, texts=texts)
        for where in tiers.wheres():
            held = tiers.held(where)
            counts = {tier: len(blocks) for tier, blocks in held.items()}
            report(f"{where}, after {seconds:.2f} s: {counts}")
            assert held[HOST]
            assert held[SSD] - held[HOST]
