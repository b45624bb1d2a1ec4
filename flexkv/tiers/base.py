"""What a tier is to the rest: bytes, addressed by slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexkv.tiers.host import HostPool


class PagedCopier(Protocol):
    """Copies blocks between one rank's paged KV cache and its region of the host pool.

    ``block_ids[i]`` goes with ``slots[i]``. No call ends - by return, error or cancellation -
    while bytes are still moving, so the caller may reuse blocks and slots at once. A call that was
    cancelled before its copy began copies nothing.
    """

    @property
    def num_blocks(self) -> int:
        """Blocks of the paged cache: ids are 0 to ``num_blocks - 1``."""
        ...

    def attach_pool(self, pool: HostPool, rank: int) -> None:
        """Copy to and from ``pool``'s region of ``rank`` from now on."""
        ...

    def mark(self) -> object:
        """A point in the order of the caller's work on the cache, to hand to a copy.

        On CUDA an event on the current stream; on CPU nothing, since the work is done already.
        """
        ...

    async def gather(self, block_ids: Sequence[int], slots: Sequence[int], after: object) -> None:
        """Copy blocks of the paged cache into slots, after the work marked by ``after``.

        Raises:
            TransferError: the slots' bytes are undefined.
        """
        ...

    async def scatter(
        self, slots: Sequence[int], block_ids: Sequence[int], after: object = None
    ) -> None:
        """Copy slots into blocks of the paged cache, after the work marked by ``after``.

        On return every stream sees the bytes.

        Raises:
            TransferError: the blocks' bytes are undefined.
        """
        ...

    def abandon(self) -> None:
        """Begin no copy any more, and return when none runs: for when the loop has died.

        Any thread may call it; it waits for a copy that runs, which takes milliseconds.
        """
        ...

    async def close(self) -> None:
        """Let go of threads and of the cache; nothing may be copying."""
        ...
