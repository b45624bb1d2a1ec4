"""Checks of what the machine allows: direct I/O, io_uring, huge pages, locked memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv.doctor.findings import ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.config import Config
    from flexkv.doctor.facts import Facts, Machine
    from flexkv.doctor.findings import Finding

_GIB = 2**30


def check_machine(facts: Facts) -> Iterator[Finding]:
    """What flexkv's settings ask of the machine is there."""
    configs = [one.config for one in facts.workers if one.config is not None]
    configs = configs or ([facts.config] if facts.config is not None else [])
    has_gpu = any(one.driver for one in facts.installations)
    yield from _memory(facts)
    yield from _memlock(facts, has_gpu=has_gpu)
    yield from _huge_pages(facts.machine, configs)
    yield from _ssd(facts.machine, configs)
    if facts.machine.card_folder_error:
        yield problem(
            "model cards",
            f"{facts.machine.card_folder} can't be written to ({facts.machine.card_folder_error}): "
            "Dynamo's frontend keeps model cards there",
            "make it writable, or give the frontend another HOME",
        )
    elif facts.machine.card_folder:
        yield ok("model cards", f"{facts.machine.card_folder} can be written to")


def check_settings(facts: Facts) -> Iterator[Finding]:
    """The settings that doctor itself was given."""
    if facts.config_error:
        yield problem("settings", facts.config_error, "correct them")
    elif facts.config is not None and not facts.workers:  # else theirs count, not doctor's
        for note in facts.config.notes:
            yield warning("settings", note, "leave it out, or do what it says")
    for name in facts.unfinished:
        yield warning("doctor", f"{name} took too long, and was left out", "ask again later")
    if facts.state and facts.state != "ready":
        yield warning("deployment", f"it is {facts.state}, not ready", "wait for it, or start it")
    for name in facts.starting.values():
        yield warning("deployment", f"{name} is not ready yet", "wait for it, or look at its log")


def _memory(facts: Facts) -> Iterator[Finding]:
    is_up = any(one.owner is not None for one in facts.endpoints)
    for where, available in facts.machine.available.items():
        seen = f"{available / _GIB:.1f} GiB are available by {where}"
        if facts.pool_nbytes is not None and available < facts.pool_nbytes and not is_up:
            yield problem(
                "memory",
                f"{seen}, and the host pool takes {facts.pool_nbytes / _GIB:.1f} GiB",
                "lower num_cpu_blocks or cpu_cache_gb",
            )
        else:
            yield ok("memory", f"{seen} (the pool is a memfd: /dev/shm is not used)")


def _memlock(facts: Facts, *, has_gpu: bool) -> Iterator[Finding]:
    limits = {w.process.name: w.process.memlock for w in facts.workers} or {
        "this process": facts.machine.memlock
    }
    for name, limit in limits.items():
        if limit is None:
            yield ok("memlock", f"{name} may lock any amount of memory")
            continue
        seen = f"{name} may lock {limit / _GIB:.3f} GiB of memory (ulimit -l)"
        needed = facts.pool_nbytes
        if not has_gpu:
            yield ok("memlock", f"{seen}; without a GPU nothing is pinned")
        elif needed is not None and limit >= needed:
            yield ok("memlock", seen)
        else:
            pool = f"of {needed / _GIB:.1f} GiB " if needed is not None else ""
            yield warning(
                "memlock",
                f"{seen}, and the host pool {pool}has to be pinned",
                "where copies fail: ulimit -l unlimited (docker run --ulimit memlock=-1)",
            )


def _huge_pages(machine: Machine, configs: list[Config]) -> Iterator[Finding]:
    if not any(config.transfers.huge_pages for config in configs):
        return
    if "[never]" in machine.shmem_enabled or "[deny]" in machine.shmem_enabled:
        yield warning(
            "huge pages",
            f"transfers.huge_pages is set, and shmem_enabled says {machine.shmem_enabled}",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (as root)",
        )
    else:
        yield ok("huge pages", f"shmem_enabled says {machine.shmem_enabled or 'nothing'}")


def _ssd(machine: Machine, configs: list[Config]) -> Iterator[Finding]:
    for folder in machine.ssd_folders:
        if folder.refusal:
            yield problem(
                "ssd",
                f"{folder.path} can't be used ({folder.refusal})",
                "give ssd_cache_dir a folder that this user may write to",
            )
        elif folder.buffered:
            yield warning(
                "direct I/O",
                f"{folder.path} does not take it ({folder.buffered}): buffered I/O costs 5 times "
                "the CPU, and page cache",
                "put ssd_cache_dir on ext4 or xfs on a local drive",
            )
        else:
            yield ok("direct I/O", f"{folder.path} takes it")
    rings = [c.cache.ssd_cache_iouring_entries for c in configs if c.cache.enable_ssd]
    if not any(rings):
        return
    if machine.uring:
        yield warning(
            "io_uring",
            f"the kernel forbids it ({machine.uring}): threads are used",
            "sysctl kernel.io_uring_disabled=0, a seccomp profile that allows it, or "
            "ssd_cache_iouring_entries 0",
        )
    elif not machine.has_uring_extra:
        yield warning(
            "io_uring",
            "the kernel allows it, the extra is not installed: threads are used",
            "pip install 'flexkv[uring]', or ssd_cache_iouring_entries 0",
        )
    else:
        yield ok("io_uring", "the kernel allows it")
