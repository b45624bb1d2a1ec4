"""Whether the router believes what the engines hold, over a whole deployment."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

from flexkv.blocks import Tier
from flexkv.events.dynamo import TIERS
from flexkv.replay.deployment import Router
from tests.deployment.asking import Answer, fresh_text, token_ids
from tests.deployment.observing import Held, Loop, Observer, block_keys, held_of
from tests.deployment.stack import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from flexkv.blocks import BlockKey
    from tests.deployment.stack import Stack

    Resident = Mapping[int, Mapping[Tier, set[BlockKey]]]
    """Keys by worker id and tier."""

QUIET_S = 20.0
AGREES_S = 5.0
_STEP_S = 0.1
_TIERS = (Tier.HOST, Tier.SSD)


class Deployment:
    """A running stack, every prompt that it was asked, and what is known of each."""

    def __init__(self, stack: Stack, loop: Loop, seed: int = 0) -> None:
        self.stack = stack
        self.loop = loop
        self.rng = random.Random(seed)
        self.keys: dict[str, list[bytes]] = {}  # of the full blocks of every prompt asked
        self.ids: dict[str, list[int]] = {}
        self.answered_by: dict[str, int] = {}  # the worker of the last answer
        self._expected = cache(self._ask_the_reference)

    def observer(self) -> Observer:
        url, endpoint = self.stack.nats_url, "dynamo.backend.generate"
        discovery = self.stack.discovery
        router = Router(url, discovery, tokens_per_block=BLOCK_SIZE, endpoint=endpoint)
        return Observer(self.loop, router)

    # Asking.

    def warm_up(self) -> None:
        """Every worker answers a fresh prompt: its first answer may take ten seconds."""
        missing = set(self.stack.worker_ids())
        for _ in range(40):
            if not missing:
                return
            missing.discard(self.ask(self.fresh(num_words=8)).worker_id or 0)
        raise AssertionError(f"workers {missing} got none of 40 fresh prompts")

    def fresh(self, num_words: int = 80) -> str:
        return fresh_text(self.rng, num_words)

    def ask(self, text: str, **options: Any) -> Answer:
        """The answer, which must be there."""
        self.remember(text)
        answer = self.stack.chat(text, **options)
        assert answer.is_good, answer
        self.answered_by[text] = answer.worker_id or 0
        return answer

    def ask_at_once(self, texts: Iterable[str], **options: Any) -> list[Answer]:
        with ThreadPoolExecutor(16) as threads:
            return list(threads.map(lambda text: self.ask(text, **options), texts))

    def ask_fresh_until(
        self, condition: Callable[[], object], what: str, limit: int = 120
    ) -> dict[str, Answer]:
        """Fresh prompts, one after another; the condition is looked at after every fourth."""
        answers: dict[str, Answer] = {}
        while not condition():
            assert len(answers) < limit, f"not after {limit} prompts: {what}"
            for text in [self.fresh() for _ in range(4)]:
                answers[text] = self.ask(text)
        return answers

    def expected(self, text: str, max_tokens: int = 8) -> str:
        """What a plain vLLM answers."""
        return self._expected(text, max_tokens)

    def _ask_the_reference(self, text: str, max_tokens: int) -> str:
        answer = self.stack.chat(text, model="plain", max_tokens=max_tokens)
        assert answer.is_good, answer
        assert answer.num_cached == 0
        return answer.text

    def remember(self, text: str) -> None:
        if text not in self.ids:
            self.ids[text] = token_ids(self.stack.model, text)
            self.keys[text] = block_keys(self.ids[text], BLOCK_SIZE)

    # The truth.

    def resident(self) -> Resident:
        """What each engine holds now, once nothing happens any more."""
        until_s = time.monotonic() + QUIET_S
        before: object = None
        while True:
            found = {
                worker_id: self.loop.residency(self.stack.endpoint(index))
                for index, worker_id in enumerate(self.stack.worker_ids())
            }
            now = [(one.last_event_id, one.digests, one.is_settled) for one in found.values()]
            if now == before and all(one.is_settled for one in found.values()):
                return {worker_id: one.keys for worker_id, one in found.items()}
            assert time.monotonic() < until_s, f"the engines do not come to rest: {now}"
            before = now
            time.sleep(2 * _STEP_S)

    def held(self, text: str, resident: Resident) -> dict[int, Held]:
        """How much of the prompt each worker has."""
        keys = self.keys[text]
        return {worker_id: held_of(keys, tiers) for worker_id, tiers in resident.items()}

    def only_holder(self, text: str, resident: Resident) -> tuple[int, Held] | None:
        """The worker that has the prompt's first block, if it is one."""
        held = {w: held for w, held in self.held(text, resident).items() if any(held)}
        return next(iter(held.items())) if len(held) == 1 else None

    def wait_for_agreement(
        self, observer: Observer, since: str, deadline_s: float = AGREES_S
    ) -> float:
        """Seconds until the observer believed the truth of every prompt and of every block."""
        resident = self.resident()
        since_s = time.monotonic()
        while wrong := self._disagreement(observer, resident):
            assert time.monotonic() < since_s + deadline_s, f"after {since}: {wrong}"
            time.sleep(_STEP_S)
        seconds = time.monotonic() - since_s
        blocks = {tier: [len(one.get(tier, ())) for one in resident.values()] for tier in _TIERS}
        report(f"after {since}: {len(self.ids)} prompts agree in {seconds:.2f} s, blocks {blocks}")
        return seconds

    def _disagreement(self, observer: Observer, resident: Resident) -> str:
        texts = list(self.ids)
        overlaps = observer.overlaps([self.ids[text] for text in texts])
        for text, overlap in zip(texts, overlaps, strict=True):
            held = self.held(text, resident)
            believed = {w: Held(one.host, one.ssd) for w, one in overlap.items() if w in held}
            if believed != held or any(one.gpu for one in overlap.values()):
                return f"the router believes {overlap} of {text[:40]!r}, but held is {held}"
        for worker_id, tiers in resident.items():
            believed_of = observer.believed(worker_id)
            for tier in _TIERS:
                held_in = {int.from_bytes(key[-8:], "big") for key in tiers.get(tier, ())}
                found = believed_of.get(TIERS[tier], set())
                if found != held_in:
                    missing, surplus = len(held_in - found), len(found - held_in)
                    return f"worker {worker_id}, {tier}: {missing} missing, {surplus} surplus"
        return ""

    # The workers' own counts.

    def num_loaded(self) -> int:
        """Blocks that the engines have loaded since they started, from their logs.

        An engine writes a line when a request comes, so each gets one that needs no load.
        """
        self.warm_up()
        total = 0
        for index in range(self.stack.plan.num_workers):
            log = self.stack.log(f"worker{index}")
            lines = [line for line in log.splitlines() if "requests, hit rate" in line]
            total += int(lines[-1].partition("loaded ")[2].partition(" ")[0]) if lines else 0
        return total


def report(line: str) -> None:
    """A measured figure, for the docs: shown with ``pytest -s``, and when a test fails."""
    print(line, flush=True)  # noqa: T201
