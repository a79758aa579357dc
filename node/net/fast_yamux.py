"""Yamux over a NoiseSession, wire-compatible with /yamux/1.0.0 and several times faster than py-libp2p 0.8.1's own.

Theory of operation. A connection carries frames ``version u8 | type u8 | flags u16 | stream u32 | length u32 | body``.
Three tasks of the connection's own nursery run it: one reads records and sorts their frames into the streams' queues
without a single await, one flushes control frames, one sees to the keepalive. Writers take the connection's lock, seal
at most ``_BATCH_FRAMES`` frames (each exactly one Noise record) and hand them to the socket in one call; so a large
message costs others a quarter MiB of waiting, not all of it. Control frames (credit, acknowledgement, reset, pong) are
only appended to a buffer: the next writer takes them along, or the control task does.

What the stock muxer does instead, measured: a window update for each read, polling of a closed window, two Noise
records per frame, four locks per frame: 1.0 ms for a 64 B echo against 0.3 ms here, 150 MB/s against 800.

Rules.
- A write to the socket is never cancelled half way: that would tear a Noise record and with it every stream. It runs
  shielded, and ends early only when the connection is closed under it.
- Reading never waits for writing. What reading owes is bounded: one pong at most (a newer ping replaces the older), and
  CONTROL_BYTES_MAX of the rest, after which the peer is cut off because it does not read.
- A peer buffers at most its window: 256 KiB for a stream that nobody has taken up, more once somebody has, within a
  budget per connection. Small chunks are merged, so that a window of one-byte frames does not become a thousand times
  as much memory.
- A lost connection is a reset of all streams and never a clean end, but bytes that had arrived are delivered first.
- Anything the specification forbids ends this connection, is counted, and touches no other.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from cryptography.exceptions import InvalidTag
from libp2p.abc import IMuxedConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from node.net.fast_noise import RECORD_BYTES_MAX, NoiseSession, Piece
from node.net.fast_stream import FastStream
from node.net.yamux_wire import ACK, DATA, FIN, GO_AWAY, HEADER, PING, RST, SYN, WINDOW, YamuxViolation, frame_header
from protocol import limits

log = logging.getLogger(__name__)
_GOODBYE_S = 0.5
_MEASURE_S = 30.0
_CLOSED_HERE = "closed on this side"
_SECOND_LOOK_S = 0.5  # after this process itself was frozen, what had arrived meanwhile is read first


class FastYamux(IMuxedConn):
    """One connection to one peer."""

    def __init__(
        self,
        conn: NoiseSession,
        peer_id: ID,
        is_initiator: bool | None = None,
        on_close: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        self.secured_conn = conn
        self.peer_id = peer_id
        self.on_close = on_close
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.lost_reason: str | None = None
        self._closing = False
        self.round_trip_s: float | None = None
        self._session = conn
        self._owner = conn.owner
        self._initiator = conn.is_initiator if is_initiator is None else is_initiator
        self._next_stream_id = 1 if self._initiator else 2
        self._streams: dict[int, FastStream] = {}
        self._inbound_count = 0
        self._outbound_room = trio.lowlevel.ParkingLot()
        self._accepted, self._to_accept = trio.open_memory_channel[FastStream](limits.STREAMS_PER_PEER_MAX)
        self._window_reserved = 0
        self._scope: trio.CancelScope | None = None
        # writing
        self._lock = trio.Lock()
        self._control = bytearray()
        self._control_waiter = trio.lowlevel.ParkingLot()
        self._flushed = trio.lowlevel.ParkingLot()
        self._pong: int | None = None
        self._write_began_s: float | None = None
        # reading
        self._partial = b""
        self._body_left = 0
        self._body_stream: FastStream | None = None
        self._body_flags = 0
        self._heard_s = trio.current_time()
        self._heard = trio.lowlevel.ParkingLot()
        self._ping_sent_s = 0.0
        self._ping_number = 0

    def __repr__(self) -> str:
        state = f"lost: {self.lost_reason}" if self.lost_reason else f"{len(self._streams)} streams"
        return f"<FastYamux {self.peer_id} {'out' if self._initiator else 'in'}, {state}>"

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    # -- life

    async def start(self) -> None:
        """Runs the connection until it is lost or closed. Raises nothing but trio.Cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                if self.lost_reason is not None:
                    nursery.cancel_scope.cancel()
                nursery.start_soon(self._receive_loop)
                nursery.start_soon(self._control_loop)
                nursery.start_soon(self._keepalive_loop)
                if self.lost_reason is None:
                    self._owner.connection_began(self)
                self.event_started.set()
        finally:
            self.lose("the host is stopping")
            with trio.CancelScope(shield=True):
                await self._finish()

    def lose(self, reason: str, *, violation: bool = False) -> None:
        """The connection is over: the socket is closed, streams are lost, tasks end. Never waits, never fails."""
        if self.lost_reason is not None:
            return
        if self._closing and not violation:
            reason = _CLOSED_HERE  # the peer heard our goodbye and may be the first to close the socket
        self.lost_reason = reason
        if violation:
            self._owner.counters.connections_broken += 1
            log.warning("connection to %s broken: %s", self.peer_id, reason)
        self._session.close_nowait()
        self._owner.connection_ended(self, reason)
        for stream in list(self._streams.values()):
            stream.lose()
        self._accepted.close()
        self._outbound_room.unpark_all()
        self._flushed.unpark_all()
        if self._scope is not None:
            self._scope.cancel()

    async def _finish(self) -> None:
        self.event_started.set()
        self.event_closed.set()
        if self.on_close is not None:
            try:
                await self.on_close()
            except Exception as error:
                log.warning("closing the connection to %s: %s: %s", self.peer_id, type(error).__name__, error)

    async def close(self, error_code: int = 0) -> None:
        """Says goodbye if that goes quickly, then closes; a write that hangs ends with the socket."""
        if self.lost_reason is None:
            self._closing = True
            self.send_control(frame_header(GO_AWAY, 0, 0, error_code))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._flush_control)
                try:
                    with trio.move_on_after(_GOODBYE_S):
                        while self._control and self.lost_reason is None:
                            await self._flushed.park()
                finally:
                    self.lose(_CLOSED_HERE)
        if self._scope is None:
            self.event_closed.set()
        await trio.lowlevel.checkpoint()

    # -- streams

    async def open_stream(self) -> FastStream:
        """Waits while STREAMS_PER_PEER_MAX of our streams are open, since the peer would refuse more."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.lost_reason is None and len(self._streams) - self._inbound_count >= limits.STREAMS_PER_PEER_MAX:
            await self._outbound_room.park()
        if self.lost_reason is not None:
            raise MuxedStreamError(f"the connection is lost: {self.lost_reason}")
        stream = FastStream(self, self._next_stream_id, inbound=False)
        self._next_stream_id += 2
        self._streams[stream.stream_id] = stream
        self._owner.counters.streams_opened += 1
        self.send_control(frame_header(WINDOW, SYN, stream.stream_id, 0))
        return stream

    async def accept_stream(self) -> FastStream:
        try:
            return await self._to_accept.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection is lost") from None

    def forget(self, stream: FastStream, window_bytes: int) -> None:
        """The stream is over in both directions; its part of the budget is free again."""
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._window_reserved -= window_bytes
        if stream.inbound:
            self._inbound_count -= 1
        else:
            self._outbound_room.unpark()

    def reserve_window(self, wanted: int) -> int:
        granted = max(0, min(wanted, limits.CONNECTION_WINDOW_BYTES_MAX - self._window_reserved))
        self._window_reserved += granted
        return granted

    # -- writing

    async def send_data(self, stream: FastStream, view: memoryview) -> int:
        """Sends one batch; returns how many bytes of ``view`` it held, which is 0 when the window closed meanwhile."""
        await self._acquire()
        try:
            frames, taken = stream.take_frames(view)
            if frames:
                await self._send(frames)
        finally:
            self._lock.release()
        return taken

    def send_control(self, frame: bytes) -> None:
        if self.lost_reason is not None:
            return
        self._control += frame
        if len(self._control) > limits.CONTROL_BYTES_MAX:
            self.lose("the peer does not read", violation=True)
        self._control_waiter.unpark()

    async def _acquire(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    def _take_control(self) -> list[Piece]:
        control = self._control
        if self._pong is not None:
            control += frame_header(PING, ACK, 0, self._pong)
            self._pong = None
        self._control = bytearray()
        return [control[i : i + RECORD_BYTES_MAX] for i in range(0, len(control), RECORD_BYTES_MAX)]

    async def _send(self, frames: list[Piece]) -> None:
        """Under the lock: seals and sends frames, control first. Raises MuxedStreamReset."""
        if self.lost_reason is not None:
            raise MuxedStreamReset(f"the connection is lost: {self.lost_reason}")
        if self._control or self._pong is not None:
            frames = self._take_control() + frames
        self._write_began_s = trio.current_time()
        try:
            with trio.CancelScope(shield=True):
                await self._session.send(self._session.seal(frames))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.lose(f"writing failed: {type(error).__name__}")
            raise MuxedStreamReset(f"the connection is lost: {self.lost_reason}") from error
        finally:
            self._write_began_s = None
            self._flushed.unpark_all()

    async def _flush_control(self) -> None:
        await self._acquire()
        try:
            if self._control or self._pong is not None:
                await self._send([])
        except MuxedStreamReset:
            return  # lose() has said why
        finally:
            self._lock.release()

    async def _control_loop(self) -> None:
        while self.lost_reason is None:
            if not self._control and self._pong is None:
                await self._control_waiter.park()
            await self._flush_control()

    # -- reading

    async def _receive_loop(self) -> None:
        try:
            while True:
                for record in await self._session.read_records():
                    self._feed(record)
                self._heard_s = trio.current_time()
                self._heard.unpark_all()
        except (IOException, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.lose(f"reading failed: {type(error).__name__}: {error}")
        except InvalidTag:
            self.lose("a record does not authenticate", violation=True)
        except YamuxViolation as error:
            self.lose(str(error), violation=True)
        except Exception as error:  # a bug of ours in reading one peer must not end the whole node
            log.exception("reading from %s", self.peer_id)
            self.lose(f"internal error: {type(error).__name__}", violation=True)

    def _feed(self, record: bytes) -> None:
        view = memoryview(record)
        offset, end = 0, len(view)
        while offset < end:
            if self._body_left:
                offset = self._on_body(view, offset, end)
            elif not self._partial and end - offset >= HEADER.size:
                self._on_header(*HEADER.unpack_from(view, offset))
                offset += HEADER.size
            else:
                taken = view[offset : offset + HEADER.size - len(self._partial)]
                offset += len(taken)
                self._partial += taken
                if len(self._partial) == HEADER.size:
                    header, self._partial = self._partial, b""
                    self._on_header(*HEADER.unpack(header))

    def _on_body(self, view: memoryview, offset: int, end: int) -> int:
        stop = min(end, offset + self._body_left)
        self._body_left -= stop - offset
        if self._body_stream is not None:
            self._body_stream.deliver(view[offset:stop])
            if not self._body_left and self._body_flags:
                self._body_stream.peer_ended(self._body_flags)
        return stop

    def _on_header(self, version: int, kind: int, flags: int, stream_id: int, value: int) -> None:
        if version != 0:
            raise YamuxViolation(f"version {version}")
        if kind == DATA:
            self._on_data(flags, stream_id, value)
        elif kind == WINDOW:
            self._on_window(flags, stream_id, value)
        elif kind == PING:
            self._on_ping(flags, value)
        elif kind == GO_AWAY:
            self.lose("the peer said goodbye")
        else:
            raise YamuxViolation(f"frame type {kind}")

    def _on_data(self, flags: int, stream_id: int, count: int) -> None:
        if flags & SYN:
            self._on_syn(stream_id)
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.expect(count)
            if not count:
                stream.peer_ended(flags)
        elif count > limits.STREAM_WINDOW_BYTES:
            raise YamuxViolation(f"a frame of {count} bytes")
        self._body_left, self._body_stream, self._body_flags = count, stream, flags & (FIN | RST)

    def _on_window(self, flags: int, stream_id: int, count: int) -> None:
        if flags & SYN:
            self._on_syn(stream_id)
        stream = self._streams.get(stream_id)
        if stream is not None:
            if count:
                stream.add_send_window(count)
            stream.peer_ended(flags)

    def _on_syn(self, stream_id: int) -> None:
        if stream_id in self._streams or not stream_id:
            raise YamuxViolation(f"stream {stream_id} was opened twice")
        if stream_id % 2 == (1 if self._initiator else 0):
            raise YamuxViolation(f"stream {stream_id} has our own parity")
        if self._inbound_count >= limits.STREAMS_PER_PEER_MAX:
            self._owner.counters.streams_refused += 1
            self.send_control(frame_header(WINDOW, RST, stream_id, 0))
            return
        stream = FastStream(self, stream_id, inbound=True)
        try:
            self._accepted.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._owner.counters.streams_refused += 1
            self.send_control(frame_header(WINDOW, RST, stream_id, 0))
            return
        self._streams[stream_id] = stream
        self._inbound_count += 1
        self._owner.counters.streams_accepted += 1
        self.send_control(frame_header(WINDOW, ACK, stream_id, 0))

    def _on_ping(self, flags: int, number: int) -> None:
        if flags & SYN:
            self._pong = number
            self._control_waiter.unpark()
        elif flags & ACK and number == self._ping_number:
            self.round_trip_s = trio.current_time() - self._ping_sent_s

    # -- keepalive

    async def _keepalive_loop(self) -> None:
        """Anything that is heard proves life; a ping makes a silent peer say something and measures the round trip."""
        self._send_ping()
        while self.lost_reason is None:
            quiet_s = trio.current_time() - self._heard_s
            if quiet_s >= limits.KEEPALIVE_INTERVAL_S:
                if not await self._answers():
                    self.lose("the peer does not answer", violation=True)
            else:
                await trio.sleep(limits.KEEPALIVE_INTERVAL_S - quiet_s)
                if trio.current_time() - self._ping_sent_s > _MEASURE_S:
                    self._send_ping()
            began_s = self._write_began_s
            if began_s is not None and trio.current_time() - began_s > limits.WRITE_STALL_S:
                self.lose("the peer does not read", violation=True)

    def _send_ping(self) -> None:
        self._ping_number = (self._ping_number + 1) % (1 << 32)
        self._ping_sent_s = trio.current_time()
        self.send_control(frame_header(PING, SYN, 0, self._ping_number))

    async def _answers(self) -> bool:
        """Pings; whether anything was heard in time."""
        self._send_ping()
        for patience_s in (limits.KEEPALIVE_TIMEOUT_S, _SECOND_LOOK_S):
            with trio.move_on_after(patience_s):
                await self._heard.park()
                return True
        return False

    # -- the rest of libp2p's interface

    @property
    def is_initiator(self) -> bool:
        return self._initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and self.lost_reason is None

    @property
    def is_closed(self) -> bool:
        return self.lost_reason is not None

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()
