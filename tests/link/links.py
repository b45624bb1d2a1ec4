"""An engine and workers on one real socket, with copies that the test ends when it likes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from flexkv.errors import TransferError
from flexkv.link.client import LinkClient
from flexkv.link.server import LinkServer
from flexkv.link.waiting import until_done
from flexkv.tiers.host import HostPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    import torch

    from flexkv.link.messages import Note

ENGINE_ID = "engine-a"
BLOCK_NBYTES = 64
NUM_BLOCKS = 32
NUM_SLOTS = 16
TOKENS_PER_BLOCK = 4
LIMIT_S = 30.0
"""For what must end, but is not what the test is about."""


@dataclass(eq=False)
class HeldCopier:
    """Copies that begin at once, and end when the test says so; until then, bytes are moving."""

    num_blocks: int = NUM_BLOCKS
    is_held: bool = False
    error: str | None = None
    begun: list[tuple[str, list[int], list[int], object]] = field(default_factory=list)
    num_running: int = 0
    pool: HostPool | None = None
    attach_error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _held: list[asyncio.Future[None]] = field(default_factory=list)

    def attach_pool(self, pool: HostPool, rank: int) -> None:
        if self.attach_error is not None:
            raise self.attach_error
        self.pool = pool
        self.rank = rank

    def region(self) -> torch.Tensor:
        assert self.pool is not None
        return self.pool.region(self.rank)

    def mark(self) -> object:
        return "marked"

    async def gather(self, block_ids: Sequence[int], slots: Sequence[int], after: object) -> None:
        await self._copy("gather", block_ids, slots, after)
        for block_id, slot in zip(block_ids, slots, strict=True):
            self.region()[slot] = block_id

    async def scatter(
        self, slots: Sequence[int], block_ids: Sequence[int], after: object = None
    ) -> None:
        await self._copy("scatter", block_ids, slots, after)

    async def close(self) -> None:
        assert not self.num_running

    def let_go(self) -> None:
        """All copies that run now end."""
        for copy in self._held:
            copy.set_result(None)
        self._held.clear()

    async def until_running(self, num_copies: int) -> None:
        async with asyncio.timeout(LIMIT_S):
            while self.num_running != num_copies:
                self.changed.clear()
                await self.changed.wait()

    async def _copy(
        self, what: str, block_ids: Sequence[int], slots: Sequence[int], after: object
    ) -> None:
        self.begun.append((what, list(block_ids), list(slots), after))
        self.num_running += 1
        self.changed.set()
        ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.is_held:
            self._held.append(ends)
        else:
            ends.set_result(None)
        try:
            await until_done(ends)
        finally:
            self.num_running -= 1
            self.changed.set()
        if self.error is not None:
            raise TransferError(self.error)


def server_at(endpoint: str, **settings: Any) -> LinkServer:
    given: dict[str, Any] = {
        "engine_id": ENGINE_ID,
        "num_ranks": 1,
        "heartbeat_s": 0.05,
        "silence_s": 10.0,
    }
    return LinkServer(endpoint, **(given | settings))


def client_at(endpoint: str, copier: HeldCopier | None = None, **settings: Any) -> LinkClient:
    given: dict[str, Any] = {
        "engine_id": ENGINE_ID,
        "rank": 0,
        "num_ranks": 1,
        "tokens_per_block": TOKENS_PER_BLOCK,
        "copier": copier or HeldCopier(),
        "block_nbytes": BLOCK_NBYTES,
        "notes": lambda _: None,
        "deadline_s": LIMIT_S,
        "heartbeat_s": 0.05,
        "silence_s": 10.0,
    }
    return LinkClient(endpoint, **(given | settings))


@dataclass
class Linked:
    """Both ends of a link whose workers are let in, in one loop."""

    server: LinkServer
    pool: HostPool
    copiers: list[HeldCopier]
    notes: list[tuple[int, Note]]
    runs: list[asyncio.Task[None]]
    clients: list[LinkClient]


@asynccontextmanager
async def linked(
    endpoint: str, num_ranks: int = 1, *, step_deadline_s: float = LIMIT_S, **settings: Any
) -> AsyncIterator[Linked]:
    """Workers first, as in vLLM. ``settings`` are the server's."""
    copiers = [HeldCopier() for _ in range(num_ranks)]
    notes: list[tuple[int, Note]] = []
    clients = [
        client_at(
            endpoint,
            copier,
            rank=rank,
            num_ranks=num_ranks,
            step_deadline_s=step_deadline_s,
            notes=lambda note, rank=rank: notes.append((rank, note)),
        )
        for rank, copier in enumerate(copiers)
    ]
    async with asyncio.timeout(2 * LIMIT_S), asyncio.TaskGroup() as tasks:
        runs = [tasks.create_task(client.run()) for client in clients]
        try:
            async with server_at(endpoint, num_ranks=num_ranks, **settings) as server:
                await server.registered(LIMIT_S)
                with_pool = HostPool(NUM_SLOTS, BLOCK_NBYTES, num_ranks, touch_threads=1)
                try:
                    for rank, copier in server.copiers.items():
                        copier.attach_pool(with_pool, rank)
                    for copier in server.copiers.values():
                        await copier.scatter([1], [1])  # ends when its worker knows the pool
                    for held in copiers:
                        held.begun.clear()
                    yield Linked(server, with_pool, copiers, notes, runs, clients)
                finally:
                    for held in copiers:
                        held.is_held = False
                        held.let_go()
                    with_pool.close()
        finally:
            if not runs[0].done():
                await asyncio.wait(runs, timeout=LIMIT_S)


@contextmanager
def bare_socket(kind: int) -> Iterator[zmq.asyncio.Socket]:
    """For an engine or a worker that the test plays itself."""
    context = zmq.asyncio.Context()
    try:
        yield context.socket(kind)
    finally:
        context.destroy(linger=0)
