"""A NATS connection that comes back, over nats-py."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import nats.errors
from nats.aio.client import Client

from flexkv.errors import FeedError
from flexkv.events.bounded import bounded
from flexkv.events.dynamo import MIN_PAYLOAD_NBYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.msg import Msg

    from flexkv.config import EventsConfig

_RECONNECT_WAIT_S = 0.5
_PING_S = 2  # a half-open connection is noticed after three of these
_PENDING_NBYTES = 8 * 2**20  # that nats-py may hold before publish waits
_FLUSH_EVERY = 64  # messages; a full buffer at the server would cost the router its connection
_FLUSH_TIMEOUT_S = 5
_MAX_REQUESTS = 16  # that wait; more are dropped
_CONNECTION_ERRORS = (OSError, EOFError, ValueError, TimeoutError, nats.errors.Error)

_log = logging.getLogger(__name__)


class OnConnect(Protocol):
    """Told each time the connection is there; ``again``: not for the first time."""

    def __call__(self, *, again: bool) -> None:
        """Must neither block nor raise."""
        ...


class NatsLink:
    """One connection at a time; ``on_connect`` is told of each, ``on_loss`` of its end."""

    def __init__(
        self, settings: EventsConfig, *, on_connect: OnConnect, on_loss: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._on_connect = on_connect
        self._on_loss = on_loss
        self._client: Client | None = None
        self._closed = asyncio.Event()
        self._last_error: Exception | None = None
        self._was_connected = False
        self._num_unflushed = 0
        self._served: tuple[str, Callable[[Msg], Awaitable[None]]] | None = None

    def serve(self, subject: str, answer: Callable[[str], Awaitable[None]]) -> None:
        """From the next connection on, call ``answer`` with where each request wants its reply."""

        async def on_request(message: Msg) -> None:
            if message.reply:
                await answer(message.reply)

        self._served = subject, on_request

    @property
    def connected(self) -> bool:
        """Whether ``publish`` may succeed."""
        return self._client is not None and self._client.is_connected

    @property
    def max_payload(self) -> int:
        """The longest message that the server takes."""
        assert self._client is not None, "known once connected"
        return max(self._client.max_payload, MIN_PAYLOAD_NBYTES)

    async def open(self) -> None:
        """Connect in time, or fail (``nats_required``), or leave it to ``keep`` to go on trying.

        Raises:
            FeedError: no server answers, or the credentials can't be read.
        """
        options = self._options()
        deadline_s = self._settings.connect_timeout_s
        self._client = Client()
        try:
            await bounded(self._connect(self._client, options), deadline_s)
        except _CONNECTION_ERRORS as error:
            cause = self._last_error or error
            await self.close()
            servers = ", ".join(self._settings.nats_servers)
            what = f"no NATS server answers at {servers} within {deadline_s} s ({cause!r})"
            if self._settings.nats_required:
                raise FeedError(
                    f"{what}: start nats-server, correct events.nats_servers (NATS_SERVER), or set "
                    "events.nats_required to false to start without a router"
                ) from error
            _log.warning("%s: events go nowhere until one does", what)
        else:
            self._was_connected = True
            self._on_connect(again=False)

    async def keep(self) -> None:
        """Connect again whenever nats-py has given up, for ever."""
        while True:
            if not self._was_connected or self._closed.is_set():
                await self._connect_again()
            else:
                await self._closed.wait()
                _log.warning("NATS has closed the connection: %r", self._last_error)
                await asyncio.sleep(_jittered(_RECONNECT_WAIT_S))

    async def publish(self, to: str, message: bytes) -> bool:
        """Hand over one message; False if it is lost."""
        if self._client is None or not self._client.is_connected:
            return False
        try:
            await self._client.publish(to, message)
        except _CONNECTION_ERRORS as error:
            _log.warning("can't publish to NATS: %r", error)
            return False
        self._num_unflushed += 1
        if self._num_unflushed >= _FLUSH_EVERY:
            return await self.flush()
        return True

    async def flush(self) -> bool:
        """Wait for the server to keep up; False if it did not in time."""
        self._num_unflushed = 0
        if self._client is None:
            return False
        try:
            await self._client.flush(_FLUSH_TIMEOUT_S)
        except _CONNECTION_ERRORS as error:
            _log.warning("NATS does not answer: %r", error)
            return False
        return True

    async def close(self) -> None:
        """Let go of the connection, within ``close_timeout_s``."""
        if self._client is None:
            return
        with contextlib.suppress(*_CONNECTION_ERRORS):
            await bounded(self._client.close(), self._settings.close_timeout_s)

    async def _connect_again(self) -> None:
        await self.close()
        self._closed.clear()
        self._client = Client()
        try:
            await bounded(self._connect(self._client, self._options()))  # tries for ever by itself
        except (*_CONNECTION_ERRORS, FeedError) as error:
            _log.warning("can't connect to NATS: %r", error)
            self._closed.set()
            await asyncio.sleep(_jittered(_RECONNECT_WAIT_S))
        else:
            _log.warning("connected to NATS")
            self._was_connected = True
            self._on_connect(again=True)  # routers may come back later than we do

    async def _connect(self, client: Client, options: dict[str, Any]) -> None:
        await client.connect(**options)
        if self._served is not None:
            subject, on_request = self._served
            await client.subscribe(subject, cb=on_request, pending_msgs_limit=_MAX_REQUESTS)

    def _options(self) -> dict[str, Any]:
        return connect_options(self._settings) | {
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": _jittered(_RECONNECT_WAIT_S),
            "ping_interval": _PING_S,
            "max_outstanding_pings": 2,
            "pending_size": _PENDING_NBYTES,
            "flush_timeout": _FLUSH_TIMEOUT_S,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
        }

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        _log.debug("NATS: %r", error)

    async def _on_disconnected(self) -> None:
        self._on_loss()
        if self._client is not None and not self._client.is_closed:  # not by our own close
            _log.warning("the connection to NATS is lost: events go nowhere until it is back")

    async def _on_reconnected(self) -> None:
        _log.warning("connected to NATS")
        self._on_connect(again=True)

    async def _on_closed(self) -> None:
        self._closed.set()


def connect_options(settings: EventsConfig) -> dict[str, Any]:
    """How nats-py finds the servers and shows who we are.

    Raises:
        FeedError: a file can't be used, or a package for it is missing.
    """
    for way in ("nats_creds", "nats_nkey"):
        if getattr(settings, way) is not None and find_spec("nkeys") is None:
            raise FeedError(f"events.{way} needs a package: pip install 'flexkv[nkeys]'")
    if settings.nats_creds is not None and not Path(settings.nats_creds).is_file():
        raise FeedError(f"events.nats_creds: there is no file {settings.nats_creds}")
    return {
        "servers": list(settings.nats_servers),
        "name": "flexkv",
        "user": settings.nats_user,
        "password": settings.nats_password,
        "token": settings.nats_token,
        "user_credentials": settings.nats_creds,
        "nkeys_seed_str": settings.nats_nkey,
        "tls": _tls(settings),
        "connect_timeout": settings.connect_timeout_s,
    }


def _jittered(seconds: float) -> float:
    """So that many engines do not come back to a server in one moment."""
    return seconds * random.uniform(0.5, 1.5)  # noqa: S311  # no secret


def _tls(settings: EventsConfig) -> ssl.SSLContext | None:
    files = (settings.nats_tls_ca, settings.nats_tls_cert, settings.nats_tls_key)
    if not any(files):
        return None
    ca, cert, key = files
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert:
            context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise FeedError(f"events.nats_tls_*: can't use {ca}, {cert}, {key}: {error}") from error
    return context
