"""Chat requests to the frontend, and what the answers say of the cache."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tests.e2e.driving import http

if TYPE_CHECKING:
    import random
    from pathlib import Path

ANSWERED_S = 30.0
_WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``worker_id``: the router's first choice. ``hit_rate``: what it expected to be cached,
    weighted by tier. ``num_cached``: the tokens that the worker really had."""

    status: int
    seconds: float
    text: str = ""
    worker_id: int | None = None
    hit_rate: float = 0.0
    num_prompt: int = 0
    num_cached: int = 0
    raw: str = ""

    @property
    def is_good(self) -> bool:
        return self.status == 200


def ask(
    url: str,
    text: str,
    *,
    model: str = "tiny",
    max_tokens: int = 8,
    deadline_s: float = ANSWERED_S,
    worker_id: int | None = None,
    dp_rank: int = 0,
) -> Answer:
    """Greedy, and exactly ``max_tokens`` long.

    ``worker_id`` and its ``dp_rank``: the one that has to answer.
    """
    routing = {} if worker_id is None else {"backend_instance_id": worker_id, "dp_rank": dp_rank}
    request = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "nvext": {"extra_fields": ["worker_id", "timing"]} | routing,
    }
    since_s = time.monotonic()
    status, reply = http(url, request, deadline_s=deadline_s)
    seconds = time.monotonic() - since_s
    if status != 200:
        return Answer(status=status, seconds=seconds, raw=reply)
    document = json.loads(reply)
    more = document.get("nvext") or {}
    worker = more.get("worker_id") or {}
    usage = document.get("usage") or {}
    return Answer(
        status=status,
        seconds=seconds,
        text=document["choices"][0]["message"]["content"],
        worker_id=worker.get("decode_worker_id") or worker.get("prefill_worker_id"),
        hit_rate=(more.get("timing") or {}).get("kv_hit_rate") or 0.0,
        num_prompt=usage.get("prompt_tokens", 0),
        num_cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        raw=reply,
    )


def fresh_text(rng: random.Random, num_words: int = 80) -> str:
    """A text that shares no block with any other."""
    return f"{rng.getrandbits(128):032x} " + " ".join(rng.choice(_WORDS) for _ in range(num_words))


def token_ids(model: Path, text: str) -> list[int]:
    """The prompt of a chat request with ``text``, as the worker sees it."""
    prompt = f"user: {text}\nassistant:"
    ids: list[int] = _tokenizer(model).encode(prompt, add_special_tokens=False).ids
    return ids


@cache
def _tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer  # noqa: PLC0415  # only in vLLM's environment

    return Tokenizer.from_file(str(model / "tokenizer.json"))
