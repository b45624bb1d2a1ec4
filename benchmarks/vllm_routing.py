"""What flexkv saves behind Dynamo's router: tokens served from cache, and time to first token.

The same conversations, more than the GPU caches hold, are asked of deployments of two workers that
`flexkv launch` starts one after another: KV routing with flexkv (both feeds), KV routing without,
round-robin without. Needs the environment of `make e2e-dynamo`; no GPU.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks._conversations import Outcome, Workload, ask_all
from benchmarks._model import MODEL
from benchmarks._report import Report
from tests.e2e.driving import environment, free_port
from tests.e2e.models import make_model

SIDES = {
    "KV routing and flexkv": [],
    "KV routing and flexkv, --gpu-events": ["--gpu-events"],
    "KV routing alone": ["--without-flexkv", "--gpu-events"],
    "round-robin": ["--without-flexkv", "--router-mode", "round-robin"],
}
BLOCK_SIZE = 32
GPU_BLOCKS = 64  # of each worker: 2,048 tokens
READY_S = 240.0
_FLEXKV = "from flexkv.cli import main; main()"


class Deployment:
    """`flexkv launch` with two workers, ready when the ``with`` block begins."""

    def __init__(self, folder: Path, model: Path, options: list[str]) -> None:
        self._folder = folder
        self._options = [
            "--model",
            str(model),
            "--served-model-name=bench",
            "--workers=2",
            "--gpus-per-worker=0",
            f"--folder={folder}",
            f"--http-port={free_port()}",
            f"--system-port={20000 + free_port() % 10000}",
            f"--block-size={BLOCK_SIZE}",
            f"--config={folder}.json",
            f"--ready-timeout={READY_S:g}",
            *options,
            "--",
            f"--hf-overrides={json.dumps(MODEL)}",
            "--load-format=dummy",
            "--dtype=float32",
            "--enforce-eager",
            "--max-model-len=2016",  # what the GPU cache holds: one block is vLLM's own
            "--max-num-seqs=8",
            f"--num-gpu-blocks-override={GPU_BLOCKS}",
        ]
        config = {"cache_config": {"num_cpu_blocks": 1024}}
        Path(f"{folder}.json").write_text(json.dumps(config))
        self._log = Path(f"{folder}.log")

    def __enter__(self) -> str:
        """The frontend's URL."""
        with self._log.open("wb") as log:
            command = [sys.executable, "-c", _FLEXKV, "launch", *self._options]
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment({}),
                text=True,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ready: "):
                return line.split()[1]
        self.__exit__()
        raise SystemExit(f"it did not start:\n{self._log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)


def warm_up(url: str) -> None:
    """The first requests of a worker are slow, and these prompts are nobody else's."""
    ask_all(url, "bench", Workload(num_sessions=8, num_turns=1, words=8, seed=99), at_once=4)


def main() -> None:
    """Ask every deployment the same, and once more in the reverse order."""
    report = Report(__doc__)
    workload = Workload(num_sessions=16, num_turns=4 if report.quick else 6, words=32)
    outcomes: dict[str, list[Outcome]] = {side: [] for side in SIDES}
    orders = [list(SIDES)] if report.quick else [list(SIDES), list(reversed(SIDES))]
    with tempfile.TemporaryDirectory(prefix="flexkv-bench-") as name:
        model = make_model(Path(name) / "models", "llama")
        for order in orders:
            for side in order:
                folder = Path(name) / "deployment"
                with Deployment(folder, model, SIDES[side]) as url:
                    warm_up(url)
                    outcomes[side].append(ask_all(url, "bench", workload, at_once=2))
                shutil.rmtree(folder, ignore_errors=True)
    add_figures(report, outcomes)
    report.finish()


def add_figures(report: Report, outcomes: dict[str, list[Outcome]]) -> None:
    """Shares and means of each side, and what flexkv's are of the others'."""
    cached = {}
    ttft_s = {}
    for side, runs in outcomes.items():
        cached[side] = sum(run.cached for run in runs) / sum(run.prompt for run in runs)
        ttft_s[side] = sum(run.mean_ttft_s for run in runs) / len(runs)
        report.add(f"{side}: tokens from cache", 100 * cached[side], "%", better="higher")
        report.add(f"{side}: mean time to first token", 1e3 * ttft_s[side], "ms")
    with_flexkv = [side for side in SIDES if "flexkv" in side]
    for side in with_flexkv:
        for other in ("KV routing alone", "round-robin"):
            more = cached[side] / max(cached[other], 1e-9)
            target = 1.3 if other == "KV routing alone" else None
            report.add(f"{side} / {other}: tokens", more, "", better="higher", target=target)
            report.add(
                f"{side} / {other}: time to first token",
                ttft_s[side] / ttft_s[other],
                "",
                target=1.0,
            )


if __name__ == "__main__":
    main()
