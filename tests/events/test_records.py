"""Whatever lies in a discovery folder, it is a record or passed over."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.config import EventsConfig
from flexkv.errors import FeedError
from flexkv.events import ownership
from flexkv.events.discovery import FileRecord
from flexkv.events.dynamo import WorkerRank
from flexkv.events.nats import NatsSink
from flexkv.replay.verify import discovery_of, registered, verify

EVENTS = EventsConfig()
WORKER = WorkerRank(
    namespace=EVENTS.namespace, component=EVENTS.component, endpoint=EVENTS.endpoint, worker_id=7
)
NAMES = st.sampled_from(["metadata", "worker", "worker_id", "dp_rank", "topic", "publisher_id"])
JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.sampled_from([7, "7", "kv-events"]) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def read(folder: Path, content: bytes) -> None:
    record = FileRecord(folder, WORKER, 1)
    record.path.parent.mkdir(parents=True)
    record.path.with_name("other").write_bytes(content)
    record._write()
    assert (7, 0) in registered(EVENTS.model_copy(update={"discovery_path": str(folder)}))
    for name, other in ownership.rivals(
        ownership.live_records(record.path.parent), WORKER, publisher_id=1
    ):
        assert str(ownership.refusal(other, WORKER, name))


async def test_a_source_whose_process_has_ended_is_not_asked(tmp_path: Path) -> None:
    record = FileRecord(tmp_path, WORKER, 1)
    record.path.parent.mkdir(parents=True)
    record._write()
    events = EVENTS.model_copy(update={"discovery_path": str(tmp_path)})
    assert registered(events) == [(7, 0)]
    content = json.loads(record.path.read_text())
    content["metadata"][ownership.OWNER]["started"] = "another time"
    record.path.write_text(json.dumps(content))
    assert registered(events) == []
    with pytest.raises(FeedError, match=r"start the engine again.*worker 7, rank 0"):
        await verify(events, 16)


@given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_record_or_passed_over(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        read(Path(folder), content)


@given(st.data())
def test_a_record_with_another_part_in_it_is_one_or_passed_over(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = json.loads(FileRecord(Path(folder), WORKER, 2)._content)
        part = data.draw(
            st.sampled_from([content, content["metadata"], content["metadata"]["worker"]])
        )
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
        read(Path(folder), json.dumps(content).encode())


@pytest.mark.parametrize("odd", [{"metadata": None}, {"metadata": 3}, {"metadata": "flexkv_owner"}])
def test_verify_passes_over_what_is_no_source(odd: object, tmp_path: Path) -> None:
    read(tmp_path, json.dumps(odd).encode())


def test_what_is_no_regular_file_or_too_long_is_passed_over_at_once(tmp_path: Path) -> None:
    record = FileRecord(tmp_path, WORKER, 1)
    folder = record.path.parent
    folder.mkdir(parents=True)
    record._write()
    os.mkfifo(folder / "pipe")  # nobody writes to it
    (folder / "folder").mkdir()
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "long").write_bytes(record._content.encode() + b" " * ownership.MAX_RECORD_NBYTES)
    rest = b" " * (ownership.MAX_RECORD_NBYTES - len(record._content))
    (folder / "padded").write_bytes(record._content.encode() + rest)
    names = {Path(name).name for name, _ in ownership.live_records(folder)}
    assert names == {record.path.name, "padded"}


def test_who_verifies_looks_where_the_engine_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert discovery_of(EVENTS) == NatsSink(EventsConfig(worker_id=7))._folder
    assert str(tmp_path) in str(discovery_of(EVENTS))
    in_etcd = EventsConfig(discovery="etcd", etcd_endpoints=("http://a:1", "http://b:1"))
    assert discovery_of(in_etcd) == "http://a:1,http://b:1"
