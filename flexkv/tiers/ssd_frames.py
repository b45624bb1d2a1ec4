"""The journal's format: framed records of runs, and what a journal says is on the disk."""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import msgspec
import numpy as np

from flexkv.blocks import BlockKey, Blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from flexkv.blocks import ExtraKeys

_FRAME = struct.Struct("<II")  # length of the record; crc32 over that length and the record
_ADD = struct.Struct("<BBHIIIII")
_DEL = struct.Struct("<BBHI")
_KIND_ADD, _KIND_DEL, _KIND_CLEAR = 1, 2, 3
_HAS_PARENT, _HAS_NAMESPACE, _HAS_LORA, _HAS_HASHES, _IS_RANKED, _IS_OPAQUE = 1, 2, 4, 8, 16, 32
MAX_NAMES_NBYTES = 128  # of namespace, LoRA name and extra keys, for each block
_EXTRA = msgspec.msgpack.Encoder()


class Kept(NamedTuple):
    """Blocks on the disk: ``blocks[i]`` is in ``slots[i]`` and its bytes have ``sums[i]``.

    ``age``: the higher, the longer ago it was used. ``parent``: the number of the run that the
    first block follows, -1 where it begins its chain; ``parent_at``: behind so many blocks of it.
    """

    blocks: Blocks
    slots: array[int]
    sums: array[int]
    age: int
    parent: int
    parent_at: int


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


def max_entry_nbytes(tokens_per_block: int, key_nbytes: int = 32) -> int:
    """What one block takes in a file at most: a run of its own, with ``MAX_NAMES_NBYTES``."""
    head = _FRAME.size + _ADD.size + key_nbytes + MAX_NAMES_NBYTES
    return head + key_nbytes + 4 * tokens_per_block + 4 + 8 + 8


def removed(blocks: Blocks) -> bytes:
    """A record: ``blocks`` are on the disk no longer."""
    return _DEL.pack(_KIND_DEL, 0, blocks.key_nbytes, len(blocks)) + blocks.packed_keys()


def cleared() -> bytes:
    """A record: nothing is on the disk."""
    return bytes((_KIND_CLEAR,))


def is_addition(record: bytes) -> bool:
    """The record says that blocks came, so their bytes must be durable before it is."""
    return record[0] == _KIND_ADD


class _Addition(NamedTuple):
    """An ADD record, cut up; ``base`` is the number of its first block among all that came."""

    base: int
    num_blocks: int
    is_ranked: bool
    parent: bytes | None
    record: memoryview


