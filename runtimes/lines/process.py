"""A lane keeps a worker of lines alive (runtimes/worker_process.py is one life of it).

A lane has one job at a time. Whoever runs it tells the lane by when the worker has to say something; a worker that does not is ended,
and another one started, after longer and longer pauses where it keeps ending early. It dies with its node, even on kill -9.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import trio

from protocol import checks, limits
from protocol.errors import ConfigError, RemoteProtocolError
from runtimes.lines.messages import LINE_WORKER, Load, Loaded, LoadFailed
from runtimes.worker_process import Walls, WorkerLink, WorkerProcess, environment_of, open_walled, pause_after

log = logging.getLogger(__name__)

_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
Start = Callable[[], AbstractAsyncContextManager[WorkerLink]]


def starts(module: str, walls: Walls | None, environment: Collection[str] = ()) -> Start:
    """How workers of a module are started: within walls, or without where ``walls`` is None; then ``environment`` names what else they
    get of ours."""

    @asynccontextmanager
    async def without() -> AsyncIterator[WorkerLink]:
        worker = WorkerProcess(
            LINE_WORKER,
            lambda descriptor: [sys.executable, "-P", "-m", module, str(descriptor), str(os.getpid())],
            environment_of({*_KEPT_ENVIRONMENT, *environment}),
        )
        try:
            yield worker
        finally:
            await worker.end()

    return without if walls is None else partial(open_walled, LINE_WORKER, module, walls)


class Lane:
    """Keeps a worker alive. ``hear`` is called with what it says of jobs, ``changed`` when it is ready and when it has ended."""

    def __init__(
        self,
        order: Load,
        start: Start,
        hear: Callable[[Lane, Any], None],
        changed: Callable[[Lane], None],
        load_s: float | None = None,
    ) -> None:
        """``load_s``: how long loading may take; None: LINE_LOAD_TIMEOUT_S."""
        self._order, self._start, self._hear, self._tell_changed = order, start, hear, changed
        self._load_s = limits.LINE_LOAD_TIMEOUT_S if load_s is None else load_s
        self._worker: WorkerLink | None = None
        self._due_s = math.inf
        self._due_changed = trio.Event()
        self.loaded: Loaded | None = None
        self.restarts = 0
        self.has_overrun = False  # whether the last worker was ended since it did not say in time what it owed
        self.used_too_much = ""  # what the sandbox ended the last worker for

    def __repr__(self) -> str:
        return f"<Lane {self._order.name}, {'alive' if self.alive else 'down'}>"

    @property
    def alive(self) -> bool:
        return self._worker is not None

    @property
    def worker_pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._worker.pid if self._worker is not None else 0

    def send_nowait(self, message: object) -> None:
        """To the worker, where there is one."""
        if self._worker is not None:
            self._worker.send_nowait(message)

    def expect_by(self, due_s: float) -> None:
        """The worker is ended at this time (of trio's clock) unless another one is named before; math.inf: it owes nothing."""
        is_sooner = due_s < self._due_s
        self._due_s = due_s
        if self._worker is not None:
            self._worker.rest(due_s == math.inf)
        if is_sooner:
            self._due_changed.set()

    async def supervise(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps a worker alive until cancelled. Raises ConfigError when the first one cannot load the Cargo."""
        pause_s = 0.0
        while True:
            served_s = await self._live(task_status if self.loaded is None else None)
            pause_s = pause_after(pause_s, served_s)
            await trio.sleep(pause_s)
            self.restarts += 1

    async def _live(self, task_status: trio.TaskStatus[None] | None) -> float:
        """One life of a worker. Returns the seconds in which it served.

        ``task_status`` is given until one has served; a failure before that is the caller's.
        """
        started_s, self.has_overrun, self.used_too_much = trio.current_time(), False, ""
        code = 0
        try:
            async with self._start() as worker:
                try:
                    await self._talk(worker, task_status)
                finally:
                    self._worker, self._due_s = None, math.inf
                    code = await worker.end()
                    self.used_too_much = worker.overrun
                    self._tell_changed(self)
        except (OSError, ConfigError) as error:
            if task_status is not None and self.loaded is None:
                raise self._not_started(error) from error
            log.warning("the worker of %s was not started: %s", self._order.name, error)
            return 0.0
        if self.loaded is None:
            raise ConfigError(self._why_not_loaded(code))
        return trio.current_time() - started_s

    def _not_started(self, error: OSError | ConfigError) -> ConfigError:
        if isinstance(error, ConfigError):
            return error
        return ConfigError(f"the process for {self._order.name} could not be started ({error}); free memory")

    async def _talk(self, worker: WorkerLink, task_status: trio.TaskStatus[None] | None) -> None:
        async with trio.open_nursery() as nursery:
            self.expect_by(trio.current_time() + self._load_s)
            nursery.start_soon(worker.write, nursery.cancel_scope)
            nursery.start_soon(self._watch, worker, nursery.cancel_scope)
            await self._serve(worker, task_status)
            nursery.cancel_scope.cancel()

    async def _watch(self, worker: WorkerLink, scope: trio.CancelScope) -> None:
        """Ends a worker that has not said in time what it owes.

        A time that moves away wakes nobody: each job sets one, and most end long before it. What was slept for is looked at again.
        """
        while True:
            if trio.current_time() >= self._due_s:
                worker.has_stalled = self.has_overrun = True
                scope.cancel()
                return
            self._due_changed = trio.Event()
            with trio.move_on_at(self._due_s):
                await self._due_changed.wait()

    async def _serve(self, worker: WorkerLink, task_status: trio.TaskStatus[None] | None) -> None:
        worker.send_nowait(self._order)
        try:
            async for message in worker.messages():
                if isinstance(message, Loaded | LoadFailed) and self._worker is not None:
                    raise RemoteProtocolError("a worker loads once")  # else it would owe nothing, and be given a second job
                if isinstance(message, LoadFailed):
                    if task_status is not None:
                        raise ConfigError(checks.made_printable(message.message))
                    return
                if isinstance(message, Loaded):
                    self._begin(worker, message)
                    if task_status is not None:
                        task_status.started()
                else:
                    self._hear(self, message)
        except RemoteProtocolError:
            worker.has_stalled = True  # a worker that talks nonsense is replaced, and gets no time to end by itself

    def _begin(self, worker: WorkerLink, message: Loaded) -> None:
        self._worker, self.loaded = worker, message
        self.expect_by(math.inf)
        self._tell_changed(self)

    def _why_not_loaded(self, code: int) -> str:
        name = self._order.name
        if self.has_overrun:
            return f"{name} was not loaded after {self._load_s:.0f} s; use a smaller one"
        if self.used_too_much:
            return f"{name} uses more {self.used_too_much} to load than its trust level grants; ask for a higher one"
        return f"the worker of {name} ended with code {code} while it loaded; use a smaller one, or free memory"
