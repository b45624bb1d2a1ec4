"""Paged KV caches as vLLM makes them: strided views of one allocation, in every physical order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexkv.tiers.host import HostPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexkv.tiers.gpu import CpuPagedCopier
    from flexkv.tiers.segments import PagedSegments

VLLM_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def vllm_caches(
    order: str, *, layers: int, blocks: int, heads: int, tokens: int, content: int
) -> dict[str, torch.Tensor]:
    """One int8 allocation in the physical ``order``; each layer a [B, H, N, C] view of it."""
    sizes = {"L": layers, "B": blocks, "H": heads, "N": tokens, "C": content}
    backing = torch.empty([sizes[axis] for axis in order], dtype=torch.int8)
    logical = backing.permute([order.index(axis) for axis in "LBHNC"])
    return {f"layers.{i}.attn": logical[i] for i in range(layers)}


def apart(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Three layers, each an allocation of its own."""
    return {f"layers.{i}.attn": torch.empty(shape, dtype=dtype) for i in range(3)}


def padded() -> dict[str, torch.Tensor]:
    """Every block is followed by bytes that are nobody's."""
    backing = torch.empty((2, 7, 100), dtype=torch.int8)
    views = backing[:, :, :96].unflatten(2, (2, 4, 12))
    return {"a": views[0], "b": views[1]}


def shared() -> dict[str, torch.Tensor]:
    """Two layers that use one tensor, and one that does not."""
    one, other = torch.empty((2, 7, 2, 4, 6)).unbind(0)
    return {"a": one, "b": other, "shares a": one}


def two_dtypes() -> dict[str, torch.Tensor]:
    """A quantized layer beside others."""
    return {
        "a": torch.empty((7, 2, 4, 6), dtype=torch.bfloat16),
        "b": torch.empty((7, 2, 4, 3), dtype=torch.int8),
    }


LAYOUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    **{
        order: lambda order=order: vllm_caches(
            order, layers=3, blocks=7, heads=2, tokens=4, content=6
        )
        for order in VLLM_ORDERS
    },
    "odd heads and bytes": lambda: vllm_caches(
        "BHLNC", layers=3, blocks=7, heads=5, tokens=4, content=7
    ),
    "LHBNC, odd": lambda: vllm_caches("LHBNC", layers=2, blocks=7, heads=3, tokens=4, content=5),
    "MLA": lambda: apart(7, 1, 4, 9, dtype=torch.bfloat16),
    "(B, N, D)": lambda: apart(7, 4, 5, dtype=torch.bfloat16),
    "(2, B, N, H, D)": lambda: apart(2, 7, 4, 3, 5),
    "(B, 2, N, H, D)": lambda: apart(7, 2, 4, 3, 5),
    "padded": padded,
    "shared": shared,
    "two dtypes": two_dtypes,
    "large pieces": lambda: {"a": torch.empty((7, 1, 4, 100_001)), "b": torch.empty((7, 3, 4, 8))},
}
"""Each with 7 blocks of 4 tokens."""


def block_axis_of(cache: torch.Tensor) -> int:
    """Where these caches have their 7 blocks."""
    return list(cache.shape).index(7)


def fill(caches: dict[str, torch.Tensor]) -> None:
    """Put random bytes everywhere."""
    for cache in caches.values():
        random = torch.randint(0, 100, cache.shape)
        cache.copy_(random)


def caches_of_seven_blocks() -> dict[str, torch.Tensor]:
    caches = vllm_caches("LBHNC", layers=3, blocks=7, heads=2, tokens=4, content=6)
    fill(caches)
    return caches


def pool_for(copier: CpuPagedCopier, num_slots: int = 9) -> HostPool:
    pool = HostPool(num_slots, copier._paged.block_nbytes, num_ranks=2)
    copier.attach_pool(pool, rank=1)
    return pool


def bytes_of_block(paged: PagedSegments, block_id: int) -> bytes:
    parts = []
    for segment in paged.segments:
        storage = torch.empty(0, dtype=torch.uint8).set_(paged.storages[segment.storage])
        start = segment.offset + block_id * segment.stride
        parts.append(bytes(storage[start : start + segment.nbytes].numpy()))
    return b"".join(parts)
