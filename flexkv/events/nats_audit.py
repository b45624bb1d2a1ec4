"""Asks an engine over NATS what it holds."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import nats.errors
from nats.aio.client import Client

from flexkv.errors import FeedError
from flexkv.events.audit import AuditError, Collector, audit_subject
from flexkv.events.bounded import bounded
from flexkv.events.nats_link import connect_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flexkv.config import EventsConfig
    from flexkv.events.audit import Audit

_CLOSE_S = 2.0
_NOBODY = "503"  # the server's word for a request without a subscriber
_ERRORS = (OSError, EOFError, nats.errors.Error, AuditError)


class Auditor:
    """Asks engines, over one connection."""

    def __init__(self, client: Client, namespace: str, deadline_s: float) -> None:
        self._client = client
        self._namespace = namespace
        self._deadline_s = deadline_s

    async def ask(self, worker_id: int, dp_rank: int) -> Audit:
        """Everything that is resident for a worker and rank.

        Raises:
            FeedError: no engine answers in time, or not in full.
        """
        subject = audit_subject(self._namespace, worker_id, dp_rank)
        inbox = self._client.new_inbox()
        collector = Collector()
        try:
            async with asyncio.timeout(self._deadline_s):
                subscription = await self._client.subscribe(inbox)
                try:
                    await self._client.publish(subject, b"", reply=inbox)
                    while True:
                        message = await subscription.next_msg(self._deadline_s)
                        if (message.headers or {}).get("Status") == _NOBODY:
                            raise AuditError("nobody listens there")
                        if (audit := collector.take(message.data)) is not None:
                            return audit
                finally:
                    await subscription.unsubscribe()
        except (TimeoutError, *_ERRORS) as error:
            raise FeedError(
                f"the engine of worker {worker_id}, rank {dp_rank} does not answer at {subject} "
                f"({_reason(error, self._deadline_s)}): is it running, with events.sink nats?"
            ) from error


def _reason(error: BaseException, deadline_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"within {deadline_s} s"
    return str(error) or repr(error)


@contextlib.asynccontextmanager
async def auditor(settings: EventsConfig, deadline_s: float = 10.0) -> AsyncIterator[Auditor]:
    """Connected with the NATS servers of ``settings``.

    Raises:
        FeedError: none answers.
    """
    client = Client()
    seen: list[Exception] = []

    async def on_error(error: Exception) -> None:  # nats-py's own prints a traceback for each
        seen[:] = [error]

    try:
        try:
            options = connect_options(settings) | {"error_cb": on_error, "allow_reconnect": False}
            await bounded(client.connect(**options), settings.connect_timeout_s)
        except (TimeoutError, *_ERRORS) as error:
            cause = seen[0] if seen else error
            raise FeedError(
                f"no NATS server answers at {', '.join(settings.nats_servers)} within "
                f"{settings.connect_timeout_s} s ({cause!r}): start nats-server, or correct "
                "events.nats_servers (NATS_SERVER)"
            ) from error
        yield Auditor(client, settings.namespace, deadline_s)
    finally:  # nats-py leaves the socket of a server that turned it away
        await _closed(client)


async def _closed(client: Client) -> None:
    with contextlib.suppress(TimeoutError, *_ERRORS):
        await bounded(client.close(), _CLOSE_S)
