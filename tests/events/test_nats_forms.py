"""The ways to reach a real nats-server: several servers, and each way to show who we are."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import nkeys
import pytest

from flexkv.config import EventsConfig
from flexkv.errors import FeedError
from flexkv.events.nats_link import NatsLink
from flexkv.replay.deployment import NatsServer

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 20.0


def ignore(**_: bool) -> None:
    pass


async def can_publish(timeout_s: float = 5.0, **settings: Any) -> bool:
    config = EventsConfig(connect_timeout_s=timeout_s, **settings)
    link = NatsLink(config, on_connect=ignore, on_loss=ignore)
    async with asyncio.timeout(DEADLINE_S):
        await link.open()
        try:
            return await link.publish("subject", b"message") and await link.flush()
        finally:
            await link.close()


async def is_refused(**settings: Any) -> bool:
    with pytest.raises(FeedError, match="no NATS server answers"):
        await can_publish(0.3, **settings)
    return True


def written(folder: Path, config: str) -> str:
    path = folder / "nats.conf"
    path.write_text(config)
    return str(path)


async def test_user_and_token(tmp_path: Path) -> None:
    async with NatsServer("--user", "me", "--pass", "secret") as nats:
        assert await can_publish(nats_servers=(nats.url,), nats_user="me", nats_password="secret")
        assert await is_refused(nats_servers=(nats.url,), nats_user="me", nats_password="wrong")
    config = written(tmp_path, 'authorization { token: "secret" }')
    async with NatsServer("-c", config) as nats:
        assert await can_publish(nats_servers=(nats.url,), nats_token="secret")


def seed_of(kind: int) -> bytes:
    return bytes(nkeys.encode_seed(os.urandom(32), kind))


async def test_an_nkey(tmp_path: Path) -> None:
    seed, other = seed_of(nkeys.PREFIX_BYTE_USER), seed_of(nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    config = written(tmp_path, f"authorization {{ users = [ {{ nkey: {public} }} ] }}")
    async with NatsServer("-c", config) as nats:
        assert await can_publish(nats_servers=(nats.url,), nats_nkey=seed.decode())
        assert await is_refused(nats_servers=(nats.url,), nats_nkey=other.decode())


def jwt(issuer: bytes, subject: bytes, name: str, claims: dict[str, Any]) -> str:
    """A token of NATS: what ``issuer`` says of ``subject``. Both are seeds."""
    pair = nkeys.from_seed(bytearray(issuer))
    content = {
        "iss": pair.public_key.decode(),
        "sub": nkeys.from_seed(bytearray(subject)).public_key.decode(),
        "name": name,
        "iat": 1_700_000_000,
        "nats": claims | {"version": 2},
    }
    content["jti"] = base64.b32encode(
        hashlib.sha256(json.dumps(content).encode()).digest()
    ).decode()
    parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, content]
    text = b".".join(_base64(json.dumps(part).encode()) for part in parts)
    return (text + b"." + _base64(pair.sign(text))).decode()


def _base64(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


async def test_a_credentials_file(tmp_path: Path) -> None:
    operator = seed_of(nkeys.PREFIX_BYTE_OPERATOR)
    account, user = seed_of(nkeys.PREFIX_BYTE_ACCOUNT), seed_of(nkeys.PREFIX_BYTE_USER)
    account_id = nkeys.from_seed(bytearray(account)).public_key.decode()
    unlimited = {"subs": -1, "data": -1, "payload": -1}
    limits = unlimited | {"conn": -1, "leaf": -1, "imports": -1, "exports": -1, "wildcards": True}
    account_jwt = jwt(operator, account, "A", {"type": "account", "limits": limits})
    config = written(
        tmp_path,
        f"operator: {jwt(operator, operator, 'O', {'type': 'operator'})}\n"
        f"resolver: MEMORY\nresolver_preload: {{ {account_id}: {account_jwt} }}\n",
    )
    user_jwt = jwt(account, user, "U", {"type": "user", "pub": {}, "sub": {}} | unlimited)
    dashes = "-----"
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"{dashes}BEGIN NATS USER JWT{dashes}\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"{dashes}BEGIN USER NKEY SEED{dashes}\n{user.decode()}\n------END USER NKEY SEED------\n"
    )
    async with NatsServer("-c", config) as nats:
        assert await can_publish(nats_servers=(nats.url,), nats_creds=str(creds))
        assert await is_refused(nats_servers=(nats.url,))
        with pytest.raises(FeedError, match=r"events\.nats_creds: there is no file"):
            await can_publish(nats_servers=(nats.url,), nats_creds=str(tmp_path / "none"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """File names of a certificate for 127.0.0.1, and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=flexkv", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return cert, key


async def test_tls_with_and_without_a_certificate_of_ours(certificate: tuple[str, str]) -> None:
    cert, key = certificate
    async with NatsServer("--tls", "--tlscert", cert, "--tlskey", key) as nats:
        url = nats.url.replace("nats://", "tls://")
        assert await can_publish(nats_servers=(url,), nats_tls_ca=cert)
        assert await is_refused(nats_servers=(url,))  # of an authority that nobody knows
    verified = ["--tlsverify", "--tlscert", cert, "--tlskey", key, "--tlscacert", cert]
    async with NatsServer(*verified) as nats:
        url = nats.url.replace("nats://", "tls://")
        mine = {"nats_tls_ca": cert, "nats_tls_cert": cert, "nats_tls_key": key}
        assert await can_publish(nats_servers=(url,), **mine)
        assert await is_refused(nats_servers=(url,), nats_tls_ca=cert)


async def test_of_several_servers_one_that_answers_is_enough() -> None:
    async with NatsServer() as first, NatsServer() as second:
        await first.stop()
        config = EventsConfig(nats_servers=(first.url, second.url))
        connections = []
        link = NatsLink(
            config, on_connect=lambda *, again: connections.append(again), on_loss=lambda: None
        )
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            await link.open()
            keeping = tasks.create_task(link.keep())
            assert await link.publish("subject", b"message")
            await first.start()
            await second.stop()
            while connections != [False, True]:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0.01)
            assert await link.publish("subject", b"message")
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping
            await link.close()
