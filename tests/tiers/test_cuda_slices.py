"""How copies are cut: all blocks once, in order, no piece beyond a pinned chunk, the right way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.tiers.cuda_slices import Shape, Way, WayTable, cut, described, needs_staging

MIB = 1 << 20


def shape(
    block_nbytes: int = 2 * MIB,
    *,
    is_whole: bool = False,
    row_nbytes: int = 0,
    blocks_touch: bool = False,
    has_kernel: bool = True,
    slots_per_chunk: int = 16,
) -> Shape:
    return Shape(
        block_nbytes=block_nbytes,
        slot_stride=-(-block_nbytes // 4096) * 4096,
        slots_per_chunk=slots_per_chunk,
        is_whole=is_whole,
        row_nbytes=row_nbytes,
        blocks_touch=blocks_touch,
        has_kernel=has_kernel,
    )


def ways(number: int, of: Shape, *, step: int = 1, is_store: bool = True) -> set[Way]:
    ids, slots = range(number), range(0, step * number, step)
    return {part.way for part in cut(ids, slots, of, WayTable(), is_store=is_store)}


@pytest.mark.parametrize(
    ("number", "of", "step", "way"),
    [
        (1, shape(), 1, Way.DIRECT),
        (4, shape(), 1, Way.DIRECT),
        (5, shape(), 1, Way.STAGED),
        (1000, shape(), 3, Way.STAGED),  # pieces of 2 MiB are large enough for DMA
        (1000, shape(64 << 10), 1, Way.STAGED),
        (1000, shape(64 << 10), 3, Way.DIRECT),
        (1, shape(has_kernel=False), 1, Way.STAGED),
        (1000, shape(64 << 10, has_kernel=False), 3, Way.STAGED),
        (1, shape(is_whole=True), 1, Way.WHOLE),
        (1, shape(64 << 10, is_whole=True), 1, Way.DIRECT),
        (1, shape(row_nbytes=256 << 10), 1, Way.ROWS),
        (1000, shape(row_nbytes=256 << 10), 1, Way.ROWS),
        (1000, shape(row_nbytes=64 << 10), 1, Way.STAGED),
        (3, shape(row_nbytes=64 << 10), 1, Way.DIRECT),
        (1, shape(row_nbytes=32 << 10), 1, Way.DIRECT),
        (1000, shape(row_nbytes=256 << 10, has_kernel=False), 1, Way.ROWS),
    ],
)
def test_each_copy_goes_its_way(number: int, of: Shape, step: int, way: Way) -> None:
    for is_store in (True, False):
        assert ways(number, of, step=step, is_store=is_store) == {way}
    assert needs_staging(of, WayTable()) or way != Way.STAGED
    assert not (needs_staging(of, WayTable()) and way in {Way.WHOLE, Way.ROWS})


def test_short_rows_go_by_dma_while_they_are_few() -> None:
    of = shape(row_nbytes=64 << 10)
    assert ways(2, of) == ways(1, of, is_store=False) == {Way.ROWS}
    assert needs_staging(of, WayTable())  # for the others


@pytest.mark.parametrize("direct_nbytes", [-1, 8 * MIB])
@pytest.mark.parametrize("row_nbytes", [0, 48, 64 << 10, 256 << 10])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_no_slice_is_staged_where_there_is_no_staging_buffer(
    *, has_kernel: bool, row_nbytes: int, direct_nbytes: int
) -> None:
    of = shape(row_nbytes=row_nbytes, has_kernel=has_kernel)
    limits = [(0, 4 * MIB), (1, 64 << 10, 1 << 30), (1, 64 << 10, 1 << 30), (0, 1 << 30)]
    for few_rows, short_row, row, dma in itertools.product(*limits):
        table = WayTable(
            direct_load_nbytes=direct_nbytes,
            direct_store_nbytes=direct_nbytes,
            few_rows_nbytes=few_rows,
            short_row_nbytes=short_row,
            row_nbytes=row,
            dma_nbytes=dma,
        )
        for ids, is_store in itertools.product([range(1), range(9)], [True, False]):
            parts = cut(ids, ids, of, table, is_store=is_store)
            assert needs_staging(of, table) or all(part.way != Way.STAGED for part in parts), table


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (shape(), "loads up to 8 MiB and stores up to 8 MiB by one kernel, else slices of 32 MiB"),
        (shape(has_kernel=False), "by torch alone"),
        (shape(is_whole=True), "whole blocks by DMA"),
        (shape(row_nbytes=256 << 10), "rows of 256 KiB"),
        (shape(row_nbytes=64 << 10), "up to 4 MiB by DMA in rows, else loads up to 8 MiB"),
    ],
)
def test_the_log_says_which_way(of: Shape, says: str) -> None:
    assert says in described(of, WayTable())


def test_a_store_begins_and_a_load_ends_with_a_small_slice() -> None:
    ids = range(60)
    store = [len(part.slots) for part in cut(ids, ids, shape(), WayTable(), is_store=True)]
    load = [len(part.slots) for part in cut(ids, ids, shape(), WayTable(), is_store=False)]
    assert store == [4, 8, 16, 16, 16]
    assert load == store[::-1]


def test_a_block_larger_than_a_slice_is_a_slice() -> None:
    parts = list(cut(range(3), range(3), shape(100 * MIB), WayTable(), is_store=True))
    assert [len(part.slots) for part in parts] == [1, 1, 1]


def test_whole_blocks_that_touch_on_both_sides_move_as_one() -> None:
    of = shape(is_whole=True, blocks_touch=True)
    (part,) = cut([5, 6, 7, 9, 3], [8, 9, 10, 11, 12], of, WayTable(), is_store=True)
    assert part.runs == [(0, 3), (3, 1), (4, 1)]
    apart = shape(is_whole=True)
    (part,) = cut([5, 6, 7], [8, 9, 10], apart, WayTable(), is_store=True)
    assert part.runs == [(0, 1), (1, 1), (2, 1)]


@given(
    slots=st.lists(st.integers(0, 60), unique=True),
    is_store=st.booleans(),
    block_nbytes=st.sampled_from([100, 4096, 64 << 10, 2 * MIB, 40 * MIB]),
    slots_per_chunk=st.integers(1, 20),
    is_whole=st.booleans(),
    blocks_touch=st.booleans(),
    has_kernel=st.booleans(),
)
def test_all_is_copied_once_and_no_run_leaves_its_chunk(
    *, slots: list[int], is_store: bool, slots_per_chunk: int, **settings: bool
) -> None:
    of = shape(slots_per_chunk=slots_per_chunk, **settings)
    ids = [7 * slot for slot in slots]
    parts = list(cut(ids, slots, of, WayTable(), is_store=is_store))
    assert list(itertools.chain(*(part.block_ids for part in parts))) == ids
    assert list(itertools.chain(*(part.slots for part in parts))) == slots
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True] * bool(parts)
    for part in parts:
        if part.way in {Way.DIRECT, Way.ROWS}:
            continue
        covered = [i for first, number in part.runs for i in range(first, first + number)]
        assert covered == list(range(len(part.slots)))
        for first, number in part.runs:
            start = part.slots[first]
            run = list(part.slots[first : first + number])
            assert run == list(range(start, start + number))
            assert start // slots_per_chunk == (start + number - 1) // slots_per_chunk
