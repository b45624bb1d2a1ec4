"""Which processors are near a GPU: memory that they touch first is near it too."""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEM = Path("/sys")


def cpus_near(pci_address: str, *, system: Path = _SYSTEM) -> set[int]:
    """The processors of the NUMA node of the PCI device; none where that is not known.

    ``pci_address`` is domain:bus:device.function, in hexadecimal.
    """
    node = _read(system / "bus/pci/devices" / pci_address.lower() / "numa_node")
    if not node.isdecimal():  # -1: the machine has but one, or does not tell
        return set()
    return _numbers(_read(system / f"devices/system/node/node{node}/cpulist"))


def stay_on(cpus: set[int]) -> None:
    """Keep the calling thread on ``cpus``, as far as it may use them; on no others if on any."""
    if allowed := cpus & os.sched_getaffinity(0):
        os.sched_setaffinity(0, allowed)


def _numbers(text: str) -> set[int]:
    """``0-3,8`` as numbers."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
