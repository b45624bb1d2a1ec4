"""Compares what a Dynamo router believes of live engines with what they hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flexkv.errors import FeedError
from flexkv.events import ownership
from flexkv.events.dynamo import TIERS
from flexkv.events.etcd import etcd_of, source_records
from flexkv.events.nats import discovery_folder
from flexkv.events.nats_audit import auditor
from flexkv.events.ownership import OWNER, live_records
from flexkv.replay.deployment import Router
from flexkv.replay.scores import Misjudged, misjudged

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from flexkv.config import EventsConfig
    from flexkv.events.audit import Audit, Held

_SOURCES = "v1/event_sources"
_POLL_S = 0.3

Source = tuple[int, int]
"""Worker id and data-parallel rank."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One source: by tier, what only the engine has, and what only the router has.

    ``misjudged``: of ``num_asked`` chains those for which the router's scores are wrong.
    On a deployment that goes on working only what differed at every look is listed.
    """

    worker_id: int
    dp_rank: int
    digests: Mapping[str, str]
    num_held: Mapping[str, int]
    missing: Mapping[str, list[int]]
    surplus: Mapping[str, list[int]]
    num_asked: int
    misjudged: list[Misjudged]

    @property
    def agrees(self) -> bool:
        """Whether the router believes the truth."""
        return not self.missing and not self.surplus and not self.misjudged

    def document(self) -> dict[str, Any]:
        """As JSON; hashes in hexadecimal."""
        return {
            "worker_id": self.worker_id,
            "dp_rank": self.dp_rank,
            "agrees": self.agrees,
            "digests": dict(self.digests),
            "blocks": dict(self.num_held),
            "missing": {tier: [f"{h:016x}" for h in hs] for tier, hs in self.missing.items()},
            "surplus": {tier: [f"{h:016x}" for h in hs] for tier, hs in self.surplus.items()},
            "chains": self.num_asked,
            "misjudged": [one.document() for one in self.misjudged],
        }


async def verify(
    settings: EventsConfig, tokens_per_block: int, *, settle_timeout_s: float = 5.0
) -> list[Comparison]:
    """Compare each flexkv source that discovery names with a real router that hears of it.

    Raises:
        FeedError: no source is registered, or an engine, NATS or etcd does not answer.
    """
    where = discovery_of(settings)
    sources, gone = await asyncio.to_thread(_sources, settings)
    if not sources:
        remedy = "name another folder or etcd, namespace, component or endpoint"
        if gone:
            workers = ", ".join(f"worker {worker_id}, rank {rank}" for worker_id, rank in gone)
            remedy = f"start the engine again, its process has ended ({workers})"
        raise FeedError(
            f"no flexkv source of {settings.namespace}.{settings.component}.{settings.endpoint} is "
            f"registered in {where}: {remedy}"
        )
    endpoint = f"{settings.namespace}.{settings.component}.{settings.endpoint}"
    url = ",".join(settings.nats_servers)
    router = Router(url, where, tokens_per_block=tokens_per_block, endpoint=endpoint)
    # NATS first: where it is away, Dynamo's runtime blocks for two minutes
    async with auditor(settings) as asking, router:
        await router.wait_for_workers({worker_id for worker_id, _ in sources})
        deadline_s = asyncio.get_running_loop().time() + settle_timeout_s
        latest: dict[Source, _Difference] = {}
        lasting: dict[Source, _Difference] = {}
        while True:
            audits = {source: await asking.ask(*source) for source in sources}
            believed = beliefs(await router.dump_events())
            for source, audit in audits.items():
                wrong = await misjudged(router, source, audit, tokens_per_block)
                now = _Difference(*differences(audit.held, believed.get(source, {})), wrong)
                before = latest.get(source, now)
                latest[source] = now
                # what differs in two looks running is no news under way; a router that had heard
                # of nothing at the first look must not hide what it believes too much later
                lasting[source] = now.common(before)
            settled = not any(any(difference) for difference in lasting.values())
            if settled or asyncio.get_running_loop().time() > deadline_s:
                return [_comparison(source, audits[source], lasting[source]) for source in sources]
            await asyncio.sleep(_POLL_S)


def discovery_of(settings: EventsConfig) -> Path | str:
    """A folder, or the URLs of an etcd."""
    if settings.discovery == "etcd":
        return ",".join(settings.etcd_endpoints)
    return discovery_folder(settings)


def registered(settings: EventsConfig) -> list[Source]:
    """The flexkv sources of an endpoint that are alive."""
    return _sources(settings)[0]


def _sources(settings: EventsConfig) -> tuple[list[Source], list[Source]]:
    """The flexkv sources of an endpoint: who is alive, and whose process is known to have ended."""
    where = {
        "namespace": settings.namespace,
        "component": settings.component,
        "name": settings.endpoint,
    }
    alive: set[Source] = set()
    gone: set[Source] = set()
    for _, record in _records(settings):
        with contextlib.suppress(
            LookupError, TypeError, ValueError, OverflowError
        ):  # not a source's
            metadata = record["metadata"]
            owner = metadata[OWNER]
            is_gone = isinstance(owner, dict) and ownership.is_gone(owner)
            if metadata["kv_state_endpoint"] == where:
                worker = metadata["worker"]
                source = int(worker["worker_id"]), int(worker["dp_rank"])
                (gone if is_gone else alive).add(source)
    return sorted(alive), sorted(gone - alive)


def _records(settings: EventsConfig) -> Iterator[tuple[str, Any]]:
    if settings.discovery == "etcd":
        return source_records(etcd_of(settings))
    return live_records(discovery_folder(settings) / _SOURCES)


def beliefs(dump: list[dict[str, Any]]) -> dict[Source, Held]:
    """What a router's dump says that each source holds."""
    found: dict[Source, Held] = {}
    for event in dump:
        source = event["worker_id"], event["event"]["dp_rank"]
        held = found.setdefault(source, {tier: set() for tier in TIERS.values()})
        blocks = event["event"]["data"]["stored"]["blocks"]
        held[event["storage_tier"]].update(block["block_hash"] for block in blocks)
    return found


