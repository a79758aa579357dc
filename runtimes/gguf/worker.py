"""The worker process: ``python -m runtimes.gguf.worker FD`` with one end of a socket pair.

Two threads. The reader takes frames from the node, prepares jobs (template, tokens) and puts them into the inbox; the main thread runs
the engine: take the inbox, one step, send what it gave. Preparing runs while llama.cpp computes, since that releases the GIL. The driver of
a pipeline does both in one thread.

It dies with its node, even on kill -9: the reader ends the process at the end of the stream, and where the kernel offers it
(PR_SET_PDEATHSIG) the kernel does too. That signal comes when the *thread* that spawned us ends, so cargo.py spawns from trio's.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from protocol import limits
from protocol.errors import ArchipelagError, Code, ConfigError, Refused
from protocol.framing import FrameDecoder, encode_frame
from protocol.generation import GENERATION
from runtimes.gguf.embed import EmbeddingJob
from runtimes.gguf.engine import Events, Job
from runtimes.gguf.load import Loaded, load, load_stage
from runtimes.gguf.messages import (
    GGUF_WORKER,
    Arrived,
    BatchFailed,
    Cancel,
    Embed,
    Embedded,
    Load,
    LoadFailed,
    Output,
    Rejected,
    Room,
    Start,
    Step,
)
from runtimes.gguf.stage_worker import StageWorker

_READ_BYTES = 256 * 1024
_OPEN_FILES_MAX = 256
_PR_SET_PDEATHSIG = 1
_HEARTBEAT_S = limits.WORKER_STALL_S / 8  # a long prompt is computed in many steps that give nothing to say
_STEP_BYTES_MAX = limits.FRAME_HEADER_BYTES_MAX // 2
_OUTPUT_BYTES = 32  # an Output beside its text and logprobs: five prefixes and two integers of at most 9 bytes


class Link:
    """The socket, from the worker's side. ``send`` is called by both threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._lock = sock, threading.Lock()
        self._decoder = FrameDecoder(GGUF_WORKER)
        self._pending: list[Any] = []

    def __repr__(self) -> str:
        return f"<Link {self._sock.fileno()}>"

    def send(self, *messages: object) -> None:
        """One write for all. A node that has gone ends the process."""
        data = b"".join(encode_frame(GGUF_WORKER, message) for message in messages)
        with self._lock:
            try:
                self._sock.sendall(data)
            except OSError:
                os._exit(0)

    def receive(self) -> Any:
        """The next message. At the end of the stream the process ends at once, whatever it computes."""
        while not self._pending:
            self._fill(0)
        return self._pending.pop(0)

    def receive_nowait(self) -> Any:
        """The next message, or None where none has come yet."""
        if not self._pending:
            self._fill(socket.MSG_DONTWAIT)
        return self._pending.pop(0) if self._pending else None

    def receive_within(self, timeout_s: float | None) -> Any:
        """The next message, or None where none comes in time."""
        if not self._pending and timeout_s is not None and not select.select([self._sock], [], [], timeout_s)[0]:
            return None
        return self.receive()

    def _fill(self, flags: int) -> None:
        try:
            data = self._sock.recv(_READ_BYTES, flags)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            os._exit(0)
        self._pending.extend(self._decoder.feed(data))


