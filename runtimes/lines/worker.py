"""The worker process of a runtime of lines: ``python -m runtimes.RUNTIME.worker FD PARENT`` with one end of a socket pair.

Two threads. The main thread loads the Cargo, then runs one job after the other; the reader takes frames from the node, and ends a job
that is cancelled or out of time. That is done over and over until it has worked, since a job that is only about to start does not feel
it. It dies with its node, even on kill -9 (link.py). ``PARENT``: the node's process id, or 0 inside a sandbox, which sees to it.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from protocol import limits
from protocol.cargo_io import ImageLine, ProgressLine, StatusLine, TokenLine, decode_input, encode_line
from protocol.checks import made_printable
from protocol.errors import ConfigError, RemoteProtocolError
from runtimes.lines.engine import BadJob, BrokenJob, JobStopped, LineEngine, LoadOrder
from runtimes.lines.link import Link, confine
from runtimes.lines.messages import LINE_WORKER, Cancel, Ended, Load, Loaded, LoadFailed, Outcome, Output, Run, Taken

_INSIST_S = 0.02


class Job:
    """A run as both threads see it."""

    def __init__(self, order: Run, link: Link) -> None:
        self.order, self._link = order, link
        self.deadline_s = time.monotonic() + order.timeout_ms / 1000
        self.outcome: Outcome | None = None  # why it has to end, where it has to
        self.is_over = False
        self._changed = threading.Condition()
        self._window_bytes = limits.LINE_WINDOW_BYTES

    def __repr__(self) -> str:
        return f"<Job {self.order.job}{' over' if self.is_over else ''}>"

    def emit(self, data: bytes) -> None:
        """Sends a piece of output; waits while the reader is behind. Raises JobStopped."""
        for start in range(0, len(data), limits.LINE_WINDOW_BYTES):
            self._emit(data[start : start + limits.LINE_WINDOW_BYTES])

    def _emit(self, piece: bytes) -> None:
        with self._changed:
            while self._window_bytes < len(piece) and self.outcome is None:
                self._changed.wait()
            self.check()
            self._window_bytes -= len(piece)
        self._link.send(Output(self.order.job, piece))

    def check(self) -> None:
        """Raises JobStopped where the job has to end."""
        if self.outcome is not None:
            raise JobStopped

    def taken(self, count: int) -> None:
        with self._changed:
            self._window_bytes += count
            self._changed.notify()

    def end(self, outcome: Outcome) -> None:
        """The first reason stays."""
        with self._changed:
            self.outcome = self.outcome or outcome
            self._changed.notify()


class Computing(Protocol):
    """What the main thread runs jobs with."""

    @property
    def label(self) -> str: ...

    def run(self, job: Job) -> Ended:
        """Its outcome INTERRUPTED where the job was ended from outside."""
        ...

    def interrupt(self) -> None:
        """Called again and again, by another thread, until a job has ended that must."""
        ...


class Worker:
    """Reader and loop over one loaded Cargo."""

    def __init__(self, link: Link, computing: Computing) -> None:
        self._link, self._computing = link, computing
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
        ended = self._computing.run(job)
        job.is_over = True
        if ended.outcome is Outcome.INTERRUPTED and job.outcome is Outcome.TIMED_OUT:
            ended = Ended(ended.job, job.outcome, f"it ran for more than {job.order.timeout_ms / 1000:g} s", stderr=ended.stderr)
        self._link.send(ended)

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
            self._computing.interrupt()

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


class _EngineJob:
    """A job as a LineEngine sees it."""

    def __init__(self, job: Job, fields: Mapping[str, Any]) -> None:
        self._job, self.fields = job, fields
        self.seed = bytes(job.order.seed)

    def say(self, line: StatusLine | TokenLine | ProgressLine | ImageLine) -> None:
        self._job.emit(encode_line(line))

    def check(self) -> None:
        self._job.check()


class EngineComputing:
    """Runs a LineEngine."""

    def __init__(self, engine: LineEngine) -> None:
        self._engine = engine

    @property
    def label(self) -> str:
        return self._engine.label

    def run(self, job: Job) -> Ended:
        number = job.order.job
        try:
            done = self._engine.run(_EngineJob(job, decode_input(bytes(job.order.input))))
            job.emit(encode_line(done))
        except (BadJob, RemoteProtocolError) as error:
            return Ended(number, Outcome.BAD_INPUT, made_printable(str(error)))
        except BrokenJob as error:
            return Ended(number, Outcome.BROKEN, made_printable(str(error)))
        except JobStopped:
            return Ended(number, Outcome.INTERRUPTED, "it was interrupted")
        except MemoryError:
            return Ended(number, Outcome.BROKEN, "it needs more memory than its Cargo may use; send less at a time")
        return Ended(number, Outcome.EXITED, "")

    def interrupt(self) -> None:
        """An engine looks by itself (``LineJob.check``)."""


def serve(load: Callable[[LoadOrder], LineEngine]) -> NoReturn:
    """The main function of a worker module. ``load`` raises ConfigError."""
    serve_computing(lambda order: EngineComputing(load(order)), None)


def serve_computing(load: Callable[[LoadOrder], Computing], address_bytes_max: int | None) -> NoReturn:
    """The same for what runs jobs its own way. ``address_bytes_max``: of the whole process, where no sandbox bounds it."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    if parent:
        confine(parent, address_bytes_max)
    faulthandler.enable()  # lines of code, no values
    link = Link(socket.socket(fileno=descriptor), LINE_WORKER)
    message = link.receive_within(None)
    if not isinstance(message, Load):
        raise ConfigError("the first frame to a worker is Load")
    try:
        computing = load(message.order())
    except (ConfigError, MemoryError) as error:
        link.send(LoadFailed(f"{message.name}: {str(error) or 'it needs more memory to load than its Cargo may use'}"))
        os._exit(0)
    link.send(Loaded(computing.label))
    Worker(link, computing).run()


def _end_with_error() -> NoReturn:
    """Says where, not what: a message may hold what somebody sent."""
    kind, _, trace = sys.exc_info()
    sys.excepthook(RuntimeError, RuntimeError(f"{kind.__name__ if kind else 'error'} (text hidden)"), trace)
    os._exit(1)
