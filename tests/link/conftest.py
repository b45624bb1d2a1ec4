"""An endpoint of the test's own."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def endpoint() -> Iterator[str]:
    """In a folder with a short name: pytest's own can be longer than a socket's path may be."""
    folder = tempfile.mkdtemp(prefix="flexkv-")
    try:
        yield f"ipc://{folder}/link"
    finally:
        shutil.rmtree(folder)
