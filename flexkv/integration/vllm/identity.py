"""What the bytes and keys of vLLM's blocks depend on: a change of it makes kept blocks useless."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json"}


def identity_of(vllm_config: Any) -> dict[str, object]:
    """The model, its weights, the form of its KV and the scheme of its keys, as JSON's values."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    hf_config = getattr(model, "hf_config", None)
    rope = ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window")
    return {
        "model": str(model.model),
        "revision": str(getattr(model, "revision", None)),
        "weights": weights_of(str(model.model), getattr(model, "revision", None)),
        "dtype": str(getattr(model, "dtype", None)),
        "quantization": str(getattr(model, "quantization", None)),
        "hf_overrides": repr(getattr(model, "hf_overrides", None)),
        "rope": repr([getattr(hf_config, name, None) for name in rope]),
        "kv_dtype": str(getattr(cache, "cache_dtype", None)),
        "kv_layout": os.environ.get("VLLM_KV_CACHE_LAYOUT", ""),
        "attention": str(getattr(getattr(vllm_config, "attention_config", None), "backend", None)),
        "ranks": [
            parallel.world_size,
            getattr(parallel, "tensor_parallel_size", None),
            getattr(parallel, "pipeline_parallel_size", None),
        ],
        "keys": _key_scheme(str(cache.prefix_caching_hash_algo)),
        "vllm": _version(),
    }


def weights_of(model: str, revision: str | None) -> str:
    """Sizes and times of the weight files, as a digest; a fine-tune at the same path differs.

    Where the files are not found, the name and the revision have to do: set ``weights_id``.
    """
    folder = Path(model) if Path(model).is_dir() else _snapshot(model, revision)
    if folder is None:
        return "not found"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS and file.is_file():
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:32]


def _snapshot(model: str, revision: str | None) -> Path | None:
    """Where the hub's cache has the model."""
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # vLLM has it

        path = try_to_load_from_cache(model, "config.json", revision=revision)
    except (ImportError, ValueError):
        return None
    return Path(path).parent if isinstance(path, str) else None


def _key_scheme(algorithm: str) -> str:
    """Xxhash's root is random in each process, unless PYTHONHASHSEED sets it."""
    seed = os.environ.get("PYTHONHASHSEED", "")
    if algorithm.startswith("xxhash") and not seed:
        return f"{algorithm} of process {uuid.uuid4().hex}"
    return f"{algorithm} from {seed!r}"


def _version() -> str:
    try:
        from vllm import __version__  # noqa: PLC0415  # not where this is tested without vLLM
    except ImportError:
        return ""
    return str(__version__)
