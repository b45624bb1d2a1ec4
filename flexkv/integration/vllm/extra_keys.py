"""What makes a block's KV differ beside its tokens, its tenant and its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexkv.blocks import ExtraKeys


def extra_keys_of(request: Any, block_size: int, num_blocks: int) -> tuple[ExtraKeys, ...] | None:
    """Of each of the request's first blocks, as vLLM publishes them; None if no block has any.

    A multimodal input gives (identifier, offset in the block), prompt embeddings their digest.
    """
    if not request.mm_features and request.prompt_embeds is None:
        return None
    from vllm.v1.core.kv_cache_utils import (  # noqa: PLC0415  # only then is it needed
        generate_block_hash_extra_keys,
    )

    keys: list[ExtraKeys] = []
    next_mm = 0
    for start in range(0, num_blocks * block_size, block_size):
        tagged, next_mm = generate_block_hash_extra_keys(
            request, start, start + block_size, next_mm
        )
        of_block = tuple(_untagged(key) for key in tagged or () if key[0] in _KINDS)
        keys.append(of_block or None)
    return tuple(keys) if any(keys) else None


_KINDS = frozenset({"mm", "prompt_embeds"})


def _untagged(key: tuple[Any, ...]) -> Any:
    return key[1:] if key[0] == "mm" else key[1]
