"""One writer for many speakers: frames of all jobs of a stream go out in order, those that wait together in one write.

An engine step ends with a token for each running answer; sent one by one that would be as many records and system calls. Speakers
never block on the network: what waits is bounded in bytes, and a peer that reads so slowly that the bound is reached loses the stream.
"""

from __future__ import annotations

from typing import Any

import trio

from node.net.frames import FrameStream
from protocol.errors import LinkLost
from protocol.framing import encode_frame
from protocol.registry import Registry

WAITING_BYTES_MAX = 32 * 1024 * 1024


class Outbox:
    """Queue of frames for one stream. ``run`` must be running in the stream's nursery."""

    def __init__(self, stream: FrameStream, registry: Registry) -> None:
        self._stream, self._registry = stream, registry
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._more = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self.lost = False
        self.frames_total = 0
        self.writes_total = 0

    def __repr__(self) -> str:
        return f"<Outbox {self._waiting_bytes} bytes waiting, {self.frames_total} frames in {self.writes_total} writes>"

    def send_nowait(self, message: Any) -> None:
        """Raises LinkLost when the stream is gone or the peer has stopped reading."""
        if self.lost:
            raise LinkLost("the stream has ended")
        frame = encode_frame(self._registry, message)
        if self._waiting_bytes + len(frame) > WAITING_BYTES_MAX:
            self.lost = True
            self._more.set()
            raise LinkLost(f"{self._stream.remote_peer} does not read: {self._waiting_bytes} bytes wait for it")
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        self._more.set()

    async def wait_sent(self) -> None:
        """Returns when everything so far has been written."""
        while self._waiting and not self.lost:
            self._idle = trio.Event()
            await self._idle.wait()

    async def run(self) -> None:
        """Writes until the stream is lost or this is cancelled. Raises LinkLost."""
        try:
            while not self.lost:
                await self._more.wait()
                self._more = trio.Event()
                while self._waiting and not self.lost:
                    frames, self._waiting = self._waiting, []
                    await self._stream.send_frames(b"".join(frames), len(frames))
                    self._waiting_bytes -= sum(map(len, frames))
                    self.frames_total += len(frames)
                    self.writes_total += 1
                self._idle.set()
            raise LinkLost("the stream has ended")
        finally:
            self.lost = True
            self._idle.set()
