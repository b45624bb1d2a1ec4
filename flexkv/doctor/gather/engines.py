"""Asks the engines what they hold, and a router of our own what it believes of it."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from flexkv.doctor.facts import Answer
from flexkv.errors import FeedError
from flexkv.events.nats_audit import auditor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexkv.config import EventsConfig
    from flexkv.doctor.registry import Source
    from flexkv.replay.verify import Comparison

_ASK_S = 3.0
_SETTLE_S = 2.0
_COMPARE_S = 8.0


class Asked(NamedTuple):
    """``error``: why NATS does not let us in."""

    error: str
    answers: list[Answer]


async def asked(settings: EventsConfig, sources: Sequence[Source], block_size: int | None) -> Asked:
    """What every flexkv source says, and whether a router agrees."""
    answers: list[Answer] = []
    try:
        async with auditor(settings, _ASK_S):
            pass
    except FeedError as error:
        return Asked(str(error), [])
    for where in dict.fromkeys(source.where for source in sources):
        ours = [source for source in sources if source.where == where]
        own = settings.model_copy(
            update=dict(zip(("namespace", "component", "endpoint"), where, strict=True))
        )
        answers += await _answers(own, ours, block_size)
    return Asked("", answers)


async def _answers(
    settings: EventsConfig, sources: Sequence[Source], block_size: int | None
) -> list[Answer]:
    async with auditor(settings, _ASK_S) as asking, asyncio.TaskGroup() as tasks:

        async def ask(source: Source) -> Answer:
            worker_id, dp_rank = source.worker_id, source.dp_rank
            try:
                audit = await asking.ask(worker_id, dp_rank)
            except FeedError as error:
                return Answer(worker_id=worker_id, dp_rank=dp_rank, error=str(error))
            held = {tier: len(hashes) for tier, hashes in audit.held.items() if hashes}
            return Answer(
                worker_id=worker_id, dp_rank=dp_rank, num_held=held, refused=audit.refused
            )

        asking_all = [tasks.create_task(ask(source)) for source in sources]
    answers = [task.result() for task in asking_all]
    if any(answer.error for answer in answers):
        return answers
    return await _compared(settings, answers, block_size)


async def _compared(
    settings: EventsConfig, answers: list[Answer], block_size: int | None
) -> list[Answer]:
    reason, comparisons = await _comparisons(settings, block_size)
    found = {(one.worker_id, one.dp_rank): one for one in comparisons}
    completed = []
    for answer in answers:
        one = found.get((answer.worker_id, answer.dp_rank))
        completed.append(
            Answer(
                worker_id=answer.worker_id,
                dp_rank=answer.dp_rank,
                num_held=answer.num_held,
                refused=answer.refused,
                agrees=one.agrees if one is not None else None,
                difference=_difference(one) if one is not None else reason,
            )
        )
    return completed


async def _comparisons(
    settings: EventsConfig, block_size: int | None
) -> tuple[str, list[Comparison]]:
    if find_spec("dynamo") is None:
        return "ai-dynamo-runtime is not installed here", []
    if block_size is None:
        return "no card names the block size", []
    from flexkv.replay.verify import verify  # noqa: PLC0415  # the router, an extra

    try:
        async with asyncio.timeout(_COMPARE_S):
            return "", await verify(settings, block_size, settle_timeout_s=_SETTLE_S)
    except FeedError as error:
        return str(error), []
    except TimeoutError:
        return f"it took longer than {_COMPARE_S} s", []


def _difference(one: Comparison) -> str:
    parts = [
        f"{len(hashes)} blocks {word} in {tier}"
        for word, by_tier in (("missing", one.missing), ("surplus", one.surplus))
        for tier, hashes in by_tier.items()
    ]
    if one.misjudged:
        parts.append(f"{len(one.misjudged)} of {one.num_asked} prompts scored wrong")
    return ", ".join(parts)
