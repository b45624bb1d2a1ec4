"""Checks of what discovery says: model cards, event sources, and who owns an endpoint."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from flexkv.doctor.findings import ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flexkv.doctor.facts import Discovery, Endpoint, Facts, Record
    from flexkv.doctor.findings import Finding

_EXPIRED_S = 12.0


class Source(NamedTuple):
    """An event source, as its record says."""

    where: tuple[str, str, str]
    worker_id: int
    dp_rank: int
    record: Record


def check_discovery(facts: Facts) -> Iterator[Finding]:
    """Every worker has a card and one source that speaks for it, and nothing else is there."""
    found = facts.discovery
    if found is None:
        return
    if found.error:
        yield problem(
            "discovery", f"{found.backend} at {found.where}: {found.error}", _readable(found)
        )
        return
    cards = [one for one in found.cards if one.age_s < _EXPIRED_S]
    live = [source for source in sources(found) if source.record.age_s < _EXPIRED_S]
    yield ok(
        "discovery", f"{found.backend} at {found.where}: {len(cards)} workers, {len(live)} sources"
    )
    yield from _stale(found)
    yield from _twins(live)
    yield from _owners(live)
    yield from _without_card(live, cards)
    if facts.feed != "none":
        yield from _without_source(live, cards)
    yield from _block_sizes(facts, cards)
    yield from _live_only(live)
    for place, error in facts.recovery.items():
        yield problem(
            "recovery",
            f"nobody listens at {place} ({error}), where routers ask for what they have missed: "
            "while they try, they see no news either",
            "let events.recovery_host (DYN_TCP_RPC_HOST) name an address that routers reach, or "
            "end the process that left the record",
        )


def sources(found: Discovery) -> list[Source]:
    """The event sources for KV events; what can't be read is left out."""
    read = (_source(record) for record in found.sources)
    return [source for source in read if source is not None]


def recovery_address(source: Source) -> str | None:
    """Host and port at which routers ask; None where they can't."""
    target = source.record.content["metadata"].get("recovery_target")
    transport = target.get("transport") if isinstance(target, dict) else None
    address = transport.get("tcp") if isinstance(transport, dict) else None
    return address.partition("/")[0] if isinstance(address, str) else None


def card_key(content: Mapping[str, Any]) -> tuple[tuple[str, str, str], int]:
    """Namespace, component and endpoint, and the worker's id."""
    where = tuple(str(content.get(key)) for key in ("namespace", "component", "endpoint"))
    return (where[0], where[1], where[2]), int(content.get("instance_id") or 0)


def card_of(record: Record) -> Mapping[str, Any]:
    """The model card itself."""
    card = record.content.get("card_json")
    return card if isinstance(card, dict) else {}


def check_endpoints(endpoints: Sequence[Endpoint]) -> Iterator[Finding]:
    """Each engine listens where nobody else does."""
    counts = Counter(one.endpoint for one in endpoints)
    for endpoint, count in counts.items():
        if count > 1:
            who = ", ".join(one.worker for one in endpoints if one.endpoint == endpoint)
            yield problem(
                "endpoints",
                f"{who} share server_recv_port {endpoint}: the second ends at its start",
                "give each a server_recv_port of its own, or leave it out",
            )
    for one in endpoints:
        yield from _owned(one)


def _owned(one: Endpoint) -> Iterator[Finding]:
    if one.owner is None and one.is_expected:
        yield problem(
            "endpoints",
            f"nobody has {one.endpoint}, where {one.worker} should listen"
            + (f" (left behind by process {one.signed})" if one.signed else ""),
            "look at the worker's log: it is not ready yet, or goes on without a cache",
        )
    elif one.owner is not None and one.family and one.owner not in one.family:
        yield problem(
            "endpoints",
            f"{one.endpoint} of {one.worker} is in use by process {one.owner} "
            f"({one.signed or 'unnamed'})",
            f"end process {one.owner}, or give the worker another server_recv_port",
        )
    elif one.owner is not None:
        yield ok("endpoints", f"{one.endpoint} belongs to process {one.owner}")


def _source(record: Record) -> Source | None:
    try:
        content, metadata = record.content, record.content["metadata"]
        if content["topic"] != "kv-events":
            return None
        endpoint = metadata["kv_state_endpoint"]
        where = (str(endpoint["namespace"]), str(endpoint["component"]), str(endpoint["name"]))
        worker = metadata["worker"]
        return Source(where, int(worker["worker_id"]), int(worker["dp_rank"]), record)
    except (LookupError, TypeError, ValueError):
        return None


def _readable(found: Discovery) -> str:
    if found.backend == "etcd":
        return "start etcd, or name another in ETCD_ENDPOINTS"
    return "name the folder that all processes share (DYN_FILE_KV or events.discovery_path)"


