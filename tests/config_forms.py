"""What the tests of settings share: load a text, or get the error of a mapping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flexkv.config import Config
from flexkv.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def errors_of(mapping: dict[Any, Any], **env: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(mapping, env)
    return str(caught.value)


def load_text(folder: Path, name: str, text: str, **env: str) -> Config:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return Config.load(path, env)
