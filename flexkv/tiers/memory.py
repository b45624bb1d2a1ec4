"""How much memory the system has left: asked before much of it is taken."""

from __future__ import annotations

from pathlib import Path

from flexkv.errors import ConfigError

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def require_memory(
    nbytes: int,
    *,
    of: str = "the host pool",
    remedy: str = "lower num_cpu_blocks or cpu_cache_gb",
    proc: Path = _PROC,
    cgroups: Path = _CGROUPS,
) -> None:
    """See that ``nbytes`` can be taken: a pool that does not fit ends in the OOM killer.

    Raises:
        ConfigError: less is available, in the machine or in this process's control group.
    """
    for where, available in available_memory(proc, cgroups).items():
        if nbytes > available:
            raise ConfigError(
                f"{of} needs {nbytes} bytes ({nbytes / 2**30:.1f} GiB), and {available} "
                f"({available / 2**30:.1f} GiB) are available by {where}: {remedy}"
            )


def available_memory(proc: Path, cgroups: Path) -> dict[str, int]:
    """Bytes left, by who says so; a limit that can't be read is not there."""
    available: dict[str, int] = {}
    meminfo = _fields(proc / "meminfo")
    if "MemAvailable:" in meminfo:
        available[f"MemAvailable in {proc / 'meminfo'}"] = 1024 * meminfo["MemAvailable:"]
    for group in _own_groups(proc / "self" / "cgroup", cgroups):
        limit = _number(group / "memory.max")
        used = _number(group / "memory.current")
        if limit is not None and used is not None:
            stat = _fields(group / "memory.stat")
            cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)  # given up on demand
            available[str(group / "memory.max")] = max(0, limit - used + cached)
    return available


def _own_groups(path: Path, root: Path) -> list[Path]:
    """The control groups (v2) of this process, and all around them: each has a limit."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    group = root / own
    return [group, *(parent for parent in group.parents if parent.is_relative_to(root))]


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {name: int(value) for name, value, *_ in words if value.isdecimal()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max": no limit