_Where = tuple[str, int]
"""Tier and router hash."""


class _Difference(NamedTuple):
    missing: set[_Where]
    surplus: set[_Where]
    misjudged: set[Misjudged]

    def common(self, other: _Difference) -> _Difference:
        """What both say; of a prompt the figures that this one gives."""
        wrong_before = {one.first_wrong for one in other.misjudged}
        return _Difference(
            self.missing & other.missing,
            self.surplus & other.surplus,
            {one for one in self.misjudged if one.first_wrong in wrong_before},
        )


def differences(held: Held, believed: Held) -> tuple[set[_Where], set[_Where]]:
    """What only the engine has, and what only the router has. The device tier is not ours."""
    ours = {(tier, h) for tier, hashes in held.items() for h in hashes if tier != "device"}
    theirs = {(tier, h) for tier, hashes in believed.items() for h in hashes if tier != "device"}
    return ours - theirs, theirs - ours


def _comparison(source: Source, audit: Audit, difference: _Difference) -> Comparison:
    return Comparison(
        *source,
        audit.digests,
        {tier: len(hashes) for tier, hashes in audit.held.items() if hashes},
        _by_tier(difference.missing),
        _by_tier(difference.surplus),
        len(audit.sample),
        sorted(difference.misjudged),
    )


def _by_tier(difference: set[_Where]) -> dict[str, list[int]]:
    tiers = sorted({tier for tier, _ in difference})
    return {tier: sorted(h for of, h in difference if of == tier) for tier in tiers}


def sentences(comparisons: list[Comparison], *, most: int = 10) -> list[str]:
    """What ``flexkv verify`` prints for people."""
    lines = []
    for one in comparisons:
        held = ", ".join(f"{n} blocks in {tier}" for tier, n in one.num_held.items()) or "nothing"
        verdict = "router == residency" if one.agrees else "the router is WRONG"
        asked = f"{one.num_asked} chains asked for by their tokens"
        lines.append(f"worker {one.worker_id}, rank {one.dp_rank}: {verdict} ({held}; {asked})")
        for word, by_tier in (("missing", one.missing), ("surplus", one.surplus)):
            for tier, hashes in by_tier.items():
                shown = " ".join(f"{h:016x}" for h in hashes[:most])
                more = f" and {len(hashes) - most} more" if len(hashes) > most else ""
                lines.append(f"  {word} in {tier}: {len(hashes)}: {shown}{more}")
        lines += [f"  {wrong}" for wrong in one.misjudged[:most]]
        if len(one.misjudged) > most:
            lines.append(f"  and {len(one.misjudged) - most} more prompts")
    return lines


def printed(comparisons: list[Comparison], *, as_json: bool) -> str:
    """The whole output."""
    if as_json:
        return json.dumps([comparison.document() for comparison in comparisons], indent=2)
    return "\n".join(sentences(comparisons))
