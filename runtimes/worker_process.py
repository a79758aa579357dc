"""A worker process as the node sees it: one life of it, in frames over a socket pair. What keeps one alive is each runtime's own."""

from __future__ import annotations

import os
import socket
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import trio

from protocol import limits
from protocol.framing import FrameDecoder, encode_frame
from protocol.registry import Registry

_READ_BYTES = 256 * 1024
_POLL_S = 0.01
_HEALTHY_S = 10.0  # a worker that served so long starts the pauses anew


def environment_of(names: Collection[str], prefixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Of the node's environment what these names and prefixes say, and where our packages are; no secret of the node."""
    kept = {name: value for name, value in os.environ.items() if name in names or name.startswith(prefixes)}
    return kept | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONUNBUFFERED": "1"}


def pause_after(pause_s: float, served_s: float) -> float:
    """Seconds to wait before the next start: twice the last pause, unless the worker that ended has served well in between."""
    if served_s >= _HEALTHY_S:
        return limits.WORKER_RESTART_MIN_S
    return min(max(2 * pause_s, limits.WORKER_RESTART_MIN_S), limits.WORKER_RESTART_MAX_S)


class WorkerProcess:
    """One life. ``heard_s``: when it said something last, on trio's clock; ``has_stalled``: it gets no time to end by itself."""

    def __init__(self, registry: Registry, command: Callable[[int], list[str]], environment: dict[str, str]) -> None:
        """``command(descriptor)`` is the program that is given that end of the socket pair.

        Starts it. Not in a thread: the kernel ends a worker together with the thread that started it. Raises OSError.
        """
        self._registry = registry
        self._decoder = FrameDecoder(registry)
        self._sock, theirs = socket.socketpair()
        self._sock.setblocking(False)
        with theirs:
            try:
                self.process = _spawn(command(theirs.fileno()), theirs.fileno(), environment)
            except OSError:
                self._sock.close()
                raise
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._sock))
        self._outgoing: deque[bytes] = deque()
        self._outgoing_changed = trio.Event()
        self._is_writing = False
        self.heard_s = trio.current_time()
        self.has_stalled = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._registry.name} {self.process.pid}>"

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

    async def end(self) -> int:
        """Ends the process, at once where it has stalled, and returns its code."""
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


def _spawn(command: list[str], descriptor: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        cwd="/",
    )
