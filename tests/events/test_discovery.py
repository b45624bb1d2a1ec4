"""The record is whole or absent, alive as long as it is refreshed, and gone once removed."""

from __future__ import annotations

import json
import os
import re
import threading
from typing import TYPE_CHECKING

import pytest

from flexkv.errors import FeedError
from flexkv.events.discovery import FileRecord, WorkerCard, escaped
from flexkv.events.dynamo import WorkerRank

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
