"""What makes a block's KV differ beside its tokens, its tenant and its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexkv.blocks import ExtraKeys

_KINDS = frozenset({"mm", "prompt_embeds"})


def has_extra_keys(request: Any) -> bool:
    """Whether any block of the request may have some."""
    return bool(request.mm_features) or request.prompt_embeds is not None


def extra_keys_of(request: Any, block_size: int, first: int, stop: int) -> list[ExtraKeys]:
    """Of each of the request's blocks ``first`` to ``stop`` - 1, as vLLM publishes them.

    A multimodal input gives (identifier, offset in the block), prompt embeddings their digest.
    """
    from vllm.v1.core.kv_cache_utils import (  # noqa: PLC0415  # only then is it needed
        generate_block_hash_extra_keys,
    )

    keys: list[ExtraKeys] = []
    next_mm = 0
    for start in range(first * block_size, stop * block_size, block_size):
        tagged, next_mm = generate_block_hash_extra_keys(
            request, start, start + block_size, next_mm
        )
        of_block = tuple(_untagged(key) for key in tagged or () if key[0] in _KINDS)
        keys.append(of_block or None)
    return keys


def _untagged(key: tuple[Any, ...]) -> Any:
    return key[1:] if key[0] == "mm" else key[1]
