"""Whatever bytes a recovery server gets, it answers, or drops them and counts; it never hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.config import EventsConfig
from flexkv.errors import FeedError
from flexkv.events import reqplane
from flexkv.events.callbacks import CallbackPolicy
from flexkv.events.recovery import _MAX_ANSWERS, RecoveryServer
from flexkv.events.reqplane import MalformedError, Query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

PATH = "abc/ns/backend/worker_kv_query_source_abc"
DEADLINE_S = 20.0


def payload(address: str, **query: Any) -> bytes:
    info = {"address": address, "subject": "S", "context": "c", "stream_type": "response"}
    control = {
        "id": "1",
        "payload_codec": "msgpack",
        "connection_info": {"transport": "tcp_server", "info": json.dumps(info)},
    }
    head = json.dumps(control).encode()
    body = msgspec.msgpack.encode(
        {
            "worker_id": 7,
            "dp_rank": 0,
            "start_event_id": None,
            "end_event_id": None,
            "supports_tree_dump_failed": True,
            "kind": "recovery",
        }
        | query
    )
    return reqplane.LENGTHS.pack(len(head), len(body), 0) + head + body


def request(body: bytes, path: str = PATH) -> bytes:
    parts = [(2, path.encode()), (2, b"{}"), (4, body)]
    return b"".join(len(part).to_bytes(width, "big") + part for width, part in parts)


def test_a_request_says_what_was_missed_and_where_the_answer_goes() -> None:
    asked = reqplane.request_of(payload("10.0.0.7:4711", start_event_id=12))
    assert asked == (Query(7, 0, 12), ("10.0.0.7", 4711), "S")
    assert reqplane.request_of(payload("[::1]:1")).address == ("::1", 1)


@given(st.binary(max_size=200) | st.binary(max_size=400).map(lambda b: bytes(16) + b))
def test_any_bytes_are_a_request_or_malformed(raw: bytes) -> None:
    with contextlib.suppress(MalformedError):
        reqplane.request_of(raw)


@given(st.data())
def test_a_request_with_a_few_wrong_bytes_is_a_request_or_malformed(data: st.DataObject) -> None:
    raw = bytearray(payload("127.0.0.1:4711"))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for some in (bytes(raw), bytes(raw[:cut])):
        with contextlib.suppress(MalformedError):
            reqplane.request_of(some)


@pytest.mark.parametrize("address", ["", ":1", "a", "a:", "a:0", "a:65536", "a:1x", "a:\u0661"])
def test_an_address_that_cannot_be_one_is_malformed(address: str) -> None:
    with pytest.raises(MalformedError, match="address"):
        reqplane.request_of(payload(address))


@pytest.mark.parametrize(
    "odd", [{"worker_id": -1}, {"start_event_id": -1}, {"kind": "status"}, {"dp_rank": "0"}]
)
def test_a_question_that_no_router_asks_is_malformed(odd: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        reqplane.request_of(payload("127.0.0.1:1", **odd))


def test_answers_go_to_this_machine_and_to_what_is_named() -> None:
    policy = CallbackPolicy(["10.1.0.0/16", "192.0.2.7", "router.example"])
    for host in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "10.1.2.3", "192.0.2.7"):
        assert policy.allows(host), host
    assert policy.allows("Router.Example")
    for host in ("192.0.2.8", "10.2.0.1", "0.0.0.0", "::", "localhost.example", "", "224.0.0.1"):
        assert not policy.allows(host), host


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[RecoveryServer]:
    @contextlib.asynccontextmanager
    async def answering(query: Query) -> AsyncIterator[list[bytes]]:
        yield list(reqplane.failed_answer(query.start or 0, "test"))

    server = RecoveryServer(EventsConfig(**settings))
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        await server.start(tasks)
        server.serve(PATH, answering)
        try:
            yield server
        finally:
            await server.close()


async def sent(server: RecoveryServer, raw: bytes, *, at_once: bool = True) -> bytes:
    """What comes back on the connection itself."""
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    if at_once:
        writer.write_eof()
    with contextlib.suppress(OSError):
        back = await reader.read()
        writer.close()
        await writer.wait_closed()
        return back
    return b""


@contextlib.asynccontextmanager
async def a_router() -> AsyncIterator[tuple[str, asyncio.Queue[bytes]]]:
    """Where answers may come to, and what came."""
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken = b""
        while not taken.endswith(b'"sentinel"'):
            taken += await reader.readexactly(1)
        answers.put_nowait(taken)
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", answers
    server.close()


async def test_a_query_is_acknowledged_and_answered_over_a_new_connection() -> None:
    async with serving() as server, a_router() as (address, answers):
        assert await sent(server, request(payload(address, start_event_id=5))) == bytes(4)
        answer = await answers.get()
        assert b"TreeDumpFailed" in answer
        assert answer.startswith(reqplane.greeting("S"))
        assert server.counts["queries"] == 1


async def test_a_query_for_another_source_is_an_error_not_silence() -> None:
    async with serving() as server, a_router() as (address, answers):
        await sent(server, request(payload(address), path="other"))
        assert b"no such source" in await answers.get()


async def test_a_refused_address_is_not_acknowledged_and_nothing_is_sent_there() -> None:
    async with serving() as server:
        assert await sent(server, request(payload("192.0.2.1:9")), at_once=False) == b""
        assert server.counts == {"queries": 1, "refused": 1}


async def test_malformed_requests_are_dropped_and_counted_and_the_next_is_answered() -> None:
    garbage = [
        request(b""),
        request(b"x" * 100),
        b"\xff\xff" + b"p" * 100,  # a path that is too long
        request(b"x")[:-5] + b"\xff\xff\xff\xff",  # a payload of 4 GiB
    ]
    async with serving() as server, a_router() as (address, answers):
        for raw in garbage:
            assert await sent(server, raw, at_once=False) == b""
        assert server.counts["malformed"] == len(garbage)
        await sent(server, b"\x00")  # torn off: no fault of anybody
        await sent(server, request(payload(address)))
        assert await answers.get()
        assert server.counts["malformed"] == len(garbage)


@contextlib.contextmanager
def clients() -> Iterator[Callable[..., Awaitable[socket.socket]]]:
    """Makes connections that the server has taken, and whose first bytes it has read."""
    with contextlib.ExitStack() as stack:

        async def connect(server: RecoveryServer, raw: bytes = b"") -> socket.socket:
            host, _, port = server.address.rpartition(":")
            before = set(server._connections)
            client = stack.enter_context(socket.create_connection((host, int(port))))
            client.sendall(raw)
            while not (new := server._connections - before):  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0.01)
            while (new <= server._idle.keys()) == bool(raw):  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.01)
            client.settimeout(0)
            return client

        yield connect


async def test_where_too_many_are_connected_the_longest_idle_makes_way() -> None:
    loop = asyncio.get_running_loop()
    with clients() as connect:
        async with serving(recovery_connections=2) as server, a_router() as (address, answers):
            first, second = await connect(server), await connect(server)
            assert await sent(server, request(payload(address))) == bytes(4)
            assert await answers.get()
            assert await loop.sock_recv(first, 1) == b"", "its connection is closed"
            with pytest.raises(BlockingIOError):
                second.recv(1)
            assert server.counts["evicted"] == 1
            assert "refused" not in server.counts


async def test_who_is_in_the_middle_of_a_request_does_not_make_way() -> None:
    with clients() as connect:
        async with serving(recovery_connections=1) as server:
            await connect(server, request(b"x" * 100)[:50])
            assert await sent(server, b"", at_once=False) == b""
            assert server.counts == {"refused": 1}


async def test_a_flood_of_silent_connections_leaves_no_more_than_so_many() -> None:
    with clients() as connect:
        async with serving(recovery_connections=3) as server, a_router() as (address, answers):
            for _ in range(20):
                await connect(server)
            assert len(server._connections) == 3
            assert server.counts["evicted"] == 17
            assert await sent(server, request(payload(address))) == bytes(4)
            assert await answers.get()


async def test_routers_that_die_while_they_ask_take_nobody_elses_answers() -> None:
    reset = struct.pack("ii", 1, 0)  # close at once, with a reset
    with clients() as connect:
        async with serving() as server, a_router() as (address, answers):
            raw = request(payload(address))
            for _ in range(_MAX_ANSWERS):
                client = await connect(server, raw[:-1])
                client.sendall(raw[-1:])
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                client.close()
                while server._connections:  # noqa: ASYNC110  # it has no event
                    await asyncio.sleep(0.001)
            assert server.counts["queries"] == _MAX_ANSWERS, "they have asked"
            assert await sent(server, raw) == bytes(4)
            assert await answers.get()
            assert "refused" not in server.counts


async def test_connections_are_asked_whether_the_other_side_is_there() -> None:
    with clients() as connect:
        async with serving() as server:
            await connect(server)
            (writer,) = server._connections
            accepted = writer.get_extra_info("socket")
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_an_address_that_no_router_could_connect_to_is_an_error(host: str) -> None:
    server = RecoveryServer(EventsConfig(recovery_host=host))
    async with asyncio.TaskGroup() as tasks:
        with pytest.raises(FeedError, match="recovery_host"):
            await server.start(tasks)
