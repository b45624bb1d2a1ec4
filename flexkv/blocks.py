"""Blocks and the words for them: keys, slots, tiers, and the layout of a KV cache."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NewType, SupportsIndex, TypeAlias

import numpy as np

from flexkv.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BlockKey = NewType("BlockKey", bytes)
"""Identifies a block and its whole prefix: the cache key. vLLM: ``BlockHash``."""

RouterHash = NewType("RouterHash", int)
"""uint64, the key's low 64 bits: what stands for the block on the wire, and only there."""

TokensHash = NewType("TokensHash", int)
"""uint64 over the tokens of one block alone. Dynamo: ``tokens_hash``."""

Slot = NewType("Slot", int)
"""A block-sized place in one tier."""

ExtraKeys: TypeAlias = tuple[object, ...] | None
"""What tells a block from others with the same tokens: multimodal inputs, prompt embeddings."""

_MIN_KEY_NBYTES = 8


class Tier(StrEnum):
    """Where a block can be."""

    GPU = "gpu"
    HOST = "host"
    SSD = "ssd"
    REMOTE = "remote"


class _Chain:
    """The arrays that many ``Blocks`` share. Never changes, but for the memo of hashes."""

    __slots__ = (
        "extra_keys",
        "key_nbytes",
        "keys",
        "lora",
        "namespace",
        "opaque_from",
        "parent",
        "token_ids",
        "tokens_hashes",
        "tokens_per_block",
    )

    def __init__(  # the one place that names every array
        self,
        keys: bytes,
        key_nbytes: int,
        token_ids: bytes,
        tokens_per_block: int,
        parent: BlockKey | None,
        namespace: str | None,
        lora: str | None,
        extra_keys: tuple[ExtraKeys, ...] | None,
        opaque_from: int | None,
    ) -> None:
        self.keys = keys
        self.key_nbytes = key_nbytes
        self.token_ids = token_ids
        self.tokens_per_block = tokens_per_block
        self.parent = parent
        self.namespace = namespace
        self.lora = lora
        self.extra_keys = extra_keys
        self.opaque_from = opaque_from
        self.tokens_hashes: array[int] | None = None  # of the leading blocks, as far as asked for


