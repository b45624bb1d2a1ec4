"""A router beside the frontend's, and what the engines themselves say they hold."""

from __future__ import annotations

import asyncio
import hashlib
import pickle
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from flexkv.blocks import Tier
from flexkv.link.residency import residency
from flexkv.replay.verify import beliefs

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping, Sequence

    from flexkv.link.residency import Residency
    from flexkv.replay.deployment import Overlap, Router

_Answer = TypeVar("_Answer")

ASKED_S = 15.0
PYTHONHASHSEED = "0"  # Dynamo's workers set it where it is unset


class Held(NamedTuple):
    """How many leading blocks of a prompt: in host memory, then further on SSD."""

    host: int
    ssd: int


def block_keys(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """vLLM's keys of the full blocks of a prompt, made here from its tokens alone."""

    def sha256(value: object) -> bytes:
        return hashlib.sha256(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)).digest()

    keys = []
    parent = sha256(PYTHONHASHSEED)
    for at in range(0, len(token_ids) // block_size * block_size, block_size):
        parent = sha256((parent, tuple(token_ids[at : at + block_size]), None))
        keys.append(parent)
    return keys


def held_of(keys: Sequence[bytes], resident: Mapping[Tier, Iterable[bytes]]) -> Held:
    """What a router must believe of a prompt with these keys, in its order of tiers."""
    host = _leading(keys, set(resident.get(Tier.HOST, ())))
    return Held(host, _leading(keys[host:], set(resident.get(Tier.SSD, ()))))


def _leading(keys: Sequence[bytes], resident: set[bytes]) -> int:
    return next((at for at, key in enumerate(keys) if key not in resident), len(keys))


class Loop:
    """A thread that runs coroutines for who has no loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def run(self, waited_for: Coroutine[Any, Any, _Answer], deadline_s: float = ASKED_S) -> _Answer:
        return asyncio.run_coroutine_threadsafe(waited_for, self._loop).result(deadline_s)

    def residency(self, endpoint: str) -> Residency:
        """What the engine at ``endpoint`` holds."""
        return self.run(residency(endpoint, ASKED_S - 5))


class Observer:
    """A second router of the deployment: it hears everything and sends no request."""

    def __init__(self, loop: Loop, router: Router) -> None:
        self._loop = loop
        self._router = router

    def __enter__(self) -> Self:
        self._loop.run(self._router.__aenter__(), 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._router.__aexit__(None, None, None))

    def wait_for_workers(self, worker_ids: Iterable[int], deadline_s: float = 30.0) -> None:
        waiting = self._router.wait_for_workers(worker_ids, deadline_s=deadline_s)
        self._loop.run(waiting, deadline_s + 5)

    def overlap(self, token_ids: Sequence[int]) -> dict[int, Overlap]:
        return self._loop.run(self._router.overlap(token_ids))

    def overlaps(self, prompts: Sequence[Sequence[int]]) -> list[dict[int, Overlap]]:
        """Of each prompt, by worker."""

        async def all_of_them() -> list[dict[int, Overlap]]:
            return [await self._router.overlap(token_ids) for token_ids in prompts]

        return self._loop.run(all_of_them())

    def believed(self, worker_id: int, rank: int = 0) -> dict[str, set[int]]:
        """Everything that the router has of the worker's rank, by Dynamo's name of the tier."""
        events = self._loop.run(self._router.dump_events())
        return dict(beliefs(events).get((worker_id, rank), {}))

    def clear_kv_blocks(self, worker_id: int) -> Any:
        """Have the worker reset its prefix cache; what it answers."""

        async def clear() -> Any:
            endpoint = self._router._runtime.endpoint("dynamo.backend.clear_kv_blocks")
            client = await endpoint.client()
            await client.wait_for_instances()
            async for answer in await client.direct({}, worker_id):
                return answer.data()
            return None

        return self._loop.run(clear(), 30)
