"""Two ends of a stream of frames without a network, so that tests may let hours pass on a clock of their own."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import trio

from protocol.errors import LinkLost
from protocol.framing import FrameDecoder, encode_frame
from protocol.registry import Registry


class MemoryStream:
    """What node.net.frames.FrameStream offers to those who talk over it. ``frozen``: what is sent gets lost, as at a stopped process."""

    def __init__(self, registry: Registry, remote_peer: str, send: Any, receive: Any) -> None:
        self.remote_peer = remote_peer
        self._registry, self._send, self._receive = registry, send, receive
        self._decoder = FrameDecoder(registry)
        self._heard: deque[Any] = deque()
        self.frozen = False
        self.sent: list[Any] = []

    async def send(self, message: Any) -> None:
        await self.send_frames(encode_frame(self._registry, message), 1)

    async def send_frames(self, frames: bytes, count: int) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += list(FrameDecoder(self._registry).feed(frames))
        try:
            if not self.frozen:
                self._send.send_nowait(frames)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkLost("the other end is gone") from error

    async def receive(self) -> Any:
        while not self._heard:
            try:
                self._heard.extend(self._decoder.feed(await self._receive.receive()))
            except (trio.EndOfChannel, trio.ClosedResourceError) as error:
                raise LinkLost("the other end is gone") from error
        return self._heard.popleft()

    def abort(self) -> None:
        self._send.close()
        self._receive.close()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()


def memory_pair(registry: Registry, left: str, right: str) -> tuple[Any, Any]:
    """The end of peer ``left`` and that of peer ``right``."""
    to_right, at_right = trio.open_memory_channel[bytes](math.inf)
    to_left, at_left = trio.open_memory_channel[bytes](math.inf)
    return MemoryStream(registry, right, to_right, at_left), MemoryStream(registry, left, to_left, at_right)
