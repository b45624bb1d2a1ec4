"""End-to-end tests of a whole deployment: `make e2e-dynamo` makes the environment and runs them.

Some of them: make e2e-dynamo PYTEST_ARGS="-k nats -s"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.deployment.observing import Loop
from tests.deployment.stack import Plan, Stack
from tests.deployment.truth import Deployment

if TYPE_CHECKING:
    from collections.abc import Iterator

# Small enough that some dozen prompts go through every tier and out of the last.
DIRECT = Plan(
    gpu_blocks=64,
    cache={"num_cpu_blocks": 96, "enable_ssd": True, "num_ssd_blocks": 224},
    config={"num_log_interval_requests": 1},  # its lines are the counters of the stock class
)


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture(scope="session")
def direct(tmp_path_factory: pytest.TempPathFactory, loop: Loop) -> Iterator[Deployment]:
    """The direct feed: vLLM's own events are off, and flexkv publishes onto NATS."""
    with Stack(tmp_path_factory.mktemp("direct"), DIRECT, reference=True) as stack:
        deployment = Deployment(stack, loop)
        deployment.warm_up()
        yield deployment
