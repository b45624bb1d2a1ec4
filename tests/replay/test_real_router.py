"""The whole command on real counterparts: nats-server, worker cards, Dynamo's router."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = [sys.executable, "-c", "from flexkv.cli import main; main()"]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_replay_agrees_with_the_real_router(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with trace.open("w") as file:
        for i in range(120):
            chain = [0, *range(100 * (i % 40), 100 * (i % 40) + 2 + i // 40)]
            entry = {"timestamp": i, "input_length": 512 * len(chain), "output_length": 1}
            file.write(json.dumps(entry | {"hash_ids": chain}) + "\n")
    command = [*PROGRAM, "replay", str(trace), "--json", "--chains", "10", "--capacity", "40"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["requests"] == 120
    assert document["hit_blocks"] > 0
    assert document["evicted"] > 0
    assert document["wrong_bytes"] == document["divergences"] == document["differing_blocks"] == 0
    assert document["chains_checked"] == {"resident": 10, "partly_resident": 10, "evicted": 10}


def test_a_replay_with_ssd_agrees_with_the_real_router_after_a_restart_in_the_middle(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace.jsonl"
    with trace.open("w") as file:
        for i in range(160):
            chain = [0, *range(100 * (i % 40), 100 * (i % 40) + 2 + i // 40)]
            entry = {"timestamp": i, "input_length": 512 * len(chain), "output_length": 1}
            file.write(json.dumps(entry | {"hash_ids": chain}) + "\n")
    options = ["--chains", "5", "--capacity", "24", "--ssd-blocks", "60", "--restart"]
    command = [*PROGRAM, "replay", str(trace), "--json", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["requests"] == 160
    assert 0 < document["back_after_restart"] <= 120, "how many, the disk decides"
    assert document["hit_blocks"] > 0
    assert document["wrong_bytes"] == document["divergences"] == document["differing_blocks"] == 0


def test_ctrl_c_ends_the_demo_and_all_its_processes_without_a_traceback() -> None:
    command = [*PROGRAM, "demo", "--requests", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        assert process.stderr is not None
        assert "of 100000 requests" in process.stderr.readline()
        children = children_of(process.pid)
        assert len(children) == 3
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
