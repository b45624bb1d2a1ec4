"""What CUDA knows of host memory: pinning it, and which processors are near."""

from __future__ import annotations

from typing import Any

import torch

from flexkv.tiers.numa import cpus_near

_PORTABLE_AND_MAPPED = 3  # for all contexts, and readable by kernels


class CudaPinner:
    """Pins memory for ``device`` (and every other) with ``cudaHostRegister``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pin(self, address: int, nbytes: int) -> None:
        """See ``Pinner``."""
        with torch.cuda.device(self._device):
            code = _cudart().cudaHostRegister(address, nbytes, _PORTABLE_AND_MAPPED)
        _check(code, f"cudaHostRegister of {nbytes} bytes")

    def unpin(self, address: int) -> None:
        """See ``Pinner``."""
        with torch.cuda.device(self._device):
            code = _cudart().cudaHostUnregister(address)
        _check(code, "cudaHostUnregister")


def cpus_of(device: torch.device) -> set[int]:
    """The processors of the GPU's NUMA node; none where that is not known."""
    properties = torch.cuda.get_device_properties(device)
    numbers = [
        getattr(properties, f"pci_{part}_id", None)  # newer than the oldest torch we work with
        for part in ("domain", "bus", "device")
    ]
    if None in numbers:
        return set()
    domain, bus, slot = numbers
    return cpus_near(f"{domain:04x}:{bus:02x}:{slot:02x}.0")


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(code: Any, what: str) -> None:
    number = int(code)
    if number:
        reason = _cudart().cudaGetErrorString(code)
        raise RuntimeError(f"{what} failed: {reason} ({number}); is `ulimit -l` high enough?")
