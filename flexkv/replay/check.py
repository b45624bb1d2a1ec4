"""Compares what the router believes with what the engines hold, chain by chain."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from flexkv.blocks import Tier
from flexkv.replay.deployment import Overlap
from flexkv.replay.run import tokens_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flexkv.blocks import BlockKey, Blocks
    from flexkv.replay.run import Replay

_TIERS = {Tier.HOST: "host_pinned", Tier.SSD: "disk"}  # Dynamo's names
_NOTHING = Overlap(0, 0, 0)
_POLL_S = 0.1
_NUM_TOP_UP_ROUNDS = 3


class Kind(StrEnum):
    """What became of a chain that was served, on the worker that holds the most of it.

    Evicted: nothing is left but what every request of the workload begins with.
    """

    RESIDENT = "resident"
    PARTLY_RESIDENT = "partly_resident"
    EVICTED = "evicted"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain under check, and how many leading blocks each worker really holds, by tier."""

    block_ids: tuple[int, ...]
    blocks: Blocks
    truth: Mapping[int, Overlap]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many chains of each kind were checked, and what the router has wrong of each worker.

    ``num_heads``: heads of evicted chains that were served again, to make partly resident ones.
    ``divergences``: chains whose overlap scores differ from what the engine holds.
    ``differing_blocks``: blocks of the whole index that only the router or only the engine has.
    """

    num_checked: Mapping[Kind, int]
    num_heads: int
    divergences: Mapping[int, int]
    differing_blocks: Mapping[int, int]
    seconds: float


async def check(replay: Replay, *, num_chains: int, seed: int, timeout_s: float) -> Verdict:
    """Compare ``num_chains`` chains of each kind, or as many as there are, and the whole index.

    Nothing may be in flight. Where too few chains are partly resident, heads of evicted ones are
    served again. The router has ``timeout_s`` to hear of the last events; what differs then, does.
    """
    loop = asyncio.get_running_loop()
    rng = random.Random(seed)  # noqa: S311 - a sample, not a secret
    served = sorted({request.block_ids for request in replay.workload.requests} - {()})
    rng.shuffle(served)
    num_common = replay.workload.num_common
    await _flush(replay)
    sample = _sample(replay, served, num_common, num_chains)
    num_heads = 0
    for _ in range(_NUM_TOP_UP_ROUNDS):
        heads = _heads_to_serve(sample, num_common, num_chains)
        if not heads:
            break
        for head in heads:
            await replay.serve(head)
        num_heads += len(heads)
        await _flush(replay)
        sample = _sample(replay, served, num_common, num_chains)
    started_s = loop.time()
    chains = [chain for kind in sample.values() for chain in kind]
    divergences = await _diverging(replay, chains, started_s + timeout_s)
    differing = await _differing(replay, started_s + timeout_s)
    num_checked = {kind: len(chains) for kind, chains in sample.items()}
    return Verdict(num_checked, num_heads, divergences, differing, loop.time() - started_s)


async def _flush(replay: Replay) -> None:
    for worker in replay.workers.values():
        await worker.engine.flush()


def _sample(
    replay: Replay, served: Iterable[tuple[int, ...]], num_common: int, num_chains: int
) -> dict[Kind, list[Chain]]:
    held = {
        wid: [worker.engine.residency(tier) for tier in _TIERS]
        for wid, worker in replay.workers.items()
    }
    sample: dict[Kind, list[Chain]] = {kind: [] for kind in Kind}
    for block_ids in served:
        if all(len(of) >= num_chains for of in sample.values()):
            break
        blocks = replay.blocks_of(block_ids)
        keys = list(blocks)
        truth = {wid: _overlap(keys, *keys_held) for wid, keys_held in held.items()}
        num_held = max(overlap.host + overlap.ssd for overlap in truth.values())
        of = sample[_kind(num_held, len(blocks), num_common)]
        if len(of) < num_chains:
            of.append(Chain(block_ids, blocks, truth))
    return sample


def _overlap(keys: Sequence[BlockKey], host: set[BlockKey], ssd: set[BlockKey]) -> Overlap:
    """What the router should say: SSD counts for what it adds behind host."""
    num_host = _num_leading(keys, host)
    return Overlap(0, num_host, max(0, _num_leading(keys, ssd) - num_host))


def _num_leading(keys: Sequence[BlockKey], held: set[BlockKey]) -> int:
    return next((i for i, key in enumerate(keys) if key not in held), len(keys))


def _kind(num_held: int, num_blocks: int, num_common: int) -> Kind:
    if num_held == num_blocks:
        return Kind.RESIDENT
    return Kind.EVICTED if num_held <= num_common else Kind.PARTLY_RESIDENT


def _heads_to_serve(
    sample: Mapping[Kind, Sequence[Chain]], num_common: int, num_chains: int
) -> list[tuple[int, ...]]:
    """Heads that make evicted chains partly resident: a bit longer than what all chains share."""
    num_wanted = num_chains - len(sample[Kind.PARTLY_RESIDENT])
    shortest = num_common + 1
    long_enough = [chain for chain in sample[Kind.EVICTED] if len(chain.blocks) > shortest]
    return [
        chain.block_ids[: min(shortest + i % 4, len(chain.blocks) - 1)]
        for i, chain in enumerate(long_enough[: max(0, num_wanted)])
    ]


async def _diverging(replay: Replay, chains: Sequence[Chain], deadline_s: float) -> dict[int, int]:
    """Per worker, on how many of the chains the router is still wrong at the deadline."""
    while True:
        wrong = dict.fromkeys(replay.workers, 0)
        diverged = []
        for chain in chains:
            believed = await replay.router.overlap(tokens_in(chain.blocks))
            errs = [w for w, n in chain.truth.items() if believed.get(w, _NOTHING) != n]
            wrong |= {wid: wrong[wid] + 1 for wid in errs}
            diverged += [chain] if errs else []
        if not diverged or asyncio.get_running_loop().time() >= deadline_s:
            return wrong
        chains = diverged  # nothing moves any more: where they agree, they go on agreeing
        await asyncio.sleep(_POLL_S)


async def _differing(replay: Replay, deadline_s: float) -> dict[int, int]:
    """Per worker, how many blocks only one side has, still at the deadline."""
    held = {
        wid: {
            (name, int.from_bytes(key[-8:]))
            for tier, name in _TIERS.items()
            for key in worker.engine.residency(tier)
        }
        for wid, worker in replay.workers.items()
    }
    while True:
        believed: dict[int, set[tuple[str, int]]] = {wid: set() for wid in held}
        for event in await replay.router.dump_events():
            blocks = event["event"]["data"]["stored"]["blocks"]
            tier = event["storage_tier"]
            believed[event["worker_id"]] |= {(tier, block["block_hash"]) for block in blocks}
        differing = {wid: len(held[wid] ^ believed[wid]) for wid in held}
        if not any(differing.values()) or asyncio.get_running_loop().time() >= deadline_s:
            return differing
        await asyncio.sleep(_POLL_S)
