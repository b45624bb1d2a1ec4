"""What texts of settings may be: addresses, names, lists."""

from __future__ import annotations

import os
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

MAX_SOCKET_PATH = 107  # bytes; Linux's sun_path, less the NUL
ENDPOINTS = f"ipc://PATH (at most {MAX_SOCKET_PATH} bytes) or tcp://HOST:PORT"


def split_at(separator: str) -> BeforeValidator:
    """A text is a list of texts with ``separator`` between them."""

    def texts(value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(separator) if part.strip())
        return tuple(value) if isinstance(value, list) else value

    return BeforeValidator(texts)


def require(good: Any) -> AfterValidator:
    """Refuses what is given and not ``good``."""

    def check(value: object) -> object:
        if value is not None and not good(value):
            raise ValueError
        return value

    return AfterValidator(check)


def _is_text(text: str) -> bool:
    return bool(text.encode()) and "\0" not in text


def _is_clean(text: str) -> bool:
    return bool(text) and text.isprintable() and not any(c.isspace() for c in text)


def is_endpoint(text: str) -> bool:
    """A ZMQ address: ipc://PATH or tcp://HOST:PORT."""
    if text.startswith("ipc://") and text.isprintable():
        return 0 < len(os.fsencode(text.removeprefix("ipc://"))) <= MAX_SOCKET_PATH
    if not _is_clean(text):
        return False
    parts = urlsplit(text)
    return parts.scheme == "tcp" and bool(parts.hostname and parts.port and not parts.path)


def are_servers(servers: tuple[str, ...]) -> bool:
    """NATS servers, at least one, without credentials."""
    for server in servers:
        if not _is_clean(server):
            return False
        parts = urlsplit(server)
        is_bare = parts.path in {"", "/"} and parts.username is None and parts.port != 0
        if parts.scheme not in {"nats", "tls"} or not parts.hostname or not is_bare:
            return False
    return bool(servers)


def are_urls(urls: tuple[str, ...]) -> bool:
    """HTTP addresses, at least one, without credentials."""
    parts = [urlsplit(url) for url in urls if _is_clean(url)]
    good = [part for part in parts if part.scheme in {"http", "https"} and part.hostname]
    return 0 < len(urls) == len([part for part in good if part.username is None])


def _is_subject(text: str) -> bool:
    return _is_clean(text) and all(text.split(".")) and not set(text) & set("*>/")


Text = Annotated[str, require(_is_text)]
"""Anything that can be said."""

Subject = Annotated[str, require(_is_subject)]
"""A part of a NATS subject, or several with dots."""