class Worker:
    """Reader and loop over one loaded model."""

    def __init__(self, link: Link, loaded: Loaded) -> None:
        self._link, self._loaded = link, loaded
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Who drives a pipeline waits for other stages anyway, and each token waits for it: a hand-over between threads would cost more
        # than preparing jobs between steps.
        self._is_driver = loaded.ring is not None
        self._room: Room | None = None
        self._said_s = 0.0

    def run(self) -> None:
        """Never returns: the end of the stream ends the process."""
        if not self._is_driver:
            threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            while True:
                self.turn()
        except BaseException:
            _end_with_error()

    def turn(self) -> None:
        """Takes what has come, computes one step, says what it gave."""
        engine = self._loaded.engine
        if engine.is_idle:
            engine.tidy()
        embedder = self._loaded.embedder
        is_embedding = embedder is not None and not embedder.is_idle
        self._take(block=not is_embedding and (engine.is_idle or engine.is_waiting_for_stages))
        self._say(engine.admit())
        self._say(engine.step())
        if embedder is not None:
            self._tell(embedder.step(engine.spare_s))

    def _tell(self, over: list[Embedded | Rejected]) -> None:
        if over:
            self._said_s = time.monotonic()
            self._link.send(*over)

    def _say(self, events: Events) -> None:
        """Tells what happened, and the room where it has changed or nothing was said for long."""
        answers = [part for message in events.messages() for part in _parts(message)]
        room, now = self._loaded.engine.room(), time.monotonic()
        if room != self._room or (not answers and now - self._said_s > _HEARTBEAT_S):
            self._room = room
            answers.append(room)
        if answers:
            self._said_s = now
            self._link.send(*answers)

    def _take(self, block: bool) -> None:
        """Hands what has come to the engine; waits for something when there is nothing to compute."""
        timeout_s = None if self._loaded.engine.is_idle else _HEARTBEAT_S
        if self._is_driver:
            message = self._link.receive_within(timeout_s) if block else self._link.receive_nowait()
            while message is not None:
                self._receive(message)
                message = self._link.receive_nowait()
            block = False
        while True:
            try:
                item = self._inbox.get(block, timeout_s)
            except queue.Empty:
                return
            block = False
            if isinstance(item, Cancel):
                self._cancel(item.job)
                continue
            if isinstance(item, Arrived):
                self._hear_of_stages(item)
                continue
            try:
                self._submit(item)
            except Refused as refusal:
                self._link.send(Rejected(item.number, refusal.code, refusal.message))

    def _submit(self, job: Job | EmbeddingJob) -> None:
        """Raises Refused."""
        if not isinstance(job, EmbeddingJob):
            self._loaded.engine.submit(job)
        elif self._loaded.embedder is not None:
            self._loaded.embedder.submit(job)

    def _cancel(self, number: int) -> None:
        if not self._loaded.engine.cancel(number) and self._loaded.embedder is not None:
            self._loaded.embedder.cancel(number)

    def _hear_of_stages(self, message: Arrived) -> None:
        ring = self._loaded.ring
        if ring is None:
            raise ConfigError("a whole model has no other stages")
        try:
            ring.arrived(message.step, message.times, message.activations, message.rows)
        except Refused as refusal:
            self._link.send(BatchFailed(message.step, refusal.code, refusal.message))

    def _read(self) -> None:
        try:
            while True:
                self._receive(self._link.receive())
        except BaseException:  # a reader that is gone would leave a worker that nobody can talk to
            _end_with_error()

    def _receive(self, message: Any) -> None:
        if isinstance(message, Cancel | Arrived):
            self._inbox.put(message)
        elif isinstance(message, Start):
            self._start(message)
        elif isinstance(message, Embed):
            self._embed(message)
        else:
            raise ConfigError(f"a worker has no use for {type(message).__name__}")

    def _embed(self, order: Embed) -> None:
        try:
            if self._loaded.embedder is None:
                raise Refused(Code.UNKNOWN_CARGO, "this Island makes no embeddings with this model")
            self._inbox.put(self._loaded.embedder.prepare(order))
        except Refused as refusal:
            self._link.send(Rejected(order.job, refusal.code, refusal.message))
        except ArchipelagError as error:
            self._link.send(Rejected(order.job, Code.BAD_INPUT, str(error)[:500]))

    def _start(self, order: Start) -> None:
        preparer = self._loaded.preparer
        try:
            job = preparer.job(order.job, GENERATION.decode(order.generation), order.salt, order.grammar)
            done = preparer.finished(job)
        except Refused as refusal:
            self._link.send(Rejected(order.job, refusal.code, refusal.message))
        except ArchipelagError as error:
            self._link.send(Rejected(order.job, Code.BAD_INPUT, str(error)[:500]))
        else:
            if done is None:
                if self._loaded.ring is not None:
                    self._loaded.ring.stages = max(2, order.stages)
                self._inbox.put(job)
            else:
                self._link.send(done)


def _parts(message: object) -> Iterator[object]:
    """A message as frames can carry it: the logprobs of many answers may be more than one header holds."""
    if not isinstance(message, Step):
        yield message
        return
    outputs: list[Output] = []
    size = at = end = 0
    for output in message.outputs:
        more = _OUTPUT_BYTES + 4 * len(output.text) + len(output.logprobs)
        if outputs and size + more > _STEP_BYTES_MAX:
            yield Step(tuple(outputs), message.tokens[at:end])
            outputs, size, at = [], 0, end
        outputs.append(output)
        size, end = size + more, end + 4 * output.count
    yield Step(tuple(outputs), message.tokens[at:end])


def _end_with_error() -> NoReturn:
    sys.excepthook(*_without_values())
    os._exit(1)


def _without_values() -> tuple[Any, Any, Any]:
    """The current exception without its text, which may hold a prompt; the traceback shows lines of code only."""
    kind, _, trace = sys.exc_info()
    return kind, kind("hidden") if kind in (ValueError, TypeError, KeyError) else RuntimeError("hidden"), trace


def confine() -> None:
    """No core dumps (they would hold prompts), few files, and an end together with the parent."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the node decides when we end
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])  # parent: 0 inside a sandbox, which sees to all this
    if parent:
        confine()
    faulthandler.enable()  # lines of code, no values
    if parent and os.getppid() != parent:  # it ended before the signal was asked for
        os._exit(0)
    link = Link(socket.socket(fileno=descriptor))
    order = link.receive()
    if not isinstance(order, Load):
        raise ConfigError("the first frame to a worker is Load")
    try:
        if order.is_stage:
            StageWorker(link, load_stage(order)).run()
        loaded = load(order, link.send)
    except ConfigError as error:
        link.send(LoadFailed(str(error)))
        os._exit(0)
    except Exception as error:  # whatever a damaged file leads to; no job has come yet, so the text holds no prompt
        reason = f"{type(error).__name__}: {error}"[:300]
        link.send(LoadFailed(f"{order.path} could not be loaded ({reason}); it may be damaged: delete it and fetch it again"))
        os._exit(1)
    link.send(loaded.ready)
    Worker(link, loaded).run()


if __name__ == "__main__":
    main()
