"""Engine service and worker role over the link: what is promised is kept or reported as failed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flexkv.blocks import Blocks, Tier
from flexkv.engine.bridge import LoopThread
from flexkv.events.digest import digest_of
from flexkv.integration.vllm.worker import WorkerRole
from flexkv.link.errors import EndpointTakenError
from flexkv.link.residency import residency
from flexkv.tiers.gpu import CpuPagedCopier
from tests.engine.chains import chain
from tests.integration.roles import LIMIT_S, MODEL, LoadJob, Roles, roles, settings, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKS = chain(1, 2, 3)
IDS = [5, 9, 7]
OTHER_IDS = [20, 21, 22]


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/link"


@pytest.fixture
def both(endpoint: str) -> Iterator[Roles]:
    with roles(endpoint) as made:
        yield made


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    move = CpuPagedCopier._move

    def slow(self: CpuPagedCopier, *tensors: Any) -> None:
        time.sleep(0.1)
        move(self, *tensors)

    monkeypatch.setattr(CpuPagedCopier, "_move", slow)


def stored(both: Roles) -> torch.Tensor:
    """BLOCKS are resident; their bytes."""
    both.store(BLOCKS, IDS)
    until(lambda: both.resident(BLOCKS) == 3)
    return both.bytes_of(IDS)


def test_what_was_stored_is_loaded_byte_for_byte(both: Roles) -> None:
    expected = stored(both)
    job = both.promise(BLOCKS, OTHER_IDS)
    both.begin_step(loads=[job])
    assert until(lambda: both.reports()[1]) == {"loaded"}
    assert torch.equal(both.bytes_of(OTHER_IDS), expected)
    assert both.reports() == (set(), set(), set())  # each once


async def test_the_endpoint_answers_with_keys_and_their_digests(both: Roles, endpoint: str) -> None:
    plain = chain(4, 5, 6)
    tail_is_opaque = Blocks(
        b"".join(plain),
        bytes(plain.token_ids),
        tokens_per_block=plain.tokens_per_block,
        extra_keys=(None, None, ("an image",)),
    )
    stored(both)
    both.store(tail_is_opaque, OTHER_IDS, "another")
    until(lambda: both.resident(tail_is_opaque) == 3)
    answer = await residency(endpoint, LIMIT_S)
    assert answer.keys[Tier.HOST] == {*BLOCKS, *plain}
    told = digest_of([*BLOCKS.router_hashes(), *plain.router_hashes()[:2]])
    assert answer.digests[Tier.HOST] == str(told)
    assert answer.is_settled


def test_a_load_waits_for_its_step(both: Roles) -> None:
    expected = stored(both)
    before = both.bytes_of(OTHER_IDS)
    job = both.promise(BLOCKS, OTHER_IDS)
    again = both.promise(BLOCKS, [30, 31, 32], "later")
    again_step = both.step + 1
    both.begin_step()  # an earlier promise than the workers know of
    assert both.reports() == (set(), set(), set())
    assert torch.equal(both.bytes_of(OTHER_IDS), before)
    both.step = again_step - 1
    both.begin_step(loads=[job, again])
    received: set[str] = set()
    until(lambda: received.update(both.reports()[1]) or received == {"loaded", "later"})
    assert torch.equal(both.bytes_of(OTHER_IDS), expected)


def test_what_is_not_there_any_more_is_reported_with_its_request(both: Roles) -> None:
    stored(both)
    assert both.service.clear()
    pin = both.service.lease(BLOCKS)
    assert pin is None
    both.store(BLOCKS[:2], IDS[:2])
    until(lambda: both.resident(BLOCKS) == 2)
    job = both.promise(BLOCKS, OTHER_IDS)
    both.begin_step(loads=[job])
    sent, received, failed = until(lambda: (r := both.reports())[1] and r)
    assert (sent, received, failed) == (set(), {"loaded"}, {OTHER_IDS[2]})


def test_a_promise_without_an_engine_is_reported_as_failed(both: Roles) -> None:
    stored(both)
    job = both.promise(BLOCKS, OTHER_IDS)
    both.service.close()
    both.begin_step(loads=[job], alive=False)
    _, received, failed = until(lambda: (r := both.reports())[1] and r)
    assert received == {"loaded"}
    assert failed == set(OTHER_IDS)


def test_a_dead_worker_thread_reports_what_it_owes_after_its_last_copy(
    both: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(both)
    begun: list[float] = []
    ended: list[float] = []
    move = CpuPagedCopier._move

    def slow(self: CpuPagedCopier, *tensors: Any) -> None:
        begun.append(time.monotonic())
        time.sleep(0.2)
        move(self, *tensors)
        ended.append(time.monotonic())

    monkeypatch.setattr(CpuPagedCopier, "_move", slow)
    job = both.promise(BLOCKS, OTHER_IDS)
    both.begin_step(loads=[job])
    thread = both.worker._thread
    assert isinstance(thread, LoopThread)
    until(lambda: begun)
    thread.stop(0)
    _, received, failed = until(lambda: (r := both.reports())[1] and r)
    assert len(ended) == len(begun) == 1
    assert received == {"loaded"}
    assert failed in (set(), set(OTHER_IDS))


@pytest.mark.usefixtures("slow_copies")
def test_a_request_that_ends_while_it_is_stored_keeps_its_blocks_until_then(both: Roles) -> None:
    both.store(BLOCKS, IDS, "ending")
    assert both.service.finish("ending")
    both.begin_step(finishing=["ending"])
    sent = [both.reports({"ending"})[0]]
    until(lambda: sent.append(both.reports()[0]) or sent[-1])
    assert sent[-1] == {"ending"}
    assert both.resident(BLOCKS) == 3
    assert both.reports({"ending"})[0] == set()


@pytest.mark.usefixtures("slow_copies")
def test_what_a_preempted_request_was_storing_is_not_kept(both: Roles) -> None:
    both.store(BLOCKS, IDS, "preempted")
    both.service.discard("preempted")
    assert not both.service.finish("preempted")
    both.store(chain(8), [40], "another")
    until(lambda: both.resident(chain(8)) == 1)
    until(lambda: both.service._num_stores == 0)
    assert both.resident(BLOCKS) == 0


def test_what_was_being_stored_when_all_was_forgotten_does_not_come_back(both: Roles) -> None:
    for _ in range(20):
        both.store(BLOCKS, IDS)
        assert both.service.clear()
        until(lambda: both.service._num_stores == 0)
        assert both.resident(BLOCKS) == 0


@pytest.mark.usefixtures("slow_copies")
def test_a_request_that_was_preempted_after_its_end_is_sent_all_the_same(both: Roles) -> None:
    both.store(BLOCKS, IDS, "ending")
    assert both.service.finish("ending")
    both.service.discard("ending")
    both.begin_step(finishing=["ending"])
    both.reports({"ending"})
    assert until(lambda: both.reports()[0]) == {"ending"}
    assert both.resident(BLOCKS) == 0


def test_a_promise_that_outlived_its_pin_is_kept_as_far_as_it_goes(both: Roles) -> None:
    expected = stored(both)
    job_id = both.service.load("late", BLOCKS, OTHER_IDS, 0, both.step + 1, None)
    both.begin_step(loads=[LoadJob(job_id, "late", OTHER_IDS)])
    assert until(lambda: both.reports()[1]) == {"late"}
    assert torch.equal(both.bytes_of(OTHER_IDS), expected)


def test_what_was_promised_before_the_caches_were_given_back_has_failed(both: Roles) -> None:
    stored(both)
    job = both.promise(BLOCKS, OTHER_IDS)
    both.step += 1  # the workers' model never comes to its step
    both.worker._loads[job.job_id] = job  # type: ignore[assignment]  # looks the same
    both.worker.unregister_kv_caches()
    both.worker.restore_kv_caches()
    both.until_usable()
    _, received, failed = both.reports()
    assert received == {"loaded"}
    assert failed == set(OTHER_IDS)


def test_caches_that_were_given_back_and_taken_again_work(both: Roles) -> None:
    expected = stored(both)
    both.worker.unregister_kv_caches()
    until(lambda: not both.service.usable)
    assert not both.service.store("x", chain(9), [3])
    both.worker.restore_kv_caches()
    both.until_usable()
    job = both.promise(BLOCKS, OTHER_IDS)
    both.begin_step(loads=[job])
    assert until(lambda: both.reports()[1]) == {"loaded"}
    assert torch.equal(both.bytes_of(OTHER_IDS), expected)


def test_a_second_engine_at_the_endpoint_fails_at_once(both: Roles) -> None:
    with pytest.raises(EndpointTakenError, match="server_recv_port"):
        Roles(both.worker._settings)


def test_a_worker_of_another_engine_is_refused(
    both: Roles, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = WorkerRole(settings(both.worker._settings.endpoint, engine_id="another"))
    stranger.register_kv_caches(both.caches, MODEL)
    until(lambda: "belongs to engine an-engine" in caplog.text)
    stranger.shutdown()
