"""vLLM's own events on, flexkv's in the same stream: one index for GPU, host and SSD.

The tests share a deployment: what the ones before have left in its caches is still there.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import pytest

from tests.deployment.all_tiers import GPU, HOST, SSD, AllTiers, Trickle
from tests.deployment.stack import BLOCK_SIZE, UP_S, Plan, Stack
from tests.deployment.test_direct_feed import clear_gpus, hang_up_on_an_answer
from tests.deployment.truth import Deployment, report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.replay.deployment import Overlap
    from tests.deployment.observing import Loop, Observer

PLAN = Plan(
    gpu_events=True, cache={"num_cpu_blocks": 128, "enable_ssd": True, "num_ssd_blocks": 256}
)
WEIGHTS = {GPU: 1.0, HOST: 0.75, SSD: 0.5}  # as launch sets them
SETTLES_S = 15.0
AWAY_S = 8.0
HEALS_S = 6.0
HEALS_AFTER_A_STEP_S = 2.0
WARM_S = 0.5
ANSWERS_S = 30.0
NUM_ROUTED = 6
NUM_FILLING = 90


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory, loop: Loop) -> Iterator[AllTiers]:
    with Stack(tmp_path_factory.mktemp("gpu"), PLAN) as stack:
        deployment = Deployment(stack, loop)
        with AllTiers(deployment) as tiers:
            time.sleep(0.5)  # the streams' readers have connected
            deployment.warm_up()
            yield tiers


@pytest.fixture
def observer(tiers: AllTiers) -> Iterator[Observer]:
    with tiers.deployment.observer() as observer:
        observer.wait_for_workers(tiers.stack.worker_ids())
        yield observer


def fill(tiers: AllTiers) -> None:
    """Ask so many prompts that every tier has evicted some, unless that has been done."""
    while len(tiers.deployment.answered_by) < NUM_FILLING:
        tiers.deployment.ask(tiers.deployment.fresh())


def agree(tiers: AllTiers, observer: Observer, since: str) -> None:
    """At quiescence, on every block and every prompt that was asked."""
    texts = list(tiers.deployment.ids)
    seconds = tiers.until_true(observer, SETTLES_S, tiers.step_all, texts=texts)
    counts = [{tier: len(held) for tier, held in tiers.held(w).items()} for w in tiers.wheres()]
    report(f"after {since}: {len(texts)} prompts agree in {seconds:.2f} s, blocks {counts}")


def test_the_index_is_true_after_evictions_from_every_tier(
    tiers: AllTiers, observer: Observer
) -> None:
    fill(tiers)
    agree(tiers, observer, "evictions")
    for where in tiers.wheres():
        num_removed = tiers.replay(where.worker).num_removed
        assert all(num_removed[medium] > 0 for medium in ("GPU", "CPU", "STORAGE")), num_removed
        believed = observer.believed(tiers.stack.worker_id(where.worker))
        # an eviction from the GPU leaves the host's entry, one from host memory the SSD's
        assert len(believed[HOST] - believed[GPU]) > BLOCK_SIZE
        assert len(believed[SSD] - believed[HOST] - believed[GPU]) > BLOCK_SIZE


def test_the_index_is_true_after_an_abort_and_preemptions(
    tiers: AllTiers, observer: Observer
) -> None:
    hang_up_on_an_answer(tiers.deployment)
    agree(tiers, observer, "an abort")
    texts = [tiers.deployment.fresh() for _ in range(12)]
    before = num_preempted(tiers)
    tiers.deployment.ask_at_once(texts, max_tokens=200)
    assert num_preempted(tiers) > before
    agree(tiers, observer, f"{num_preempted(tiers) - before:.0f} preemptions")


def test_a_cleared_gpu_leaves_what_the_other_tiers_hold(
    tiers: AllTiers, observer: Observer
) -> None:
    before = tiers.held(tiers.wheres()[0])
    clear_gpus(tiers.deployment)
    tiers.step_all()  # with which vLLM tells it
    wheres = tiers.wheres()
    none_left = "the streams say that the GPUs hold nothing"
    tiers.stack.until(lambda: not any(tiers.held(w)[GPU] for w in wheres), SETTLES_S, none_left)
    agree(tiers, observer, "clear_kv_blocks")
    after = tiers.held(tiers.wheres()[0])
    assert before[GPU]
    assert after == {GPU: set(), HOST: before[HOST], SSD: before[SSD]}


def test_the_index_is_true_again_after_nats_was_away(tiers: AllTiers, observer: Observer) -> None:
    with Trickle(tiers.deployment) as trickle:
        interrupt_nats(tiers)
    seconds = tiers.until_true(observer, HEALS_S, tiers.step_all)
    report(f"NATS back, workers at work: true after {seconds:.2f} s")
    with Trickle(tiers.deployment) as another:
        interrupt_nats(tiers)
    time.sleep(HEALS_S)  # idle: nothing is told
    stale = tiers.differences(observer)
    tiers.step_all()
    seconds = tiers.until_true(observer, HEALS_AFTER_A_STEP_S)
    report(f"NATS back, then idle ({stale}): true {seconds:.2f} s after a step")
    answers = trickle.answers + another.answers
    report(f"{len(answers)} requests, {len(trickle.failed + another.failed)} failed")
    assert len(answers) > 10
    assert trickle.failed + another.failed == []


def interrupt_nats(tiers: AllTiers) -> None:
    tiers.stack.kill_nats()
    time.sleep(AWAY_S)
    tiers.stack.start_nats()


def num_preempted(tiers: AllTiers) -> float:
    workers = range(tiers.stack.plan.num_workers)
    return sum(tiers.stack.metric(index, "vllm:num_preemptions_total") for index in workers)


@pytest.mark.nightly
@pytest.mark.parametrize("tier", [HOST, SSD])
def test_prompts_go_where_one_tier_alone_has_them(
    tiers: AllTiers, observer: Observer, tier: str
) -> None:
    fill(tiers)
    clear_gpus(tiers.deployment)
    tiers.until_true(observer, SETTLES_S, tiers.step_all)
    num_asked = 0
    for text in list(tiers.deployment.ids):
        if num_asked == NUM_ROUTED:
            break
        holder = the_only_holder(observer, tiers, text)
        if holder is None or blocks_in(holder[1])[tier] != len(tiers.deployment.keys[text]):
            continue
        num_asked += 1
        ask_the_holder(tiers, text, *holder)
        tiers.until_true(observer, SETTLES_S, tiers.step_all)
    report(f"{tier}: {num_asked} prompts went to the only worker that had them, in that tier")
    assert num_asked == NUM_ROUTED


def ask_the_holder(tiers: AllTiers, text: str, worker_id: int, overlap: Overlap) -> None:
    """It answers, and its blocks come from flexkv, as the router expected."""
    index = tiers.stack.worker_ids().index(worker_id)
    name = "vllm:external_prefix_cache_hits_total"
    before = tiers.stack.metric(index, name)
    answer = tiers.deployment.ask(text)
    assert answer.worker_id == worker_id
    num_loaded = tiers.stack.metric(index, name) - before
    num_blocks = math.ceil(answer.num_prompt / BLOCK_SIZE)
    weighted = sum(WEIGHTS[of] * count for of, count in blocks_in(overlap).items())
    assert abs(answer.hit_rate * num_blocks - weighted) < 0.01
    assert abs(answer.num_cached // BLOCK_SIZE - sum(overlap)) <= 1
    assert num_loaded == answer.num_cached > 0


def blocks_in(overlap: Overlap) -> dict[str, int]:
    return {GPU: overlap.gpu, HOST: overlap.host, SSD: overlap.ssd}


def the_only_holder(observer: Observer, tiers: AllTiers, text: str) -> tuple[int, Overlap] | None:
    """The worker that has blocks of the prompt, if it is one."""
    overlaps = observer.overlap(tiers.deployment.ids[text])
    found = [(worker_id, overlap) for worker_id, overlap in overlaps.items() if any(overlap)]
    return found[0] if len(found) == 1 else None


@pytest.mark.nightly
def test_a_prompt_that_every_tier_has_lost_is_nowhere(tiers: AllTiers, observer: Observer) -> None:
    texts = [tiers.deployment.fresh() for _ in range(8)]
    for text in texts:
        tiers.deployment.ask(text)
    tiers.deployment.ask_fresh_until(
        lambda: not any(any(o) for t in texts for o in overlaps_of(observer, tiers, t)), "lost"
    )
    agree(tiers, observer, "the loss of prompts")
    answers = [tiers.deployment.ask(text) for text in texts]
    assert [(answer.hit_rate, answer.num_cached) for answer in answers] == [(0.0, 0)] * len(texts)


def overlaps_of(observer: Observer, tiers: AllTiers, text: str) -> list[Overlap]:
    return list(observer.overlap(tiers.deployment.ids[text]).values())


@pytest.mark.nightly
@pytest.mark.parametrize("watched", [True, False], ids=["with observer", "without"])
def test_a_frontend_that_was_killed_is_warm_again(tiers: AllTiers, *, watched: bool) -> None:
    stack = tiers.stack
    texts = [tiers.deployment.fresh() for _ in range(16)]
    for text in texts:
        tiers.deployment.ask(text)
    tiers.step_all()
    observer = tiers.deployment.observer().__enter__()
    observer.wait_for_workers(stack.worker_ids())
    tiers.until_true(observer, SETTLES_S, tiers.step_all)
    holders = {text: the_only_holder(observer, tiers, text) for text in texts}
    if not watched:
        observer.__exit__()
    since_s = restart_frontend(stack)
    answers_s = time.monotonic() - since_s
    time.sleep(max(0.0, since_s + WARM_S - time.monotonic()))
    num_right = 0
    for text, holder in holders.items():
        assert holder is not None
        num_right += tiers.deployment.ask(text).worker_id == holder[0]
    report(f"frontend: answers after {answers_s:.2f} s, {num_right} of {len(texts)} are right")
    if watched:
        observer.__exit__()
    assert num_right == len(texts)


def restart_frontend(stack: Stack) -> float:
    """When it was started; it has answered since."""
    pid = stack.kill("frontend")
    since_s = stack.wait_for_successor("frontend", pid)
    stack.until(lambda: stack.chat("hi", deadline_s=15).is_good, ANSWERS_S, "an answer")
    return since_s


@pytest.mark.nightly
def test_answers_are_those_of_a_plain_vllm(tiers: AllTiers, request: pytest.FixtureRequest) -> None:
    deployment = tiers.deployment
    stack = deployment.stack
    reference = stack.start_reference()
    request.addfinalizer(reference.end)
    stack.until(lambda: stack._lists("plain"), UP_S, "the reference is listed")
    texts = [deployment.fresh() for _ in range(6)]
    for _ in range(2):
        assert [deployment.ask(text).text for text in texts] == [
            deployment.expected(text) for text in texts
        ]
    clear_gpus(deployment)
    again = [deployment.ask(text) for text in texts]
    assert [answer.text for answer in again] == [deployment.expected(text) for text in texts]
    assert all(answer.num_cached >= 8 * BLOCK_SIZE for answer in again)


@pytest.mark.nightly
@pytest.mark.parametrize("group", [True, False], ids=["group", "main process"])
def test_a_killed_worker_fails_no_request_and_has_its_ssd_again(
    tiers: AllTiers, observer: Observer, *, group: bool
) -> None:
    stack = tiers.stack
    dead = stack.worker_id(0)
    ssd = tiers.held(tiers.wheres()[0])[SSD]
    with Trickle(tiers.deployment) as trickle:
        time.sleep(1)
        pid = stack.kill("worker0", group=group)
        since_s = time.monotonic()
        stack.wait_for_successor("worker0", pid)
        stack.wait_until_ready()
        seconds = time.monotonic() - since_s
        worker_id = stack.worker_id(0)
        time.sleep(1)
    report(f"worker listed after {seconds:.1f} s; {len(trickle.answers)} requests meanwhile")
    assert trickle.failed == []
    assert worker_id != dead
    tiers.forget_gpu(0)
    observer.wait_for_workers(stack.worker_ids())
    true_s = tiers.until_true(observer, SETTLES_S, tiers.step_all)
    back = ssd & observer.believed(worker_id)[SSD]
    report(f"index true {true_s:.2f} s later, {len(back)} of {len(ssd)} SSD blocks known again")
    assert len(back) > len(ssd) // 2
    for text in list(tiers.deployment.ids):
        holder = the_only_holder(observer, tiers, text)
        if holder is not None and holder[0] == worker_id and holder[1].ssd > 5:
            return ask_the_holder(tiers, text, *holder)
    raise AssertionError("no prompt is on the worker's SSD alone")
