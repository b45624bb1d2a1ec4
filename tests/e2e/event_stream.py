"""A reader of vLLM's KV event stream with structs of its own: nothing of vLLM or flexkv."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import msgspec
import zmq

if TYPE_CHECKING:
    from collections.abc import Iterable

TOPIC = "kv"
_LOW = (1 << 64) - 1


class _Event(msgspec.Struct, omit_defaults=True, tag=True):
    pass


class BlockStored(_Event):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None


class BlockRemoved(_Event):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(_Event):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Subscriber:
    """Collects batches from ``endpoint`` for as long as the ``with`` block lasts."""

    def __init__(self, endpoint: str, topic: str = TOPIC) -> None:
        self.batches: list[Batch] = []
        self.sequence: list[int] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(endpoint, topic), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(5)

    def _run(self, endpoint: str, topic: str) -> None:
        decoder = msgspec.msgpack.Decoder(Batch)
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            socket.subscribe(topic)
            socket.connect(endpoint)
            while not self._stopping.is_set():
                if socket.poll(50):
                    _, number, payload = socket.recv_multipart()
                    self.sequence.append(int.from_bytes(number, "big"))
                    self.batches.append(decoder.decode(payload))


class Replay:
    """What a router comes to believe: the hashes per medium, after all events so far."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.media: dict[str | None, set[int]] = {}
        self.num_cleared = 0
        self.num_removed: Counter[str | None] = Counter()  # per medium
        self.problems: list[str] = []
        self._digests: dict[int, bytes] = {}
        for batch in batches:
            for event in batch.events:
                self._take(event)

    def _take(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, AllBlocksCleared):
            self.media.clear()
            self.num_cleared += 1
            return
        held = self.media.setdefault(event.medium, set())
        if isinstance(event, BlockRemoved):
            self.num_removed[event.medium] += len(held.intersection(event.block_hashes))
            held.difference_update(event.block_hashes)
            return
        if event.medium != "GPU":
            self._check(event, held)
        self._learn(event)
        held.update(event.block_hashes)

    def _check(self, event: BlockStored, held: set[int]) -> None:
        """One residency, one Stored; and the parent is there first."""
        if twice := held & set(event.block_hashes):
            self.problems.append(f"announced twice: {sorted(twice)[:3]}")
        if event.parent_block_hash is not None and event.parent_block_hash not in held:
            self.problems.append(f"parent {event.parent_block_hash} is not there")
        if len(event.token_ids) != len(event.block_hashes) * event.block_size:
            self.problems.append(f"{len(event.token_ids)} tokens for {len(event.block_hashes)}")

    def _learn(self, event: BlockStored) -> None:
        """Compute each hash from the tokens, as vLLM's default (SHA-256 of a pickle) does."""
        first = event.parent_block_hash
        parent = _digest("vllm-none-hash") if first is None else self._digests.get(first)
        for i, block_hash in enumerate(event.block_hashes):
            if parent is None:
                self.problems.append(f"{event.medium}: the parent of {block_hash} is unknown")
                return
            tokens = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
            extra = event.extra_keys[i] if event.extra_keys else None
            parent = _digest((parent, tuple(tokens), extra))
            if int.from_bytes(parent, "big") & _LOW != block_hash:
                self.problems.append(f"{event.medium}: {block_hash} is not what its tokens give")
            self._digests[block_hash] = parent


def _digest(thing: object) -> bytes:
    return hashlib.sha256(pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)).digest()
