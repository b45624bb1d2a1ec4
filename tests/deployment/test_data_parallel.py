"""One worker with two data-parallel ranks: a router has both, whichever feed tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.deployment.all_tiers import GPU, HOST, SSD, AllTiers
from tests.deployment.stack import Plan, Stack
from tests.deployment.truth import Deployment, report

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deployment.observing import Loop

SETTLES_S = 15.0
CACHE = {"num_cpu_blocks": 96, "enable_ssd": True, "num_ssd_blocks": 128}


@pytest.mark.nightly
@pytest.mark.parametrize("gpu_events", [False, True], ids=["direct", "GPU events"])
def test_both_ranks_are_in_the_index(loop: Loop, tmp_path: Path, *, gpu_events: bool) -> None:
    plan = Plan(num_workers=1, data_parallel_size=2, gpu_events=gpu_events, cache=CACHE)
    with Stack(tmp_path, plan) as stack:
        deployment = Deployment(stack, loop)
        with AllTiers(deployment) as tiers, deployment.observer() as observer:
            observer.wait_for_workers(stack.worker_ids())
            for _ in range(50):
                deployment.ask(deployment.fresh())
            tiers.step_all()
            seconds = tiers.until_true(observer, SETTLES_S, tiers.step_all)
            for _, rank in tiers.wheres():
                believed = observer.believed(stack.worker_id(0), rank)
                counts = {tier: len(blocks) for tier, blocks in believed.items()}
                report(f"rank {rank}, after {seconds:.2f} s: {counts}")
                assert believed[HOST]
                assert believed[SSD] - believed[HOST]
                assert bool(believed[GPU]) == gpu_events
