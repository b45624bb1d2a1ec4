"""What the frontend says: the model it serves, and the workers it knows."""

from __future__ import annotations

import asyncio
import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Health:
    """``worker_ids``: those that serve the endpoint, a dead one for some 10 s more."""

    answers: bool = False
    has_model: bool = False
    worker_ids: frozenset[int] = frozenset()


async def health_of(url: str, model: str, endpoint: tuple[str, str, str]) -> Health:
    """Ask once. ``endpoint``: namespace, component and name."""
    return await asyncio.to_thread(_ask, url, model, endpoint)


def _ask(url: str, model: str, endpoint: tuple[str, str, str]) -> Health:
    health, models = _get(url, "/health"), _get(url, "/v1/models")
    if health is None or models is None:
        return Health()
    names = [entry.get("id") for entry in models.get("data") or []]
    ids = [
        entry.get("instance_id")
        for entry in health.get("instances") or []
        if (entry.get("namespace"), entry.get("component"), entry.get("endpoint")) == endpoint
    ]
    return Health(
        answers=True,
        has_model=model in names,
        worker_ids=frozenset(worker_id for worker_id in ids if isinstance(worker_id, int)),
    )


def _get(url: str, path: str) -> dict[str, Any] | None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        document = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return document if isinstance(document, dict) else None
