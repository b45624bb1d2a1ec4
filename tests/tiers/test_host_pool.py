"""The host pool: shared, aligned, touched in parallel, and refused where memory is short."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexkv.errors import ConfigError, InputError, LayoutError
from flexkv.tiers import host, memory
from flexkv.tiers.host import HostPool


def taken_nbytes(pool: HostPool) -> int:
    return 512 * os.fstat(pool.fd).st_blocks


def mapping_of(address: int) -> dict[str, int]:
    """The numbers of /proc/self/smaps for the mapping at ``address``; none if there is none."""
    numbers: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name.split()[0]:
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= address < stop
        elif inside and rest.strip().endswith("kB"):
            numbers[name] = 1024 * int(rest.split()[0])
    return numbers


@pytest.mark.parametrize("slot_nbytes", [1, 4095, 4096, 4097, 100_000])
def test_slots_are_aligned_and_apart(slot_nbytes: int) -> None:
    pool = HostPool(5, slot_nbytes, num_ranks=3)
    seen = set()
    for rank in range(3):
        region = pool.region(rank)
        assert region.shape == (5, slot_nbytes)
        for slot in range(5):
            address = region[slot].data_ptr()
            assert address % 4096 == 0
            seen.add(address)
            pool.slot(rank, slot)[:] = bytes([16 * rank + slot]) * slot_nbytes
    assert len(seen) == 15
    for rank in range(3):
        for slot in range(5):
            assert pool.region(rank)[slot].unique().tolist() == [16 * rank + slot]
    pool.close()


def test_what_a_tensor_writes_the_slot_shows() -> None:
    pool = HostPool(2, 10)
    pool.region(0)[1] = torch.arange(10, dtype=torch.uint8)
    assert bytes(pool.slot(0, 1)) == bytes(range(10))
    pool.close()


def test_another_process_maps_the_pool_and_shares_its_bytes() -> None:
    pool = HostPool(4, 5000, num_ranks=2)
    pool.slot(1, 3)[:5] = b"there"
    script = (
        "import sys\n"
        "from flexkv.tiers.host import HostPool\n"
        "pool = HostPool.open(sys.argv[1], 4, 5000, num_ranks=2)\n"
        "assert bytes(pool.slot(1, 3)[:5]) == b'there'\n"
        "pool.touch(1)\n"
        "pool.slot(1, 2)[:4] = b'back'\n"
    )
    subprocess.run([sys.executable, "-c", script, pool.path()], check=True, timeout=60)
    assert bytes(pool.slot(1, 2)[:4]) == b"back"
    assert bytes(pool.slot(1, 3)[:5]) == b"there"
    pool.close()


def test_a_descriptor_that_was_sent_maps_the_pool() -> None:
    pool = HostPool(2, 10)
    other = HostPool.open(pool.fd, 2, 10)
    pool.close()
    other.slot(0, 0)[:2] = b"ok"
    assert bytes(other.region(0)[0, :2].numpy()) == b"ok"
    other.close()


def test_a_pool_of_another_size_is_refused() -> None:
    pool = HostPool(4, 5000)
    with pytest.raises(LayoutError, match="has 32768 bytes, where 40960 are expected"):
        HostPool.open(pool.path(), 5, 5000)
    pool.close()


def test_a_pool_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="/proc/self/fd/987654 can't be opened: No such file"):
        HostPool.open("/proc/self/fd/987654", 1, 1)


def test_touch_takes_the_memory_of_one_region_only() -> None:
    pool = HostPool(100, 10_000, num_ranks=2, touch_threads=3)
    assert taken_nbytes(pool) == 0
    pool.touch(1)
    assert taken_nbytes(pool) == 100 * pool.slot_stride
    assert mapping_of(pool.region(0).data_ptr())["Rss"] == 100 * pool.slot_stride
    pool.touch_all()
    assert taken_nbytes(pool) == pool.nbytes
    pool.close()


def test_touch_runs_in_parallel_over_all_of_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(3)  # is passed only by three at the same time
    touched: list[tuple[int, int]] = []

    def populate(part: torch.Tensor) -> None:
        barrier.wait(timeout=60)
        touched.append((part.data_ptr(), part.data_ptr() + part.numel()))

    monkeypatch.setattr(host, "_populate", populate)
    pool = HostPool(100, 4096, num_ranks=2, touch_threads=3)
    pool.touch(1)

    touched.sort()
    start = pool.region(1).data_ptr()
    assert (touched[0][0], touched[-1][1]) == (start, start + 100 * 4096)
    assert [stop for _, stop in touched[:-1]] == [begin for begin, _ in touched[1:]]
    pool.close()


def test_touch_releases_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_TOUCH_NBYTES", 256 << 20)  # in one system call
    for _ in range(5):  # the main thread may have been off its core all the time
        pool = HostPool(1, 256 << 20, touch_threads=1)
        thread = threading.Thread(target=pool.touch_all)
        thread.start()
        seen = set()
        while thread.is_alive():  # this loop needs the GIL
            seen.add(taken_nbytes(pool))
        thread.join()
        pool.close()
        if len(seen - {0, pool.nbytes}) > 1:
            return
    pytest.fail("no Python ran while the system call took memory")


def test_an_older_kernel_is_touched_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_MADV_POPULATE_WRITE", 9999)
    pool = HostPool(10, 10_000)
    pool.slot(0, 4)[:5] = b"stays"
    pool.touch_all()
    assert taken_nbytes(pool) == pool.nbytes
    assert bytes(pool.slot(0, 4)[:5]) == b"stays"
    pool.close()


def test_memory_that_the_system_refuses_is_a_clear_error() -> None:
    pool = HostPool(10, 10_000)
    os.ftruncate(pool.fd, 0)
    with pytest.raises(ConfigError, match=r"refuses .* bytes .*num_cpu_blocks"):
        pool.touch_all()
    pool.close()


def test_touch_ends_when_the_pool_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_TOUCH_NBYTES", 4096)
    pool = HostPool(100, 4096, touch_threads=1)
    parts: list[torch.Tensor] = []

    def populate(part: torch.Tensor) -> None:
        parts.append(part)
        if len(parts) == 3:
            pool.close()

    monkeypatch.setattr(host, "_populate", populate)
    pool.touch_all()
    assert len(parts) == 3


def test_memory_stays_as_long_as_a_view_lives_and_no_longer() -> None:
    pool = HostPool(3, 10_000)
    region, address = pool.region(0), pool.region(0).data_ptr()
    pool.close()
    pool.close()
    region.fill_(7)
    assert int(region.sum()) == 7 * 30_000
    assert mapping_of(address)
    del region
    gc.collect()
    assert not mapping_of(address)


def test_a_closed_pool_says_so() -> None:
    pool = HostPool(3, 10)
    pool.close()
    for use in (lambda: pool.region(0), lambda: pool.slot(0, 0), lambda: pool.touch(0)):
        with pytest.raises(InputError, match="closed"):
            use()


def test_slots_and_ranks_out_of_range_are_refused() -> None:
    pool = HostPool(3, 10, num_ranks=2)
    with pytest.raises(InputError, match="slot 3 is not in the host pool, which has 3"):
        pool.slot(0, 3)
    with pytest.raises(InputError, match="rank -1"):
        pool.region(-1)
    with pytest.raises(InputError, match="rank 2"):
        pool.touch(2)
    pool.close()


@pytest.mark.parametrize("sizes", [(0, 10, 1), (3, 0, 1), (3, 10, -1)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        HostPool(*sizes)


def test_a_pool_larger_than_memory_is_refused_before_anything_is_taken() -> None:
    with pytest.raises(ConfigError) as caught:
        HostPool(1 << 30, 1 << 20)
    for part in (str(1 << 50), "MemAvailable", "num_cpu_blocks", "cpu_cache_gb"):
        assert part in str(caught.value)


def test_touch_looks_at_the_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool(10, 4096, num_ranks=2)
    pool.touch(0)
    asked: list[int] = []
    monkeypatch.setattr(host, "require_memory", asked.append)
    pool.touch(1)
    pool.touch_all()  # there is nothing left to take
    assert asked == [10 * 4096, 0]
    pool.close()


def test_other_systems_are_refused_on_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "sys", SimpleNamespace(platform="darwin"))
    with pytest.raises(ConfigError, match=r"needs Linux .* darwin"):
        HostPool(1, 1)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A machine with 1000 KiB available, and this process in the control group a/b."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/a/b\n")
    (tmp_path / "groups/a/b").mkdir(parents=True)
    return tmp_path


def limit(group: Path, most: str, used: int, cached: int = 0) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\nactive_file {cached}\ninactive_file 0\n")


def require(nbytes: int, system: Path) -> None:
    memory.require_memory(nbytes, proc=system / "proc", cgroups=system / "groups")


def test_the_machine_bounds_the_pool(system: Path) -> None:
    require(1000 * 1024, system)
    with pytest.raises(ConfigError, match=r"1024001 bytes .* and 1024000 .*meminfo"):
        require(1000 * 1024 + 1, system)


@pytest.mark.parametrize("group", ["a/b", "a", "."])
def test_each_control_group_around_bounds_the_pool(system: Path, group: str) -> None:
    limit(system / "groups/a/b", "max", used=100)
    limit(system / "groups" / group, "5000", used=4500)
    require(500, system)
    with pytest.raises(ConfigError, match=r"501 bytes .* and 500 .*memory\.max"):
        require(501, system)


def test_cached_files_do_not_count_as_used(system: Path) -> None:
    limit(system / "groups/a/b", "5000", used=4500, cached=4000)
    require(4500, system)
    with pytest.raises(ConfigError):
        require(4501, system)


def test_limits_that_can_not_be_read_do_not_bound(tmp_path: Path) -> None:
    require(1 << 60, tmp_path)


def test_mincore_agrees_that_touched_pages_are_there() -> None:
    pool = HostPool(16, 4096, touch_threads=2)
    states = (ctypes.c_ubyte * 16)()
    address, nbytes = ctypes.c_void_p(pool.region(0).data_ptr()), ctypes.c_size_t(pool.nbytes)
    libc = ctypes.CDLL(None)
    assert libc.mincore(address, nbytes, states) == 0
    assert sum(states) == 0
    pool.touch(0)
    assert libc.mincore(address, nbytes, states) == 0
    assert [state & 1 for state in states] == [1] * 16
    pool.close()
