"""The direct feed, when one of its processes is killed: no request fails, and the index heals.

Figures are printed (``-s``); what is asserted is what docs/dynamo.md promises. The tests share a
deployment with the others, and each waits until all of it is there again.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING

import pytest

from flexkv.blocks import Tier
from tests.deployment.stack import BLOCK_SIZE, SEEN_S
from tests.deployment.talking import Talk
from tests.deployment.truth import report

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deployment.truth import Deployment

NUM_KNOWN = 16
FRONTEND_S = 0.5  # after its start, or with its first answer if that is later
NATS_AWAY_S = 8.0
NATS_HEALED_S = 6.0
REFUSED_S = 5.0


def known_on(direct: Deployment, worker_id: int, count: int) -> list[str]:
    """Fresh prompts that the worker has been given."""
    texts: list[str] = []
    for _ in range(20 * count):
        text = direct.fresh()
        if direct.ask(text).worker_id == worker_id:
            texts.append(text)
        if len(texts) == count:
            return texts
    raise AssertionError(f"worker {worker_id} got {len(texts)} of {20 * count} prompts")


@pytest.mark.parametrize("observed", [False, True], ids=["alone", "beside_an_observer"])
def test_a_restarted_frontend_knows_who_has_what(direct: Deployment, observed: bool) -> None:  # noqa: FBT001
    stack = direct.stack
    stack.wait_until_ready()
    texts = [direct.fresh(num_words=24) for _ in range(NUM_KNOWN)]
    first = {text: direct.ask(text).worker_id for text in texts}
    assert set(first.values()) == set(stack.worker_ids())
    resident = direct.resident()
    assert all((direct.only_holder(text, resident) or [0])[0] == first[text] for text in texts)
    with direct.observer() if observed else contextlib.nullcontext():
        pid = stack.kill("frontend")
        started_s = stack.wait_for_successor("frontend", pid)
        stack.until(lambda: stack.chat(texts[0], deadline_s=5).is_good, SEEN_S, "an answer")
        answered_s = time.monotonic() - started_s
        time.sleep(max(0.0, started_s + FRONTEND_S - time.monotonic()))
        answers = {text: direct.ask(text) for text in texts}
    report(f"frontend: first answer {answered_s:.2f} s after its start")
    wrong = {text: one for text, one in answers.items() if one.worker_id != first[text]}
    assert not wrong
    assert all(one.num_cached for one in answers.values())


@pytest.mark.parametrize("group", [True, False], ids=["whole_group", "main_process_alone"])
def test_a_killed_worker_costs_no_request_and_comes_back_with_its_ssd(
    direct: Deployment,
    group: bool,  # noqa: FBT001
) -> None:
    stack = direct.stack
    stack.wait_until_ready()
    victim = stack.worker_id(0)
    texts = known_on(direct, victim, 8)
    was_on_ssd = direct.resident()[victim][Tier.SSD]
    expected = {text: direct.expected(text) for text in texts}
    with Talk(direct) as talk:
        talk.wait_for_answers(12)
        pid = stack.kill("worker0", group=group)
        killed_s = time.monotonic()
        stack.wait_for_successor("worker0", pid)
        restarted_s = time.monotonic() - killed_s
        talk.wait_for_answers(12)
        stack.wait_until_ready()
        listed_s = time.monotonic() - killed_s
        talk.wait_for_answers(4)
    report(
        f"worker: {talk.num_answers} requests, {talk.num_failed} failed, restarted after "
        f"{restarted_s:.1f} s, ready after {listed_s:.1f} s, slowest answer {talk.slowest_s:.1f} s"
    )
    assert not talk.failures
    successor = stack.worker_id(0)
    assert successor != victim
    resident = direct.resident()
    on_ssd = resident[successor][Tier.SSD]
    report(f"worker: {len(was_on_ssd & on_ssd)} of {len(was_on_ssd)} SSD blocks are back")
    with direct.observer() as observer:
        observer.wait_for_workers([successor])
        direct.wait_for_agreement(observer, "a worker's restart")
    back = [text for text in texts if set(direct.keys[text]) <= on_ssd]
    assert len(back) >= len(texts) // 2
    for text in back:
        num_blocks = len(direct.keys[text])
        answer = direct.ask(text)
        assert answer.worker_id == successor
        assert num_blocks - 1 <= answer.num_cached // BLOCK_SIZE <= num_blocks
        assert answer.text == expected[text]


def test_nats_may_be_away(direct: Deployment) -> None:
    """Both workers have news when it goes, and one is idle from then on."""
    stack = direct.stack
    stack.wait_until_ready()
    busy, idle = stack.worker_ids()
    steady = known_on(direct, busy, 4)
    with direct.observer() as observer:
        observer.wait_for_workers([busy, idle])
        direct.wait_for_agreement(observer, "the time before")
        stack.kill_nats()
        away_s = time.monotonic()
        before = direct.resident()
        unheard = [direct.fresh() for _ in range(12)]
        answers = direct.ask_at_once(unheard)
        assert {answer.worker_id for answer in answers} == {busy, idle}
        num_steady = 0
        while time.monotonic() < away_s + NATS_AWAY_S:
            direct.ask(steady[num_steady % len(steady)])
            num_steady += 1
            time.sleep(0.2)
        resident = direct.resident()
        assert all(resident[one] != before[one] for one in (busy, idle))
        stack.start_nats()
        back_s = time.monotonic()
        healed_s = direct.wait_for_agreement(observer, "NATS's return", NATS_HEALED_S)
    report(f"NATS: index true {healed_s:.1f} s after its return, {num_steady} steady requests")
    time.sleep(max(0.0, back_s + NATS_HEALED_S - time.monotonic()))
    resident = direct.resident()
    held = {text: direct.only_holder(text, resident) for text in unheard}
    known = {text: one[0] for text, one in held.items() if one is not None and one[1].host}
    assert set(known.values()) == {busy, idle}
    for text, worker_id in list(known.items())[:6]:
        assert direct.ask(text).worker_id == worker_id  # the frontend's index is true as well


def test_the_endpoint_of_another_worker_is_refused(direct: Deployment, tmp_path: Path) -> None:
    stack = direct.stack
    stack.wait_until_ready()
    entry = stack.entry("worker1")
    config = {"server_recv_port": entry["server_recv_port"]}
    path = tmp_path / "same_endpoint.json"
    path.write_text(json.dumps(config))
    connector = json.dumps({"kv_connector": "FlexKVConnectorV1", "kv_role": "kv_both"})
    options = [f"--kv-transfer-config={connector}", "--enable-prefix-caching"]
    with stack.start_by_hand("hand", options, {"FLEXKV_CONFIG_PATH": str(path)}) as process:
        stack.until(lambda: "FlexKVConnectorV1" in process.log(), 200, "the connector is made")
        begun_s = time.monotonic()
        endpoint = entry["server_recv_port"]
        stack.until(
            lambda: f"{endpoint}: the endpoint is taken" in process.log(), 60, "it is refused"
        )
        refused_s = time.monotonic() - begun_s
        process.popen.wait(60)
    report(f"a taken endpoint: refused within {refused_s:.1f} s")
    assert refused_s < REFUSED_S
    assert process.popen.returncode != 0
    assert direct.ask(direct.fresh()).is_good
