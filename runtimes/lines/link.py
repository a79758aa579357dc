"""The worker's end of the socket pair, for any registry of messages, and what a worker gives up before it takes any."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections import deque
from typing import Any

from protocol.framing import FrameDecoder, encode_frame
from protocol.registry import Registry

_READ_BYTES = 256 * 1024
_OPEN_FILES_MAX = 256
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


class Link:
    """Frames to and from the node. ``send`` may be called from several threads, the others from one."""

    def __init__(self, sock: socket.socket, registry: Registry) -> None:
        self._sock, self._registry = sock, registry
        self._lock = threading.Lock()
        self._decoder = FrameDecoder(registry)
        self._pending: deque[Any] = deque()

    def __repr__(self) -> str:
        return f"<Link {self._registry.name} {self._sock.fileno()}>"

    def send(self, message: object) -> None:
        """Returns when the socket has taken it. A node that has gone ends the process."""
        data = encode_frame(self._registry, message)
        with self._lock:
            try:
                self._sock.sendall(data)
            except OSError:
                os._exit(0)

    def receive_within(self, timeout_s: float | None) -> Any:
        """The next message, or None where none comes in time. The end of the stream ends the process, whatever it computes."""
        while not self._pending:
            if timeout_s is not None and not select.select([self._sock], [], [], timeout_s)[0]:
                return None
            self._fill()
        return self._pending.popleft()

    def _fill(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            os._exit(0)
        self._pending.extend(self._decoder.feed(data))


def confine(parent: int, address_bytes_max: int | None) -> None:
    """No core dumps (they would hold what people sent), few files, no new rights, bounded memory, an end together with the parent.

    Of all threads: call it before others are started. ``parent``: process id; where that has ended already, so does this process.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES_MAX)
    if sys.platform == "linux" and address_bytes_max is not None:
        _lower(resource.RLIMIT_AS, address_bytes_max)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the node decides when we end
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(_PR_SET_DUMPABLE, 0)
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the signal was asked for
        os._exit(0)


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(kind, (most, most))
