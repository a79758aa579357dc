"""Messages over one stream: the shell round protocol.framing.

Frames are cut out of the chunks that the muxer delivers without copying them first; a large body is put together once,
from the chunks that have really arrived, so a peer cannot make us allocate 64 MiB by announcing it in eight bytes.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from node.net.counters import NetCounters
from node.net.fast_noise import Piece
from node.net.fast_stream import FastStream
from protocol.errors import LinkLost, RemoteProtocolError
from protocol.framing import PREFIX_BYTES, encode_frame, parse_prefix
from protocol.registry import Registry

_YIELD_EVERY = 64  # messages handed out without letting another task run
_MERGE_BELOW_BYTES = 512
_MERGED_BYTES_MAX = 64 * 1024


class StreamEnded(LinkLost):
    """The peer ended the stream between two frames. Whether that was in order is for the protocol above to say."""


_INCOMPLETE = object()


class FrameStream:
    """Messages of one registry to and from one peer. Any number of tasks may send; one may receive.

    Who opened a stream ends it, with aclose, abort or ``async with``: a connection carries STREAMS_PER_PEER_MAX each way.
    """

    def __init__(self, stream: FastStream, registry: Registry, counters: NetCounters, protocol_id: str = "") -> None:
        self.remote_peer: str = str(stream.connection.peer_id)
        self.protocol_id = protocol_id
        self._stream = stream
        self._registry = registry
        self._counters = counters
        self._send_lock = trio.Lock()
        self._chunks: deque[Piece] = deque()
        self._offset = 0  # in the first chunk
        self._have = 0  # bytes from there to the end of the last
        self._lengths: tuple[int, int] | None = None
        self._unyielded = 0
        self._refused = False

    def __repr__(self) -> str:
        return f"<FrameStream {self.protocol_id or self._registry.name} to {self.remote_peer}, {self._stream!r}>"

    async def send(self, message: object) -> None:
        """Waits until the message has left. Raises LinkLost; LocalProtocolError for what is no message of the protocol.

        Cancelled before anything has left, the stream stays usable; in the middle of a frame, it is reset.
        """
        frame = encode_frame(self._registry, message)
        try:
            self._send_lock.acquire_nowait()  # the usual case, and cheaper than a pass through the scheduler
        except trio.WouldBlock:
            await self._send_lock.acquire()
        try:
            await self._stream.write(frame)
        except MuxedStreamError as error:
            raise LinkLost(f"sending to {self.remote_peer}: {error}") from error
        finally:
            self._send_lock.release()
        self._counters.frames_sent += 1
        self._counters.frame_bytes_sent += len(frame)

    async def send_frames(self, frames: bytes, count: int) -> None:
        """Like ``send`` for ``count`` frames that are encoded already, in one write. Raises LinkLost."""
        async with self._send_lock:
            try:
                await self._stream.write(frames)
            except MuxedStreamError as error:
                raise LinkLost(f"sending to {self.remote_peer}: {error}") from error
        self._counters.frames_sent += count
        self._counters.frame_bytes_sent += len(frames)

    async def receive(self) -> Any:
        """The next message. Cancelling it loses nothing.

        Raises StreamEnded at a clean end, its parent LinkLost when the stream was cut, RemoteProtocolError for bytes
        that are no message; the stream is reset then.
        """
        self._unyielded += 1
        if self._unyielded > _YIELD_EVERY:
            self._unyielded = 0
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            message = self._next_or_refuse()
            if message is not _INCOMPLETE:
                self._counters.frames_received += 1
                return message
            await self._fill()

    def _next_or_refuse(self) -> Any:
        if self._refused:
            raise LinkLost(f"the stream to {self.remote_peer} was reset after a bad frame")
        try:
            return self._next_message()
        except RemoteProtocolError:
            self._refused = True
            self._counters.frames_refused += 1
            self.abort()
            raise

    async def aclose(self) -> None:
        """Ends the stream in order: what was sent arrives, and the peer then reads the end. Never fails."""
        self._stream.leave_nowait()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Ends the stream at once in both directions; the peer reads LinkLost. Never fails, never waits."""
        self._stream.reset_nowait()

    async def __aenter__(self) -> FrameStream:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            await self.aclose()
        else:
            self.abort()

    async def _fill(self) -> None:
        try:
            chunks = await self._stream.receive_chunks()
        except MuxedStreamEOF:
            if self._have or self._lengths is not None:
                raise LinkLost(f"{self.remote_peer} ended the stream inside a frame") from None
            raise StreamEnded(f"{self.remote_peer} ended the stream") from None
        except MuxedStreamError as error:
            raise LinkLost(f"receiving from {self.remote_peer}: {error}") from error
        for chunk in chunks:
            self._counters.frame_bytes_received += len(chunk)
            self._have += len(chunk)  # now, since the next one may be merged into it
            self._keep(chunk)

    def _keep(self, chunk: Piece) -> None:
        """Small chunks behind others are merged, so that a body that drips in costs no more memory than its bytes."""
        last = self._chunks[-1] if self._chunks else None
        if last is None or len(chunk) >= _MERGE_BELOW_BYTES:
            self._chunks.append(chunk)
        elif type(last) is bytearray and len(last) < _MERGED_BYTES_MAX:
            last += chunk
        else:
            self._chunks.append(bytearray(chunk))

    def _next_message(self) -> Any:
        if self._lengths is None:
            if self._have < PREFIX_BYTES:
                return _INCOMPLETE
            self._lengths = parse_prefix(self._take(PREFIX_BYTES))
        header, body = self._lengths
        if self._have < header + body:
            return _INCOMPLETE
        self._lengths = None
        return self._registry.decode(self._take(header), self._take(body) if body else b"")

    def _take(self, count: int) -> bytes:
        self._have -= count
        first = self._chunks[0]
        end = self._offset + count
        if end < len(first):
            taken = bytes(first[self._offset : end])
            self._offset = end
            return taken
        parts: list[Piece] = []
        while count:
            first = self._chunks[0]
            part = first[self._offset : self._offset + count]
            parts.append(part)
            count -= len(part)
            self._offset += len(part)
            if self._offset == len(first):
                self._chunks.popleft()
                self._offset = 0
        return b"".join(parts)
