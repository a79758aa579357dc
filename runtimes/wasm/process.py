"""A lane keeps a WASM worker alive (runtimes/worker_process.py is one life of it).

A lane has one job at a time. Whoever runs it tells the lane by when the worker has to say something; a worker that does not is ended,
and another one started, after longer and longer pauses where it keeps ending early. It dies with its node, even on kill -9.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import trio

from protocol import limits
from protocol.errors import ConfigError, RemoteProtocolError
from runtimes.wasm.messages import WASM_WORKER, Load, Loaded, LoadFailed
from runtimes.worker_process import WorkerProcess, environment_of, pause_after

_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def worker_command(descriptor: int) -> list[str]:
    """The program that is given this end of the socket pair."""
    return [sys.executable, "-P", "-m", "runtimes.wasm.worker", str(descriptor), str(os.getpid())]


class Lane:
    """Keeps a WASM worker alive. ``hear`` is called with what it says of jobs, ``changed`` when it is ready and when it has ended."""

    def __init__(self, order: Load, hear: Callable[[Lane, Any], None], changed: Callable[[Lane], None]) -> None:
        self._order, self._hear, self._tell_changed = order, hear, changed
        self._worker: WorkerProcess | None = None
        self._due_s = math.inf
        self._due_changed = trio.Event()
        self.loaded: Loaded | None = None
        self.restarts = 0
        self.has_overrun = False  # whether the last worker was ended since it did not say in time what it owed

    def __repr__(self) -> str:
        return f"<Lane {self._order.name}, {'alive' if self.alive else 'down'}>"

    @property
    def alive(self) -> bool:
        return self._worker is not None

    @property
    def worker_pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._worker.process.pid if self._worker is not None else 0

    def send_nowait(self, message: object) -> None:
        """To the worker, where there is one."""
        if self._worker is not None:
            self._worker.send_nowait(message)

    def expect_by(self, due_s: float) -> None:
        """The worker is ended at this time (of trio's clock) unless another one is named before; math.inf: it owes nothing."""
        is_sooner = due_s < self._due_s
        self._due_s = due_s
        if is_sooner:
            self._due_changed.set()

    async def supervise(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps a worker alive until cancelled. Raises ConfigError when the first one cannot load the module."""
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
        try:
            worker = WorkerProcess(WASM_WORKER, worker_command, environment_of(_KEPT_ENVIRONMENT))
        except OSError as error:
            if task_status is None:
                return 0.0
            raise ConfigError(f"the process for {self._order.name} could not be started ({error}); free memory") from error
        started_s, self.has_overrun = trio.current_time(), False
        try:
            async with trio.open_nursery() as nursery:
                self.expect_by(started_s + limits.WASM_LOAD_TIMEOUT_S)
                nursery.start_soon(worker.write, nursery.cancel_scope)
                nursery.start_soon(self._watch, worker, nursery.cancel_scope)
                await self._serve(worker, task_status)
                nursery.cancel_scope.cancel()
        finally:
            self._worker, self._due_s = None, math.inf
            code = await worker.end()
            self._tell_changed(self)
        if self.loaded is None:
            raise ConfigError(_why_not_loaded(self._order.name, code, worker.has_stalled))
        return trio.current_time() - started_s

    async def _watch(self, worker: WorkerProcess, scope: trio.CancelScope) -> None:
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

    async def _serve(self, worker: WorkerProcess, task_status: trio.TaskStatus[None] | None) -> None:
        worker.send_nowait(self._order)
        try:
            async for message in worker.messages():
                if isinstance(message, LoadFailed):
                    if task_status is not None:
                        raise ConfigError(message.message)
                    return
                if isinstance(message, Loaded):
                    self._begin(worker, message)
                    if task_status is not None:
                        task_status.started()
                else:
                    self._hear(self, message)
        except RemoteProtocolError:
            worker.has_stalled = True  # a worker that talks nonsense is replaced, and gets no time to end by itself

    def _begin(self, worker: WorkerProcess, message: Loaded) -> None:
        self._worker, self.loaded = worker, message
        self.expect_by(math.inf)
        self._tell_changed(self)


def _why_not_loaded(name: str, code: int, has_stalled: bool) -> str:
    if has_stalled:
        return f"the module of {name} was not compiled after {limits.WASM_LOAD_TIMEOUT_S:.0f} s; use a smaller one"
    return f"the worker of {name} ended with code {code} while it compiled the module; use a smaller one, or free memory"
