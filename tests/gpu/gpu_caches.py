"""Paged caches on a GPU, laid out as those of tests/tiers, and copiers that go one way only."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import torch

from flexkv.tiers import cuda
from flexkv.tiers.cuda import CudaPagedCopier
from flexkv.tiers.cuda_slices import WayTable
from flexkv.tiers.host import HostPool
from flexkv.tiers.segments import segments_of
from tests.tiers.paged_caches import bytes_of_block, fill

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

Caches = dict[str, torch.Tensor]

PAGE = 4096
TABLES = {
    "direct": WayTable(direct_load_nbytes=1 << 30, direct_store_nbytes=1 << 30, row_nbytes=1 << 30),
    "staged": WayTable(
        direct_load_nbytes=-1, direct_store_nbytes=-1, dma_nbytes=0, row_nbytes=1 << 30
    ),
    "rows": WayTable(
        direct_load_nbytes=-1, direct_store_nbytes=-1, dma_nbytes=0, row_nbytes=1, max_slices=3
    ),
    "few rows": WayTable(
        direct_load_nbytes=-1,
        direct_store_nbytes=-1,
        dma_nbytes=0,
        row_nbytes=1 << 30,
        short_row_nbytes=1,
    ),
    "small slices": WayTable(
        row_nbytes=1 << 30,
        slice_nbytes=3 * PAGE,
        first_nbytes=PAGE,
        max_slices=2,
        direct_load_nbytes=-1,
        direct_store_nbytes=-1,
        dma_nbytes=0,
    ),
    "torch alone": WayTable(slice_nbytes=5 * PAGE, dma_nbytes=1 << 30),
    "defaults": WayTable(),
}
"""By what they force; with few bytes per block, ``dma_nbytes`` 0 takes whole blocks as they are."""


def moved(caches: Caches, device: str) -> Caches:
    """The same views of the same storages, on ``device``."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies = {}
    for name, cache in caches.items():
        storage = cache.untyped_storage()
        if storage.data_ptr() not in storages:
            flat = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(storage)
            storages[storage.data_ptr()] = flat.to(device).untyped_storage()
        copies[name] = torch.empty(0, dtype=cache.dtype, device=device).set_(
            storages[storage.data_ptr()], cache.storage_offset(), cache.shape, cache.stride()
        )
    return copies


def blocks_of_caches(caches: Caches, tokens: int = 4) -> list[bytes]:
    """The bytes of every block."""
    paged = segments_of(moved(caches, "cpu"), tokens)
    return [bytes_of_block(paged, i) for i in range(paged.num_blocks)]


def refill(caches: Caches) -> None:
    """Put random bytes everywhere."""
    other = moved(caches, "cpu")
    fill(other)
    for name, cache in caches.items():
        cache.copy_(other[name])
    torch.cuda.synchronize()


@asynccontextmanager
async def copier_on(
    caches: Caches,
    *,
    num_slots: int = 12,
    table: WayTable | None = None,
    tokens: int = 4,
) -> AsyncIterator[tuple[CudaPagedCopier, HostPool]]:
    """A copier, its pool attached."""
    paged = segments_of(caches, tokens)
    copier = CudaPagedCopier(paged, torch.device("cuda", 0), table=table)
    pool = HostPool(num_slots, paged.block_nbytes)
    copier.attach_pool(pool, 0)
    try:
        yield copier, pool
    finally:
        await copier.close()
        pool.close()


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    monkeypatch.setattr(cuda, "_kernel_of", lambda *_: None)


def is_pinned(pool: HostPool, slot: int = 0) -> bool:
    """Is this slot of the first rank? torch asks about a storage's first byte: one of its own."""
    return torch.from_numpy(pool.region(0)[slot].numpy()).is_pinned()


def slot_bytes(pool: HostPool, slot: int, nbytes: int) -> bytes:
    return bytes(pool.slot(0, slot)[:nbytes])
