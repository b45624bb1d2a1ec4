"""flexkv verify finds what a router is wrong about, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flexkv.blocks import Blocks, Tier
from flexkv.doctor.gather.deployment import settings_of
from flexkv.errors import ConfigError, FeedError
from flexkv.events.audit import Collector, chunks
from flexkv.events.feed import RecoverableFeed
from flexkv.events.nats_audit import Auditor
from flexkv.events.types import BlockStored
from flexkv.replay.deployment import FakeWorker, Overlap
from flexkv.replay.scores import first_wrong
from flexkv.replay.verify import Comparison, sentences, verify
from tests.dynamo.shelf import TOKENS_PER_BLOCK, Shelf, chain, feeding, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.events.audit import Audit
    from flexkv.events.log import EventLog
    from flexkv.events.nats import NatsSink
    from flexkv.replay.deployment import NatsServer, Router


def filled() -> Shelf:
    shelf = Shelf()
    for _ in range(20):
        blocks = chain(10)
        shelf.store(blocks)
        shelf.store(blocks[:6], Tier.SSD)
    return shelf


async def test_a_router_that_believes_the_truth_agrees(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    async with feeding(shelf, config):
        (found,) = await verify(config, TOKENS_PER_BLOCK)
        assert found.agrees
        assert found.num_held == {"host_pinned": 200, "disk": 120}
        assert found.digests["disk"] == str(shelf.log.digests()[Tier.SSD])
        assert found.num_asked == 40, "each chain, in both tiers"
        (line,) = sentences([found])
        assert line.startswith(
            f"worker {worker.worker_id}, rank 0: router == residency (200 blocks"
        )


async def test_tenants_adapters_and_other_ranks_are_asked_for_as_such(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    size = TOKENS_PER_BLOCK
    async with (
        FakeWorker(nats_server.url, tmp_path, tokens_per_block=size, num_ranks=2) as worker,
        contextlib.AsyncExitStack() as stack,
    ):
        for rank in range(2):
            shelf = filled()
            shelf.store(chain(3, namespace="tenant", lora="adapter"))
            shelf.store(chain(3, namespace="tenant"), Tier.SSD)
            shelf.store(chain(3, lora="adapter"))
            config = settings(nats_server.url, tmp_path, worker.worker_id, dp_rank=rank)
            await stack.enter_async_context(feeding(shelf, config))
        comparisons = await verify(config, size)
        assert [(found.dp_rank, found.num_asked) for found in comparisons] == [(0, 43), (1, 43)]
        assert all(found.agrees for found in comparisons), sentences(comparisons)


class Liar:
    """A log whose dump is another one: routers ask it."""

    def __init__(self, log: EventLog, told: list[BlockStored]) -> None:
        self._log = log
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def dump(self) -> tuple[int, Iterator[BlockStored]]:
        return self._log.last_id, iter(self._told)


async def test_a_planted_difference_of_each_kind_is_found(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    never_told, never_taken_back = chain(1), chain(1)
    shelf.store(never_told)
    planted = BlockStored(never_taken_back, Tier.SSD)
    async with feeding(shelf, config) as sink:
        told = [event for event in shelf._walk() if event.blocks != never_told]
        assert isinstance(sink._feed, RecoverableFeed)
        sink._feed._answers._source = Liar(shelf.log, [*told, planted])
        (found,) = await verify(config, TOKENS_PER_BLOCK, settle_timeout_s=1.0)
    assert found.missing == {"host_pinned": never_told.router_hashes()}
    assert found.surplus == {"disk": never_taken_back.router_hashes()}
    assert not found.agrees
    lines = sentences([found])
    assert lines[1] == f"  missing in host_pinned: 1: {never_told.router_hashes()[0]:016x}"
    assert lines[2] == f"  surplus in disk: 1: {never_taken_back.router_hashes()[0]:016x}"
    (wrong,) = found.misjudged
    assert (wrong.held, wrong.believed) == (Overlap(0, 1, 0), Overlap(0, 0, 0))
    assert lines[3:] == [f"  {wrong}"]


async def test_a_planted_difference_of_each_kind_shows_in_the_scores_of_a_prompt(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    less, more = (chain(8, namespace="tenant", lora="adapter") for _ in range(2))
    for blocks in (less, more):
        shelf.store(blocks, Tier.SSD)
        shelf.store(blocks, of=5)
    async with feeding(shelf, config) as sink:
        told = [event for event in shelf._walk() if event.blocks not in (less[:5], more[:5])]
        told += [BlockStored(less[:3], Tier.HOST), BlockStored(more[:7], Tier.HOST)]
        assert isinstance(sink._feed, RecoverableFeed)
        sink._feed._answers._source = Liar(shelf.log, told)
        (found,) = await verify(config, TOKENS_PER_BLOCK, settle_timeout_s=1.0)
    truth = Overlap(0, 5, 3)
    by_last = {wrong.last: wrong for wrong in found.misjudged if wrong.num_blocks == 8}
    assert {last: (wrong.held, wrong.believed) for last, wrong in by_last.items()} == {
        less.router_hashes()[-1]: (truth, Overlap(0, 3, 5)),
        more.router_hashes()[-1]: (truth, Overlap(0, 7, 1)),
    }


def with_other_tokens(shelf: Shelf, sink: NatsSink, blocks: Blocks) -> None:
    """The routers that ask from now on are told other tokens than those of ``blocks``."""
    other_tokens = Blocks(
        blocks.packed_keys(),
        bytes(chain(len(blocks)).token_ids),
        tokens_per_block=TOKENS_PER_BLOCK,
        key_nbytes=blocks.key_nbytes,
    )
    assert isinstance(sink._feed, RecoverableFeed)
    sink._feed._answers._source = Liar(shelf.log, [BlockStored(other_tokens, Tier.HOST)])


async def test_what_only_a_prompt_can_show_is_found(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = Shelf()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    blocks = chain(4)
    shelf.store(blocks)
    async with feeding(shelf, config) as sink:
        with_other_tokens(shelf, sink, blocks)
        (found,) = await verify(config, TOKENS_PER_BLOCK, settle_timeout_s=1.0)
    assert not found.missing
    assert not found.surplus
    assert not found.agrees
    assert str(found.misjudged[0]).endswith("counts 0 blocks in host_pinned where 4 are held")


async def test_a_wrong_prompt_that_grows_from_look_to_look_is_found(
    nats_server: NatsServer,
    worker: FakeWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf = Shelf()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    blocks = chain(100)
    shelf.store(blocks, of=4)
    looks = itertools.count(5)
    real = Auditor.ask

    async def ask(self: Auditor, worker_id: int, dp_rank: int) -> Audit:
        shelf.store(blocks, of=next(looks))
        return await real(self, worker_id, dp_rank)

    monkeypatch.setattr(Auditor, "ask", ask)
    async with feeding(shelf, config) as sink:
        with_other_tokens(shelf, sink, blocks[:4])
        (found,) = await verify(config, TOKENS_PER_BLOCK, settle_timeout_s=1.0)
    assert next(looks) > 6, "it looked again"
    (wrong,) = found.misjudged
    assert wrong.held == Overlap(0, shelf.num_held(blocks, Tier.HOST), 0), "the latest figures"


def test_where_a_prompt_is_wrong_stays_and_what_is_under_way_moves_on() -> None:
    hashes = list(range(100, 120))
    lasting = [
        first_wrong(hashes, Overlap(gpu, 9 - gpu, grown), Overlap(gpu, 4 - gpu, 0))
        for gpu in (0, 2)
        for grown in (0, 3)
    ]
    assert lasting == [("host_pinned", 104)] * 4
    under_way = [first_wrong(hashes, Overlap(1, 2, n), Overlap(1, 2, n - 1)) for n in (3, 4)]
    assert under_way == [("disk", 105), ("disk", 106)]


async def test_blocks_of_another_size_than_the_engines_are_an_error(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    async with feeding(shelf, config):
        with pytest.raises(FeedError, match="have 16 tokens, the settings say 32"):
            await verify(config, 2 * TOKENS_PER_BLOCK)


async def test_the_command_says_it_with_its_exit_status(
    nats_server: NatsServer, worker: FakeWorker, tmp_path: Path
) -> None:
    shelf = filled()
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    file = tmp_path / "flexkv.json"
    events = {
        "sink": "nats",
        "nats_servers": nats_server.url,
        "namespace": "flexkv",
        "worker_id": worker.worker_id,
        "discovery_path": str(tmp_path),
    }
    cache = {"tokens_per_block": TOKENS_PER_BLOCK}
    file.write_text(json.dumps({"cache_config": cache, "events": events}))
    async with feeding(shelf, config):
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("flexkv"),
            *("verify", "--config", str(file), "--json"),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
    assert process.returncode == 0
    (document,) = json.loads(out)
    assert document["agrees"] is True
    assert document["blocks"] == {"host_pinned": 200, "disk": 120}
    assert document["chains"] == 40


async def compared_by_folder(nats_url: str, discovery: Path | str, folder: Path) -> Comparison:
    """What verify says of the deployment that a folder of launch describes, and of nothing else."""
    file = folder / "worker0.json"
    file.write_text(json.dumps({"events": {"sink": "nats"}}))
    place = {"backend": "file", "path": str(discovery)}
    if isinstance(discovery, str):
        place = {"backend": "etcd", "endpoints": discovery}
    document = {
        "state": "ready",
        "feed": "nats",
        "block_size": TOKENS_PER_BLOCK,
        "nats": nats_url,
        "namespace": "flexkv",
        "discovery": place,
        "workers": [{"index": 0, "pid": None, "config": str(file)}],
    }
    (folder / "deployment.json").write_text(json.dumps(document))
    size = TOKENS_PER_BLOCK
    async with FakeWorker(nats_url, discovery, tokens_per_block=size) as worker:
        events, found_size = settings_of(folder, None, {})
        async with feeding(filled(), events.model_copy(update={"worker_id": worker.worker_id})):
            (found,) = await verify(events, found_size)
    return found


async def test_a_folder_of_launch_says_all_that_it_needs(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    found = await compared_by_folder(nats_server.url, tmp_path, tmp_path)
    assert found.agrees
    assert found.num_held == {"host_pinned": 200, "disk": 120}


async def test_discovery_may_be_in_etcd(
    nats_server: NatsServer, etcd_url: str, tmp_path: Path
) -> None:
    found = await compared_by_folder(nats_server.url, etcd_url, tmp_path)
    assert found.agrees
    assert found.num_held == {"host_pinned": 200, "disk": 120}


def test_a_feed_that_is_not_ours_or_has_ended_can_not_be_compared(tmp_path: Path) -> None:
    (tmp_path / "deployment.json").write_text('{"state": "ready", "feed": "vllm"}')
    with pytest.raises(ConfigError, match=r"feed of this deployment is vllm.*--gpu-events"):
        settings_of(tmp_path, None, {})
    (tmp_path / "deployment.json").write_text('{"state": "ended", "feed": "nats"}')
    with pytest.raises(ConfigError, match="has ended"):
        settings_of(tmp_path, None, {})


async def test_nothing_to_compare_is_an_error_that_says_where_it_looked(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    with pytest.raises(FeedError, match=rf"no flexkv source.*{tmp_path}"):
        await verify(settings(nats_server.url, tmp_path, 1), TOKENS_PER_BLOCK)


async def test_where_nats_is_away_it_says_so_before_a_router_waits_for_it(
    nats_server: NatsServer,
    worker: FakeWorker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = settings(nats_server.url, tmp_path, worker.worker_id)
    nowhere = {"nats_servers": ("nats://127.0.0.1:1",), "connect_timeout_s": 0.5}
    async with feeding(filled(), config):
        with pytest.raises(FeedError, match=r"nats://127.0.0.1:1 within 0.5 s .*Refused.*: start"):
            await verify(config.model_copy(update=nowhere), TOKENS_PER_BLOCK)
    assert "Traceback" not in caplog.text


async def test_a_worker_without_a_model_card_is_named_with_the_remedy(router: Router) -> None:
    with pytest.raises(FeedError, match=r"no router lists worker 7 of flexkv\..*register_model"):
        await router.wait_for_workers([7], deadline_s=0.2)


def test_an_answer_comes_whole_or_not_at_all() -> None:
    shelf = filled()
    messages = [message for message in chunks(shelf.log, shelf.log.digests()) if message]
    collector = Collector()
    audits = [collector.take(message) for message in messages]
    assert audits[:-1] == [None] * (len(messages) - 1)
    audit = audits[-1]
    assert audit is not None
    assert len(audit.held["host_pinned"]) == 200
    with pytest.raises(ValueError, match="not the next"):
        Collector().take(messages[1])
    with pytest.raises(ValueError, match="not a chunk"):
        Collector().take(messages[0][:-1])
