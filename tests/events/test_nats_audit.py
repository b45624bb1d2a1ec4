"""Who asks engines over NATS leaves no connection behind."""

from __future__ import annotations

import asyncio

from flexkv.config import EventsConfig
from flexkv.events.nats_audit import auditor

DEADLINE_S = 20.0


async def test_who_is_cancelled_while_connecting_hangs_up() -> None:
    connected, hung_up = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        hung_up.set()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = EventsConfig(nats_servers=(f"nats://127.0.0.1:{port}",), connect_timeout_s=60)
    async with server, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(auditor(settings).__aenter__())
        await connected.wait()
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        await hung_up.wait()
