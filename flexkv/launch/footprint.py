"""How much host memory the workers of a deployment will take, as far as it can be known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexkv.config import Config

_ITEM_NBYTES = {"float32": 4, "float": 4, "int8": 1, "uint8": 1}
_DEFAULT_ITEM_NBYTES = 2


def kv_nbytes_per_token(
    model: Mapping[str, Any], dtype: str | None, *, num_ranks: int = 1
) -> int | None:
    """Of a model's KV cache, all its ranks together; None where its config.json does not say."""
    text: Mapping[str, Any] = model.get("text_config") or model
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int):
        return None
    item_nbytes = _item_nbytes(dtype)
    if latent := text.get("kv_lora_rank"):  # every rank stores the whole latent vector
        return int(layers * (latent + text.get("qk_rope_head_dim", 0)) * item_nbytes * num_ranks)
    heads = text.get("num_attention_heads")
    head_dim = text.get("head_dim") or (heads and text.get("hidden_size", 0) // heads)
    kv_heads = text.get("num_key_value_heads") or heads
    if not (head_dim and kv_heads):
        return None
    kv_heads = max(kv_heads, num_ranks)  # fewer heads than ranks are copied
    return int(layers * 2 * kv_heads * head_dim * item_nbytes)


def host_nbytes(config: Config, nbytes_per_token: int | None) -> int | None:
    """Of one engine's host tier; None if its size is in blocks, and a block's is not known."""
    if not config.enable_flexkv:
        return 0
    if config.cache.cpu_cache_bytes is not None:
        return config.cache.cpu_cache_bytes
    if nbytes_per_token is None:
        return None
    block_nbytes = nbytes_per_token * config.tokens_per_block
    return config.cache.num_host_slots(block_nbytes) * block_nbytes


def _item_nbytes(dtype: str | None) -> int:
    name = (dtype or "").removeprefix("torch.")
    if name.startswith("fp8"):
        return 1
    return _ITEM_NBYTES.get(name, _DEFAULT_ITEM_NBYTES)