class Replay:
    """Takes the records of one journal, in order; ``kept`` is what they leave."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._latest: dict[bytes, int] = {}  # which of all blocks that came is there, by key
        self._clear()

    def take(self, record: memoryview) -> None:
        """The next record; one of an unknown kind says nothing."""
        kind = record[0] if len(record) else 0
        if kind == _KIND_ADD:
            self._take_addition(record)
        elif kind == _KIND_DEL:
            _, _, width, num_blocks = _DEL.unpack_from(record)
            for key in _cut(bytes(record[_DEL.size :]), width, num_blocks):
                self._latest.pop(key, None)
        elif kind == _KIND_CLEAR:
            self._clear()

    def kept(self) -> list[Kept]:
        """What is on the disk and can be reached: parents before children."""
        if not self._additions:
            return []
        slots = _unpacked("i", b"".join(self._slots))
        sums = _unpacked("Q", b"".join(self._sums))
        num_left = self._num_reachable(np.frombuffer(slots, np.int32))
        bases = [addition.base for addition in self._additions]
        children: dict[int, list[tuple[int, int]]] = {}
        for i, addition in enumerate(self._additions):
            if not num_left[i]:
                continue
            if addition.parent is None:
                children.setdefault(-1, []).append((i, 0))
            elif (number := self._latest.get(addition.parent)) is not None:
                of = bisect_right(bases, number) - 1
                if number - bases[of] < num_left[of]:
                    children.setdefault(of, []).append((i, number - bases[of] + 1))
        found: list[Kept] = []
        last = len(bases)
        ready = [(i, at, -1) for i, at in children.pop(-1, ())]
        while ready:
            i, parent_at, parent = ready.pop()
            _, _, is_ranked, _, record = self._additions[i]
            part = slice(bases[i], bases[i] + num_left[i])
            age = last + i if is_ranked else last - i
            ready += [(child, at, len(found)) for child, at in children.pop(i, ())]
            found.append(
                Kept(
                    _blocks_of(record, num_left[i]), slots[part], sums[part], age, parent, parent_at
                )
            )
        return found

    def _clear(self) -> None:
        self._latest.clear()
        self._additions: list[_Addition] = []
        self._slots: list[memoryview] = []
        self._sums: list[memoryview] = []
        self._num_blocks = 0

    def _num_reachable(self, slots: NDArray[np.int32]) -> list[int]:
        """Of each addition, how many of its leading blocks are still there."""
        alive = np.zeros(self._num_blocks, bool)
        alive[np.fromiter(self._latest.values(), np.int64, len(self._latest))] = True
        alive &= (slots >= 0) & (slots < self._num_slots)
        owner = np.full(self._num_slots, -1, np.int64)
        numbers = np.flatnonzero(alive)
        owner[slots[numbers]] = numbers  # where two claim a slot, the later one wrote it
        alive[numbers] = owner[slots[numbers]] == numbers
        num_dead: list[int] = np.concatenate(([0], np.cumsum(~alive))).tolist()
        num_left: list[int] = []
        for addition in self._additions:
            start, num_blocks = addition.base, addition.num_blocks
            if num_dead[start + num_blocks] != num_dead[start]:
                num_blocks = int(np.argmin(alive[start : start + num_blocks]))
            num_left.append(num_blocks)
        return num_left

    def _take_addition(self, record: memoryview) -> None:
        at = _Places(record)
        base, num_blocks = self._num_blocks, at.num_blocks
        self._num_blocks += num_blocks
        self._slots.append(record[at.slots : at.sums])
        self._sums.append(record[at.sums : at.hashes])
        keys = _cut(bytes(record[at.keys : at.token_ids]), at.width, num_blocks)
        self._latest.update(zip(keys, range(base, self._num_blocks), strict=True))
        parent = bytes(record[_ADD.size : at.namespace]) if at.flags & _HAS_PARENT else None
        is_ranked = bool(at.flags & _IS_RANKED)
        self._additions.append(_Addition(base, num_blocks, is_ranked, parent, record))


class _Places:
    """Where the fields of an ADD record begin."""

    __slots__ = (
        "extra",
        "flags",
        "hashes",
        "keys",
        "lora",
        "namespace",
        "num_blocks",
        "slots",
        "sums",
        "token_ids",
        "tokens_per_block",
        "width",
    )

    def __init__(self, record: memoryview) -> None:
        head = _ADD.unpack_from(record)
        _, self.flags, self.width, num_blocks, self.tokens_per_block, *lengths = head
        self.num_blocks = num_blocks
        self.namespace = _ADD.size + (self.width if self.flags & _HAS_PARENT else 0)
        self.lora = self.namespace + lengths[0]
        self.extra = self.lora + lengths[1]
        self.keys = self.extra + lengths[2]
        self.token_ids = self.keys + self.width * num_blocks
        self.slots = self.token_ids + 4 * self.tokens_per_block * num_blocks
        self.sums = self.slots + 4 * num_blocks
        self.hashes = self.sums + 8 * num_blocks


def _blocks_of(record: memoryview, num_left: int) -> Blocks:
    """The first blocks of an ADD record."""
    at = _Places(record)
    flags = at.flags
    blocks = Blocks(
        bytes(record[at.keys : at.keys + at.width * num_left]),
        bytes(record[at.token_ids : at.token_ids + 4 * at.tokens_per_block * num_left]),
        tokens_per_block=at.tokens_per_block,
        key_nbytes=at.width,
        parent=BlockKey(bytes(record[_ADD.size : at.namespace])) if flags & _HAS_PARENT else None,
        namespace=str(record[at.namespace : at.lora], "utf-8") if flags & _HAS_NAMESPACE else None,
        lora=str(record[at.lora : at.extra], "utf-8") if flags & _HAS_LORA else None,
        extra_keys=_extra_keys(bytes(record[at.extra : at.keys]), num_left),
        is_opaque=bool(flags & _IS_OPAQUE),
    )
    if flags & _HAS_HASHES:
        known = _unpacked("Q", bytes(record[at.hashes : at.hashes + 8 * num_left]))
        blocks.tokens_hashes(lambda _: known)
    return blocks


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
