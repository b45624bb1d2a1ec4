"""Dynamo's own publisher and our codec send the same bytes for the same content."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import nats
from dynamo.llm import KvEventPublisher
from dynamo.runtime import DistributedRuntime

from flexkv.blocks import BlockKey, Blocks, Tier
from flexkv.events.dynamo import DynamoCodec, WorkerRank
from flexkv.events.types import BlockRemoved, BlockStored, Event
from flexkv.replay.deployment import NatsServer, dynamo_environment
from tests.dynamo.shelf import DEADLINE_S, TOKENS_PER_BLOCK, chain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from nats.aio.subscription import Subscription


@contextlib.asynccontextmanager
async def a_publisher(nats_url: str, folder: Path) -> AsyncIterator[tuple[Any, Subscription]]:
    subject = WorkerRank(
        namespace="capture", component="backend", endpoint="generate", worker_id=0
    ).subject
    client = await nats.connect(nats_url)
    subscription = await client.subscribe(subject)
    await client.flush()
    with dynamo_environment(nats_url, folder):
        loop = asyncio.get_running_loop()
        runtime = DistributedRuntime(loop, "file", "tcp", event_plane="nats")
        endpoint = runtime.endpoint("capture.backend.generate")
        publisher = KvEventPublisher(
            endpoint, kv_block_size=TOKENS_PER_BLOCK, dp_rank=0, enable_local_indexer=False
        )
    try:
        yield publisher, subscription
    finally:
        publisher.shutdown()
        runtime.shutdown()
        await client.close()


def with_short_keys(blocks: Blocks, parent: BlockKey | None) -> Blocks:
    """The same blocks under keys as long as the publisher's hashes."""
    keys = b"".join(router_hash.to_bytes(8, "big") for router_hash in blocks.router_hashes())
    return Blocks(
        keys,
        bytes(blocks.token_ids),
        tokens_per_block=blocks.tokens_per_block,
        key_nbytes=8,
        parent=parent,
        lora=blocks.lora,
    )


def ours(captured: bytes, event: Event) -> bytes:
    """Our message with ``event``, and what only the publisher could know taken from its own."""
    envelope = msgspec.msgpack.decode(captured)
    (router_event,) = msgspec.msgpack.decode(envelope["payload"])
    codec = DynamoCodec(
        worker_id=router_event["worker_id"], dp_rank=0, publisher_id=envelope["publisher_id"]
    )
    encoded = codec.router_event(router_event["event"]["event_id"], event)
    for _ in range(envelope["sequence"]):
        codec.message([], 0)
    return codec.message([encoded], envelope["published_at"])


async def test_stored_and_removed_messages_are_byte_equal(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    whole = chain(70, lora="french")
    root = with_short_keys(whole[:1], None)
    rest = with_short_keys(whole[1:], root.key(0))
    async with a_publisher(nats_server.url, tmp_path) as (publisher, subscription):

        async def captured() -> bytes:
            return (await subscription.next_msg(DEADLINE_S)).data

        for blocks in (root, rest):
            publisher.publish_stored(
                blocks.token_ids.cast("I").tolist(),
                [TOKENS_PER_BLOCK] * len(blocks),
                [signed(router_hash) for router_hash in blocks.router_hashes()],
                None if blocks.parent is None else signed(int.from_bytes(blocks.parent, "big")),
                lora_name="french",
            )
            theirs = await captured()
            assert ours(theirs, BlockStored(blocks, Tier.GPU)) == theirs
        publisher.publish_removed(
            [signed(router_hash) for router_hash in rest.router_hashes()][::-1]
        )
        theirs = await captured()
        assert ours(theirs, BlockRemoved(rest, Tier.GPU)) == theirs


def signed(router_hash: int) -> int:
    """As the binding wants it: the same 64 bits as an int64."""
    return router_hash - 2**64 if router_hash >= 2**63 else router_hash
