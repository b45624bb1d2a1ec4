"""What listens on this machine, and what answers: NATS, recovery servers, frontends."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flexkv.doctor.facts import Frontend, Listener, Nats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from flexkv.doctor.facts import Process

_LISTENING = "0A"
_ASK_S = 2.0
_MAX_ANSWER_NBYTES = 16 * 2**20
_MAX_GREETING_NBYTES = 64 * 1024


def listeners(processes: Iterable[Process]) -> list[Listener]:
    """The listening TCP sockets of ``processes`` and of those below them."""
    sockets = dict(_sockets("tcp")) | dict(_sockets("tcp6"))
    found: dict[tuple[str, int], Listener] = {}
    for process in processes:
        for pid in process.family or {process.pid}:
            for inode in _inodes(pid):
                if inode in sockets:
                    host, port = sockets[inode]
                    one = Listener(host=host, port=port, process=process)
                    found.setdefault((host, port), one)
    return sorted(found.values(), key=lambda one: (one.process.pid, one.port))


def nats(servers: Sequence[str]) -> Nats:
    """What the first server that answers says of itself, before anybody logs in."""
    named, error = ", ".join(servers), ""
    for server in servers:
        parts = urlsplit(server)
        address = (parts.hostname or "", parts.port or 4222)
        try:
            with socket.create_connection(address, _ASK_S) as connection:
                return Nats(servers=named, greeting=_greeting(connection))
        except (OSError, ValueError) as refusal:
            error = str(refusal)
    return Nats(servers=named, error=error)


def refusal(address: str) -> str:
    """Why nobody can connect to HOST:PORT; "" if one can."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ASK_S).close()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def frontend(url: str, process: Process | None = None) -> Frontend:
    """What a frontend counts."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=_ASK_S) as answer:  # noqa: S310  # http
            text = answer.read(_MAX_ANSWER_NBYTES).decode(errors="replace")
    except (OSError, ValueError) as error:
        return Frontend(url=url, process=process, error=str(error))
    applied: Counter[tuple[str, str]] = Counter()
    num_requests = 0
    for name, labels, value in _samples(text):
        if name == "dynamo_component_kv_cache_events_applied":
            applied[labels.get("event_type", ""), labels.get("status", "")] += value
        elif name == "dynamo_frontend_requests_total":
            num_requests += value
    return Frontend(url=url, process=process, applied=applied, num_requests=num_requests)


def url_of(process: Process) -> str:
    """Where a frontend serves HTTP."""
    host = process.option("--http-host") or process.variable("DYN_HTTP_HOST") or "0.0.0.0"  # noqa: S104
    port = process.option("--http-port") or process.variable("DYN_HTTP_PORT") or "8000"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  # it listens there
    return f"http://{host}:{port}"


def _greeting(connection: socket.socket) -> dict[str, Any]:
    connection.settimeout(_ASK_S)
    line = b""
    while b"\n" not in line and len(line) < _MAX_GREETING_NBYTES:
        part = connection.recv(4096)
        if not part:
            break
        line += part
    word, _, content = line.partition(b" ")
    if word != b"INFO":
        raise ValueError("it is no NATS server")
    found = json.loads(content.partition(b"\r\n")[0])
    return found if isinstance(found, dict) else {}


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], int]]:
    for line in text.splitlines():
        if found := re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line):
            name, labels, value = found.groups()
            try:
                number = int(float(value))
            except (ValueError, OverflowError):
                continue
            yield name, dict(re.findall(r'(\w+)="([^"]*)"', labels or "")), number


def _sockets(kind: str) -> Iterator[tuple[str, tuple[str, int]]]:
    try:
        lines = Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        words = line.split()
        if words[3] == _LISTENING:
            host, _, port = words[1].partition(":")
            yield words[9], (_address(host), int(port, 16))


def _address(text: str) -> str:
    """Words of 32 bits, each in the byte order of the machine."""
    packed = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    return str(ipaddress.ip_address(packed))


def _inodes(pid: int) -> Iterator[str]:
    try:
        paths = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return
    for path in paths:
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", str(path.readlink()))
        except OSError:
            continue
        if found:
            yield found.group(1)