class Blocks:
    """Consecutive blocks of one chain: their keys, token ids, tenant and adapter.

    Immutable. A slice shares the arrays of the whole, so it costs the same for one block as for
    thousands. ``token_ids`` are packed little-endian uint32, ``tokens_per_block`` for each block;
    ``keys`` are packed as well, ``key_nbytes`` each (at least 8). ``parent`` is the key of the
    block before the first one, None where the first block begins the chain. ``extra_keys``: for
    each block what else tells it from others with the same tokens, None for nothing;
    ``is_opaque``: a block before these has some.

    Raises:
        LayoutError: the arrays do not have the same number of blocks.
    """

    __slots__ = ("_chain", "_start", "_stop")

    def __init__(
        self,
        keys: bytes,
        token_ids: bytes,
        *,
        tokens_per_block: int,
        key_nbytes: int = 32,
        parent: BlockKey | None = None,
        namespace: str | None = None,
        lora: str | None = None,
        extra_keys: tuple[ExtraKeys, ...] | None = None,
        is_opaque: bool = False,
    ) -> None:
        if key_nbytes < _MIN_KEY_NBYTES or tokens_per_block < 1:
            raise LayoutError(
                f"key_nbytes is {key_nbytes} (at least 8) and tokens_per_block "
                f"{tokens_per_block} (at least 1)"
            )
        num_blocks, odd = divmod(len(keys), key_nbytes)
        if odd or len(token_ids) != 4 * tokens_per_block * num_blocks:
            raise LayoutError(
                f"{len(keys)} bytes of keys at {key_nbytes} each do not go with "
                f"{len(token_ids)} bytes of token ids at {4 * tokens_per_block} a block"
            )
        if extra_keys is not None and len(extra_keys) != num_blocks:
            raise LayoutError(f"{len(extra_keys)} extra keys do not go with {num_blocks} blocks")
        opaque_from = next((i for i, extra in enumerate(extra_keys or ()) if extra), None)
        if is_opaque:
            opaque_from = 0
        self._chain = _Chain(
            keys,
            key_nbytes,
            token_ids,
            tokens_per_block,
            parent,
            namespace,
            lora,
            extra_keys,
            opaque_from,
        )
        self._start = 0
        self._stop = num_blocks

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> Blocks:
        start, stop, step = part.indices(self._stop - self._start)
        if step != 1:
            raise LayoutError(f"blocks of a chain are consecutive: step {step} is not possible")
        return self.part(start, max(start, stop))

    def __iter__(self) -> Iterator[BlockKey]:
        return (self.key(i) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Blocks):
            return NotImplemented
        return self.parent == other.parent and self.packed_keys() == other.packed_keys()

    __hash__ = None  # type: ignore[assignment]  # compared by content, and long: not a dict key

    def __repr__(self) -> str:
        if not len(self):
            return "Blocks(0)"
        return f"Blocks({len(self)}, {self.key(0).hex()[:8]}..{self.key(len(self) - 1).hex()[:8]})"

    def part(self, start: int, stop: int) -> Blocks:
        """``self[start:stop]`` for bounds that are known to lie within: no checks."""
        blocks = Blocks.__new__(Blocks)
        blocks._chain = self._chain
        blocks._start = self._start + start
        blocks._stop = self._start + stop
        return blocks

    def key(self, i: int) -> BlockKey:
        """The key of block ``i``, counted from the first of these (0 <= i < len)."""
        chain = self._chain
        at = (self._start + i) * chain.key_nbytes
        return BlockKey(chain.keys[at : at + chain.key_nbytes])

    def packed_keys(self) -> bytes:
        """All keys, end to end."""
        width = self._chain.key_nbytes
        return self._chain.keys[self._start * width : self._stop * width]

    def router_hashes(self) -> list[RouterHash]:
        """What stands for each block on the wire: its key's last 8 bytes, big endian."""
        width = self._chain.key_nbytes
        rows = np.frombuffer(self.packed_keys(), np.uint8).reshape(-1, width)
        low = np.ascontiguousarray(rows[:, width - 8 :]).view(">u8")
        hashes: list[RouterHash] = low.ravel().tolist()
        return hashes

    def tokens_hashes(self, compute: Callable[[memoryview], Iterable[int]]) -> array[int]:
        """One hash a block. The chain keeps them: ``compute`` gets the token ids not hashed yet."""
        chain = self._chain
        known = chain.tokens_hashes or array("Q")
        if len(known) < self._stop:
            width = 4 * chain.tokens_per_block
            rest = memoryview(chain.token_ids)[len(known) * width : self._stop * width]
            # A new array, so that a race of two threads costs work and nothing else.
            known = chain.tokens_hashes = known + array("Q", compute(rest))
        return known[self._start : self._stop]

    @property
    def parent(self) -> BlockKey | None:
        """The key of the block before the first of these."""
        return self.key(-1) if self._start else self._chain.parent

    @property
    def key_nbytes(self) -> int:
        """Bytes of one key."""
        return self._chain.key_nbytes

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one block."""
        return self._chain.tokens_per_block

    @property
    def token_ids(self) -> memoryview:
        """Packed little-endian uint32, ``tokens_per_block`` for each block."""
        width = 4 * self._chain.tokens_per_block
        return memoryview(self._chain.token_ids)[self._start * width : self._stop * width]

    @property
    def namespace(self) -> str | None:
        """The tenant: vLLM's and Dynamo's cache salt."""
        return self._chain.namespace

    @property
    def lora(self) -> str | None:
        """The adapter's name."""
        return self._chain.lora

    @property
    def extra_keys(self) -> tuple[ExtraKeys, ...] | None:
        """One entry for each block; None where the chain has none."""
        keys = self._chain.extra_keys
        return None if keys is None else keys[self._start : self._stop]

    @property
    def num_plain(self) -> int:
        """How many of these, from the first, are told by tokens, tenant and adapter alone.

        A block with extra keys is not, and neither is what follows it.
        """
        opaque_from = self._chain.opaque_from
        if opaque_from is None:
            return len(self)
        return max(0, min(opaque_from, self._stop) - self._start)

    def num_common(self, other: Blocks, at: int) -> int:
        """How many of these blocks, from the first, equal ``other[at:]``.

        A key identifies its whole prefix, so two chains that agree at one position agree at
        every position before: the answer is found by bisection, not by walking.
        """
        mine, theirs = self._chain, other._chain
        width = mine.key_nbytes
        a, b = self._start * width, (other._start + at) * width
        low, high = 0, min(self._stop - self._start, other._stop - other._start - at)
        my_keys, their_keys = mine.keys, theirs.keys
        probe = high  # most often the answer is "all of them"
        while low < high:
            i, j = a + probe * width, b + probe * width
            if my_keys[i - width : i] == their_keys[j - width : j]:
                low = probe
            else:
                high = probe - 1
            probe = (low + high + 1) // 2
        return low

    def compact(self) -> Blocks:
        """The same blocks, in arrays at most twice as long as needed (a copy if they were not)."""
        chain = self._chain
        num_blocks = self._stop - self._start
        if 2 * num_blocks * chain.key_nbytes >= len(chain.keys):
            return self
        blocks = Blocks.__new__(Blocks)
        blocks._chain = copy = _Chain(
            self.packed_keys(),
            chain.key_nbytes,
            bytes(self.token_ids),
            chain.tokens_per_block,
            self.parent,
            chain.namespace,
            chain.lora,
            self.extra_keys,
            None if chain.opaque_from is None else max(0, chain.opaque_from - self._start),
        )
        if chain.tokens_hashes is not None:
            copy.tokens_hashes = chain.tokens_hashes[self._start : self._stop]
        blocks._start = 0
        blocks._stop = num_blocks
        return blocks


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, SupportsIndex) or value.__index__() < 1:
        raise LayoutError(f"{name} is {value!r}: give an integer from 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """What the engine must know of a paged KV cache to size its tiers.

    ``block_nbytes``: bytes of one block on one rank, all layers together. ``num_ranks``: how many
    GPU workers (tensor x pipeline parallel) hold a part of every block.

    Raises:
        LayoutError: a number is no integer, or is not positive.
    """

    tokens_per_block: int
    block_nbytes: int
    num_ranks: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens_per_block", "block_nbytes", "num_ranks"):
            _require_count(name, getattr(self, name))

    @classmethod
    def of_model(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        dtype_nbytes: int,
        tokens_per_block: int,
        num_kv_parts: int = 2,
        num_ranks: int = 1,
    ) -> KVLayout:
        """The layout of a model; ``num_kv_heads`` and ``num_layers`` are those of one rank.

        ``num_kv_parts``: 2 where keys and values are kept, 1 for MLA's single latent.
        """
        for name, value in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("head_size", head_size),
            ("dtype_nbytes", dtype_nbytes),
            ("tokens_per_block", tokens_per_block),
            ("num_kv_parts", num_kv_parts),
        ):
            _require_count(name, value)
        tokens = tokens_per_block * num_kv_heads * head_size * dtype_nbytes
        return cls(
            tokens_per_block=tokens_per_block,
            block_nbytes=num_layers * num_kv_parts * tokens,
            num_ranks=num_ranks,
        )
