"""Engine and workers over a real socket, in one loop: copies, notes, refusals, residency."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
import torch
import zmq

from flexkv.blocks import BlockKey, Tier
from flexkv.errors import EngineClosedError, InputError, LayoutError, TransferError
from flexkv.events.digest import digest_of
from flexkv.link import client as client_module
from flexkv.link import copier as copier_module
from flexkv.link.endpoint import socket_path
from flexkv.link.errors import EndpointTakenError, LinkError
from flexkv.link.messages import (
    MAX_COPIES,
    Hello,
    LoadDone,
    Refused,
    StoresDone,
    Welcome,
    decode,
    encode,
    pack_ids,
)
from flexkv.link.residency import Piece, ResidencyParts, residency
from flexkv.tiers.gpu import make_copier
from flexkv.tiers.host import HostPool
from tests.link.links import (
    BLOCK_NBYTES,
    ENGINE_ID,
    LIMIT_S,
    NUM_SLOTS,
    TOKENS_PER_BLOCK,
    HeldCopier,
    bare_socket,
    client_at,
    linked,
    server_at,
)
from tests.link.test_messages import CHUNK, HELLO

if TYPE_CHECKING:
    from flexkv.link.server import LinkServer


async def test_a_worker_copies_real_bytes_both_ways(endpoint: str) -> None:
    cache = torch.randint(0, 100, (10, 2, TOKENS_PER_BLOCK, 8), dtype=torch.uint8)
    expected = cache.clone()
    real = make_copier({"layer": cache}, TOKENS_PER_BLOCK, BLOCK_NBYTES, 0)
    client = client_at(endpoint, cast("HeldCopier", real))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(client.run())
        async with server_at(endpoint) as server:
            await server.registered(LIMIT_S)
            pool = HostPool(NUM_SLOTS, BLOCK_NBYTES)
            copier = server.copiers[0]
            assert copier.num_blocks == 10
            copier.attach_pool(pool, 0)
            await copier.gather([3, 4, 9], [0, 1, 15], copier.mark())
            cache.zero_()
            await copier.scatter([15, 0], [9, 3])
    assert torch.equal(cache[[3, 9]], expected[[3, 9]])
    assert not cache[4].any()
    await real.close()
    pool.close()


async def test_every_rank_has_its_own_copier_and_its_own_region(endpoint: str) -> None:
    async with linked(endpoint, num_ranks=3) as link:
        for rank in (0, 1, 2):
            await link.server.copiers[rank].gather([10 + rank], [5], None)
        for rank in (0, 1, 2):
            assert link.pool.region(rank)[5, 0] == 10 + rank
            assert link.copiers[rank].begun == [("gather", [10 + rank], [5], "marked")]


async def test_ranks_of_different_sizes_register(endpoint: str) -> None:
    async with server_at(endpoint, num_ranks=2) as server, asyncio.TaskGroup() as tasks:
        runs = [
            tasks.create_task(
                client_at(endpoint, rank=rank, num_ranks=2, block_nbytes=64 + rank).run()
            )
            for rank in (0, 1)
        ]
        hellos = await server.registered(LIMIT_S)
        for run in runs:
            run.cancel()
    assert {rank: hello.block_nbytes for rank, hello in hellos.items()} == {0: 64, 1: 65}
    assert {hello.pid for hello in hellos.values()} == {os.getpid()}


async def test_many_copies_run_at_a_time_and_the_rest_wait(endpoint: str) -> None:
    async with linked(endpoint) as link:
        held, copier = link.copiers[0], link.server.copiers[0]
        held.is_held = True
        async with asyncio.TaskGroup() as tasks:
            for _ in range(MAX_COPIES + 1):
                tasks.create_task(copier.gather([1], [1], None))
            for _ in range(MAX_COPIES):  # loads do not wait for stores
                tasks.create_task(copier.scatter([1], [1]))
            await held.until_running(2 * MAX_COPIES)
            held.is_held = False
            held.let_go()
        assert len(held.begun) == 2 * MAX_COPIES + 1


async def test_a_long_copy_is_cut_to_fit_into_messages(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier_module, "MAX_COPY_BLOCKS", 2)
    async with linked(endpoint) as link:
        await link.server.copiers[0].scatter([5, 4, 3, 2, 1], [1, 2, 3, 4, 5])
        assert link.copiers[0].begun == [
            ("scatter", [1, 2], [5, 4], "marked"),
            ("scatter", [3, 4], [3, 2], "marked"),
            ("scatter", [5], [1], "marked"),
        ]


async def test_a_cancelled_copy_ends_when_its_bytes_rest(endpoint: str) -> None:
    async with linked(endpoint) as link:
        held = link.copiers[0]
        held.is_held = True
        async with asyncio.TaskGroup() as tasks:
            gather = tasks.create_task(link.server.copiers[0].gather([1], [1], None))
            await held.until_running(1)
            for _ in range(2):
                gather.cancel()
                await residency_refused(endpoint)  # a round trip: time enough to end too early
                assert not gather.done()
            held.let_go()
            await asyncio.wait([gather], timeout=LIMIT_S)
        assert gather.cancelled()
        assert not held.num_running


async def residency_refused(endpoint: str) -> None:
    with pytest.raises(LinkError, match="not ready"):
        await residency(endpoint, LIMIT_S)


async def test_a_failed_copy_is_a_transfer_error_and_the_next_one_works(endpoint: str) -> None:
    async with linked(endpoint) as link:
        held, copier = link.copiers[0], link.server.copiers[0]
        held.error = "the bus fell off " + "x" * 5000
        with pytest.raises(TransferError, match="rank 0: the bus fell off"):
            await copier.gather([1], [1], None)
        with pytest.raises(TransferError, match="rank 0: the bus fell off"):
            await copier.scatter([1], [1])
        held.error = None
        await copier.scatter([1], [1])


async def test_wrong_ids_are_refused_before_anything_is_sent(endpoint: str) -> None:
    async with linked(endpoint) as link:
        copier = link.server.copiers[0]
        with pytest.raises(InputError, match="2 block ids do not go with 1 slots"):
            await copier.gather([1, 2], [1], None)
        with pytest.raises(InputError, match="out of range: there are 32"):
            await copier.scatter([1, 2], [1, 32])
        with pytest.raises(InputError, match="can't be sent"):
            await copier.scatter([1], [2**40])
        with pytest.raises(InputError, match="rank 0, not 1"):
            copier.attach_pool(link.pool, 1)
        await copier.close()
        with pytest.raises(EngineClosedError):
            await copier.scatter([1], [1])
        assert link.copiers[0].begun == []


async def test_notes_reach_every_rank_in_order(endpoint: str) -> None:
    notes: list[LoadDone | StoresDone] = [
        LoadDone(1, "a", pack_ids([7])),
        StoresDone("a"),
        LoadDone(2, "a"),
    ]
    async with linked(endpoint, num_ranks=2) as link:
        for note in notes:
            link.server.tell(note)
        for copier in link.server.copiers.values():
            await copier.scatter([], [])
            await copier.scatter([1], [1])  # ends after what was told before
        assert [note for rank, note in link.notes if rank == 0] == notes
        assert [note for rank, note in link.notes if rank == 1] == notes


async def test_the_engines_end_is_an_orderly_end_for_workers(endpoint: str) -> None:
    async with linked(endpoint, num_ranks=2) as link:
        pass
    assert [run.exception() for run in link.runs] == [None, None]
    path = socket_path(endpoint)
    assert path is not None
    assert list(path.parent.iterdir()) == []


async def test_the_socket_is_for_its_user_only(endpoint: str) -> None:
    path = socket_path(endpoint)
    assert path is not None
    async with server_at(endpoint):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_tcp_works_too(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, unused_tcp_port: int
) -> None:
    path = socket_path(endpoint)
    assert path is not None
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path.parent))
    async with linked(f"tcp://127.0.0.1:{unused_tcp_port}") as link:
        await link.server.copiers[0].gather([1], [1], None)


async def test_a_tcp_port_that_a_stranger_has_is_taken(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    path = socket_path(endpoint)
    assert path is not None
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path.parent))
    stranger = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = stranger.sockets[0].getsockname()[1]
    with pytest.raises(EndpointTakenError, match="another process"):
        await server_at(f"tcp://127.0.0.1:{port}").__aenter__()
    stranger.close()
    await stranger.wait_closed()


async def test_a_second_engine_fails_at_once_and_the_first_goes_on(endpoint: str) -> None:
    async with linked(endpoint) as link:
        with pytest.raises(EndpointTakenError, match=f"process {os.getpid()}"):
            await server_at(endpoint, engine_id="engine-b").__aenter__()
        await link.server.copiers[0].scatter([1], [1])


async def test_an_engine_takes_over_where_the_last_one_ended(endpoint: str) -> None:
    for _ in range(3):
        async with linked(endpoint) as link:
            await link.server.copiers[0].scatter([1], [1])


# Who is not let in.


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"engine_id": "engine-b"}, "belongs to engine engine-a .* own server_recv_port"),
        ({"num_ranks": 2}, "rank 0 of 2 can't join an engine of 1 ranks"),
        ({"rank": 1}, "rank 1 of 1 can't join an engine of 1 ranks"),
        ({"tokens_per_block": 8}, "rank 0 has 8 tokens per block, rank 0 4"),
        ({}, f"rank 0 is taken by process {os.getpid()}"),
    ],
)
async def test_a_worker_that_does_not_belong_is_told_why(
    endpoint: str, settings: dict[str, Any], reason: str
) -> None:
    async with linked(endpoint) as link:
        with pytest.raises(LinkError, match=reason) as raised:
            await client_at(endpoint, **settings).run()
        assert endpoint in str(raised.value)
        await link.server.copiers[0].scatter([1], [1])  # who was there is there still


async def ask(endpoint: str, payload: bytes) -> Refused:
    """What the engine answers to ``payload``."""
    with bare_socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        await socket.send(payload)
        async with asyncio.timeout(LIMIT_S):
            answer = decode(await socket.recv(), endpoint)
    assert isinstance(answer, Refused)
    return answer


async def test_a_worker_on_another_host_is_refused_by_its_name(endpoint: str) -> None:
    hello = msgspec.structs.replace(
        HELLO, engine_id=ENGINE_ID, rank=0, num_ranks=1, host="far-away", machine="another boot"
    )
    async with server_at(endpoint) as server:
        assert (
            "rank 0 is on host far-away, the engine on"
            in (await ask(endpoint, encode(hello))).reason
        )
        with pytest.raises(LinkError, match=r"rank 0 did not come .* refused: .* far-away"):
            await server.registered(0.01)


@pytest.mark.parametrize(
    "payload",
    [
        encode(msgspec.structs.replace(HELLO, version=2)),
        msgspec.msgpack.encode({"type": "Hello", "version": 2, "fields": "of the future"}),
    ],
)
async def test_a_worker_of_another_version_is_refused_by_both_versions(
    endpoint: str, payload: bytes
) -> None:
    async with server_at(endpoint):
        assert (await ask(endpoint, payload)).reason == "a worker speaks version 2, the engine 1"


async def test_a_worker_that_asks_again_is_welcomed_again(endpoint: str) -> None:
    hello = msgspec.structs.replace(
        HELLO,
        engine_id=ENGINE_ID,
        rank=0,
        num_ranks=1,
        pid=os.getpid(),
        machine=client_at(endpoint)._hello.machine,
    )
    pool = HostPool(NUM_SLOTS, BLOCK_NBYTES)
    with bare_socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        await socket.send(encode(hello))
        async with asyncio.timeout(LIMIT_S), server_at(endpoint, heartbeat_s=60) as server:
            await server.registered(LIMIT_S)
            server.copiers[0].attach_pool(pool, 0)
            await socket.send(encode(hello))
            answers = [decode(await socket.recv(), endpoint) for _ in range(2)]
    assert isinstance(answers[0], Welcome)
    assert answers[0] == answers[1]
    pool.close()


# Which blocks are where.


def keys_of(numbers: range) -> list[BlockKey]:
    return [BlockKey(number.to_bytes(32, "big")) for number in numbers]


def digest(keys: list[BlockKey]) -> str:
    return str(digest_of(int.from_bytes(key[-8:], "big") for key in keys))


async def test_anybody_can_ask_which_blocks_are_where(endpoint: str) -> None:
    host, ssd = keys_of(range(10_000)), keys_of(range(9_990, 10_010))
    pieces = [
        *(Piece(Tier.HOST, 32, key) for key in host[:100]),
        Piece(Tier.HOST, 32, b"".join(host[100:5000])),
        Piece(Tier.HOST, 32, b"".join(host[5000:]), told=False),
        Piece(Tier.SSD, 32, b"".join(ssd)),
    ]
    digests = {Tier.HOST: digest(host[:5000]), Tier.SSD: digest(ssd)}
    parts = ResidencyParts(lambda: (41, digests), pieces)
    async with server_at(endpoint, residency=lambda: parts):
        answers = await asyncio.gather(*(residency(endpoint, LIMIT_S) for _ in range(3)))
    for answer in answers:
        assert answer.last_event_id == 41
        assert answer.keys == {Tier.HOST: set(host), Tier.SSD: set(ssd)}
        assert answer.digests == digests
        assert answer.is_settled


async def test_keys_that_are_not_those_of_the_digests_are_no_answer(endpoint: str) -> None:
    keys = keys_of(range(10))
    for digests in ({Tier.HOST: digest(keys[1:])}, {Tier.SSD: digest(keys)}, {}):
        parts = ResidencyParts(lambda d=digests: (7, d), [Piece(Tier.HOST, 32, b"".join(keys))])
        async with server_at(endpoint, residency=lambda p=parts: p):
            with pytest.raises(LinkError, match="keys of digest"):
                await residency(endpoint, LIMIT_S)


async def test_digests_of_later_events_are_handed_on_unchecked(endpoint: str) -> None:
    ids = iter((7, 8))
    parts = ResidencyParts(lambda: (next(ids), {Tier.HOST: "3:0"}), [])
    async with server_at(endpoint, residency=lambda: parts):
        answer = await residency(endpoint, LIMIT_S)
    assert (answer.last_event_id, answer.digests) == (7, {Tier.HOST: "3:0"})
    assert not answer.is_settled


async def test_an_empty_engine_says_so(endpoint: str) -> None:
    async with server_at(endpoint, residency=lambda: ResidencyParts(lambda: (-1, {}), [])):
        answer = await residency(endpoint, LIMIT_S)
    assert answer.last_event_id == -1
    assert answer.keys == {Tier.HOST: set()}


async def test_an_answer_with_a_hole_is_no_answer(endpoint: str) -> None:
    with bare_socket(zmq.ROUTER) as engine:
        engine.bind(endpoint)
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(failing(residency(endpoint, LIMIT_S)))
            route, _ = await engine.recv_multipart()
            for count in (2, 5):
                chunk = msgspec.structs.replace(CHUNK, count=count, last=count == 5)
                await engine.send_multipart([route, encode(chunk)])
            assert "a part of the answer is missing" in str(await run)


async def test_asking_nobody_ends_at_the_deadline(endpoint: str) -> None:
    with pytest.raises(LinkError, match=r"no engine answered within 0\.05 s"):
        await residency(endpoint, 0.05)


async def test_asking_at_no_endpoint_is_an_error() -> None:
    with pytest.raises(LinkError, match="can't connect"):
        await residency("carrier-pigeon://home", LIMIT_S)
    with pytest.raises(LinkError, match="can't connect"):
        await client_at("carrier-pigeon://home").run()


# Pools that are of no use.


@pytest.mark.parametrize("where", ["open", "attach"])
async def test_a_pool_that_cant_be_used_ends_the_worker_and_tells_the_engine(
    endpoint: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = HeldCopier()
    if where == "attach":
        copier.attach_error = LayoutError("a slot is too small")
    else:
        monkeypatch.setattr(client_module, "HostPool", ClosedPool)
    async with asyncio.timeout(LIMIT_S), server_at(endpoint) as server:
        async with asyncio.TaskGroup() as tasks:
            run = tasks.create_task(failing(client_at(endpoint, copier).run()))
            pool = await let_in(server)
            assert "of no use here" in str(await run)
        assert "of no use here" in (await server.lost())[0]
    pool.close()


class ClosedPool:
    @staticmethod
    def open(*_: object, **__: object) -> None:
        raise LayoutError("it has another size")


async def failing(run: object) -> LinkError:
    with pytest.raises(LinkError) as raised:
        await run  # type: ignore[misc]  # a coroutine
    return raised.value


async def let_in(server: LinkServer) -> HostPool:
    await server.registered(LIMIT_S)
    pool = HostPool(NUM_SLOTS, BLOCK_NBYTES)
    server.copiers[0].attach_pool(pool, 0)
    return pool


def test_the_hello_that_tests_send_is_one(endpoint: str) -> None:
    assert isinstance(decode(encode(HELLO), endpoint), Hello)


async def test_a_load_waits_for_the_step_that_frees_its_blocks(endpoint: str) -> None:
    async with linked(endpoint) as link:
        worker, copier = link.copiers[0], link.server.copiers[0]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copier.scatter([1], [1], 2))
            await copier.scatter([2], [2])
            link.clients[0].reached(1)
            await copier.scatter([3], [3], 1)
            assert [slots for _, _, slots, _ in worker.begun] == [[2], [3]]
            link.clients[0].reached(2)
        assert [slots for _, _, slots, _ in worker.begun] == [[2], [3], [1]]


async def test_a_load_whose_step_never_begins_fails(endpoint: str) -> None:
    async with linked(endpoint, step_deadline_s=0.01) as link:
        with pytest.raises(TransferError, match=r"did not begin step 7 in 0\.01 s"):
            await link.server.copiers[0].scatter([1], [1], 7)
        assert link.copiers[0].begun == []
