"""End-to-end tests with a real vLLM: `make e2e` makes their environments and runs them.

One of them: .venv-e2e/bin/pytest -c tests/e2e/pytest.ini tests/e2e -k "tiny_pool and stock"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.cases import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    base = tmp_path_factory.getbasetemp()
    # below pytest-xdist, a worker's folder lies in the run's
    shared = base.parent if base.name.startswith("popen-") else base
    bench = Bench(base / "bench", shared)
    yield bench
    bench.end()
