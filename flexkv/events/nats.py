"""Publishes an engine's events on NATS, as a Dynamo event source of its own."""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.errors import EngineClosedError, FeedError
from flexkv.events.audit import audit_subject, chunks
from flexkv.events.discovery import REFRESH_S, FileRecord, WorkerCard, recovery_path
from flexkv.events.dynamo import MAX_ID, DynamoCodec, WorkerRank
from flexkv.events.etcd import EtcdCard, EtcdRecord, etcd_of
from flexkv.events.feed import RecoverableFeed
from flexkv.events.live import LiveFeed
from flexkv.events.nats_link import NatsLink
from flexkv.events.recovery import RecoveryServer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexkv.config import EventsConfig
    from flexkv.events.log import EventSource

_CARD_POLL_S = 0.25
_CARD_PATIENCE_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NatsStats:
    """What a sink has done so far.

    ``counts``: beats, kicks, gaps and dumps answered, overflows, blocks ``left_out`` and
    ``waiting``, ``unsent`` messages, ``reconnects``, and what the recovery server counts.
    ``resyncs``: how often everything was told again, by reason, where routers can't ask.
    """

    connected: bool
    num_events: int = 0
    num_blocks: int = 0
    num_messages: int = 0
    nbytes: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    resyncs: Mapping[str, int] = field(default_factory=dict)


