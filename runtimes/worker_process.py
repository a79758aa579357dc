"""A worker process as the node sees it: one life of it, in frames over a socket pair, in a sandbox or without one. What keeps one alive is
each runtime's own."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from protocol import limits
from protocol.framing import FrameDecoder, encode_frame
from protocol.registry import Registry
from runtimes.sandbox.box import Sandboxed, open_sandboxed
from runtimes.sandbox.command import CONTROL_FD, Bind, Program
from runtimes.sandbox.probe import Sandbox
from runtimes.sandbox.tiers import Tier

_READ_BYTES = 256 * 1024
_POLL_S = 0.01
_HEALTHY_S = 10.0  # a worker that served so long starts the pauses anew


@dataclass(frozen=True, slots=True)
class Walls:
    """The sandbox of a worker, and what of the machine it is shown. ``devices``: of a GPU that was granted. ``environment``: more words."""

    sandbox: Sandbox
    tier: Tier
    reads: tuple[Bind, ...] = ()
    devices: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def environment_of(names: Collection[str], prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Of the node's environment what these names and prefixes say, and where our packages are; no secret of the node."""
    kept = {name: value for name, value in os.environ.items() if name in names or name.startswith(prefixes)}
    return kept | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONUNBUFFERED": "1"}


def pause_after(pause_s: float, served_s: float) -> float:
    """Seconds to wait before the next start: twice the last pause, unless the worker that ended has served well in between."""
    if served_s >= _HEALTHY_S:
        return limits.WORKER_RESTART_MIN_S
    return min(max(2 * pause_s, limits.WORKER_RESTART_MIN_S), limits.WORKER_RESTART_MAX_S)


class WorkerLink(ABC):
    """Frames to and from one life of a worker. ``heard_s``: when it said something last, on trio's clock; ``ready_s``: when it was loaded,
    set by whoever knows; ``has_stalled``: it gets no time to end by itself."""

    def __init__(self, registry: Registry, sock: socket.socket, stream: trio.SocketStream) -> None:
        """``sock`` and ``stream`` are the same end of a socket pair; ``sock`` does not block."""
        self._registry, self._sock, self._stream = registry, sock, stream
        self._decoder = FrameDecoder(registry)
        self._outgoing: deque[bytes] = deque()
        self._outgoing_changed = trio.Event()
        self._is_writing = False
        self.heard_s = trio.current_time()
        self.ready_s = math.inf
        self.has_stalled = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._registry.name} {self.pid}>"

    @property
    @abstractmethod
    def pid(self) -> int:
        """Of the process with which all of the worker ends."""

    @property
    def overrun(self) -> str:
        """Why the sandbox ended it; empty where it did not."""
        return ""

    @abstractmethod
    def rest(self, is_resting: bool) -> None:
        """Whether it has nothing to do, for whoever watches what it uses."""

    def send_nowait(self, message: object) -> None:
        """At once where the socket takes it, which spares each token a turn of the scheduler; else when it does."""
        data = encode_frame(self._registry, message)
        if not (self._outgoing or self._is_writing):
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                pass  # full: the writer waits for room
            except OSError:
                return  # the worker has ended, which its reader notices
            if not data:
                return
        self._outgoing.append(data)
        self._outgoing_changed.set()

    async def write(self, scope: trio.CancelScope) -> None:
        """Sends what was put, until cancelled; cancels ``scope`` when the worker is gone."""
        try:
            while True:
                while self._outgoing:
                    data = b"".join(self._outgoing)
                    self._outgoing.clear()
                    self._is_writing = True
                    await self._stream.send_all(data)
                    self._is_writing = False
                self._outgoing_changed = trio.Event()
                await self._outgoing_changed.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()

    async def messages(self) -> AsyncIterator[Any]:
        """What the worker says, until it ends. Raises RemoteProtocolError for nonsense."""
        while data := await self._read():
            self.heard_s = trio.current_time()
            for message in self._decoder.feed(data):
                yield message

    async def _read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    @abstractmethod
    async def end(self) -> int:
        """Ends the worker, at once where it has stalled, and returns its exit code."""


class WorkerProcess(WorkerLink):
    """One without a sandbox."""

    def __init__(self, registry: Registry, command: Callable[[int], list[str]], environment: dict[str, str]) -> None:
        """``command(descriptor)`` is the program that is given that end of the socket pair.

        Starts it. Not in a thread: the kernel ends a worker together with the thread that started it. Raises OSError.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                self.process = _spawn(command(theirs.fileno()), theirs.fileno(), environment)
            except OSError:
                ours.close()
                raise
        super().__init__(registry, ours, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))

    @property
    def pid(self) -> int:
        return self.process.pid

    def rest(self, is_resting: bool) -> None:
        """Nobody watches it."""

    async def end(self) -> int:
        with trio.CancelScope(shield=True):
            await self._stream.aclose()
            if self.has_stalled:
                self.process.kill()
            with trio.move_on_after(limits.WORKER_EXIT_S):
                while self.process.poll() is None:
                    await trio.sleep(_POLL_S)
            self.process.kill()
            code: int = await trio.to_thread.run_sync(self.process.wait)
        return code


class SandboxedWorker(WorkerLink):
    """One in its sandbox. Whoever has opened that closes it."""

    def __init__(self, registry: Registry, box: Sandboxed) -> None:
        self._box = box
        sock = socket.socket(fileno=os.dup(box.stream.socket.fileno()))
        sock.setblocking(False)
        super().__init__(registry, sock, box.stream)

    @property
    def pid(self) -> int:
        return self._box.pid

    @property
    def overrun(self) -> str:
        return self._box.overrun.value if self._box.overrun is not None else ""

    def rest(self, is_resting: bool) -> None:
        self._box.rest(is_resting)

    async def end(self) -> int:
        with trio.CancelScope(shield=True):
            self._sock.close()
            await self._stream.aclose()
            if self.has_stalled:
                self._box.kill_nowait()
            with trio.move_on_after(limits.WORKER_EXIT_S):  # not by wait(): where we are cancelled, so is what tells it
                while self._box.poll() is None:
                    await trio.sleep(_POLL_S)
            self._box.kill_nowait()
            code = self._box.poll()
        if code is None:
            return -signal.SIGKILL
        return 128 - code if code > 128 else code  # as subprocess tells of signals, and not as shells do


@asynccontextmanager
async def open_walled(registry: Registry, module: str, walls: Walls) -> AsyncIterator[SandboxedWorker]:
    """A worker, ``python -m MODULE FD 0``, in its sandbox until this is left. Raises ConfigError."""
    program = Program(
        command=(sys.executable, "-P", "-m", module, str(CONTROL_FD), "0"),
        reads=walls.reads,
        environment=walls.environment,
        devices=walls.devices,
    )
    async with open_sandboxed(program, walls.tier.lasting(), walls.sandbox) as box:
        worker = SandboxedWorker(registry, box)
        try:
            yield worker
        finally:
            await worker.end()


def _spawn(command: list[str], descriptor: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,  # signals to the node's group are for the node
    )
