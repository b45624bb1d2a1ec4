"""Whatever an etcd answers, it is an answer or a FeedError: the engine lives on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.errors import FeedError
from flexkv.events.dynamo import WorkerRank
from flexkv.events.etcd import Etcd, EtcdCard, EtcdRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WORKER = WorkerRank(namespace="ns", component="backend", endpoint="generate", worker_id=7)
TEXTS = st.sampled_from(["", "1", "-1", "YQ==", "e30=", "W10=", "no base64", "\u00e9"]) | st.text()
NAMES = st.sampled_from(["ID", "TTL", "result", "kvs", "key", "value", "count", "token", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
answers = st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode())


class Answering(Etcd):
    """Gets these answers, whatever it asks."""

    def __init__(self, answers: list[bytes]) -> None:
        super().__init__(["http://x"])
        self._answers = iter(answers)

    def _posted(self, *_: object) -> bytes:
        return next(self._answers, b"{}")


@given(st.lists(answers, max_size=8))
def test_any_bytes_are_an_answer_or_an_error(answers: list[bytes]) -> None:
    async def check() -> None:
        etcd = Answering(answers)
        record = EtcdRecord(etcd, WORKER, 1, None)
        assert await EtcdCard(etcd, WORKER).exists() in {True, False}
        for step in (record.claim, record.refresh, record.remove):
            with contextlib.suppress(FeedError):
                await step()

    asyncio.run(check())


def test_keys_without_a_value_are_somebody_elses() -> None:
    found = {"kvs": [{"key": "YQ=="}, {"value": "e30="}, {"key": "YQ==", "value": "e30="}]}
    etcd = Answering([json.dumps(found).encode()])
    assert list(etcd.under("a/")) == [("", {}), ("a", {})]


@contextlib.asynccontextmanager
async def saying(said: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    asked: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        # The body too: closing with bytes unread resets the connection before the answer is read.
        asked.append(await reader.readuntil(b"}"))
        writer.write(said)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
        for writer in writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x15\x03\x01\x00\x02\x02\x16",  # TLS
        b"HTTP/1.1 999999 what\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
        OK + b"Content-Length: 100\r\n\r\n{}",
        OK + b"Content-Length: -1\r\n\r\n[]",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
    ids=["nothing", "tls", "status", "redirect", "cut", "list", "chunks", "long"],
)
async def test_who_does_not_speak_as_an_etcd_does_is_an_error(said: bytes) -> None:
    async with saying(said) as (url, _):
        with pytest.raises(FeedError, match="no etcd answers"):
            await asyncio.to_thread(Etcd([url]).grant)
        assert not await EtcdCard(Etcd([url]), WORKER).exists()


async def test_the_endpoint_that_answered_last_is_asked_first() -> None:
    async with (
        saying(b"no") as (wrong, asked),
        saying(OK + b"\r\n" + b'{"count": "1"}') as (url, _),
    ):
        etcd = Etcd([wrong, url])
        for _ in range(3):
            assert await asyncio.to_thread(etcd.exists, "key")
        assert len(asked) == 1
