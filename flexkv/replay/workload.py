"""What is replayed: requests as chains of block ids, and a generator of conversations."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from flexkv.replay.mixing import mixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

_MAX_TOKEN_BITS = 31  # positive in an int32 as well
_NUM_PROMPTS = 6
_PROMPTED = 0.7  # the share of sessions that begin with a system prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it comes, and its full blocks. Equal ids at a place are equal tokens."""

    arrival_s: float
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order in which they come."""

    name: str
    requests: Sequence[Request]
    tokens_per_block: int

    @property
    def num_distinct(self) -> int:
        """How many different blocks the requests name: what an endless cache would hold."""
        return len({block for request in self.requests for block in request.block_ids})

    @property
    def num_longest(self) -> int:
        """Blocks of the longest request."""
        return max((len(request.block_ids) for request in self.requests), default=0)

    @property
    def num_common(self) -> int:
        """How many blocks *every* request begins with: a system prompt that never ages."""
        chains = [request.block_ids for request in self.requests if request.block_ids]
        if not chains:
            return 0
        first, last = min(chains), max(chains)  # what these two share, all share
        pairs = zip(first, last, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def tokens_of(block_ids: Sequence[int], tokens_per_block: int, seed: int) -> npt.NDArray[np.uint32]:
    """The token ids of some blocks, end to end: the same for the same id and seed, below 2**31."""
    ids = np.asarray(block_ids, np.uint64)[:, None]
    places = np.arange(tokens_per_block, dtype=np.uint64)[None, :]
    root = mixed(np.array([seed], np.uint64))
    words = mixed(mixed(root + ids) + places)
    return (words >> np.uint64(64 - _MAX_TOKEN_BITS)).astype(np.uint32).ravel()


@dataclass(slots=True)
class _Session:
    """One conversation that goes on growing."""

    block_ids: list[int]
    num_turns_left: int


@dataclass(slots=True)
class _Conversations:
    """Draws sessions: most begin with one of a few system prompts, all grow turn by turn."""

    rng: random.Random
    num_open: int
    next_block: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    open: list[_Session] = field(default_factory=list)

    def fresh(self, low: int, high: int) -> list[int]:
        """Blocks that nobody has named before."""
        first = self.next_block
        self.next_block += self.rng.randint(low, high)
        return list(range(first, self.next_block))

    def turn(self) -> tuple[int, ...]:
        """The next request: a session's whole past, and what its user adds."""
        while len(self.open) < self.num_open:
            prompt = self.rng.choice(self.prompts) if self.rng.random() < _PROMPTED else ()
            self.open.append(_Session(list(prompt), self.rng.randint(1, 10)))
        # The latest sessions are the busiest; the others come back after a while, or never.
        at = len(self.open) - 1 - min(int(self.rng.expovariate(0.06)), len(self.open) - 1)
        session = self.open[at]
        session.block_ids += self.fresh(1, 6)
        asked = tuple(session.block_ids)
        session.block_ids += self.fresh(0, 2)  # the answer, part of the next question's past
        session.num_turns_left -= 1
        if not session.num_turns_left:
            self.open.pop(at)
        return asked


def conversations(num_requests: int, *, seed: int, tokens_per_block: int = 64) -> Workload:
    """A multi-turn workload: many sessions at once, on a few shared system prompts."""
    draw = _Conversations(random.Random(seed), num_open=48)  # noqa: S311 - a draw, not a secret
    draw.prompts = [draw.fresh(2, 8) for _ in range(_NUM_PROMPTS)]
    requests: list[Request] = []
    arrival_s = 0.0
    for _ in range(num_requests):
        arrival_s += draw.rng.expovariate(20.0)
        requests.append(Request(arrival_s, draw.turn()))
    return Workload("conversations", requests, tokens_per_block)
