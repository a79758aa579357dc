"""The worker process: ``python -m runtimes.wasm.worker FD PARENT`` with one end of a socket pair.

Two threads. The main thread compiles the module, then runs one job after the other; the reader takes frames from the node, and ends a
job that is cancelled or out of time. That is done over and over until it has worked, since a job that is only about to start does not
feel it. It dies with its node, even on kill -9 (link.py).
"""

from __future__ import annotations

import faulthandler
import os
import queue
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from protocol import limits
from protocol.errors import ConfigError
from runtimes.wasm.engine import ENGINE_NAME, Compiled, Interrupted, RunLimits, RunResult, WasmEngine, run_module
from runtimes.wasm.link import Link, confine
from runtimes.wasm.messages import WASM_WORKER, Cancel, Ended, Load, Loaded, LoadFailed, Outcome, Output, Run, Taken

# The interpreter and its libraries have 0.3 GB of addresses, a memory 256 MiB; the rest is for compiling a large module.
_ADDRESS_BYTES_MAX = 2 * 1024**3
_INSIST_S = 0.02


class Job:
    """A run as both threads see it."""

    def __init__(self, order: Run, link: Link) -> None:
        self.order, self._link = order, link
        self.deadline_s = time.monotonic() + order.timeout_ms / 1000
        self.outcome: Outcome | None = None  # why it has to end, where it has to
        self.is_over = False
        self._changed = threading.Condition()
        self._window_bytes = limits.WASM_WINDOW_BYTES

    def __repr__(self) -> str:
        return f"<Job {self.order.job}{' over' if self.is_over else ''}>"

    def emit(self, data: bytes) -> None:
        """Sends a piece of output; waits while the reader is behind. Raises Interrupted where the job is to end."""
        with self._changed:
            while self._window_bytes < len(data) and self.outcome is None:
                self._changed.wait()
            if self.outcome is not None:
                raise Interrupted
            self._window_bytes -= len(data)
        self._link.send(Output(self.order.job, data))

    def taken(self, count: int) -> None:
        with self._changed:
            self._window_bytes += count
            self._changed.notify()

    def end(self, outcome: Outcome) -> None:
        """The first reason stays."""
        with self._changed:
            self.outcome = self.outcome or outcome
            self._changed.notify()


class Worker:
    """Reader and loop over one compiled module."""

    def __init__(self, link: Link, compiled: Compiled) -> None:
        self._link, self._compiled = link, compiled
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._job: Job | None = None  # of the reader

    def run(self) -> NoReturn:
        """The end of the stream ends the process."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            while True:
                self._do(self._inbox.get())
        except BaseException:
            _end_with_error()

    def _do(self, job: Job) -> None:
        order = job.order
        most = RunLimits(order.fuel, order.output_bytes_max)
        result = run_module(self._compiled, order.input, job.emit, most, order.seed)
        job.is_over = True
        self._link.send(_ended(job, result))

    def _read(self) -> None:
        try:
            while True:
                message = self._link.receive_within(self._patience_s())
                if message is not None:
                    self._receive(message)
                self._look()
        except BaseException:  # a reader that is gone would leave a worker that nobody can talk to
            _end_with_error()

    def _patience_s(self) -> float | None:
        """How long the reader may wait for a message."""
        job = self._job
        if job is None or job.is_over:
            return None
        return _INSIST_S if job.outcome is not None else max(0.0, job.deadline_s - time.monotonic())

    def _look(self) -> None:
        """Ends the job where its time has come."""
        job = self._job
        if job is None or job.is_over:
            return
        if time.monotonic() >= job.deadline_s:
            job.end(Outcome.TIMED_OUT)
        if job.outcome is not None:
            self._compiled.engine.interrupt()

    def _receive(self, message: Any) -> None:
        if isinstance(message, Run):
            self._job = Job(message, self._link)
            self._inbox.put(self._job)
        elif not isinstance(message, Cancel | Taken):
            raise ConfigError(f"a worker has no use for {type(message).__name__}")
        elif self._job is not None and message.job == self._job.order.job:
            if isinstance(message, Cancel):
                self._job.end(Outcome.INTERRUPTED)
            else:
                self._job.taken(message.count)


def _ended(job: Job, result: RunResult) -> Ended:
    outcome, message = result.outcome, result.message
    if outcome is Outcome.INTERRUPTED and job.outcome is Outcome.TIMED_OUT:
        outcome, message = job.outcome, f"the module ran for more than {job.order.timeout_ms / 1000:g} s"
    return Ended(job.order.job, outcome, message, result.exit_code, result.fuel_used, result.stderr)


def _end_with_error() -> NoReturn:
    """Says where, not what: a message may hold what somebody sent."""
    kind, _, trace = sys.exc_info()
    sys.excepthook(RuntimeError, RuntimeError(f"{kind.__name__ if kind else 'error'} (text hidden)"), trace)
    os._exit(1)


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    confine(parent, _ADDRESS_BYTES_MAX)
    faulthandler.enable()  # lines of code, no values
    link = Link(socket.socket(fileno=descriptor), WASM_WORKER)
    order = link.receive_within(None)
    if not isinstance(order, Load):
        raise ConfigError("the first frame to a worker is Load")
    try:
        compiled = WasmEngine().compile(order.module, order.content_hash)
    except (ConfigError, MemoryError) as error:
        link.send(LoadFailed(f"{order.name}: {error or 'the module needs too much memory to compile'}"))
        os._exit(0)
    link.send(Loaded(ENGINE_NAME))
    Worker(link, compiled).run()


if __name__ == "__main__":
    main()
