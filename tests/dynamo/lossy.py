"""A proxy between a publisher and NATS that loses, repeats and reorders what is published."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import random

_LATE = 3  # a message that is overtaken is overtaken by so many


class LossyProxy:
    """Between publishers that connect to ``url`` and the server at ``nats_url``.

    ``loss`` is the share of messages that never arrive; as many come twice, and as many come
    late. The ``n``-th message of a connection meets the same fate for the same ``rng``. ``calm``
    ends all that.
    """

    def __init__(self, nats_url: str, rng: random.Random, loss: float) -> None:
        place = urlsplit(nats_url)
        self._server_at = (place.hostname, place.port)
        self._rng = rng
        self.loss = loss
        self._late: list[tuple[int, bytes]] = []
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        self.fates: Counter[str] = Counter()
        self.url = ""

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    def calm(self) -> None:
        self.loss = 0.0

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._tasks.create_task(self._connection(reader, writer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_writer = None
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._server_at)
            async with asyncio.TaskGroup() as ways:
                back = ways.create_task(_copy(far_reader, writer))
                await self._forward(reader, far_writer)
                back.cancel()
        except* (OSError, EOFError):
            pass
        finally:
            for end in (writer, far_writer):
                if end is not None:
                    end.close()
                    with contextlib.suppress(OSError):
                        await end.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.startswith(b"PUB "):
                payload = await reader.readexactly(int(line.split()[-1]) + 2)
                for message in self._delivered(line + payload):
                    writer.write(message)
            else:
                writer.write(line)
            await writer.drain()

    def _delivered(self, message: bytes) -> list[bytes]:
        """What arrives now."""
        luck = self._rng.random()
        if luck < self.loss:
            self.fates["lost"] += 1
            now = []
        elif luck < 2 * self.loss:
            self.fates["twice"] += 1
            now = [message, message]
        elif luck < 3 * self.loss:
            self.fates["late"] += 1
            self._late.append((_LATE, message))
            return []
        else:
            self.fates["fine"] += 1
            now = [message]
        late = [(left - 1, held) for left, held in self._late]
        self._late = [(left, held) for left, held in late if left > 0]
        return now + [held for left, held in late if left <= 0]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    raise EOFError
