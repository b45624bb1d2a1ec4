"""What every benchmark shares: --json and --quick, one line per figure, the exit status."""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median, quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Report:
    """Prints figures as they come; ``finish`` exits with 1 if one missed its target."""

    def __init__(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--json", action="store_true", help="one JSON object per line")
        parser.add_argument("--quick", action="store_true", help="smaller, for a first look")
        options = parser.parse_args()
        self.quick: bool = options.quick
        self._json: bool = options.json
        self._missed = 0

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        better: str = "lower",
        target: float | None = None,
    ) -> None:
        """One figure; with a ``target`` it is decided, ``better`` says in which direction."""
        ok = target is None or (value <= target if better == "lower" else value >= target)
        self._missed += not ok
        if self._json:
            row = {"name": name, "value": value, "unit": unit, "better": better}
            print(json.dumps(row | {"target": target, "ok": ok}), flush=True)
        else:
            goal = "" if target is None else f"  target {target:g}: {'ok' if ok else 'MISSED'}"
            print(f"{name:<58} {value:>12.4g} {unit}{goal}", flush=True)

    def add_ratio(self, name: str, samples_s: Sequence[float], c_s: float, target: float) -> None:
        """The median in multiples of *c*, decided; median and 99th percentile beside it."""
        self.add(f"{name} / c", median(samples_s) / c_s, "c", target=target)
        self.add(f"{name} p50", 1e6 * median(samples_s), "us")
        self.add(f"{name} p99", 1e6 * percentile(samples_s, 99), "us")

    def finish(self) -> None:
        """Exit: 1 if a target was missed."""
        sys.exit(1 if self._missed else 0)


def percentile(samples: Sequence[float], percent: int) -> float:
    """A percentile (1 to 99) of at least two samples."""
    return quantiles(samples, n=100, method="inclusive")[percent - 1]


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def calibration() -> float:
    """The reference loop *c*, in seconds: absolute times are compared as multiples of it."""
    numbers = {i: i for i in range(1000)}

    def loop() -> int:
        total = 0
        for i in range(1000):
            total += numbers[i]
        return total

    return median(timed(loop) for _ in range(500))
