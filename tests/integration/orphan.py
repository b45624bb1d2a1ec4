"""A process that starts another one, as vLLM starts its EngineCore, with an engine in it.

    python -m tests.integration.orphan ENDPOINT

Says `PID` of the other when that serves; both stay until they are ended.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

from tests.integration.roles import roles


def engine_core(endpoint: str) -> None:
    with roles(endpoint) as both:
        print(os.getpid(), flush=True)  # noqa: T201  # what the test waits for
        while both.service.alive:
            time.sleep(0.01)


if __name__ == "__main__":
    core = multiprocessing.get_context("spawn").Process(target=engine_core, args=[sys.argv[1]])
    core.start()
    core.join()