class NatsSink:
    """An event source whose routers believe the truth after anything that may happen to them.

    A router that has missed something asks for it, at ``recovery``: a server that several sinks of
    one process may share, and whose owner starts and closes it; None: each has its own. Where the
    deployment's request plane is not TCP no router can ask, and the source is live-only: see
    ``LiveFeed``.

    While disconnected nothing is queued. Connection errors are logged, counted, and end nothing.
    """

    def __init__(self, settings: EventsConfig, recovery: RecoveryServer | None = None) -> None:
        self._settings = settings
        self._worker = _worker(settings)
        self._publisher_id = secrets.randbelow(MAX_ID) + 1
        self._folder = discovery_folder(settings)
        self._etcd = etcd_of(settings) if settings.discovery == "etcd" else None
        self._card = (
            WorkerCard(self._folder, self._worker)
            if self._etcd is None
            else EtcdCard(self._etcd, self._worker)
        )
        self._owns_recovery = recovery is None
        self._recovery = recovery or RecoveryServer(settings)
        self._record: FileRecord | EtcdRecord | None = None
        self._feed: RecoverableFeed | LiveFeed | None = None
        self._link: NatsLink | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._num_reconnects = 0

    async def start(self, source: EventSource, tasks: asyncio.TaskGroup) -> None:
        """Register, connect, and tell everything resident; ``tasks`` owns what goes on.

        Raises:
            FeedError: the discovery folder can't be written to, the worker and rank have a source
                already, the recovery address can't be listened at, or no server answers within
                ``connect_timeout_s`` and ``nats_required`` is set. Nothing is left behind.
            EngineClosedError: the sink was closed: make a new one.
        """
        if self._closing:
            raise EngineClosedError("the sink is closed: make a new NatsSink")
        worker, settings = self._worker, self._settings
        codec = DynamoCodec(
            worker_id=worker.worker_id, dp_rank=worker.dp_rank, publisher_id=self._publisher_id
        )
        self._link = link = NatsLink(settings, on_connect=self._on_connect, on_loss=self._on_loss)
        subject = audit_subject(worker.namespace, worker.worker_id, worker.dp_rank)
        link.serve(subject, lambda reply: self._audit(source, reply))
        try:
            if settings.request_plane in {None, "tcp"}:
                feed = RecoverableFeed(settings, worker, codec, source, link)
                self._feed = feed
                await self._serve(feed, tasks)  # before the record names it
                address = self._recovery.address
            else:
                _log.warning(
                    "the request plane is %s: routers can't ask for what they have missed, and one "
                    "that starts late stays cold; set DYN_REQUEST_PLANE=tcp",
                    settings.request_plane,
                )
                self._feed = LiveFeed(settings, worker, codec, source, link)
                address = None
            if self._etcd is None:
                self._record = FileRecord(self._folder, worker, self._publisher_id, address)
            else:
                self._record = EtcdRecord(self._etcd, worker, self._publisher_id, address)
            await self._record.claim()
            await link.open()
        except BaseException:
            await self._let_go()
            raise
        self._task = tasks.create_task(self._run(), name="flexkv-nats-sink")

    def wake(self) -> None:
        """The source has news."""
        if self._feed is not None:
            self._feed.wake()

    def resync(self) -> None:
        """Bring every router that listens to the truth, whatever it believes."""
        if self._feed is not None:
            self._feed.resync()

    def stats(self) -> NatsStats:
        """Counters since the start."""
        feed, link = self._feed, self._link
        if feed is None or link is None:
            return NatsStats(connected=False)
        counts = feed.counts
        return NatsStats(
            connected=link.connected,
            num_events=counts.get("events", 0),
            num_blocks=counts.get("blocks", 0),
            num_messages=counts.get("messages", 0),
            nbytes=counts.get("nbytes", 0),
            counts=self.counts(),
            resyncs=dict(feed.num_resyncs) if isinstance(feed, LiveFeed) else {},
        )

    def counts(self) -> Mapping[str, int]:
        """As in ``stats``; from any thread."""
        feed, link = self._feed, self._link
        return {
            **(feed.counts if feed is not None else {}),
            **self._recovery.counts,
            "connected": int(link is not None and link.connected),
            "reconnects": self._num_reconnects,
        }

    async def close(self) -> None:
        """Send what is left, within ``close_timeout_s``; then routers forget the source."""
        self._closing = True
        if self._task is not None and self._feed is not None:
            self._feed.stop()
            await asyncio.wait([self._task], timeout=self._settings.close_timeout_s)
            self._feed.give_up()  # nats-py may swallow the cancellation
            self._task.cancel()
            await asyncio.wait([self._task], timeout=self._settings.close_timeout_s)
        await self._let_go()

    async def _audit(self, source: EventSource, reply: str) -> None:
        """Answer who compares routers with us."""
        assert self._link is not None
        for message in chunks(source, source.digests(), self._recovery.refused_hosts):
            if message and not await self._link.publish(reply, message):
                return
            await asyncio.sleep(0)

    async def _serve(self, feed: RecoverableFeed, tasks: asyncio.TaskGroup) -> None:
        if self._owns_recovery:
            await self._recovery.start(tasks)
        self._recovery.serve(recovery_path(self._worker, self._publisher_id), feed.answering)

    async def _let_go(self) -> None:
        if self._record is not None:
            try:
                await self._record.remove()
            except FeedError as error:  # it is dead in 10 s without us
                _log.warning("%s", error)
        self._recovery.forget(recovery_path(self._worker, self._publisher_id))
        if self._owns_recovery:
            await self._recovery.close()
        if self._link is not None:
            await self._link.close()

    async def _run(self) -> None:
        """Own everything that goes on until ``close``."""
        assert self._link is not None
        assert self._feed is not None
        async with asyncio.TaskGroup() as group:
            others = [
                group.create_task(self._link.keep()),
                group.create_task(self._keep_record()),
            ]
            await self._feed.run()
            for task in others:
                task.cancel()

    async def _keep_record(self) -> None:
        """Keep the record alive, and look out for the worker's card."""
        loop = asyncio.get_running_loop()
        began_s = refreshed_s = loop.time()
        has_card = has_warned = False
        while True:
            await asyncio.sleep(REFRESH_S if has_card else _CARD_POLL_S)
            now_s = loop.time()
            if not has_card and await self._card.exists():
                has_card = True
                if now_s - began_s > 2 * _CARD_POLL_S:  # else the start itself is enough
                    self._tell_again("card")
            elif not has_card and not has_warned and now_s - began_s > _CARD_PATIENCE_S:
                has_warned = True
                _log.warning("no model card at %s: routers ignore this worker", self._card.path)
            if now_s - refreshed_s >= REFRESH_S:
                refreshed_s = now_s
                await self._refresh_record()

    async def _refresh_record(self) -> None:
        assert self._record is not None
        try:
            if not await self._record.refresh():
                self._tell_again("record")
        except FeedError as error:
            _log.warning("%s", error)

    def _tell_again(self, reason: str) -> None:
        """Routers that can ask do so by themselves when they see worker and record."""
        if isinstance(self._feed, LiveFeed):
            self._feed.resync(reason)

    def _on_connect(self, *, again: bool) -> None:
        self._num_reconnects += again
        if self._feed is not None:
            self._feed.on_connect(again=again)

    def _on_loss(self) -> None:
        if self._feed is not None:
            self._feed.on_loss()


def _worker(settings: EventsConfig) -> WorkerRank:
    if settings.worker_id is None:
        raise FeedError("events.worker_id is not set: name the Dynamo worker that events speak for")
    return WorkerRank(
        namespace=settings.namespace,
        component=settings.component,
        endpoint=settings.endpoint,
        worker_id=settings.worker_id,
        dp_rank=settings.dp_rank,
    )


def discovery_folder(settings: EventsConfig) -> Path:
    """Where workers and routers find each other with file discovery."""
    folder = settings.discovery_path
    return Path(folder or f"{tempfile.gettempdir()}/dynamo_store_kv")  # Dynamo's own default
