"""Checks that events arrive, and that routers believe what the engines hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from flexkv.doctor.findings import ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexkv.doctor.facts import Answer, Facts, Frontend, Nats
    from flexkv.doctor.findings import Finding

_CAUSES = (
    "compare the event planes above; with vLLM's own events see that somebody binds the endpoint "
    "(ipc://, not tcp://127.0.0.1), and that the block sizes are equal"
)


class Known(NamedTuple):
    """What a line of a log means, and what to do. {0} is what the line names."""

    pattern: str
    seen: str
    remedy: str


_NO_EVENTS = Known(
    r"no events are published: (.{1,120})",
    seen="flexkv publishes nothing: {0}",
    remedy="set DYN_EVENT_PLANE=nats in the worker's environment",
)
KNOWN_LINES = (
    Known(
        r"a router wants its answer at (\S+), which is not an address of this machine",
        seen="a router asked for its answer at {0}, and the engine refused: that router does not "
        "learn what it has missed",
        remedy="name {0} in events.recovery_callback_hosts, or give the router an address of this "
        "machine (DYN_TCP_RESPONSE_STREAM_HOST)",
    ),
    Known(
        r"has its event source already",
        seen="flexkv's feed is off: the worker had an event source already",
        remedy="switch vLLM's own events off, end the other owner, or set events.sink to vllm",
    ),
    Known(
        r"kv_event_source_ambiguous",
        seen="a router has seen two event sources for one worker and rank: it believes neither",
        remedy="leave one (see records), then start the worker again",
    ),
    Known(
        r"Block not published\. token_ids too short",
        seen="Dynamo's relay drops events: their blocks are shorter than the router's",
        remedy="give worker, flexkv and router one block size",
    ),
    Known(
        r"the endpoint is taken by (another process|process \d+)",
        seen="an engine found its endpoint taken by {0}",
        remedy="give each worker a server_recv_port of its own",
    ),
    Known(
        r"cannot import name 'smart_resize'|No module named 'torchvision'",
        seen="dynamo.vllm ended at its start: smart_resize needs torchvision",
        remedy="see torchvision above",
    ),
    _NO_EVENTS,
)


def check_nats(found: Nats | None) -> Iterator[Finding]:
    """The server answers, and takes our credentials."""
    if found is None:
        return
    if found.greeting is None:
        yield problem(
            "nats",
            f"no NATS server answers at {found.servers} ({found.error})",
            "start nats-server, or correct NATS_SERVER (events.nats_servers)",
        )
    elif found.error:
        yield problem(
            "nats",
            f"the server at {found.servers} does not take us: {found.error}",
            "correct NATS_AUTH_* or NATS_TLS_* (events.nats_user, nats_creds, nats_tls_ca ...)",
        )
    else:
        yield ok("nats", f"nats-server {found.greeting.get('version')} at {found.servers}")


def check_index(facts: Facts) -> Iterator[Finding]:
    """What was announced is indexed."""
    for answer in facts.answers:
        yield from _answer(answer)
    for frontend in facts.frontends:
        if not frontend.error and facts.feed != "none":
            yield _applied(frontend, facts)
            yield from _rejected(frontend)


def check_logs(facts: Facts) -> Iterator[Finding]:
    """What a log has already said; each thing once a log."""
    told = set()
    for line in facts.log_lines:
        for known in KNOWN_LINES:
            if facts.feed == "vllm" and known is _NO_EVENTS:  # flexkv's own, which nobody needs
                continue
            if found := re.search(known.pattern, line.text):
                text = known.seen.format(*found.groups())
                if (line.log, text) not in told:
                    told.add((line.log, text))
                    todo = known.remedy.format(*found.groups())
                    yield problem("log", f"{text} ({line.log})", todo)


def _answer(answer: Answer) -> Iterator[Finding]:
    name = f"worker {answer.worker_id}, rank {answer.dp_rank}"
    for host in answer.refused:
        yield problem(
            "recovery",
            f"{name} has refused a router that wants its answers at {host}: it does not learn what "
            "it has missed",
            f"name {host} in events.recovery_callback_hosts, or give the router an address of this "
            "machine (DYN_TCP_RESPONSE_STREAM_HOST)",
        )
    held = ", ".join(f"{n} blocks in {tier}" for tier, n in answer.num_held.items()) or "nothing"
    if answer.error:
        yield problem(
            "index",
            f"{name}: {answer.error}",
            "see that the worker runs, with events.sink nats and the NATS server named here",
        )
    elif answer.agrees is None:
        yield ok("index", f"{name} holds {held}; no router was asked ({answer.difference})")
    elif answer.agrees:
        yield ok("index", f"{name}: a router believes what the engine holds ({held})")
    else:
        yield problem(
            "index",
            f"{name}: a router does not believe what the engine holds ({held}): "
            f"{answer.difference}",
            "ask again when the deployment is quiet (flexkv verify lists every block); then see "
            "records, block size and event plane",
        )


def _applied(frontend: Frontend, facts: Facts) -> Finding:
    count = sum(n for (_, status), n in frontend.applied.items() if status == "ok")
    if count:
        return ok("events", f"{frontend.url} has applied {count} KV events")
    seen = f"{frontend.url} has applied no KV event"
    if facts.feed == "nats" or frontend.num_requests:
        return problem("events", seen, _CAUSES)
    return warning("events", f"{seen}, and has served no request", "send one, and ask again")


def _rejected(frontend: Frontend) -> Iterator[Finding]:
    wrong = {
        f"{kind} {status}": n
        for (kind, status), n in frontend.applied.items()
        if status not in {"ok", "block_not_found"} and n  # a beat may name an unknown block
    }
    if wrong:
        named = ", ".join(f"{what}: {n}" for what, n in wrong.items())
        yield warning(
            "events",
            f"{frontend.url} could not apply some KV events ({named})",
            "flexkv verify says whether the index is right now",
        )