def _stale(found: Discovery) -> Iterator[Finding]:
    for source in sources(found):
        if source.record.age_s >= _EXPIRED_S:
            yield warning(
                "records",
                f"worker {source.worker_id}, rank {source.dp_rank}: a record that nobody has "
                f"touched for {source.record.age_s:.0f} s ({source.record.place})",
                "routers ignore it; remove the file",
            )


def _twins(live: Sequence[Source]) -> Iterator[Finding]:
    by_rank: defaultdict[tuple[int, int], list[Source]] = defaultdict(list)
    for source in live:
        by_rank[source.worker_id, source.dp_rank].append(source)
    for (worker_id, dp_rank), twins in by_rank.items():
        if len(twins) > 1:
            yield problem(
                "records",
                f"worker {worker_id}, rank {dp_rank} has {len(twins)} event sources "
                f"({'; '.join(_owner(one) for one in twins)}): Dynamo believes none of them",
                "leave one: vLLM's own events off, or events.sink vllm; end a process that is not "
                "needed; the one that stays has to be started again",
            )


def _owners(live: Sequence[Source]) -> Iterator[Finding]:
    for source in live:
        name = f"worker {source.worker_id}, rank {source.dp_rank}"
        if source.record.owner_is_gone:
            yield warning(
                "records",
                f"{name}: {_owner(source)} has ended, its record is left",
                "routers drop it in about 10 s; a new start of the worker removes it at once",
            )
        else:
            yield ok("records", f"{name}: {_owner(source)}")


def _owner(source: Source) -> str:
    owner = source.record.content["metadata"].get("flexkv_owner")
    if isinstance(owner, dict):
        return f"flexkv, process {owner.get('pid')} on {owner.get('host')}"
    return "Dynamo's own publisher"


def _without_card(live: Sequence[Source], cards: Sequence[Record]) -> Iterator[Finding]:
    keys = [card_key(card.content) for card in cards]
    for source in live:
        if (source.where, source.worker_id) in keys:
            continue
        others = [".".join(where) for where, worker_id in keys if worker_id == source.worker_id]
        said = ".".join(source.where)
        if others:
            yield problem(
                "records",
                f"worker {source.worker_id} is {others[0]} by its card, and its source says {said}:"
                " routers ignore the source",
                "set events.namespace, component and endpoint to those of the worker, or leave "
                "them out",
            )
        else:
            yield problem(
                "records",
                f"there is a source for worker {source.worker_id} of {said}, and no model card: "
                "routers ignore it",
                "wait for the worker, or correct events.worker_id",
            )


def _without_source(live: Sequence[Source], cards: Sequence[Record]) -> Iterator[Finding]:
    heard = {source.worker_id for source in live}
    for card in cards:
        where, worker_id = card_key(card.content)
        if worker_id not in heard and card_of(card).get("worker_type") != "prefill":
            yield problem(
                "records",
                f"worker {worker_id} of {'.'.join(where)} has no event source: routers only guess "
                "what it holds",
                "let flexkv publish (DYN_EVENT_PLANE=nats in its environment, or events.sink "
                "nats), or give vLLM --kv-events-config",
            )


def _block_sizes(facts: Facts, cards: Sequence[Record]) -> Iterator[Finding]:
    sizes = {card_key(c.content)[1]: card_of(c).get("kv_cache_block_size") for c in cards}
    if len(set(sizes.values())) > 1:
        named = ", ".join(f"worker {worker_id}: {size}" for worker_id, size in sizes.items())
        yield problem(
            "block size",
            f"the workers' blocks differ ({named}): a router has one block size",
            "give all the same --block-size",
        )
    yield from _own_sizes(facts, sizes)
    for process in facts.processes:
        asked = process.option("--kv-cache-block-size") if process.role == "frontend" else None
        if asked and asked.isdecimal() and sizes and int(asked) not in sizes.values():
            yield problem(
                "block size",
                f"{process.name} has --kv-cache-block-size {asked}, the workers "
                f"{next(iter(sizes.values()))}: nothing is indexed",
                "leave it out: the router takes the workers'",
            )


def _own_sizes(facts: Facts, sizes: Mapping[int, Any]) -> Iterator[Finding]:
    for worker in facts.workers:
        size = sizes.get(worker.process.worker_id or -1)
        cache = worker.config.cache if worker.config is not None else None
        if size is None or cache is None or "tokens_per_block" not in cache.model_fields_set:
            continue
        if cache.tokens_per_block != size:
            yield problem(
                "block size",
                f"{worker.process.name}: its card says {size} tokens, tokens_per_block is "
                f"{cache.tokens_per_block}: nothing of it is indexed",
                "leave tokens_per_block out, or make them equal",
            )


def _live_only(live: Sequence[Source]) -> Iterator[Finding]:
    for source in live:
        if recovery_address(source) is None:
            yield warning(
                "recovery",
                f"routers can't ask the source of worker {source.worker_id}, rank "
                f"{source.dp_rank} for what they have missed: one that starts late stays cold",
                "set DYN_REQUEST_PLANE=tcp, and start the worker again",
            )
