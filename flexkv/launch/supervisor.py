"""Starts what the plan says, waits until it serves, keeps it running, and ends all of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexkv.launch.child import Child
from flexkv.launch.health import Health, health_of
from flexkv.launch.logs import Follower, last_lines, set_aside
from flexkv.launch.plan import document_of
from flexkv.launch.record import started_of
from flexkv.launch.restarts import MAX_RESTARTS, WINDOW_S, Restarts

if TYPE_CHECKING:
    from flexkv.launch.plan import Plan, Program
    from flexkv.launch.record import Record
    from flexkv.launch.terminal import Terminal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BAD_USAGE = 2  # what a program says whose arguments are wrong: it will say so again
_NUM_LAST_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long what may take, in seconds."""

    ready_s: float = 600.0
    server_s: float = 15.0  # until NATS or etcd answers
    end_s: float = 30.0  # from SIGTERM to SIGKILL: longer than vLLM's own --shutdown-timeout
    end_unready_s: float = 5.0  # the same for what has nothing to withdraw yet
    poll_s: float = 0.5
    logs_s: float = 0.2
    first_restart_s: float = 1.0


class Supervisor:
    """One deployment, from its start to its end. ``run`` is called once."""

    def __init__(self, plan: Plan, record: Record, terminal: Terminal, timing: Timing) -> None:
        self._plan = plan
        self._record = record
        self._terminal = terminal
        self._timing = timing
        self._children = {program.name: Child(program) for program in plan.programs}
        self._states = dict.fromkeys(self._children, "starting")
        self._followers: dict[str, Follower] = {}
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._is_ready = False
        self._status = 0
        record.document = document_of(plan) | {"pid": os.getpid(), "started": {}}

    async def run(self) -> int:
        """Serve until a signal, or until it can't go on; 0: it was ready, and was told to end."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        for program in self._plan.programs:
            set_aside(program.log)
            self._followers[program.name] = Follower(program.log)
        self._record.write()
        try:
            await self._serve()
        finally:
            await self._end_all()
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        return self._status if self._is_ready or self._status else 1

    def stop(self) -> None:
        """Let ``run`` end everything."""
        self._stopping.set()

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._follow())]
            running += [tasks.create_task(self._keep(program)) for program in self._plan.servers]
            if await self._servers_answer():
                front = self._plan.programs[len(self._plan.servers) :]
                running += [tasks.create_task(self._keep(program)) for program in front]
                running.append(tasks.create_task(self._watch()))
            await self._stopping.wait()
            for task in running:
                task.cancel()

    async def _keep(self, program: Program) -> None:
        """Run one program, again and again, until it has died too often."""
        child = self._children[program.name]
        restarts = Restarts(first_delay_s=self._timing.first_restart_s)
        while True:
            try:
                child.start()
            except OSError as error:
                self._fail(f"{program.name} can't be started: {error}")
                return
            self._note(program, "starting")
            await child.exited()
            pid, status = child.pid, await child.end()
            self._note(program, "dead")
            self._report(program, pid, status)
            delay_s = restarts.delay_s(asyncio.get_running_loop().time())
            if status == _BAD_USAGE or not self._plan.options.restarts or delay_s is None:
                self._give_up(program, too_often=delay_s is None)
                return
            self._say(f"{program.name} is started again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            self._count_restart(program)

    def _report(self, program: Program, pid: int | None, status: int | None) -> None:
        how = f"status {status}"
        if status is not None and status < 0:
            how = f"signal {signal.Signals(-status).name}"
        self._say(
            f"{program.name} (pid {pid}) died with {how}; the rest of its processes are ended"
        )
        if status not in {-signal.SIGKILL, -signal.SIGTERM}:
            self._say(f"the last lines of {program.log}:")
            for line in last_lines(program.log, _NUM_LAST_LINES):
                self._say(f"  {line}")

    def _give_up(self, program: Program, *, too_often: bool) -> None:
        why = "it is not started again"
        if too_often:
            why = (
                f"it was started again {MAX_RESTARTS} times in {WINDOW_S / 60:g} minutes: given up"
            )
        self._states[program.name] = "given up"
        workers = [worker.program.name for worker in self._plan.workers]
        is_last = all(self._states[name] == "given up" for name in workers)
        if program.role == "worker" and self._is_ready and not is_last:
            self._say(f"{program.name}: {why}; the other workers go on")
        else:
            self._fail(f"{program.name}: {why}")

    async def _servers_answer(self) -> bool:
        """Wait for NATS and etcd; False if one does not answer, or we are to end."""
        for program in self._plan.servers:
            self._terminal.progress(f"waiting for {program.name}")
            deadline_s = asyncio.get_running_loop().time() + self._timing.server_s
            while not self._stopping.is_set() and not await asyncio.to_thread(_answers, program):
                if asyncio.get_running_loop().time() > deadline_s:
                    self._fail(f"{program.name} does not answer within {self._timing.server_s} s")
                await self._pause(self._timing.logs_s)
            if not self._stopping.is_set():
                self._note(program, "ready")
        return not self._stopping.is_set()

    async def _watch(self) -> None:
        """See who is ready, as long as somebody is not."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timing.ready_s
        plan = self._plan
        endpoint = (plan.namespace, "backend", "generate")
        while True:
            health = await health_of(plan.url, plan.options.model_name, endpoint)
            waiting = self._see(health)
            self._terminal.progress(f"waiting for {', '.join(waiting)}" if waiting else "")
            if not waiting and not self._is_ready:
                self._is_ready = True
                self._record.document["state"] = "ready"
                self._record.write()
                self._announce()
            elif waiting and not self._is_ready and loop.time() > deadline_s:
                missing = ", ".join(waiting)
                self._fail(
                    f"not ready within {self._timing.ready_s:g} s (--ready-timeout): still waiting "
                    f"for {missing}; see {plan.options.folder / 'logs'}"
                )
            self._changed.clear()
            if waiting:
                await asyncio.sleep(self._timing.poll_s)
            else:
                await self._changed.wait()

    def _see(self, health: Health) -> list[str]:
        """Note what is ready; what is not, in words."""
        plan = self._plan
        waiting = []
        if health.answers and self._states["frontend"] == "starting":
            self._note(plan.frontend, "ready")
        if self._states["frontend"] != "ready":
            waiting.append("the frontend")
        for worker in plan.workers:
            name = worker.program.name
            if self._states[name] == "starting":
                worker_id = self._children[name].worker_id()
                if worker_id in health.worker_ids:
                    self._document(worker.program)["worker_id"] = worker_id
                    self._note(worker.program, "ready")
            if self._states[name] in {"starting", "dead"}:
                waiting.append(name)
        if not waiting and not health.has_model:
            waiting.append(f"the model {plan.options.model_name}")
        return waiting

    def _note(self, program: Program, state: str) -> None:
        """One program's state has changed: say so, and write it down."""
        if state == "ready":
            self._say(f"{program.name} is ready")
        self._states[program.name] = state
        child = self._children[program.name]
        entry = self._document(program)
        entry["pid" if program.role != "server" else f"{program.name}_pid"] = child.pid
        if program.role == "worker":
            entry["state"] = state
            if state != "ready":
                entry["worker_id"] = None
        self._record.document["started"] = {
            str(other.pid): started_of(other.pid)
            for other in self._children.values()
            if other.pid is not None
        }
        self._record.write()
        self._changed.set()

    def _count_restart(self, program: Program) -> None:
        entry = self._document(program)
        if program.role != "server":
            entry["restarts"] += 1

    def _document(self, program: Program) -> dict[str, Any]:
        document = self._record.document
        if program.role == "server":
            return document
        workers: list[dict[str, Any]] = document["workers"]
        frontend: dict[str, Any] = document["frontend"]
        return workers[program.index] if program.role == "worker" else frontend

    async def _follow(self) -> None:
        while True:
            self._show_logs()
            await asyncio.sleep(self._timing.logs_s)

    def _show_logs(self) -> None:
        for name, follower in self._followers.items():
            for line in follower.lines():
                self._terminal.line(name, line)

    def _announce(self) -> None:
        with contextlib.suppress(OSError):  # nobody reads
            sys.stdout.write(f"ready: {self._plan.url}\n")
            sys.stdout.flush()

    def _say(self, text: str) -> None:
        self._terminal.line("launch", text)

    def _fail(self, text: str) -> None:
        self._say(text)
        self._status = 1
        self._stopping.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stopping.is_set():
            self._say(f"{signal.Signals(number).name}: ending everything; once more: at once")
            self._stopping.set()
        else:
            for child in self._children.values():
                child.kill()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _end_all(self) -> None:
        """Frontend and workers first: they take their leave of NATS and discovery."""
        self._stopping.set()
        self._terminal.progress("ending")
        servers = {program.name for program in self._plan.servers}
        for last in (False, True):
            going = [child for name, child in self._children.items() if (name in servers) is last]
            for child in going:
                child.terminate()
            async with asyncio.TaskGroup() as tasks:
                for child in going:
                    is_ready = self._states[child.program.name] == "ready"
                    timing = self._timing
                    tasks.create_task(child.end(timing.end_s if is_ready else timing.end_unready_s))
        self._show_logs()
        self._record.document |= {"state": "ended", "started": {}}
        self._document(self._plan.frontend)["pid"] = None
        for server in self._plan.servers:
            self._document(server)[f"{server.name}_pid"] = None
        for worker in self._plan.workers:
            self._document(worker.program).update(pid=None, worker_id=None, state="dead")
        self._record.write()
        self._say("all has ended")


def _answers(program: Program) -> bool:
    host, port, _ = program.ports[0]
    try:
        socket.create_connection(("127.0.0.1" if host == "0.0.0.0" else host, port), 1).close()  # noqa: S104
    except OSError:
        return False
    return True
