"""Which layout of the KV cache suits flexkv best."""

from __future__ import annotations

_BLACKWELL = 10


def block_outermost_layout() -> str | None:
    """VLLM's name of a layout whose blocks are outermost; None where its kernels take none.

    What they take is vLLM's own table of backends (0.31 to 0.33). A layout that a model's backend
    does not take is a warning of vLLM's, and it uses another one.
    """
    from vllm.platforms import current_platform  # noqa: PLC0415  # vLLM is there when it asks

    if not current_platform.is_cuda():
        return None  # those for CPUs take none, whatever they say
    capability = current_platform.get_device_capability()
    if capability is not None and capability.major >= _BLACKWELL:
        return "BLHNC"  # FlashInfer's
    return "BLNHC"  # FlashAttention's
