"""Turns token ids into block keys, and into the hashes that Dynamo's router matches by."""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256
from itertools import count
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from flexkv.blocks import Blocks
from flexkv.errors import InputError

_DOMAIN = b"flexkv block keys, version 1\0"
_KEY_NBYTES = 32
_MAX_TOKEN_ID = 2**32 - 1
_TOKENS_SEED = 1337
_UINT64 = 2**64 - 1


def blocks_of(
    token_ids: Any,
    tokens_per_block: int,
    namespace: str | None = None,
    lora: str | None = None,
) -> Blocks:
    """The full blocks of ``token_ids``; a partial last one is left out.

    ``token_ids``: integers from 0 to 2**32 - 1 in one dimension: a sequence, an ``array``, or a
    numpy or torch array of any integer type, on any device. ``namespace`` (tenant, cache salt) and
    ``lora`` separate: equal tokens under another one have other keys, and None is not "".

    The keys are a chain of SHA-256 digests, so nobody can craft a collision with another's prefix:

        text(None) = 00;  text(s) = 01 || length as uint64 || s as UTF-8
        key[-1] = SHA-256("flexkv block keys, version 1" || 00
                          || tokens_per_block as uint32 || text(namespace) || text(lora))
        key[i] = SHA-256(key[i - 1] || the block's token ids as uint32)

    with all integers little endian. ``blocks_of([1, 2, 3, 4], 2)`` has the keys
    91ceb2bd5494... and 7d45d9817d99....

    Raises:
        InputError: a token id, the number of tokens per block or a name can't be right.
    """
    if type(tokens_per_block) is not int or not 1 <= tokens_per_block <= _MAX_TOKEN_ID:
        raise InputError(f"tokens_per_block is {tokens_per_block!r}: give an integer from 1")
    root = _root(tokens_per_block, namespace, lora)
    packed = _packed(token_ids)
    width = 4 * tokens_per_block
    packed = packed[: len(packed) // width * width]
    return Blocks(
        _chain(root, packed, width),
        packed,
        tokens_per_block=tokens_per_block,
        key_nbytes=_KEY_NBYTES,
        namespace=namespace,
        lora=lora,
    )


def tokens_hashes(blocks: Blocks) -> array[int]:
    """Dynamo's ``tokens_hash`` of each block: what its router matches requests by.

    XXH3 over the block's token ids alone; the seed holds adapter and namespace. The chain keeps
    them: slices of it that come later, or again, cost nothing.
    """
    seed = _TOKENS_SEED
    if blocks.lora:
        seed += xxh3_64_intdigest(blocks.lora.encode(), seed=0)
    if blocks.namespace:
        seed += xxh3_64_intdigest(blocks.namespace.encode(), seed=1)
    seed &= _UINT64
    width = 4 * blocks.tokens_per_block

    def compute(token_ids: memoryview) -> list[int]:
        starts = range(0, len(token_ids), width)
        return [xxh3_64_intdigest(token_ids[i : i + width], seed) for i in starts]

    return blocks.tokens_hashes(compute)


def _root(tokens_per_block: int, namespace: str | None, lora: str | None) -> bytes:
    size = tokens_per_block.to_bytes(4, "little")
    return sha256(_DOMAIN + size + _text("namespace", namespace) + _text("lora", lora)).digest()


def _text(name: str, text: str | None) -> bytes:
    if text is None:
        return b"\0"
    if not isinstance(text, str):
        raise InputError(f"{name} is {text!r}: give a string or None")
    try:
        packed = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is {text!r}, which has no UTF-8 form: {error.reason}") from None
    return b"\1" + len(packed).to_bytes(8, "little") + packed


def _chain(key: bytes, packed: bytes, width: int) -> bytes:
    keys: list[bytes] = []
    append = keys.append
    for start in range(0, len(packed), width):
        key = sha256(key + packed[start : start + width]).digest()
        append(key)
    return b"".join(keys)


def _packed(token_ids: Any) -> bytes:
    """Token ids as little-endian uint32."""
    if isinstance(token_ids, (str, bytes, bytearray)):
        raise InputError(f"token_ids is {type(token_ids).__name__}: give integers, not text")
    if hasattr(token_ids, "__array__") or isinstance(token_ids, (array, memoryview)):
        return _packed_array(token_ids)
    if not isinstance(token_ids, Sequence):
        kind = type(token_ids).__name__
        raise InputError(f"token_ids is {kind}: give a sequence or an array of integers")
    return _packed_sequence(token_ids)


def _packed_array(token_ids: Any) -> bytes:
    on_cpu = getattr(token_ids, "cpu", None)  # a torch tensor, wherever it is
    try:
        ids = np.asarray(on_cpu() if on_cpu is not None else token_ids)
    except (TypeError, RuntimeError) as error:  # bfloat16, or a gradient
        raise InputError(f"token_ids has no integer values: {error}") from None
    if ids.ndim != 1:
        raise InputError(f"token_ids has shape {ids.shape}: give one sequence, of one dimension")
    if ids.dtype.kind not in "iu":
        first = f", the first is {ids[0]!r}" if len(ids) else ""
        raise InputError(f"token_ids are of type {ids.dtype}{first}: give integers")
    bits = np.iinfo(ids.dtype)
    if len(ids) and (bits.min < 0 or bits.max > _MAX_TOKEN_ID):
        wrong = (ids < 0) | (ids > _MAX_TOKEN_ID) if bits.max > _MAX_TOKEN_ID else ids < 0
        at = int(wrong.argmax())
        if wrong[at]:
            raise _bad_token(int(ids[at]), at)
    return ids.astype("<u4").tobytes()


def _packed_sequence(token_ids: Sequence[int]) -> bytes:
    try:
        all_int = set(map(type, token_ids)) <= {int}  # array() would take a bool for an integer
        packed = array("I", token_ids if all_int else map(_token, token_ids, count()))
    except OverflowError:  # one of them, and _token names it
        packed = array("I", map(_token, token_ids, count()))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _token(token_id: Any, at: int) -> int:
    if isinstance(token_id, (bool, np.bool_)):
        raise _bad_token(token_id, at)
    try:
        value = operator.index(token_id)
    except TypeError:
        raise _bad_token(token_id, at) from None
    if not 0 <= value <= _MAX_TOKEN_ID:
        raise _bad_token(value, at)
    return value


def _bad_token(token_id: Any, at: int) -> InputError:
    return InputError(f"token_ids[{at}] is {token_id!r}: give an integer from 0 to {_MAX_TOKEN_ID}")
