"""The truth of every tier, the GPUs' too, beside what an observer's router believes of it."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Self

from flexkv.blocks import Tier
from flexkv.events.dynamo import TIERS
from flexkv.link.endpoint import with_dp_rank
from flexkv.replay.deployment import Overlap
from tests.deployment.observing import block_keys
from tests.deployment.stack import BLOCK_SIZE
from tests.e2e.event_stream import Replay, Subscriber

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tests.deployment.asking import Answer
    from tests.deployment.observing import Observer
    from tests.deployment.truth import Deployment

GPU, HOST, SSD = "device", "host_pinned", "disk"
_POLL_S = 0.05


class Where(NamedTuple):
    """A worker, as the stack counts them, and one of its data-parallel ranks."""

    worker: int
    rank: int = 0


class AllTiers:
    """What the GPUs hold is what vLLM's own stream says, for as long as the ``with`` lasts.

    It has to begin before a worker gets its first request. With data parallelism the GPUs are
    left out, and with the direct feed there is no stream.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.stack = deployment.stack
        self._streams: dict[int, Subscriber] = {}
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        plan = self.stack.plan
        if plan.gpu_events and plan.data_parallel_size == 1:
            for index in range(plan.num_workers):
                stream = Subscriber(self.stack.events_endpoint(index), topic="")
                self._streams[index] = self._exits.enter_context(stream)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def wheres(self) -> list[Where]:
        plan = self.stack.plan
        ranks = range(plan.data_parallel_size)
        return [Where(worker, rank) for worker in range(plan.num_workers) for rank in ranks]

    def replay(self, index: int) -> Replay:
        """All that worker ``index``'s stream has said."""
        return Replay(list(self._streams[index].batches))

    def forget_gpu(self, index: int) -> None:
        """Its process is another one now: what its GPU holds is not known any more."""
        self._streams.pop(index, None)

    def held(self, where: Where) -> dict[str, set[int]]:
        """Router hashes, by Dynamo's name of the tier."""
        endpoint = self.stack.endpoint(where.worker)
        if self.stack.plan.data_parallel_size > 1:
            endpoint = with_dp_rank(endpoint, where.rank)
        keys = self.deployment.loop.residency(endpoint).keys
        held = {TIERS[tier]: _hashes(keys.get(tier, ())) for tier in (Tier.HOST, Tier.SSD)}
        if where.worker in self._streams:
            held[GPU] = self.replay(where.worker).media.get("GPU", set())
        return held

    def differences(self, observer: Observer) -> list[str]:
        """In words, for every rank and tier; none where the index is true."""
        found = []
        for where in self.wheres():
            believed = observer.believed(self.stack.worker_id(where.worker), where.rank)
            for tier, held in self.held(where).items():
                has = believed.get(tier, set())
                if has != held:
                    counts = f"{len(held - has)} missing, {len(has - held)} surplus"
                    found.append(f"{where}, {tier}: {counts}")
        return found

    def until_true(
        self,
        observer: Observer,
        deadline_s: float,
        meanwhile: Callable[[], object] | None = None,
        *,
        texts: Iterable[str] = (),
    ) -> float:
        """Seconds until the whole index was true, and the scores of these prompts.

        ``meanwhile`` is called again and again.
        """
        since_s = time.monotonic()
        prompts = list(texts)
        while differing := self.differences(observer) or self.wrong_overlaps(observer, prompts):
            if time.monotonic() > since_s + deadline_s:
                raise AssertionError(f"the router is wrong after {deadline_s} s: {differing}")
            if meanwhile is not None:
                meanwhile()
            time.sleep(_POLL_S)
        return time.monotonic() - since_s

    def wrong_overlaps(self, observer: Observer, texts: Iterable[str]) -> list[str]:
        """The prompts whose scores are not what the tiers hold."""
        held = {self.stack.worker_id(i): self.held(Where(i)) for i, _ in self.wheres()}
        wrong = []
        for text in texts:
            keys = block_keys(self.deployment.ids[text], BLOCK_SIZE)
            overlaps = observer.overlap(self.deployment.ids[text])
            for worker_id, tiers in held.items():
                expected = expected_overlap(keys, tiers)
                if overlaps[worker_id] != expected:
                    wrong.append(f"{text[:40]}: {overlaps[worker_id]}, not {expected}")
        return wrong

    def step_all(self) -> None:
        """Let every rank run a step: the built-in connector tells what is left with the next."""
        for worker, rank in self.wheres():
            worker_id = self.stack.worker_id(worker)
            answer = self.stack.chat("hi", max_tokens=2, worker_id=worker_id, dp_rank=rank)
            assert answer.is_good, answer


class Trickle:
    """Fresh prompts, one after another, until the ``with`` block ends."""

    def __init__(self, deployment: Deployment, pause_s: float = 0.2) -> None:
        self.answers: list[Answer] = []
        self._deployment, self._pause_s = deployment, pause_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.is_good]

    def _ask(self) -> None:
        while not self._ending.wait(self._pause_s):
            text = self._deployment.fresh()
            self._deployment.remember(text)
            self.answers.append(self._deployment.stack.chat(text))


def expected_overlap(keys: Sequence[bytes], held: Mapping[str, set[int]]) -> Overlap:
    """The leading blocks on the GPU, what host adds behind them, and SSD behind both."""
    hashes = [int.from_bytes(key[-8:], "big") for key in keys]
    counts, at = [], 0
    for tier in (GPU, HOST, SSD):
        start = at
        while at < len(hashes) and hashes[at] in held.get(tier, ()):
            at += 1
        counts.append(at - start)
    return Overlap(*counts)


def _hashes(keys: Iterable[bytes]) -> set[int]:
    return {int.from_bytes(key[-8:], "big") for key in keys}
