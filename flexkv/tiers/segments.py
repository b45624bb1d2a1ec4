"""Where the bytes of a block are in a paged KV cache: any strided layout, as a list of segments."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from flexkv.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

_NUM_KV_PARTS = 2  # keys and values


class Segment(NamedTuple):
    """``nbytes`` of every block: block ``b`` has them at ``offset + b * stride`` of ``storage``.

    All in bytes; ``storage`` counts the storages of a ``PagedSegments``. A stride of 0 says that
    there is but one block.
    """

    storage: int
    offset: int
    stride: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedSegments:
    """A paged KV cache. Its segments end to end, in this order, are the bytes of one block."""

    segments: tuple[Segment, ...]
    storages: tuple[torch.UntypedStorage, ...]
    num_blocks: int
    num_layers: int

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block, all layers together."""
        return sum(segment.nbytes for segment in self.segments)

    def address(self, segment: Segment, block_id: int) -> int:
        """Where the bytes of ``segment`` begin in block ``block_id``."""
        base = self.storages[segment.storage].data_ptr()
        return base + segment.offset + block_id * segment.stride


def segments_of(
    kv_caches: Mapping[str, torch.Tensor],
    tokens_per_block: int,
    block_axis: int | None = None,
) -> PagedSegments:
    """Find the segments of ``kv_caches``: ``{layer name: tensor}``, each of one of these shapes.

    ``(blocks, heads, tokens, content)`` and ``(blocks, tokens, content)``, or with keys and values
    apart ``(2, blocks, tokens, heads, size)`` and ``(blocks, 2, tokens, heads, size)``, in any
    physical order. ``block_axis`` tells the last two apart where there are just two blocks. Layers
    that share a tensor count once, and segments that touch in every block become one.

    Raises:
        LayoutError: the shape is another one, tokens or blocks differ, or bytes overlap.
    """
    if not kv_caches:
        raise LayoutError("there are no KV caches: at least one layer is needed")
    storages: dict[int, torch.UntypedStorage] = {}
    layers_by_count: dict[int, str] = {}
    layers: dict[Segment, str] = {}  # keeps a tensor that layers share but once
    for name, cache in kv_caches.items():
        axis = _block_axis(name, cache, block_axis)
        _check_tokens(name, cache, tokens_per_block)
        layers_by_count.setdefault(cache.shape[axis], name)
        storage = cache.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        index = list(storages).index(storage.data_ptr())
        for segment in _segments_of_layer(name, cache, axis, index):
            layers.setdefault(segment, name)
    if len(layers_by_count) > 1:
        (few, one), (many, other), *_ = sorted(layers_by_count.items())
        raise LayoutError(f"layer {one!r} has {few} blocks, and layer {other!r} has {many}")
    (num_blocks,) = layers_by_count
    _refuse_overlaps(layers, list(storages), num_blocks)
    return PagedSegments(
        segments=tuple(_merged(layers)),
        storages=tuple(storages.values()),
        num_blocks=num_blocks,
        num_layers=len(kv_caches),
    )


def _block_axis(name: str, cache: torch.Tensor, asked: int | None) -> int:
    shape = tuple(cache.shape)
    if 0 in shape:
        raise LayoutError(f"layer {name!r} is empty: its shape is {shape}")
    if len(shape) in (3, 4):
        axes = [0]
    elif len(shape) == 5:  # noqa: PLR2004  # keys and values apart: the other of the first two axes
        axes = [axis for axis in (0, 1) if shape[1 - axis] == _NUM_KV_PARTS]
    else:
        axes = []
    if asked is not None:
        axes = [axis for axis in axes if axis == asked]
    if len(axes) > 1:
        raise LayoutError(
            f"layer {name!r} of shape {shape} has its blocks on axis 0 or on axis 1, both of "
            "length 2: pass block_axis"
        )
    if not axes:
        how = "" if asked is None else f" with block_axis={asked}"
        raise LayoutError(
            f"layer {name!r} has the shape {shape}, which is no known layout{how}: (blocks, "
            "heads, tokens, content), (blocks, tokens, content), (2, blocks, tokens, heads, size) "
            "or (blocks, 2, tokens, heads, size)"
        )
    return axes[0]


def _check_tokens(name: str, cache: torch.Tensor, tokens_per_block: int) -> None:
    num_tokens = cache.shape[1 if cache.ndim == 3 else 2]  # noqa: PLR2004  # 3: there are no heads
    if num_tokens != tokens_per_block:
        raise LayoutError(
            f"layer {name!r} of shape {tuple(cache.shape)} holds {num_tokens} tokens in a block, "
            f"but tokens_per_block is {tokens_per_block}: make vLLM's --block-size and flexkv's "
            "tokens_per_block equal"
        )


def _segments_of_layer(
    name: str, cache: torch.Tensor, block_axis: int, storage: int
) -> set[Segment]:
    width = cache.element_size()
    dims = sorted(
        (cache.stride(axis) * width, cache.shape[axis])
        for axis in range(cache.ndim)
        if axis != block_axis and cache.shape[axis] > 1
    )
    nbytes = width
    while dims and dims[0][0] == nbytes:  # contiguous: one piece
        nbytes *= dims.pop(0)[1]
    num_blocks = cache.shape[block_axis]
    stride = cache.stride(block_axis) * width if num_blocks > 1 else 0
    base = int(cache.storage_offset()) * width
    pieces = [
        Segment(storage, base + sum(offsets), stride, nbytes)
        for offsets in itertools.product(*([i * step for i in range(n)] for step, n in dims))
    ]
    segments = set(pieces)
    if len(segments) < len(pieces) or (num_blocks > 1 and stride < nbytes):
        raise LayoutError(
            f"layer {name!r} overlaps itself: shape {tuple(cache.shape)}, strides {cache.stride()}"
        )
    return segments


def _refuse_overlaps(layers: Mapping[Segment, str], bases: list[int], num_blocks: int) -> None:
    """See that no byte is part of two segments. Addresses decide, since storages may be nested."""
    starts = sorted((bases[segment.storage] + segment.offset, segment) for segment in layers)
    near: list[tuple[int, Segment]] = []  # those that reach as far as the one looked at
    for start, segment in starts:
        near = [
            (other_start, other)
            for other_start, other in near
            if start < other_start + (num_blocks - 1) * other.stride + other.nbytes
        ]
        for other_start, other in near:
            if _overlap(other, segment, start - other_start, num_blocks):
                raise LayoutError(
                    f"layers {layers[other]!r} and {layers[segment]!r} overlap in part: {other} "
                    f"and {segment}"
                )
        near.append((start, segment))


def _overlap(one: Segment, other: Segment, distance: int, num_blocks: int) -> bool:
    """Whether a block of ``one`` has bytes of a block of ``other``, which begins later."""
    if one.stride != other.stride or not one.stride:  # no layout interleaves unlike strides
        return True
    first = max(1 - num_blocks, (distance - one.nbytes) // one.stride + 1)
    return first * one.stride < distance + other.nbytes


def _merged(segments: Iterable[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in sorted(segments):
        if merged and _touch(merged[-1], segment):
            merged[-1] = merged[-1]._replace(nbytes=merged[-1].nbytes + segment.nbytes)
        else:
            merged.append(segment)
    return merged


def _touch(one: Segment, other: Segment) -> bool:
    same = (one.storage, one.stride) == (other.storage, other.stride)
    return same and one.offset + one.nbytes == other.offset
