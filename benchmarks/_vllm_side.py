"""One side of benchmarks/vllm_overhead.py: an in-process vLLM that does what it is told.

The first line is a case as tests/e2e/child.py takes it, the others are turns.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.e2e.child import Engine


class Side:
    def __init__(self, case: dict[str, Any]) -> None:
        if config_path := case.get("config_path"):
            os.environ["FLEXKV_CONFIG_PATH"] = config_path
        self.engine = Engine(case)
        core = self.engine.core
        self._step = core.step_fn
        core.step_fn = self._timed_step
        self._steps_s: list[float] = []

    def turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Run its prompts; the seconds of all of it, and of each step that computed something."""
        if turn.get("reset"):
            self.engine.reset()
        rng = random.Random(turn["seed"])
        prompts = [
            [rng.randrange(3, 500) for _ in range(turn["num_tokens"])]
            for _ in range(turn["num_prompts"])
        ]
        self.engine.set_num_new_tokens(turn["num_new_tokens"])
        self._steps_s = []
        start_s = time.perf_counter()
        result = self.engine.run(prompts)
        seconds = time.perf_counter() - start_s
        steps_s = self._steps_s
        self.engine.drain()
        return {"seconds": seconds, "steps_s": steps_s, "external": result["external"]}

    def _timed_step(self) -> Any:
        start_s = time.perf_counter()
        outputs, executed = self._step()
        if executed:
            self._steps_s.append(time.perf_counter() - start_s)
        return outputs, executed


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        side: Side | None = None
        for line in sys.stdin:
            order = json.loads(line)
            if side is None:
                side, answer = Side(order), {}
            else:
                answer = side.turn(order)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        if side is not None:
            side.engine.close()


if __name__ == "__main__":
    main()
