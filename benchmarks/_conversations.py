"""A multi-turn workload in shuffled order, and what a chat server answers to it.

The assistant's turns are made up, not the server's answers, so that every deployment is asked the
same. In each round every session takes one turn, in another random order each time: a router that
takes workers in turn meets a session's last worker by chance only.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUEST_S = 120.0

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Workload:
    """``words``: of each user turn and of each made-up answer."""

    num_sessions: int
    num_turns: int
    words: int
    seed: int = 0

    def rounds(self) -> Iterator[list[Messages]]:
        """The conversations as far as they have come, in the order in which they are asked."""
        rng = random.Random(self.seed)
        sessions: list[Messages] = [[] for _ in range(self.num_sessions)]
        for turn in range(self.num_turns):
            for messages in sessions:
                if turn:
                    messages.append({"role": "assistant", "content": self._text(rng)})
                messages.append({"role": "user", "content": self._text(rng)})
            yield [list(messages) for messages in rng.sample(sessions, k=len(sessions))]

    def _text(self, rng: random.Random) -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=3)) for _ in range(self.words))


@dataclass(frozen=True)
class Answer:
    """``cached``: prompt tokens that the worker did not compute. ``ttft_s``: to the first token."""

    ttft_s: float
    prompt: int
    cached: int


@dataclass(frozen=True)
class Outcome:
    """Of a workload in one deployment, its first round left out: it can't hit anything."""

    answers: list[Answer]

    @property
    def cached(self) -> int:
        return sum(answer.cached for answer in self.answers)

    @property
    def prompt(self) -> int:
        return sum(answer.prompt for answer in self.answers)

    @property
    def mean_ttft_s(self) -> float:
        return mean(answer.ttft_s for answer in self.answers)


def ask_all(url: str, model: str, workload: Workload, *, at_once: int) -> Outcome:
    """Every turn of every session, ``at_once`` requests at a time.

    Raises:
        AssertionError: a request failed.
    """
    answers: list[Answer] = []
    with ThreadPoolExecutor(at_once) as pool:
        for turn, conversations in enumerate(workload.rounds()):
            asked = list(pool.map(lambda messages: ask(url, model, messages), conversations))
            answers += asked if turn else []
    return Outcome(answers)


def ask(url: str, model: str, messages: Messages) -> Answer:
    """One streamed chat completion of four tokens."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.netloc, timeout=REQUEST_S)
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start_s = time.perf_counter()
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        reply = connection.getresponse()
        assert reply.status == 200, f"{reply.status}: {reply.read(1000)!r}"
        first_s: float | None = None
        usage: dict[str, Any] | None = None
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if first_s is None and event.get("choices"):
                first_s = time.perf_counter()
            usage = event.get("usage") or usage
    finally:
        connection.close()
    assert first_s is not None, "no token came"
    assert usage is not None, "no usage came"
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(first_s - start_s, usage["prompt_tokens"], cached)
