"""A child process that runs an engine, seen from the node: started, watched, talked to in frames, and started again when it ends.

One that keeps ending early is started after longer and longer pauses. One that owes something and says nothing is ended. It dies with
its node, even on kill -9.
"""

from __future__ import annotations

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import trio

from protocol import limits
from protocol.errors import ConfigError, RemoteProtocolError
from runtimes.error_groups import only_error
from runtimes.gguf.messages import GGUF_WORKER, Load, LoadFailed, Ready
from runtimes.worker_process import Walls, WorkerLink, WorkerProcess, environment_of, open_walled, pause_after

_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
_KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "GGML_", "VK_", "HIP_", "ROCR_", "HSA_", "OMP_", "GOMP_")


def default_threads() -> int:
    """Cores that this process may use, less one for the node itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def worker_environment() -> dict[str, str]:
    """What native code needs to find its drivers, and no secret of the node."""
    # ggml answers a failed assertion by starting gdb on itself, which is slow and would print what is in memory
    return environment_of(_KEPT_ENVIRONMENT, _KEPT_PREFIXES) | {"GGML_NO_BACKTRACE": "1"}


def worker_command(descriptor: int) -> list[str]:
    """The program that is given this end of the socket pair."""
    return [sys.executable, "-P", "-m", "runtimes.gguf.worker", str(descriptor), str(os.getpid())]


Start = Callable[[], AbstractAsyncContextManager[WorkerLink]]


@asynccontextmanager
async def start_plain() -> AsyncIterator[WorkerLink]:
    """A worker without walls. Raises OSError."""
    worker = WorkerProcess(GGUF_WORKER, worker_command, worker_environment())
    try:
        yield worker
    finally:
        await worker.end()


def start_of(walls: Walls | None) -> Start:
    """How workers are started: within walls, or without where there are none."""
    return start_plain if walls is None else partial(open_walled, GGUF_WORKER, "runtimes.gguf.worker", walls)


class EngineProcess(ABC):
    """Keeps a worker alive. Subclasses say what they owe (``_is_busy``), hear its messages (``_hear``) and its end (``_bury``)."""

    def __init__(self, order: Load, walls: Walls | None = None) -> None:
        self._order, self._start = order, start_of(walls)
        self._worker: WorkerLink | None = None
        self._ready: Ready | None = None
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._closed = trio.Event()
        self.restarts = 0

    @abstractmethod
    def _is_busy(self) -> bool:
        """Whether the worker owes someone an answer."""

    @abstractmethod
    def _hear(self, worker: WorkerLink, message: Any) -> None:
        """One message of the worker. Raises RemoteProtocolError for what a worker does not say."""

    @abstractmethod
    def _bury(self, code: int) -> None:
        """The worker has ended with this exit code."""

    @property
    def ready(self) -> Ready:
        """What the worker said when it was loaded. Raises ConfigError where it never was."""
        if self._ready is None:
            raise ConfigError(f"{self._order.name} was never loaded")
        return self._ready

    @property
    def alive(self) -> bool:
        return self._worker is not None

    @property
    def worker_pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._worker.pid if self._worker is not None else 0

    async def wait_changed(self) -> None:
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def aclose(self) -> None:
        """Ends the worker and the jobs that still run. Idempotent."""
        self._scope.cancel()
        await self._closed.wait()

    async def supervise(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps a worker alive until closed. Raises ConfigError when the first one cannot load the model."""
        pause_s = 0.0
        try:
            with self._scope:
                while True:
                    served_s = await self._live(task_status if self._ready is None else None)
                    pause_s = pause_after(pause_s, served_s)
                    await trio.sleep(pause_s)
                    self.restarts += 1
        finally:
            self._closed.set()

    async def _live(self, task_status: trio.TaskStatus[None] | None) -> float:
        """One life of a worker: spawn, load, serve, bury. Returns the seconds in which it served.

        ``task_status`` is given until one has served; a failure before that is the caller's.
        """
        async with AsyncExitStack() as stack:
            try:
                worker = await stack.enter_async_context(self._start())
            except (OSError, ConfigError) as error:
                if task_status is None:
                    return 0.0
                raise ConfigError(f"the engine's process could not be started ({error}); free memory or end other processes") from error
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(worker.write, nursery.cancel_scope)
                    nursery.start_soon(self._watch, worker, nursery.cancel_scope)
                    await self._serve(worker, task_status)
                    nursery.cancel_scope.cancel()
            finally:
                self._worker = None
                code = await worker.end()
                self._bury(code)
        if self._ready is None:
            self._try_plain(code, worker.has_stalled)
        return max(0.0, trio.current_time() - worker.ready_s)

    def _try_plain(self, code: int, has_stalled: bool) -> None:
        """The first load ended without a word: by a crash, the build's kernels may be at fault, so the next one does without them.

        Raises ConfigError where that is no help.

        Seen: llama.cpp built by GCC 12 on a CPU with AMX crashes at its first batch of two rows, since the compiler drops the stores of
        the tile configuration.
        """
        path = self._order.path
        if has_stalled:
            raise ConfigError(f"{path} was not loaded after {limits.WORKER_LOAD_TIMEOUT_S:.0f} s; use a faster disk or a smaller model")
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            raise ConfigError(f"the engine was killed while it loaded {path}, as for want of memory; free some or use a smaller model")
        if code >= 0:
            raise ConfigError(f"the engine gave up with code {code} while it loaded {path}; what it wrote says why; try `make setup`")
        if self._order.plain:
            raise ConfigError(f"the engine crashed twice ({_signal_name(code)}) on {path}; it may be damaged: delete it and fetch it again")
        self._order = replace(self._order, plain=True)

    async def _watch(self, worker: WorkerLink, scope: trio.CancelScope) -> None:
        """Ends a worker that has jobs, or is loading, and says nothing."""
        while True:
            await trio.sleep(limits.WORKER_STALL_S / 10)
            is_loading = self._worker is not worker
            limit_s = limits.WORKER_LOAD_TIMEOUT_S if is_loading else limits.WORKER_STALL_S
            if (is_loading or self._is_busy()) and trio.current_time() - worker.heard_s > limit_s:
                worker.has_stalled = True
                scope.cancel()
                return

    async def _serve(self, worker: WorkerLink, task_status: trio.TaskStatus[None] | None) -> None:
        worker.send_nowait(self._order)
        try:
            async for message in worker.messages():
                if isinstance(message, Ready | LoadFailed) and self._worker is worker:
                    raise RemoteProtocolError("a worker loads once")
                if isinstance(message, LoadFailed):
                    if task_status is not None:
                        raise ConfigError(message.message)
                    return
                self._hear(worker, message)
                if isinstance(message, Ready) and task_status is not None:
                    task_status.started()
        except RemoteProtocolError:
            return  # a worker that talks nonsense is replaced


def _signal_name(code: int) -> str:
    """Of a process that a signal has ended."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


Opened = TypeVar("Opened", bound=EngineProcess)


@asynccontextmanager
async def opened(engine: Opened) -> AsyncIterator[Opened]:
    """The engine, loaded, in a nursery of its own; ended when this is left. Raises ConfigError when it cannot be loaded."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.supervise)
            try:
                yield engine
            finally:
                with trio.CancelScope(shield=True):
                    await engine.aclose()
    except BaseExceptionGroup as group:
        raise only_error(group) from None
