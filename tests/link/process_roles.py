"""An engine or a worker as a process that a test may kill; it prints how far it is."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from flexkv.errors import FlexKVError
from flexkv.tiers.host import HostPool
from tests.link.links import (
    BLOCK_NBYTES,
    LIMIT_S,
    NUM_SLOTS,
    HeldCopier,
    client_at,
    server_at,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def say(text: object) -> None:
    print(text, flush=True)  # noqa: T201  # what the test waits for


class TellingCopier(HeldCopier):
    """Holds every copy until its end, which is the process's."""

    def attach_pool(self, pool: HostPool, rank: int) -> None:
        super().attach_pool(pool, rank)
        say("linked")

    async def gather(self, block_ids: Sequence[int], slots: Sequence[int], after: object) -> None:
        say("copying")
        await super().gather(block_ids, slots, after)


async def worker(endpoint: str) -> None:
    copier = TellingCopier(is_held=True)
    asyncio.get_running_loop().add_reader(sys.stdin, copier.let_go)
    await client_at(endpoint, copier, silence_s=0.5).run()
    say("ended")


async def engine(endpoint: str, stage: str) -> None:
    async with server_at(endpoint) as server:
        say("listening")
        await server.registered(LIMIT_S)
        say("registered")
        if stage == "registered":
            await asyncio.sleep(LIMIT_S)
        pool = HostPool(NUM_SLOTS, BLOCK_NBYTES)
        server.copiers[0].attach_pool(pool, 0)
        await server.copiers[0].scatter([1], [1])
        say("linked")
        if stage == "idle":
            await asyncio.sleep(LIMIT_S)
        await asyncio.to_thread(sys.stdin.readline)
        await server.copiers[0].gather([1], [1], None)


async def main() -> None:
    role, endpoint, *more = sys.argv[1:]
    async with asyncio.timeout(2 * LIMIT_S):
        try:
            await (worker(endpoint) if role == "worker" else engine(endpoint, *more))
        except FlexKVError as error:
            say(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    asyncio.run(main())
