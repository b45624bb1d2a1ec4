"""Whichever side dies, at whatever point, and whatever it is sent: nobody hangs, nobody lies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from flexkv.errors import TransferError
from flexkv.link.endpoint import socket_path
from flexkv.link.errors import LinkError
from flexkv.link.messages import (
    MAX_MESSAGE_NBYTES,
    Bye,
    CopyDone,
    Ping,
    Pong,
    Refused,
    Welcome,
    decode,
    encode,
)
from flexkv.process import Process
from flexkv.tiers.host import HostPool
from tests.link.links import (
    BLOCK_NBYTES,
    LIMIT_S,
    NUM_SLOTS,
    HeldCopier,
    bare_socket,
    client_at,
    linked,
    server_at,
)
from tests.link.test_messages import EVERY_MESSAGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from flexkv.link.server import LinkServer

REGISTERED = "registered"
IDLE = "idle"
COPYING = "copying"


@contextlib.asynccontextmanager
async def process(*args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.link.process_roles",
        *args,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def said(running: asyncio.subprocess.Process, word: str) -> str:
    """Wait until the process says a line with ``word``."""
    assert running.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        while line := (await running.stdout.readline()).decode():
            if word in line:
                return line
    raise AssertionError(f"the process ended and never said {word}")


def let_in(server: LinkServer) -> HostPool:
    pool = HostPool(NUM_SLOTS, BLOCK_NBYTES)
    server.copiers[0].attach_pool(pool, 0)
    return pool


async def failure_of(run: Coroutine[None, None, None]) -> LinkError:
    with pytest.raises(LinkError) as raised:
        async with asyncio.timeout(LIMIT_S):
            await run
    return raised.value


# The worker dies.


@pytest.mark.parametrize("stage", [REGISTERED, IDLE, COPYING])
async def test_a_killed_worker_is_lost_and_its_successor_takes_its_place(
    endpoint: str, stage: str
) -> None:
    async with asyncio.timeout(2 * LIMIT_S), server_at(endpoint) as server:
        async with process("worker", endpoint) as worker, asyncio.TaskGroup() as tasks:
            hello = (await server.registered(LIMIT_S))[0]
            copier = server.copiers[0]
            copies: list[asyncio.Task[None]] = []
            if stage != REGISTERED:
                pool = let_in(server)
                await said(worker, "linked")
            if stage == COPYING:
                copies = [tasks.create_task(lost_copy(server)) for _ in range(3)]
                await said(worker, "copying")
            worker.kill()
            losses = await server.lost()
            assert list(losses) == [0]
            assert f"(process {hello.pid})" in losses[0]
            if stage != REGISTERED:
                with pytest.raises(TransferError, match="nothing was copied"):
                    await copier.scatter([1], [1])
            if copies:
                await asyncio.wait(copies)
        async with asyncio.TaskGroup() as tasks:
            held = HeldCopier()
            run = tasks.create_task(client_at(endpoint, held).run())
            assert (await server.registered(LIMIT_S))[0].pid == os.getpid()
            if stage == REGISTERED:
                pool = let_in(server)
            await server.copiers[0].gather([1], [1], None)
            assert [what for what, *_ in held.begun] == ["gather"]
            run.cancel()
    pool.close()


async def lost_copy(server: LinkServer) -> None:
    with pytest.raises(TransferError, match="a copy was lost: rank 0"):
        await server.copiers[0].gather([1], [1], None)


async def test_a_successor_need_not_wait_for_the_next_heartbeat(endpoint: str) -> None:
    async with asyncio.timeout(LIMIT_S), server_at(endpoint, heartbeat_s=3600.0) as server:
        async with process("worker", endpoint) as worker:
            await server.registered(LIMIT_S)
            worker.kill()
            await worker.wait()
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(client_at(endpoint).run())
            while server.copiers[0].hello.pid != os.getpid():
                await server._change()
            run.cancel()


def test_a_killed_worker_is_gone_before_anybody_reaps_it() -> None:
    with subprocess.Popen(["sleep", "100"]) as child:
        process_of_child = Process(child.pid)
        assert process_of_child.is_alive()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{child.pid}").exists()
        assert not process_of_child.is_alive()
    assert not Process(child.pid).is_alive()


async def test_a_silent_worker_is_lost_but_keeps_its_place_until_its_copies_end(
    endpoint: str,
) -> None:
    async with asyncio.timeout(2 * LIMIT_S), server_at(endpoint, silence_s=0.5) as server:
        async with process("worker", endpoint) as worker, asyncio.TaskGroup() as tasks:
            await server.registered(LIMIT_S)
            pool = let_in(server)
            tasks.create_task(lost_copy(server))
            await said(worker, "copying")
            os.kill(worker.pid, signal.SIGSTOP)
            assert "gave no sign of life for 0.5 s" in (await server.lost())[0]
            # its bytes may still move: nobody may take its place
            refused = await failure_of(client_at(endpoint).run())
            assert f"taken by process {worker.pid}, lost but not gone" in str(refused)
            os.kill(worker.pid, signal.SIGCONT)
            refused = await failure_of(client_at(endpoint).run())
            assert "lost but not gone" in str(refused)
            assert worker.stdin is not None
            worker.stdin.write(b"\n")  # the copy may end
            assert await said(worker, "gave no sign of life") == (
                f"LinkError: {endpoint}: refused by the engine: rank 0 (process {worker.pid}) "
                "gave no sign of life for 0.5 s\n"
            )
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(client_at(endpoint).run())
            await server.registered(LIMIT_S)
            await server.copiers[0].scatter([1], [1])
            run.cancel()
    pool.close()


async def test_a_worker_that_leaves_waits_for_its_copies_and_may_come_back(endpoint: str) -> None:
    held = HeldCopier(is_held=True)
    async with asyncio.timeout(LIMIT_S), server_at(endpoint) as server:
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(client_at(endpoint, held).run())
            await server.registered(LIMIT_S)
            pool = let_in(server)
            tasks.create_task(lost_copy(server))
            await held.until_running(1)
            run.cancel()
            await asyncio.sleep(0)
            assert held.num_running == 1
            assert not run.done()
            held.let_go()
        assert run.cancelled()
        assert "has left" in (await server.lost())[0]
        held.is_held = False
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(client_at(endpoint, held).run())
            await server.registered(LIMIT_S)
            await server.copiers[0].scatter([1], [1])
            run.cancel()
    pool.close()


async def test_missing_ranks_are_named_at_the_deadline(endpoint: str) -> None:
    async with server_at(endpoint, num_ranks=3) as server, asyncio.TaskGroup() as tasks:
        run = tasks.create_task(client_at(endpoint, rank=1, num_ranks=3).run())
        async with asyncio.timeout(LIMIT_S):
            while 1 not in server.copiers:
                await server._change()
        with pytest.raises(LinkError, match=r"rank 0, 2 did not come within 0\.01 s") as raised:
            await server.registered(0.01)
        run.cancel()
    assert endpoint in str(raised.value)


async def test_closing_frees_whoever_waits_for_ranks(endpoint: str) -> None:
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        async with server_at(endpoint) as server:
            waits = [
                tasks.create_task(closed(server.registered(LIMIT_S))),
                tasks.create_task(closed(server.lost())),
            ]
            await asyncio.sleep(0)
        await asyncio.wait(waits)


async def closed(wait: Coroutine[None, None, object]) -> None:
    with pytest.raises(LinkError, match="the link is closed"):
        await wait


async def test_copies_that_run_when_the_engine_closes_count_as_lost(endpoint: str) -> None:
    async with linked(endpoint) as link, asyncio.TaskGroup() as tasks:
        link.copiers[0].is_held = True
        tasks.create_task(lost_copy(link.server))
        await link.copiers[0].until_running(1)
        await link.server.__aexit__(None, None, None)
        assert link.copiers[0].num_running == 1
        assert not link.runs[0].done()
        link.copiers[0].let_go()
        await asyncio.wait(link.runs, timeout=LIMIT_S)
        assert link.runs[0].exception() is None


# The engine dies.


async def test_a_worker_without_an_engine_gives_up_at_its_deadline(endpoint: str) -> None:
    failure = await failure_of(client_at(endpoint, deadline_s=0.2).run())
    assert str(failure) == f"{endpoint}: no engine let us in within 0.2 s"


async def test_an_engine_killed_before_it_let_the_worker_in_has_a_successor(endpoint: str) -> None:
    held = HeldCopier()
    async with asyncio.timeout(2 * LIMIT_S), asyncio.TaskGroup() as tasks:
        run = tasks.create_task(client_at(endpoint, held).run())
        async with process("engine", endpoint, REGISTERED) as engine:
            await said(engine, "registered")
            engine.kill()
            await engine.wait()
        async with server_at(endpoint) as server:  # its socket and lock files are still there
            await server.registered(LIMIT_S)
            pool = let_in(server)
            await server.copiers[0].scatter([1], [1])
        await run
    pool.close()


@pytest.mark.parametrize("stage", [IDLE, COPYING])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_silent_engine_ends_the_worker_after_its_copies(
    endpoint: str, stage: str, blow: signal.Signals
) -> None:
    held = HeldCopier()
    client = client_at(endpoint, held, silence_s=0.5)
    async with asyncio.timeout(2 * LIMIT_S), asyncio.TaskGroup() as tasks:
        run = tasks.create_task(failure_of(client.run()))
        async with process("engine", endpoint, stage) as engine:
            await said(engine, "linked")
            if stage == COPYING:
                held.is_held = True
                assert engine.stdin is not None
                engine.stdin.write(b"\n")
                await held.until_running(1)
            os.kill(engine.pid, blow)
            if stage == COPYING:
                await asyncio.wait([client._end], timeout=LIMIT_S)
                assert not run.done()
                held.let_go()
            reason = str(await run)
    wanted = "is gone" if blow is signal.SIGKILL else "gave no sign of life for 0.5 s"
    assert wanted in reason
    assert endpoint in reason
    assert not held.num_running


# What is sent is nonsense.


def in_a_new_folder(play: Callable[[str], Coroutine[None, None, None]]) -> None:
    with tempfile.TemporaryDirectory(prefix="flexkv-") as folder:
        asyncio.run(play(f"ipc://{folder}/link"))


payloads = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([encode(message) for message in EVERY_MESSAGE]),
    st.lists(st.sampled_from(EVERY_MESSAGE), min_size=2, max_size=2).map(
        lambda pair: encode(pair[0])[:7] + encode(pair[1])[7:]
    ),
)


LAST_HELLO = msgspec.msgpack.encode({"type": "Hello", "version": 99})
LAST_ANSWER = encode(Refused("a worker speaks version 99, the engine 1"))


@given(messages=st.lists(st.lists(payloads, max_size=3), max_size=6))
def test_no_message_of_a_stranger_harms_the_engine_or_its_worker(
    messages: list[list[bytes]],
) -> None:
    async def play(endpoint: str) -> None:
        async with linked(endpoint) as link:
            with bare_socket(zmq.DEALER) as stranger:
                stranger.connect(endpoint)
                for frames in messages:
                    await stranger.send_multipart(frames or [b""])
                await stranger.send(LAST_HELLO)
                while (await stranger.recv_multipart()) != [LAST_ANSWER]:
                    pass
            await link.server.copiers[0].gather([1], [1], None)
            assert list(link.server.copiers) == [0]

    in_a_new_folder(play)


async def test_a_message_that_is_too_long_is_not_even_received(endpoint: str) -> None:
    async with asyncio.timeout(LIMIT_S), linked(endpoint) as link:
        with bare_socket(zmq.DEALER) as stranger:
            stranger.connect(endpoint)
            await stranger.send(bytes(MAX_MESSAGE_NBYTES + 1))
            await stranger.send(LAST_HELLO)
            while not await stranger.poll(100):  # lost with the connection
                await stranger.send(LAST_HELLO)
        assert link.server.num_dropped == 0
        await link.server.copiers[0].gather([1], [1], None)


@given(payload=st.binary(max_size=300), greets=st.booleans())
def test_no_bytes_on_the_socket_harm_the_engine(payload: bytes, *, greets: bool) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)

    async def play(endpoint: str) -> None:
        async with linked(endpoint) as link:
            path = socket_path(endpoint)
            assert path is not None
            _, writer = await asyncio.open_unix_connection(path)
            writer.write((greeting if greets else b"") + payload)
            writer.close()
            await link.server.copiers[0].gather([1], [1], None)

    in_a_new_folder(play)


@given(messages=st.lists(st.lists(payloads, min_size=1, max_size=2), max_size=6))
def test_no_message_of_an_engine_harms_a_worker(messages: list[list[bytes]]) -> None:
    async def play(endpoint: str) -> None:
        with bare_socket(zmq.ROUTER) as engine:
            engine.bind(endpoint)
            async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
                tasks.create_task(ending(client_at(endpoint).run()))
                route, _ = await engine.recv_multipart()
                for frames in [*messages, [encode(Bye())]]:
                    await engine.send_multipart([route, *frames])

    in_a_new_folder(play)


async def ending(run: Coroutine[None, None, None]) -> None:
    """It may have been refused, or welcomed to a pool that is nowhere."""
    with contextlib.suppress(LinkError):
        await run


async def test_a_worker_that_reports_copies_nobody_asked_for_is_not_believed(
    endpoint: str,
) -> None:
    async with linked(endpoint) as link:
        copier = link.server.copiers[0]
        link.copiers[0].is_held = True
        async with asyncio.TaskGroup() as tasks:
            copy = tasks.create_task(copier.gather([1], [1], None))
            await link.copiers[0].until_running(1)
            link.server._hear(copier.route, CopyDone(10_000))
            link.server._hear(b"somebody", CopyDone(next(iter(copier._running))))
            assert not copy.done()
            assert copier._running
            assert link.server.num_dropped == 2
            link.copiers[0].let_go()


async def test_an_engine_that_answers_and_then_says_nothing_is_lost(endpoint: str) -> None:
    pool = HostPool(NUM_SLOTS, BLOCK_NBYTES)
    with bare_socket(zmq.ROUTER) as engine:
        engine.bind(endpoint)
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(failure_of(client_at(endpoint, silence_s=0.2).run()))
            route, _ = await engine.recv_multipart()
            welcome = Welcome(
                pool_path=pool.path(),
                num_slots=NUM_SLOTS,
                slot_nbytes=BLOCK_NBYTES,
                num_ranks=1,
                engine_pid=os.getpid(),
            )
            await engine.send_multipart([route, encode(welcome)])
            await engine.send_multipart([route, encode(Ping())])
            heard = decode((await engine.recv_multipart())[1], endpoint)
            assert "gave no sign of life for 0.2 s" in str(await run)
            assert isinstance(heard, Pong)
            farewell = decode((await engine.recv_multipart())[1], endpoint)
            assert farewell == Bye("the engine gave no sign of life for 0.2 s")
    pool.close()
