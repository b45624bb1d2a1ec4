"""kill -9 of the process that started the engine's: the engine lets go of what a restart needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flexkv.link.endpoint import EndpointLock
from flexkv.link.errors import EndpointTakenError
from tests.integration.roles import until

ROOT = Path(__file__).parent.parent.parent


def test_an_orphaned_engine_gives_up_its_endpoint(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/link"
    command = [sys.executable, "-m", "tests.integration.orphan", endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
        assert parent.stdout is not None
        core = int(parent.stdout.readline())
        try:
            lock = EndpointLock(endpoint)
            with pytest.raises(EndpointTakenError):
                lock.take()
            parent.kill()
            parent.wait(10)
            killed_s = time.monotonic()

            def taken() -> bool:
                with suppress(EndpointTakenError):
                    lock.take()
                    return True
                return False

            until(taken)
            assert time.monotonic() - killed_s < 10  # it looks once a second
            lock.release()
        finally:
            with suppress(ProcessLookupError):
                os.kill(core, signal.SIGKILL)
