"""Moves blocks between slot files and the host pool, in the thread that asks for it."""

from __future__ import annotations

import errno
import os
import time
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flexkv.tiers.host import HostPool
    from flexkv.tiers.ssd_files import SlotFiles
    from flexkv.tiers.ssd_journal import DiskCalls

_MAX_CALL_NBYTES = 2 << 20  # of neighbours in one call; more would only delay their checksums
_MAX_BUFFERS = 1024  # Linux's IOV_MAX
RING_DEPTH = 32  # more in flight stalls whoever submits, and gains nothing
_MAX_RING_NBYTES = 32 << 20
_REST = 1.5  # beside reads a write is followed by a pause so many times as long, for each writer
_RING_SHARE = 10  # beside reads a ring of writes has one in so many of its requests in flight
_MAX_REST_S = 0.1


class Move(NamedTuple):
    """Blocks to move: ``slots[i]`` of the disk and ``host_slots[i]``, for each i of ``order``."""

    slots: Sequence[int]
    host_slots: Sequence[int]
    sums: Sequence[int]
    """What the bytes must have; of a write nothing."""
    order: Sequence[int]


class Mover:
    """``preadv`` and ``pwritev``, neighbours on the disk in one call.

    ``has_sums`` False: nothing is summed up and nothing is verified, which only a benchmark wants.
    ``num_reading`` and ``num_writing`` are for the owner to set: calls to ``read`` and ``write``
    that run or wait for a thread. Writes make pauses while there are reads.
    """

    def __init__(
        self, files: SlotFiles, pool: HostPool, calls: DiskCalls, *, has_sums: bool = True
    ) -> None:
        self._files = files
        self.num_reading = self.num_writing = 0
        self._calls = calls
        self._has_sums = has_sums
        self._memory: memoryview | None = pool.memory()
        self._nbytes = pool.slot_nbytes
        self._stride = pool.slot_stride
        self._bases = range(0, pool.num_ranks * pool.region_nbytes, pool.region_nbytes)

    def read(self, move: Move) -> list[int]:
        """Fill host slots. Returns which blocks of ``order`` are lost: short, or of another sum.

        Raises:
            OSError: the disk failed; all host slots are undefined.
        """
        lost: list[int] = []
        for group, which, offset in self._groups(move):
            num_read = self._call(self._calls.preadv, move, group, which, offset)
            num_whole = num_read // self._files.slot_nbytes
            lost += group[num_whole:]
            lost += [i for i in group[:num_whole] if not self._is_right(move, i)]
        return lost

    def write(self, move: Move) -> list[int]:
        """Copy host slots to the disk. Returns the sums, one for each of ``order``.

        Raises:
            OSError: the disk failed; all the disk's slots are undefined.
        """
        sums = self._sums(move)
        for group, which, offset in self._groups(move):
            began_s = time.perf_counter()
            num_written = self._call(self._calls.pwritev, move, group, which, offset)
            self._require_whole(num_written, len(group) * self._files.slot_nbytes, which)
            self._rest(time.perf_counter() - began_s)
        return sums

    def close(self) -> None:
        """Let go of the pool; nothing may be moving."""
        self._memory = None

    def _call(
        self,
        call: Callable[[int, list[memoryview], int], int],
        move: Move,
        group: Sequence[int],
        which: int,
        offset: int,
    ) -> int:
        buffers = [part for i in group for part in self._parts(move.host_slots[i])]
        try:
            return call(self._files.fds[which], buffers, offset)
        except OSError as error:
            raise self._files.named(error, which) from error

    def _require_whole(self, num_moved: int, num_wanted: int, which: int) -> None:
        if num_moved != num_wanted:
            error = OSError(errno.EIO, f"a write ended after {num_moved} of {num_wanted} bytes")
            raise self._files.named(error, which)

    def _rest(self, seconds: float) -> None:
        """A write took so long: leave the disk to reads, if there are any."""
        if self.num_reading:
            time.sleep(min(_REST * self.num_writing * seconds, _MAX_REST_S))

    def _sums(self, move: Move) -> list[int]:
        if not self._has_sums:
            return [0] * len(move.order)
        return [self._sum(move.host_slots[i]) for i in move.order]

    def _is_right(self, move: Move, i: int) -> bool:
        return not self._has_sums or self._sum(move.host_slots[i]) == move.sums[i]

    def _sum(self, host_slot: int) -> int:
        parts = self._parts(host_slot)
        if len(parts) == 1:
            return xxh3_64_intdigest(parts[0][: self._nbytes])
        digest = xxh3_64()
        for part in parts:
            digest.update(part[: self._nbytes])
        return digest.intdigest()

    def _parts(self, host_slot: int) -> list[memoryview]:
        """The block's part of every rank, with its padding, as they follow on the disk."""
        memory, start, stride = self._memory, host_slot * self._stride, self._stride
        assert memory is not None, "closed while blocks were moving"
        return [memory[base + start : base + start + stride] for base in self._bases]

    def _groups(self, move: Move) -> Iterator[tuple[list[int], int, int]]:
        """Neighbours on the disk, with the number of their file and the offset of the first."""
        files, slot_nbytes = self._files, self._files.slot_nbytes
        most = min(_MAX_CALL_NBYTES // slot_nbytes, _MAX_BUFFERS // len(self._bases)) or 1
        group: list[int] = []
        first = expected = (-1, -1)
        for i in move.order:
            place = files.place(move.slots[i])
            if place == expected and len(group) < most:
                group.append(i)
            else:
                if group:
                    yield group, *first
                group, first = [i], place
            expected = (place[0], place[1] + slot_nbytes)
        if group:
            yield group, *first


class UringMover(Mover):
    """The same through ``num_rings`` io_urings; further threads wait until one is idle.

    Raises:
        ImportError: the extra ``uring`` is not installed.
        OSError: the kernel does not allow it.
    """

    def __init__(
        self,
        files: SlotFiles,
        pool: HostPool,
        calls: DiskCalls,
        *,
        has_sums: bool = True,
        num_rings: int,
        depth: int = RING_DEPTH,
    ) -> None:
        super().__init__(files, pool, calls, has_sums=has_sums)
        import uring_api  # noqa: PLC0415  # an extra

        most = max(2, _MAX_RING_NBYTES // self._stride)
        self._depth = max(1, min(depth, RING_DEPTH, most))
        self._rings: list[Any] = []
        try:
            while len(self._rings) < num_rings:  # now, so that a refusal leaves the threads
                self._rings.append(uring_api.Ring(RING_DEPTH))
        except OSError:
            self.close()
            raise
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for ring in self._rings:
            self._idle.put(ring)

    def read(self, move: Move) -> list[int]:
        """As ``Mover.read``."""
        lost: set[int] = set()
        num_missing = dict.fromkeys(move.order, len(self._bases))
        for i, _, num_moved in self._run(move, is_write=False):
            num_missing[i] -= 1
            if num_moved != self._stride or (
                not num_missing[i] and i not in lost and not self._is_right(move, i)
            ):
                lost.add(i)
        return sorted(lost)

    def write(self, move: Move) -> list[int]:
        """As ``Mover.write``."""
        sums = self._sums(move)
        for _, which, num_moved in self._run(move, is_write=True):
            self._require_whole(num_moved, self._stride, which)
        return sums

    def close(self) -> None:
        """As ``Mover.close``."""
        for ring in self._rings:
            ring.close()
        self._rings.clear()
        super().close()

    def _run(self, move: Move, *, is_write: bool) -> Iterator[tuple[int, int, int]]:
        """Yields (block, file, bytes moved) of each part that ends; at the end all have ended."""
        ring = self._idle.get()
        prepare = ring.prepare_write if is_write else ring.prepare_read
        todo = self._transfers(move)
        num_running = 0
        number, failed = 0, 0
        try:
            while True:
                depth = self._depth
                if is_write and self.num_reading:
                    depth = max(1, depth // _RING_SHARE)
                room = 0 if number else max(0, depth - num_running)
                for i, which, part, offset in islice(todo, room):
                    prepare(self._files.fds[which], part, offset, user_data=(i, which))
                    num_running += 1
                if not num_running:
                    break
                ended = _ended(ring)
                num_running -= len(ended)  # all, for whoever asked may stop in the middle
                for i, which, res in ended:
                    if res < 0:
                        number, failed = -res, which
                    elif not number:
                        yield i, which, res
        finally:  # the buffers are in use until the last has ended, whatever happened
            while num_running:
                num_running -= len(_ended(ring))
            self._idle.put(ring)
        if number:
            raise self._files.named(OSError(number, os.strerror(number)), failed)

    def _transfers(self, move: Move) -> Iterator[tuple[int, int, memoryview, int]]:
        files = self._files
        for i in move.order:
            which, offset = files.place(move.slots[i])
            for part in self._parts(move.host_slots[i]):
                yield i, which, part, offset
                offset += self._stride


def _ended(ring: Any) -> list[tuple[int, int, int]]:
    """Wait until some requests have ended: block, file, and bytes moved or the error's number.

    No completion leaves this call. An error's traceback would keep one alive, and the garbage
    collector, which frees the cycle that this makes, crashes on it (uring-api 0.1).
    """
    return [(*completion.user_data, completion.res) for completion in ring.wait()]
