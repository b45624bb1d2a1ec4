"""What makes blocks that were kept useless to another vLLM."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flexkv.integration.vllm.identity import identity_of

if TYPE_CHECKING:
    from pathlib import Path


def vllm_config(folder: Path, **changes: Any) -> Any:
    """As much of vLLM's configuration as is read."""
    values = {"dtype": "bfloat16", "cache_dtype": "auto", "algorithm": "sha256", "world_size": 1}
    values |= changes
    hf_config = SimpleNamespace(rope_theta=values.get("rope_theta", 1e4))
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder), revision=None, dtype=values["dtype"], hf_config=hf_config
        ),
        cache_config=SimpleNamespace(
            cache_dtype=values["cache_dtype"], prefix_caching_hash_algo=values["algorithm"]
        ),
        parallel_config=SimpleNamespace(world_size=values["world_size"]),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_the_same_model_is_the_same_after_a_restart(folder: Path) -> None:
    assert identity_of(vllm_config(folder)) == identity_of(vllm_config(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float16"},
        {"cache_dtype": "fp8"},
        {"algorithm": "sha256_cbor"},
        {"world_size": 2},
        {"rope_theta": 1e6},
    ],
)
def test_another_form_is_another_identity(folder: Path, change: dict[str, Any]) -> None:
    assert identity_of(vllm_config(folder, **change)) != identity_of(vllm_config(folder))


def test_a_fine_tune_at_the_same_path_is_another_identity(folder: Path) -> None:
    before = identity_of(vllm_config(folder))
    file = folder / "model.safetensors"
    stat = file.stat()
    file.write_bytes(b"tuned!!")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert identity_of(vllm_config(folder)) != before


def test_keys_that_change_per_process_are_never_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vllm_config(folder, algorithm="xxhash")
    assert identity_of(config) != identity_of(config)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert identity_of(config) == identity_of(config)
