"""The direct feed: routers believe what host memory and SSD hold, and send prompts there.

The tests share a deployment, and each goes on with what the ones before have left behind.
"""

from __future__ import annotations

import http.client
import json
import math
from typing import TYPE_CHECKING

from flexkv.blocks import Tier
from tests.deployment.stack import BLOCK_SIZE
from tests.deployment.truth import report

if TYPE_CHECKING:
    from tests.deployment.asking import Answer
    from tests.deployment.observing import Held
    from tests.deployment.truth import Deployment, Resident

DISK_WEIGHT = 0.25  # the router's own; that of host memory is set to 1
NUM_ROUTED = 12
SEEN_S = 15.0


def test_answers_are_those_of_a_plain_vllm(direct: Deployment) -> None:
    texts = [direct.fresh() for _ in range(6)]
    expected = [direct.expected(text) for text in texts]
    assert len(set(expected)) == len(texts)
    assert [direct.ask(text).text for text in texts] == expected
    again = [direct.ask(text) for text in texts]
    assert [answer.text for answer in again] == expected
    assert all(answer.num_cached >= 8 * BLOCK_SIZE for answer in again)
    clear_gpus(direct)
    assert [direct.ask(text).text for text in texts] == expected


def test_a_router_beside_agrees_with_every_engine(direct: Deployment) -> None:
    plan = direct.stack.plan
    with direct.observer() as observer:
        observer.wait_for_workers(direct.stack.worker_ids())
        direct.wait_for_agreement(observer, "first prompts")

        served = dict.fromkeys(direct.stack.worker_ids(), 0)

        while min(served.values()) <= plan.gpu_blocks:
            answer = direct.ask(direct.fresh())
            served[answer.worker_id or 0] += answer.num_prompt // BLOCK_SIZE
        direct.wait_for_agreement(observer, "GPU evictions")

        known = [text for text, worker_id in direct.answered_by.items() if worker_id in served]
        answered = dict(direct.answered_by)

        def has_lost(tier: Tier) -> bool:
            """Every worker has evicted one of the prompts known by now."""
            resident = direct.resident()
            kept = {key for tiers in resident.values() for key in tiers[tier]}
            full = all(len(tiers[tier]) >= slots[tier] * 0.8 for tiers in resident.values())
            lost = {answered[text] for text in known if direct.keys[text][0] not in kept}
            return full and lost == set(resident)

        slots = {Tier.HOST: plan.cache["num_cpu_blocks"], Tier.SSD: plan.cache["num_ssd_blocks"]}
        direct.ask_fresh_until(lambda: has_lost(Tier.HOST), "host evictions")
        direct.wait_for_agreement(observer, "host evictions")
        direct.ask_fresh_until(lambda: has_lost(Tier.SSD), "SSD evictions")
        direct.wait_for_agreement(observer, "SSD evictions")

        clear_gpus(direct)
        direct.wait_for_agreement(observer, "clear_kv_blocks")
        hang_up_on_an_answer(direct)
        direct.wait_for_agreement(observer, "an abort")
        preempt(direct)
        direct.wait_for_agreement(observer, "preemptions")


def test_prompts_go_where_host_memory_has_them(direct: Deployment) -> None:
    for _ in range(NUM_ROUTED):
        direct.ask(direct.fresh())
    clear_gpus(direct)  # what comes from a cache now comes from flexkv
    resident = direct.resident()
    held = holders(direct, resident)
    whole = {text: one for text, one in held.items() if one[1].host == len(direct.keys[text])}
    ask_holders(direct, whole, "host memory")


def test_prompts_go_where_only_ssd_has_them(direct: Deployment) -> None:
    clear_gpus(direct)
    resident = direct.resident()
    held = holders(direct, resident)
    on_ssd = {text: one for text, one in held.items() if one[1].ssd == len(direct.keys[text])}
    ask_holders(direct, on_ssd, "SSD")


