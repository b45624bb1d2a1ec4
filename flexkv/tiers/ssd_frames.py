"""The journal's format: framed records of runs, and what a journal says is on the disk."""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import msgspec
import numpy as np

from flexkv.blocks import BlockKey, Blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from flexkv.blocks import ExtraKeys

_FRAME = struct.Struct("<II")  # length of the record; crc32 over that length and the record
_ADD = struct.Struct("<BBHIIIII")
_DEL = struct.Struct("<BBHI")
_KIND_ADD, _KIND_DEL, _KIND_CLEAR = 1, 2, 3
_HAS_PARENT, _HAS_NAMESPACE, _HAS_LORA, _HAS_HASHES, _IS_RANKED, _IS_OPAQUE = 1, 2, 4, 8, 16, 32
_EXTRA = msgspec.msgpack.Encoder()


class Kept(NamedTuple):
    """Blocks on the disk: ``blocks[i]`` is in ``slots[i]`` and its bytes have ``sums[i]``.

    ``age``: the higher, the longer ago it was used.
    """

    blocks: Blocks
    slots: array[int]
    sums: array[int]
    age: int


def framed(record: bytes) -> bytes:
    """``record`` as it stands in a file, so that what was torn or rotted is known."""
    length = len(record).to_bytes(4, "little")
    return length + crc32(record, crc32(length)).to_bytes(4, "little") + record


def unframed(journal: memoryview) -> Iterator[tuple[memoryview, int]]:
    """The records up to the first that is not whole, each with the position of its end."""
    at, end = 0, len(journal)
    while at + _FRAME.size <= end:
        length, checksum = _FRAME.unpack_from(journal, at)
        start = at + _FRAME.size
        at = start + length
        if at > end:
            return
        record = journal[start:at]
        if crc32(record, crc32(journal[start - _FRAME.size : start - 4])) != checksum:
            return
        yield record, at


def added(
    blocks: Blocks,
    slots: Sequence[int],
    sums: Sequence[int],
    hashes: array[int] | None = None,
    *,
    is_ranked: bool = False,
) -> bytes:
    """A record: ``blocks`` are on the disk. ``is_ranked``: used longer ago than those before."""
    parent, namespace, lora = blocks.parent, blocks.namespace, blocks.lora
    packed_namespace = (namespace or "").encode()
    packed_lora = (lora or "").encode()
    packed_extra = _EXTRA.encode(blocks.extra_keys) if blocks.extra_keys else b""
    flags = (
        (_HAS_PARENT if parent is not None else 0)
        | (_HAS_NAMESPACE if namespace is not None else 0)
        | (_HAS_LORA if lora is not None else 0)
        | (_HAS_HASHES if hashes is not None else 0)
        | (_IS_RANKED if is_ranked else 0)
        | (_IS_OPAQUE if len(blocks) and not blocks.num_plain else 0)
    )
    head = _ADD.pack(
        _KIND_ADD,
        flags,
        blocks.key_nbytes,
        len(blocks),
        blocks.tokens_per_block,
        len(packed_namespace),
        len(packed_lora),
        len(packed_extra),
    )
    return b"".join(
        (
            head,
            parent or b"",
            packed_namespace,
            packed_lora,
            packed_extra,
            blocks.packed_keys(),
            blocks.token_ids,
            _packed("i", slots),
            _packed("Q", sums),
            b"" if hashes is None else _packed("Q", hashes),
        )
    )


def removed(blocks: Blocks) -> bytes:
    """A record: ``blocks`` are on the disk no longer."""
    return _DEL.pack(_KIND_DEL, 0, blocks.key_nbytes, len(blocks)) + blocks.packed_keys()


def cleared() -> bytes:
    """A record: nothing is on the disk."""
    return bytes((_KIND_CLEAR,))


def is_addition(record: bytes) -> bool:
    """The record says that blocks came, so their bytes must be durable before it is."""
    return record[0] == _KIND_ADD


@dataclass(slots=True)
class _Addition:
    """An ADD record, cut up; ``base`` is the number of its first block among all that came."""

    base: int
    num_blocks: int
    is_ranked: bool
    slots: NDArray[np.int32]
    sums: NDArray[np.uint64]
    blocks: Callable[[int], Blocks]


