"""One stream of a FastYamux connection: what has arrived waits here, what is written goes out as far as the peer's window reaches."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from node.net.fast_noise import Piece
from node.net.yamux_wire import (
    BODY_BYTES_MAX,
    DATA,
    FIN,
    RST,
    SEND_WINDOW_BYTES_MAX,
    WINDOW,
    WINDOW_BYTES_MIN,
    YamuxViolation,
    frame_header,
)
from protocol import limits
from protocol.errors import LocalProtocolError

if TYPE_CHECKING:
    from node.net.fast_yamux import FastYamux

_BATCH_FRAMES = 4
_MERGE_BELOW_BYTES = 512
_MERGED_BYTES_MAX = 64 * 1024


class FastStream(IMuxedStream):
    """One stream. One task may read while another writes; that only one task writes is the caller's business."""

    def __init__(self, connection: FastYamux, stream_id: int, inbound: bool) -> None:
        self.muxed_conn: IMuxedConn = connection
        self.connection = connection
        self.stream_id = stream_id
        self.inbound = inbound
        self.send_closed = False
        self.recv_closed = False
        self.was_reset = False
        self._left = False
        self._send_window = WINDOW_BYTES_MIN
        self._window = WINDOW_BYTES_MIN  # what we promised to buffer
        self._recv_window = WINDOW_BYTES_MIN  # what the peer may still send
        self._consumed = 0  # read by us, not yet given back as credit
        self._chunks: deque[Piece] = deque()
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        state = "reset" if self.was_reset else f"{'-' if self.recv_closed else 'r'}{'-' if self.send_closed else 'w'}"
        return f"<FastStream {self.stream_id} {state}, {len(self._chunks)} chunks, may send {self._send_window} B>"

    # -- reading

    async def receive_chunks(self) -> list[Piece]:
        """Everything that has arrived, at least one byte. Raises MuxedStreamEOF, MuxedStreamReset."""
        if not self._chunks:
            await self._wait_for_chunk()
        chunks = list(self._chunks)
        self._chunks.clear()
        self._give_credit(sum(map(len, chunks)))
        return chunks

    async def read(self, n: int | None = None) -> bytes:
        """Up to ``n`` bytes, at least one."""
        if n == 0:
            return b""
        if not self._chunks:
            await self._wait_for_chunk()
        chunk = self._chunks.popleft()
        if n is not None and 0 < n < len(chunk):
            view = memoryview(chunk)
            self._chunks.appendleft(view[n:])
            chunk = view[:n]
        self._give_credit(len(chunk))
        return bytes(chunk)

    async def _wait_for_chunk(self) -> None:
        while not self._chunks:
            if self.was_reset:
                raise MuxedStreamReset("the stream or its connection was lost")
            if self.recv_closed:
                raise MuxedStreamEOF("the peer has ended the stream")
            await self._readers.park()

    def _give_credit(self, count: int) -> None:
        self._consumed += count
        if self._consumed * 4 >= self._window and not self.recv_closed:
            self.connection.send_control(frame_header(WINDOW, 0, self.stream_id, self._consumed))
            self._recv_window += self._consumed
            self._consumed = 0

    def widen_window(self) -> None:
        """Lets the peer send large messages without waiting, as far as the connection's budget reaches."""
        extra = self.connection.reserve_window(limits.STREAM_WINDOW_BYTES - self._window)
        if extra > 0 and not self.recv_closed:
            self._window += extra
            self._recv_window += extra
            self.connection.send_control(frame_header(WINDOW, 0, self.stream_id, extra))

    # -- writing

    async def write(self, data: Piece) -> None:
        """Waits until all of it has left. Cancelled before the first byte it leaves no trace; half way, a reset."""
        view = memoryview(data)
        offset = 0
        try:
            while offset < len(view):
                self._check_writable()
                await trio.lowlevel.checkpoint_if_cancelled()
                if self._send_window <= 0:
                    await self._writers.park()
                    continue
                offset += await self.connection.send_data(self, view[offset:])
        except trio.Cancelled:
            if offset:
                self.reset_nowait()
            raise

    def _check_writable(self) -> None:
        if self.was_reset:
            raise MuxedStreamReset("the stream or its connection was lost")
        if self.send_closed:
            raise MuxedStreamError("the stream was closed for writing")

    def take_frames(self, view: memoryview) -> tuple[list[Piece], int]:
        """Data frames for at most one batch of ``view``, as far as the window reaches, and the count of its bytes."""
        self._check_writable()
        frames: list[Piece] = []
        taken = 0
        while len(frames) < _BATCH_FRAMES:
            size = min(self._send_window, BODY_BYTES_MAX, len(view) - taken)
            if size <= 0:
                break
            frames.append(b"".join((frame_header(DATA, 0, self.stream_id, size), view[taken : taken + size])))
            taken += size
            self._send_window -= size
        return frames, taken

    # -- ending

    async def close(self) -> None:
        """Ends our direction; the peer may go on sending. Never fails."""
        self.close_write_nowait()
        await trio.lowlevel.checkpoint()

    def close_write_nowait(self) -> None:
        if self.send_closed:
            return
        self.send_closed = True
        self._writers.unpark_all()
        self.connection.send_control(frame_header(WINDOW, FIN, self.stream_id, 0))
        self._forget_if_done()

    async def reset(self) -> None:
        self.reset_nowait()
        await trio.lowlevel.checkpoint()

    def reset_nowait(self) -> None:
        """Ends both directions at once and drops what was not read. Never fails."""
        done = self.send_closed and self.recv_closed
        self._chunks.clear()
        if not done:
            self.connection.send_control(frame_header(WINDOW, RST, self.stream_id, 0))
        self.lose()

    def leave_nowait(self) -> None:
        """Ends our direction and stops listening: should the peer go on sending, the stream is reset then."""
        self._left = True
        self._chunks.clear()
        self.close_write_nowait()

    def lose(self) -> None:
        """The stream is no more; chunks that had arrived stay readable."""
        self.send_closed = self.recv_closed = self.was_reset = True
        self._wake()
        self._forget_if_done()

    def _wake(self) -> None:
        self._readers.unpark_all()
        self._writers.unpark_all()

    def _forget_if_done(self) -> None:
        if self.send_closed and self.recv_closed:
            self.connection.forget(self, self._window - WINDOW_BYTES_MIN)
            self._window = WINDOW_BYTES_MIN

    # -- called by the connection's reader

    def expect(self, count: int) -> None:
        """A data frame of ``count`` bytes begins. Raises YamuxViolation when it overruns the window."""
        if self.recv_closed and not self.was_reset:
            raise YamuxViolation("data after the end of a stream")
        self._recv_window -= count
        if self._recv_window < 0:
            raise YamuxViolation("more data than the window allows")

    def deliver(self, chunk: memoryview) -> None:
        if self.recv_closed:
            return
        if self._left:
            self.reset_nowait()
            return
        queue = self._chunks
        if queue and len(chunk) < _MERGE_BELOW_BYTES:
            last = queue[-1]
            if type(last) is bytearray and len(last) < _MERGED_BYTES_MAX:
                last += chunk
            else:
                queue.append(bytearray(chunk))
        else:
            queue.append(chunk)
        self._readers.unpark_all()

    def add_send_window(self, count: int) -> None:
        self._send_window += count
        if self._send_window > SEND_WINDOW_BYTES_MAX:
            raise YamuxViolation("the send window overflowed")
        self._writers.unpark_all()

    def peer_ended(self, flags: int) -> None:
        if flags & RST:
            self.lose()
        elif flags & FIN:
            self.recv_closed = True
            self._readers.unpark_all()
            self._forget_if_done()

    # -- the rest of libp2p's interface

    def set_deadline(self, ttl: int) -> None:
        raise LocalProtocolError("a stream has no deadline of its own: use a trio cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.connection.get_remote_address()

    async def __aenter__(self) -> IMuxedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
