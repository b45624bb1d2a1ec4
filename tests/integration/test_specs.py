"""Models that flexkv declines, by the kinds of their KV cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.integration.vllm.specs import reason_to_decline, reason_to_decline_groups


def spec(kind: str) -> Any:
    return type(kind, (), {})()


def layers(*kinds: str | None) -> Any:
    """vLLM's settings in a worker whose layers have these kinds; None: a layer without a cache."""
    context = {
        f"layer.{i}": SimpleNamespace(get_kv_cache_spec=lambda _, kind=kind: kind and spec(kind))
        for i, kind in enumerate(kinds)
    }
    context["experts"] = SimpleNamespace()
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))


def groups(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=one) for one in specs])


@pytest.mark.parametrize(
    "kinds",
    [
        ("FullAttentionSpec",),
        ("MLAAttentionSpec", None),
        ("FullAttentionSpec", "SlidingWindowSpec"),  # vLLM keeps all of it, for such a connector
    ],
)
def test_layers_that_keep_their_blocks_are_served(kinds: tuple[str | None, ...]) -> None:
    assert reason_to_decline(layers(*kinds)) is None


@pytest.mark.parametrize("kinds", [("SlidingWindowSpec",), ("FullAttentionSpec", "MambaSpec")])
def test_layers_that_do_not_are_declined_by_name(kinds: tuple[str, ...]) -> None:
    assert kinds[-1] in str(reason_to_decline(layers(*kinds)))


def test_one_group_of_whole_blocks_is_served() -> None:
    assert reason_to_decline_groups(groups(spec("FullAttentionSpec"))) is None
    uniform = SimpleNamespace(kv_cache_specs={"a": spec("MLAAttentionSpec")})
    assert reason_to_decline_groups(groups(uniform)) is None


def test_other_groups_are_declined() -> None:
    sliding = spec("SlidingWindowSpec")
    assert "SlidingWindowSpec" in str(reason_to_decline_groups(groups(sliding)))
    assert "2 groups" in str(reason_to_decline_groups(groups(spec("FullAttentionSpec"), sliding)))
