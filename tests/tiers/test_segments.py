"""Segments against a walk over all elements, one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_caches import LAYOUTS, apart, block_axis_of, vllm_caches

from flexkv.errors import LayoutError
from flexkv.tiers.segments import PagedSegments, segments_of


def bytes_of_block(cache: torch.Tensor, block_axis: int, block_id: int) -> set[int]:
    """The address of every byte of one block, element by element."""
    width, steps = cache.element_size(), cache.stride()
    addresses = set()
    axes = [range(size) for size in cache.shape]
    axes[block_axis] = range(block_id, block_id + 1)
    for index in itertools.product(*axes):
        at = cache.data_ptr() + width * sum(i * step for i, step in zip(index, steps, strict=True))
        addresses.update(range(at, at + width))
    return addresses


def check(
    paged: PagedSegments, caches: dict[str, torch.Tensor], axes: dict[str, int], num_blocks: int
) -> None:
    """Every byte of every block is part of just one segment, and no other byte is."""
    assert paged.num_blocks == num_blocks
    for block_id in range(num_blocks):
        found: list[int] = []
        for segment in paged.segments:
            start = paged.address(segment, block_id)
            found.extend(range(start, start + segment.nbytes))
        expected = set().union(
            *(bytes_of_block(cache, axes[name], block_id) for name, cache in caches.items())
        )
        assert sorted(found) == sorted(expected)
        assert len(found) == paged.block_nbytes


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "large pieces"])
def test_the_segments_are_the_bytes_of_a_block(layout: str) -> None:
    caches = LAYOUTS[layout]()
    axes = {name: block_axis_of(cache) for name, cache in caches.items()}

    paged = segments_of(caches, 4)

    check(paged, caches, axes, 7)
    assert paged.num_layers == len(caches)


@given(
    order=st.permutations("LBHNC").map("".join),
    sizes=st.tuples(*[st.integers(1, 4)] * 4, st.integers(1, 9)),
    dtype=st.sampled_from([torch.int8, torch.bfloat16, torch.float32]),
    skipped=st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_any_physical_order_has_segments(
    order: str, sizes: tuple[int, ...], dtype: torch.dtype, skipped: int
) -> None:
    layers, blocks, heads, tokens, content = sizes
    views = vllm_caches(
        order, layers=layers, blocks=blocks, heads=heads, tokens=tokens, content=content
    )
    backing = torch.empty(layers * blocks * heads * tokens * content, dtype=dtype)
    caches = {
        name: backing.as_strided(view.shape, view.stride(), view.storage_offset())
        for name, view in views.items()
    }
    caches = dict(list(caches.items())[min(skipped, layers - 1) :])

    check(segments_of(caches, tokens), caches, dict.fromkeys(caches, 0), blocks)


@pytest.mark.parametrize(
    ("layout", "number"),
    [
        ("LBHNC", 3),  # one per layer
        ("LBNHC", 3),
        ("LHBNC", 6),  # one per layer and head
        ("BLHNC", 1),  # blocks outermost: one in all
        ("BLNHC", 1),
        ("BHLNC", 1),
        ("(2, B, N, H, D)", 6),  # keys and values apart
        ("(B, 2, N, H, D)", 3),
        ("shared", 2),
    ],
)
def test_segments_that_touch_are_merged(layout: str, number: int) -> None:
    assert len(segments_of(LAYOUTS[layout](), 4).segments) == number


def test_two_blocks_of_keys_and_values_ask_for_the_block_axis() -> None:
    caches = apart(2, 2, 4, 3, 5)
    with pytest.raises(LayoutError, match="pass block_axis"):
        segments_of(caches, 4)

    for axis, number in ((0, 3), (1, 6)):
        paged = segments_of(caches, 4, block_axis=axis)
        check(paged, caches, dict.fromkeys(caches, axis), 2)
        assert len(paged.segments) == number


@pytest.mark.parametrize(
    "shape", [(7, 2, 16, 6), (7, 16, 6), (2, 7, 16, 3, 5), (7, 2, 16, 3, 5)], ids=str
)
def test_another_number_of_tokens_is_refused_by_layer_and_numbers(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        segments_of({"layers.3.attn": torch.empty(shape)}, 64)
    for part in ("'layers.3.attn'", str(shape), " 16 ", " 64:", "--block-size"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "block_axis"),
    [
        ((7, 4), None),
        ((7, 3, 4, 3, 5), None),
        ((1, 2, 7, 4, 3, 5), None),
        ((7, 2, 4, 6), 1),
        ((2, 7, 4, 3, 5), 0),
        ((2, 7, 4, 3, 5), 2),
        ((0, 2, 4, 6), None),
    ],
    ids=str,
)
def test_an_unknown_shape_is_refused(shape: tuple[int, ...], block_axis: int | None) -> None:
    with pytest.raises(LayoutError, match=r"layer 'a' .*shape"):
        segments_of({"a": torch.empty(shape)}, 4, block_axis)


def test_layers_with_unlike_numbers_of_blocks_are_refused() -> None:
    caches = {"a": torch.empty((7, 2, 4, 6)), "b": torch.empty((8, 2, 4, 6))}
    with pytest.raises(LayoutError, match="'a' has 7 blocks, and layer 'b' has 8"):
        segments_of(caches, 4)


def test_no_caches_are_refused() -> None:
    with pytest.raises(LayoutError, match="no KV caches"):
        segments_of({}, 4)


def overlapping() -> dict[str, dict[str, torch.Tensor]]:
    flat = torch.empty(2000)
    shape, strides = (5, 2, 4, 6), (48, 24, 6, 1)
    whole = flat.as_strided(shape, strides, 0)
    return {
        "shifted by half a block": {"a": whole, "b": flat.as_strided(shape, strides, 24)},
        "shifted by a block": {"a": whole, "b": flat.as_strided(shape, strides, 48)},
        "a part": {"a": whole, "b": flat.as_strided((5, 1, 4, 6), strides, 0)},
        "unlike strides": {"a": whole, "b": flat.as_strided(shape, (96, 24, 6, 1), 100)},
        "another storage": {"a": whole, "b": torch.from_numpy(flat.numpy()[24:264]).view(shape)},
        "blocks into each other": {"a": flat.as_strided(shape, (40, 24, 6, 1), 0)},
        "heads into each other": {"a": flat.as_strided(shape, (48, 10, 6, 1), 0)},
        "an expanded axis": {"a": torch.empty((5, 1, 4, 6)).expand(shape)},
        "expanded blocks": {"a": torch.empty((1, 2, 4, 6)).expand(shape)},
    }


@pytest.mark.parametrize("case", overlapping())
def test_bytes_of_two_segments_are_refused(case: str) -> None:
    with pytest.raises(LayoutError, match="overlap"):
        segments_of(overlapping()[case], 4)


def test_layers_that_interleave_without_overlap_are_fine() -> None:
    flat = torch.empty(1000)
    caches = {  # in each block's 100 elements: a gap b gap a gap b gap
        name: flat.as_strided((7, 2, 4, 3), (100, 50, 3, 1), start)
        for name, start in (("a", 0), ("b", 20))
    }
    check(segments_of(caches, 4), caches, dict.fromkeys(caches, 0), 7)