@dataclass(slots=True)
class Replay:
    """Takes the records of one journal, in order; ``kept`` is what they leave."""

    num_slots: int
    num_records: int = 0
    _additions: list[_Addition] = field(default_factory=list)
    _latest: dict[bytes, int] = field(default_factory=dict)
    _num_blocks: int = 0

    def take(self, record: memoryview) -> None:
        """The next record; one of an unknown kind says nothing."""
        self.num_records += 1
        kind = record[0] if len(record) else 0
        if kind == _KIND_ADD:
            self._take_addition(record)
        elif kind == _KIND_DEL:
            _, _, width, num_blocks = _DEL.unpack_from(record)
            for key in _cut(bytes(record[_DEL.size :]), width, num_blocks):
                self._latest.pop(key, None)
        elif kind == _KIND_CLEAR:
            self._latest.clear()
            self._additions.clear()
            self._num_blocks = 0

    def kept(self) -> list[Kept]:
        """What is on the disk, in no order of parents: of each run what can still be reached."""
        additions = self._additions
        if not additions:
            return []
        slots = np.concatenate([addition.slots for addition in additions])
        alive = np.zeros(self._num_blocks, bool)
        alive[np.fromiter(self._latest.values(), np.int64, len(self._latest))] = True
        alive &= (slots >= 0) & (slots < self.num_slots)
        owner = np.full(self.num_slots, -1, np.int64)
        numbers = np.flatnonzero(alive)
        owner[slots[numbers]] = numbers  # where two claim a slot, the later one wrote it
        alive[numbers] = owner[slots[numbers]] == numbers
        num_dead: list[int] = np.concatenate(([0], np.cumsum(~alive))).tolist()
        found: list[Kept] = []
        last = len(additions)
        for i, addition in enumerate(additions):
            start, stop = addition.base, addition.base + addition.num_blocks
            num_left = addition.num_blocks
            if num_dead[stop] != num_dead[start]:
                num_left = int(np.argmin(alive[start:stop]))
            if num_left:
                age = last + i if addition.is_ranked else last - i
                found.append(_kept(addition, num_left, age))
        return found

    def _take_addition(self, record: memoryview) -> None:
        _, flags, width, num_blocks, tokens_per_block, *lengths = _ADD.unpack_from(record)
        at = _ADD.size

        def take(num_bytes: int) -> memoryview:
            nonlocal at
            at += num_bytes
            return record[at - num_bytes : at]

        parent = BlockKey(bytes(take(width))) if flags & _HAS_PARENT else None
        namespace, lora = (str(take(length), "utf-8") for length in lengths[:2])
        packed_extra = bytes(take(lengths[2]))
        keys = bytes(take(width * num_blocks))
        token_ids = take(4 * tokens_per_block * num_blocks)
        slots = np.frombuffer(take(4 * num_blocks), "<i4")
        sums = np.frombuffer(take(8 * num_blocks), "<u8")
        hashes = take(8 * num_blocks) if flags & _HAS_HASHES else None

        def blocks(num_left: int) -> Blocks:
            made = Blocks(
                keys[: width * num_left],
                bytes(token_ids[: 4 * tokens_per_block * num_left]),
                tokens_per_block=tokens_per_block,
                key_nbytes=width,
                parent=parent,
                namespace=namespace if flags & _HAS_NAMESPACE else None,
                lora=lora if flags & _HAS_LORA else None,
                extra_keys=_extra_keys(packed_extra, num_left),
                is_opaque=bool(flags & _IS_OPAQUE),
            )
            if hashes is not None:
                known = _unpacked("Q", bytes(hashes[: 8 * num_left]))
                made.tokens_hashes(lambda _: known)
            return made

        base = self._num_blocks
        self._num_blocks += num_blocks
        numbers = range(base, base + num_blocks)
        self._latest.update(zip(_cut(keys, width, num_blocks), numbers, strict=True))
        is_ranked = bool(flags & _IS_RANKED)
        self._additions.append(_Addition(base, num_blocks, is_ranked, slots, sums, blocks))


def in_order(kept: Iterable[Kept]) -> Iterator[Kept]:
    """Parents before children. What has no parent, and what is there already, is left out."""
    waiting: dict[BlockKey | None, list[Kept]] = {}
    for run in kept:
        waiting.setdefault(run.blocks.parent, []).append(run)
    begun: set[BlockKey] = set()
    ready = waiting.pop(None, [])
    while ready:
        run = ready.pop()
        if run.blocks.key(0) in begun:
            continue
        begun.add(run.blocks.key(0))
        yield run
        for key in waiting.keys() & set(run.blocks) if waiting else ():
            ready += waiting.pop(key)


def _kept(addition: _Addition, num_left: int, age: int) -> Kept:
    slots = _unpacked("i", addition.slots[:num_left].tobytes())
    sums = _unpacked("Q", addition.sums[:num_left].tobytes())
    return Kept(addition.blocks(num_left), slots, sums, age)


def _extra_keys(packed: bytes, num_left: int) -> tuple[ExtraKeys, ...] | None:
    if not packed:
        return None
    extra: tuple[ExtraKeys, ...] = _as_tuple(msgspec.msgpack.decode(packed))
    return extra[:num_left]


def _as_tuple(value: Any) -> Any:
    """Lists are tuples: msgpack does not tell them apart."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _cut(packed: bytes, width: int, num_parts: int) -> list[bytes]:
    return [packed[i * width : (i + 1) * width] for i in range(num_parts)]


def _packed(typecode: str, numbers: Sequence[int]) -> bytes:
    packed = array(typecode, numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpacked(typecode: str, packed: bytes) -> array[int]:
    numbers: array[int] = array(typecode, packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
