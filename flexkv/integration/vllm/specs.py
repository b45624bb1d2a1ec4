"""Which models flexkv can serve: those whose blocks stay whole until their request ends."""

from __future__ import annotations

from typing import Any

_WHOLE = ("FullAttentionSpec", "MLAAttentionSpec")
_TURNED_INTO_WHOLE = ("SlidingWindowSpec", "ChunkedLocalAttentionSpec")


def reason_to_decline(vllm_config: Any) -> str | None:
    """In a worker: why its model's KV cache is of no use; None where it is of use.

    vLLM keeps a mixture of full and sliding attention as full attention for a connector that
    knows one group of blocks only.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    kinds = set().union(*(_kinds_of(layer, vllm_config) for layer in layers))
    mixed = bool(kinds & set(_WHOLE))
    useful = {*_WHOLE, *_TURNED_INTO_WHOLE} if mixed else set(_WHOLE)
    return _declined(kinds - useful)


def reason_to_decline_groups(kv_cache_config: Any) -> str | None:
    """The same of the groups of blocks that vLLM has made."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) > 1:
        return f"the model has {len(groups)} groups of KV blocks, and flexkv serves one"
    kinds = set().union(*(_names_of(group.kv_cache_spec) for group in groups))
    return _declined(kinds - set(_WHOLE))


def _declined(kinds: set[str]) -> str | None:
    if not kinds:
        return None
    names = ", ".join(sorted(kinds))
    return f"the model's KV cache is {names}; flexkv serves full attention and MLA"


def _kinds_of(layer: Any, vllm_config: Any) -> set[str]:
    get_spec = getattr(layer, "get_kv_cache_spec", None)
    spec = get_spec(vllm_config) if get_spec is not None else None
    return set() if spec is None else _names_of(spec)


def _names_of(spec: Any) -> set[str]:
    """Kinds by their exact name: a special kind of full attention may keep its blocks otherwise."""
    several = getattr(spec, "kv_cache_specs", None)  # of one kind, with several sizes
    return {type(one).__name__ for one in (several.values() if several else [spec])}
