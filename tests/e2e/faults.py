"""Injects faults into flexkv from outside: wraps its copiers and threads in a process of vLLM.

What to inject is a dictionary, and each injection is one line in a file, so that a test sees it
wherever it happened. In processes that vLLM starts, a plug-in of vLLM (``plugin/``) calls
``install_from_environment``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable

VARIABLE = "E2E_FAULTS"

_installed = ExitStack()


def install_from_environment() -> None:
    if faults := os.environ.get(VARIABLE):
        install(json.loads(faults))


def install(faults: dict[str, Any]) -> None:
    """Replace what was installed before by ``faults``; {} for none.

    ``log``: the file for the lines. ``fail_every``: that many loads, one fails. ``garbage``: loads
    write something else. ``delay_s``: each load begins so much later. ``kill``: the prefix of the
    name of a flexkv thread that ends with load number ``at``.
    """
    _installed.close()
    if not faults:
        return
    from flexkv.engine.bridge import LoopThread  # noqa: PLC0415  # absent where there is no flexkv
    from flexkv.link.copier import LinkCopier  # noqa: PLC0415
    from flexkv.tiers.gpu import CpuPagedCopier  # noqa: PLC0415

    threads: list[LoopThread] = []
    start = LoopThread.start

    def recorded(self: LoopThread, timeout_s: float) -> None:
        threads.append(self)
        start(self, timeout_s)

    kill = faults.get("kill", "")
    copier = LinkCopier if kill.startswith("flexkv-engine") else CpuPagedCopier
    scatter = _faulty(copier.scatter, faults, lambda: _end_thread(threads, kill))
    _installed.enter_context(mock.patch.object(LoopThread, "start", recorded))
    _installed.enter_context(mock.patch.object(copier, "scatter", scatter))


def num_injected(log: Path) -> int:
    """How many faults were injected, in all processes."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def _faulty(scatter: Any, faults: dict[str, Any], end_thread: Callable[[], None]) -> Any:
    from flexkv.errors import TransferError  # noqa: PLC0415

    log = Path(faults["log"])
    numbers = itertools.count(1)

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(what + "\n")

    async def faulty(self: Any, slots: Any, block_ids: Any, after: Any = None) -> None:
        number = next(numbers)
        if delay_s := faults.get("delay_s"):
            note("delayed")
            await asyncio.sleep(delay_s)
        if (every := faults.get("fail_every")) and number % every == 0:
            note("failed")
            raise TransferError("injected")
        if faults.get("kill") and number == faults["at"]:
            note("killed")
            end_thread()
        if faults.get("garbage") and len(slots) > 1:
            note("garbage")
            # not in another order: keys know their positions, so attention would come out the same
            slots = [slots[0]] * len(slots)
        await scatter(self, slots, block_ids, after)

    return faulty


def _end_thread(threads: list[Any], prefix: str) -> None:
    def die() -> None:
        raise SystemExit  # the only thing that gets out of a loop's callback

    thread = next(t for t in reversed(threads) if t._thread.name.startswith(prefix))
    thread.call(die)
