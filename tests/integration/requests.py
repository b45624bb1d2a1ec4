"""Requests as vLLM has them, as far as flexkv looks at them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

BLOCK_SIZE = 4


def hashes_of(token_ids: list[int]) -> list[bytes]:
    """One for each full block, of its whole prefix."""
    ends = range(BLOCK_SIZE, len(token_ids) + 1, BLOCK_SIZE)
    return [hashlib.sha256(repr(token_ids[:end]).encode()).digest() for end in ends]


@dataclass
class Request:
    all_token_ids: list[int]
    request_id: str = "a"
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    prompt: int | None = None
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.set_tokens(self.all_token_ids)

    def set_tokens(self, token_ids: list[int]) -> None:
        self.all_token_ids = token_ids
        self.block_hashes = hashes_of(token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens if self.prompt is None else self.prompt

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def lora(name: str) -> Any:
    return SimpleNamespace(lora_name=name)