def test_a_prompt_that_every_tier_has_lost_goes_anywhere(direct: Deployment) -> None:
    texts = [direct.fresh() for _ in range(24)]
    first = {text: direct.ask(text).worker_id for text in texts}

    def all_are_lost() -> bool:
        resident = direct.resident()
        return not any(any(one) for text in texts for one in direct.held(text, resident).values())

    direct.ask_fresh_until(all_are_lost, "all are lost")
    answers = {text: direct.ask(text) for text in texts}
    assert all(answer.num_cached == 0 for answer in answers.values())
    assert all(answer.hit_rate == 0 for answer in answers.values())
    num_same = sum(answer.worker_id == first[text] for text, answer in answers.items())
    report(f"lost prompts: {num_same} of {len(texts)} went to the worker that they were on")
    assert num_same < len(texts)


def holders(direct: Deployment, resident: Resident) -> dict[str, tuple[int, Held]]:
    """The prompts that one worker alone has blocks of."""
    found = {text: direct.only_holder(text, resident) for text in direct.ids}
    return {text: one for text, one in found.items() if one is not None}


def ask_holders(direct: Deployment, held: dict[str, tuple[int, Held]], where: str) -> None:
    """Each goes to the one worker that has it, and its blocks come from there."""
    before = direct.num_loaded()
    asked: dict[str, Answer] = {}
    for text, (worker_id, (host, ssd)) in held.items():
        if len(asked) == NUM_ROUTED:
            break
        now = direct.only_holder(text, direct.resident())
        if now != held[text]:  # an answer before this one had to make room
            continue
        asked[text] = answer = direct.ask(text)
        weighted = host + ssd * DISK_WEIGHT
        num_blocks = math.ceil(answer.num_prompt / BLOCK_SIZE)
        assert answer.worker_id == worker_id, (held[text], answer)
        assert abs(answer.hit_rate * num_blocks - weighted) < 0.01
        assert host + ssd - 1 <= answer.num_cached // BLOCK_SIZE <= host + ssd
        assert answer.text == direct.expected(text)
    assert len(asked) >= NUM_ROUTED // 2
    num_loaded = direct.num_loaded() - before
    num_cached = sum(answer.num_cached for answer in asked.values()) // BLOCK_SIZE
    report(f"{where}: {len(asked)} prompts, {num_cached} blocks cached, {num_loaded} loaded")
    assert num_loaded == num_cached


def clear_gpus(direct: Deployment) -> None:
    with direct.observer() as observer:
        for worker_id in direct.stack.worker_ids():
            assert observer.clear_kv_blocks(worker_id)["status"] == "success"


def hang_up_on_an_answer(direct: Deployment) -> None:
    """Close the connection in the middle of a long answer; the worker must have noticed."""
    stack = direct.stack
    workers = range(stack.plan.num_workers)

    def total(name: str) -> float:
        return sum(stack.metric(index, name) for index in workers)

    before = total("vllm:generation_tokens_total")
    text = direct.fresh()
    direct.remember(text)
    connection = http.client.HTTPConnection("127.0.0.1", stack.http_port, timeout=20)
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 600,
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
    response = connection.getresponse()
    assert response.status == 200
    assert response.read(200)  # it has begun
    response.close()
    connection.close()
    running = "vllm:num_requests_running"
    stack.until(lambda: total(running) == 0, SEEN_S, "the worker has noticed the abort")
    assert total("vllm:generation_tokens_total") - before < 600


def preempt(direct: Deployment) -> None:
    """More running requests than the GPUs' caches have room for."""
    stack = direct.stack
    workers = range(stack.plan.num_workers)

    def num_preempted() -> float:
        return sum(stack.metric(index, "vllm:num_preemptions_total") for index in workers)

    before = num_preempted()
    texts = [direct.fresh() for _ in range(12)]
    answers = direct.ask_at_once(texts, max_tokens=200)
    num = num_preempted() - before
    report(f"{num:.0f} preemptions")
    assert num > 0
    for text, answer in list(zip(texts, answers, strict=True))[:3]:
        assert answer.text == direct.expected(text, 200)
