"""The record is whole or absent, alive as long as it is refreshed, and gone once removed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from flexkv.errors import FeedError
from flexkv.events.discovery import FileRecord, WorkerCard, escaped
from flexkv.events.dynamo import WorkerRank
from flexkv.events.ownership import EXPIRED_S, this_process
from flexkv.process import Process

if TYPE_CHECKING:
    from pathlib import Path

WORKER = WorkerRank(
    namespace="my-ns", component="backend", endpoint="generate", worker_id=0xABC, dp_rank=2
)


def record(folder: Path) -> FileRecord:
    return FileRecord(folder, WORKER, publisher_id=0xBD644E542495EA)


async def test_the_record_has_dynamos_name_and_content(tmp_path: Path) -> None:
    await record(tmp_path).write()
    (file,) = (tmp_path / "v1" / "event_sources").iterdir()
    assert file.name == (
        "namespace%2Fmy%2Dns%2Fcomponent%2Fbackend%2Fendpoint%2Fgenerate"
        "%2Ftopic%2Fkv%2Devents%2Fbd644e542495ea"
    )
    where = {"namespace": "my-ns", "component": "backend", "name": "generate"}
    assert json.loads(file.read_text()) == {
        "type": "EventSource",
        "scope": {"kind": "endpoint", "endpoint": where},
        "topic": "kv-events",
        "publisher_id": 0xBD644E542495EA,
        "metadata": {
            "kv_state_endpoint": where,
            "worker": {"worker_id": 0xABC, "dp_rank": 2},
            "publisher_id": 0xBD644E542495EA,
            "flexkv_owner": this_process(),
        },
    }


async def test_a_refresh_touches_the_record_and_nothing_else(tmp_path: Path) -> None:
    mine = record(tmp_path)
    await mine.write()
    os.utime(mine.path, (1, 1))
    assert await mine.refresh()
    assert mine.path.stat().st_mtime > 1
    assert list(mine.path.parent.iterdir()) == [mine.path]


async def test_a_record_that_was_swept_away_is_written_again(tmp_path: Path) -> None:
    mine = record(tmp_path)
    await mine.write()
    content = mine.path.read_text()
    mine.path.unlink()
    assert not await mine.refresh()
    assert mine.path.read_text() == content


async def test_a_removed_record_stays_removed(tmp_path: Path) -> None:
    """Even where a refresh that lost its waiter goes on in its thread."""
    mine = record(tmp_path)
    await mine.write()
    await mine.remove()
    await mine.refresh()
    await mine.write()
    assert not list(mine.path.parent.iterdir())
    await mine.remove()


async def test_the_files_are_written_in_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    mine = record(tmp_path)
    write = mine._write
    monkeypatch.setattr(mine, "_write", lambda: (threads.append(threading.get_ident()), write()))
    await mine.write()
    assert threads != [threading.get_ident()]
    assert mine.path.exists()


async def test_a_folder_that_takes_no_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    mine = record(in_the_way)
    with pytest.raises(FeedError, match=re.escape(str(in_the_way)) + r".*DYN_FILE_KV"):
        await mine.write()
    await mine.remove()


async def test_the_workers_card_is_found_where_dynamo_puts_it(tmp_path: Path) -> None:
    card = WorkerCard(tmp_path, WORKER)
    assert not await card.exists()
    folder = tmp_path / "v1" / "mdc"
    folder.mkdir(parents=True)
    (folder / "my%2Dns%2Fbackend%2Fgenerate%2Fabc").touch()
    assert await card.exists()


def test_what_is_no_ascii_letter_or_digit_is_escaped_by_its_bytes() -> None:
    assert escaped("aZ9_./\u00e9") == "aZ9%5F%2E%2F%C3%A9"


async def test_a_source_that_can_be_asked_says_where(tmp_path: Path) -> None:
    mine = FileRecord(tmp_path, WORKER, 0xABCDEF, "127.0.0.1:4711")
    await mine.write()
    assert json.loads(mine.path.read_text())["metadata"]["recovery_target"] == {
        "component": "backend",
        "endpoint": "worker_kv_query_source_abcdef",
        "namespace": "my-ns",
        "instance_id": 0xABCDEF,
        "transport": {
            "tcp": "127.0.0.1:4711/abcdef/my-ns/backend/worker_kv_query_source_abcdef",
        },
        "device_type": "cuda",
        "request_plane_codec": "msgpack",
    }


def other_record(folder: Path, owner: dict[str, object] | None, publisher_id: int = 7) -> Path:
    """The record of somebody else for the same worker and rank."""
    other = FileRecord(folder, WORKER, publisher_id)
    content = json.loads(other._content)
    del content["metadata"]["flexkv_owner"]
    if owner is not None:
        content["metadata"]["flexkv_owner"] = owner
    other.path.parent.mkdir(parents=True, exist_ok=True)
    other.path.write_text(json.dumps(content))
    return other.path


def a_process_that_is_gone() -> dict[str, object]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = this_process() | {"pid": child.pid, "started": Process(child.pid).started}
    child.kill()
    child.communicate()
    return owner


async def test_the_record_of_a_dead_predecessor_is_removed(tmp_path: Path) -> None:
    dead = other_record(tmp_path, a_process_that_is_gone())
    mine = record(tmp_path)
    await mine.claim()
    assert not dead.exists()
    assert mine.path.exists()


async def test_a_pid_that_was_given_to_a_later_process_is_gone_too(tmp_path: Path) -> None:
    dead = other_record(tmp_path, this_process() | {"started": "1"})
    await record(tmp_path).claim()
    assert not dead.exists()


@pytest.mark.parametrize(
    ("owner", "named"),
    [
        (this_process(), rf"process {os.getpid()} on "),
        (this_process() | {"machine": "another", "pid": 1, "host": "far"}, "process 1 on far"),
        (this_process() | {"pid": "1"}, "process 1 on "),
        (None, "a publisher that is not flexkv's.*own KV events off"),
    ],
    ids=["alive", "elsewhere", "odd", "foreign"],
)
async def test_anybody_elses_record_is_an_error_that_names_its_owner(
    tmp_path: Path, owner: dict[str, object] | None, named: str
) -> None:
    other = other_record(tmp_path, owner)
    mine = record(tmp_path)
    with pytest.raises(FeedError, match=named):
        await mine.claim()
    assert other.exists()
    assert not mine.path.exists()


async def test_another_rank_and_an_expired_record_are_no_rivals(tmp_path: Path) -> None:
    another = WorkerRank(
        namespace="my-ns", component="backend", endpoint="generate", worker_id=0xABC, dp_rank=3
    )
    await FileRecord(tmp_path, another, 8).claim()
    expired = other_record(tmp_path, this_process())
    long_ago = expired.stat().st_mtime - EXPIRED_S - 1
    os.utime(expired, (long_ago, long_ago))
    await record(tmp_path).claim()
    assert expired.exists()


async def test_of_two_that_come_at_once_no_two_stay(tmp_path: Path) -> None:
    mine, other = record(tmp_path), FileRecord(tmp_path, WORKER, 9)
    look = mine._remove_the_dead
    looks = iter([lambda: (look(), other._write()), look])

    def look_while_the_other_writes() -> None:
        next(looks)()

    mine._remove_the_dead = look_while_the_other_writes  # type: ignore[method-assign]
    with pytest.raises(FeedError, match="has its event source already"):
        await mine.claim()
    assert not mine.path.exists()


async def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    mine = record(tmp_path)
    mine.path.parent.mkdir(parents=True)
    for i, content in enumerate(["", "[]", "{}", '{"metadata": 3}', "[" * 100_000, "\0"]):
        (mine.path.parent / f"odd{i}").write_text(content)
    await mine.claim()
    assert mine.path.exists()
