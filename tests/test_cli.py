"""The command line: exit status, what goes to which stream, one line for every bad input."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flexkv import cli
from flexkv._version import __version__
from flexkv.replay import stage
from flexkv.replay.run import Replay
from tests.replay.local_stage import DeafToStored, flip_a_bit, local_stage

if TYPE_CHECKING:
    from pathlib import Path


REAL_STAGED = stage.staged


@pytest.fixture
def flexkv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``flexkv(*arguments)``: exit status, standard output, standard error."""
    monkeypatch.setattr(stage, "staged", local_stage)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flexkv", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        for i in range(30):
            entry = {"timestamp": i, "input_length": 1100, "output_length": 1}
            file.write(json.dumps(entry | {"hash_ids": [0, i % 7 + 1, 99]}) + "\n")
    return path


def test_version_is_one_line(flexkv: Any) -> None:
    assert flexkv("--version") == (0, f"flexkv {__version__}\n", "")


def test_json_is_one_document_and_nothing_else(flexkv: Any, trace: Path) -> None:
    status, out, err = flexkv("replay", trace, "--json", "--requests", 20, "--capacity", 3)
    assert status == 0
    assert err == ""
    document = json.loads(out)
    assert document["requests"] == 20
    assert document["blocks"] == 40
    assert document["wrong_bytes"] == document["divergences"] == 0
    assert 0 < document["block_hit_rate"] == document["hit_blocks"] / 40
    assert document["stored"] == sum(row["stored"] for row in document["workers"])
    assert {row["capacity"] for row in document["workers"]} == {3}
    assert set(document["chains_checked"]) == {"resident", "partly_resident", "evicted"}
    assert document["holds"] is True


def test_a_replay_ends_with_a_line_for_each_worker(flexkv: Any, trace: Path) -> None:
    status, out, _ = flexkv("replay", trace, "--workers", 3, "--as-fast-as-possible")
    assert status == 0
    assert out.splitlines()[-3:] == [f"worker {i}: router == residency" for i in range(3)]


def test_speed_follows_the_arrivals(flexkv: Any, trace: Path) -> None:
    status, out, _ = flexkv("replay", trace, "--speed", 1, "--json", "--requests", 30)
    assert status == 0
    assert json.loads(out)["seconds"] >= 0.029  # when the last request came


def test_the_demo_shows_hits_evictions_and_agreement(flexkv: Any) -> None:
    status, out, _ = flexkv("demo", "--requests", 120)
    assert status == 0
    assert out.splitlines()[-2:] == [f"worker {i}: router == residency" for i in range(2)]


def test_a_demo_too_small_to_show_anything_is_not_a_success(flexkv: Any) -> None:
    status, _, err = flexkv("demo", "--requests", 1)
    assert status == 1
    assert "too small" in err


def test_a_divergence_exits_with_1_and_says_where(
    flexkv: Any, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "staged", partial(local_stage, make_sink=DeafToStored))
    monkeypatch.setattr(stage, "Settings", partial(stage.Settings, settle_timeout_s=0.0))
    status, out, _ = flexkv("replay", trace, "--capacity", 1000)
    assert status == 1
    assert "router != residency: " in out


def test_a_wrong_byte_exits_with_1(
    flexkv: Any, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Replay.run

    async def run_around_a_fault(replay: Replay) -> None:
        await served(replay)
        flip_a_bit(replay, replay.workload.requests[0].block_ids)
        await served(replay)

    monkeypatch.setattr(Replay, "run", run_around_a_fault)
    status, out, _ = flexkv("replay", trace, "--json", "--capacity", 1000, "--workers", 1)
    assert status == 1
    document = json.loads(out)
    assert document["wrong_bytes"] > 0
    assert document["divergences"] == 0


BAD: list[tuple[list[object], str]] = [
    (["--workers", 0], "--workers"),
    (["--requests", 0], "--requests"),
    (["--capacity", 0], "--capacity"),
    (["--speed", 0], "--speed"),
    (["--speed", 2, "--as-fast-as-possible"], "exclude each other"),
    (["--evict-ratio", 1.5], "evict_ratio"),
    (["--block-bytes", 1000], "multiple of 2048"),
    (["--nats", "http://x"], "nats_servers"),
    (["--sped", 2], "No such option"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_usage_exits_with_2_and_names_the_problem(
    flexkv: Any,
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    says: str,
) -> None:
    monkeypatch.setattr(stage, "staged", REAL_STAGED)
    status, out, err = flexkv("replay", trace, *arguments)
    assert (status, out) == (2, "")
    assert says in err


def test_a_malformed_line_exits_with_2_and_one_line(flexkv: Any, trace: Path) -> None:
    with trace.open("a") as file:
        file.write("{}\n")
    status, out, err = flexkv("replay", trace)
    assert (status, out) == (2, "")
    assert err.startswith(f"flexkv: {trace}:31: ")
    assert err.count("\n") == 1


def test_a_nats_server_that_is_not_there_is_one_line(
    flexkv: Any, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "staged", REAL_STAGED)
    with socket.socket() as taken:  # bound and not listening: nothing can answer there
        taken.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{taken.getsockname()[1]}"
        status, out, err = flexkv("replay", trace, "--nats", url)
    assert (status, out) == (1, "")
    assert err.startswith(f"flexkv: no NATS server at {url}: ")
    assert err.count("\n") == 1


def test_a_missing_extra_exits_with_2_and_says_what_to_install(
    flexkv: Any, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "staged", REAL_STAGED)
    monkeypatch.setattr(stage, "find_spec", lambda _name: None)
    status, out, err = flexkv("replay", trace)
    assert (status, out) == (2, "")
    assert "pip install 'flexkv[demo]'" in err
    assert err.count("\n") == 1


def test_the_commands_import_what_they_need_when_they_run() -> None:
    program = "import sys; from flexkv import cli; sys.exit('flexkv.replay' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
