"""The Noise transport phase of py-libp2p 0.8.1, made fast; the handshake stays libp2p's own.

Theory of operation. After the XX handshake a Noise connection is a sequence of records ``u16 length | ciphertext``, at
most 65,535 bytes each, sealed with ChaCha20-Poly1305 under a counter. The stock session does two reads, a dozen awaits
and four locks for each record, which costs more than the cryptography (1.99 GB/s here). This one reads whatever the
socket has into one buffer, opens every record that is complete, and seals many records into one buffer for one write.
Bytes on the wire are the same, so either end may be stock.

Rules.
- A sealed record must reach the wire whole and in order, or the peer's counter goes wrong and the connection is lost.
  So ``seal`` and ``send`` belong together under the caller's lock, shielded from cancellation (see fast_yamux).
- The read buffer starts small, since a node may hold thousands of connections, and grows when a read fills it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, cast

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.security.secure_session import SecureSession

from node.net.counters import ConnectionOwner

RECORD_BYTES_MAX = 65_535 - 16  # plaintext of one record: u16 length less the tag
_TAG_BYTES = 16
_LENGTH_BYTES = 2
_READ_BYTES_MIN = 16 * 1024
_READ_BYTES_MAX = 320 * 1024  # holds a read of 256 KiB behind an incomplete record
_NONCE = struct.Struct("<4xQ")
_LENGTH = struct.Struct(">H")

Piece = bytes | bytearray | memoryview


class NoiseSession(SecureSession):
    """One side of an encrypted connection. One task may read while another writes."""

    def __init__(self, stock: SecureSession, owner: ConnectionOwner) -> None:
        super().__init__(
            local_peer=stock.local_peer,
            local_private_key=stock.local_private_key,
            remote_peer=stock.remote_peer,
            remote_permanent_pubkey=stock.remote_permanent_pubkey,
            is_initiator=stock.is_initiator,
            conn=stock.conn,
        )
        self.owner = owner
        transport = cast(Any, stock.conn)
        state = transport.noise_state.noise_protocol
        self._sealer: Any = state.cipher_state_encrypt.cipher.cipher
        self._opener: Any = state.cipher_state_decrypt.cipher.cipher
        self._sealed_records = int(state.cipher_state_encrypt.n)
        self._opened_records = int(state.cipher_state_decrypt.n)
        self._stream: trio.SocketStream = transport.read_writer.read_write_closer.stream.stream
        self._buffer = bytearray(_READ_BYTES_MIN)
        self._filled = 0
        self._plain = bytearray()

    # -- reading

    async def read_records(self) -> list[bytes]:
        """At least one opened record. Raises ConnectionClosedError at the end, InvalidTag for a forged record."""
        if self._plain:
            rest, self._plain = bytes(self._plain), bytearray()
            return [rest]
        while True:
            records = self._open_complete()
            if records:
                return records
            await self._receive_more()

    async def read(self, n: int | None = None) -> bytes:
        """Up to ``n`` bytes; only used while the muxer is being negotiated."""
        while not self._plain:
            self._plain += b"".join(await self.read_records())
        size = len(self._plain) if n is None else n
        taken = bytes(self._plain[:size])
        del self._plain[:size]
        return taken

    async def _receive_more(self) -> None:
        with memoryview(self._buffer) as view, view[self._filled :] as free:
            count = await self._stream.socket.recv_into(cast(bytearray, free))
        if not count:
            raise ConnectionClosedError("the peer closed the connection", transport="tcp")
        self._filled += count
        size = len(self._buffer)
        if self._filled == size < _READ_BYTES_MAX:
            self._buffer = self._buffer + bytes(min(size * 3, _READ_BYTES_MAX - size))

    def _open_complete(self) -> list[bytes]:
        records: list[bytes] = []
        offset, filled = 0, self._filled
        opener, count = self._opener, self._opened_records
        with memoryview(self._buffer) as view:
            while filled - offset >= _LENGTH_BYTES:
                start = offset + _LENGTH_BYTES
                end = start + _LENGTH.unpack_from(view, offset)[0]
                if end > filled:
                    break
                with view[start:end] as sealed:
                    records.append(opener.decrypt(_NONCE.pack(count), sealed, None))
                count += 1
                offset = end
            if offset:
                with view[: filled - offset] as head, view[offset:filled] as rest:
                    head[:] = rest
        self._opened_records, self._filled = count, filled - offset
        return records

    # -- writing

    def seal(self, pieces: Sequence[Piece]) -> bytearray:
        """Records for the wire, one for each piece of at most RECORD_BYTES_MAX bytes. What is sealed has to be sent."""
        sealer, count = self._sealer, self._sealed_records
        sealed = bytearray(sum(map(len, pieces)) + len(pieces) * (_LENGTH_BYTES + _TAG_BYTES))
        offset = 0
        with memoryview(sealed) as view:
            for piece in pieces:
                size = len(piece) + _TAG_BYTES
                _LENGTH.pack_into(view, offset, size)
                offset += _LENGTH_BYTES
                with view[offset : offset + size] as target:
                    sealer.encrypt_into(_NONCE.pack(count), piece, None, target)
                count += 1
                offset += size
        self._sealed_records = count
        return sealed

    async def send(self, sealed: bytearray) -> None:
        await self._stream.send_all(memoryview(sealed))

    async def write(self, data: bytes) -> None:
        """Seals and sends; only used while the muxer is being negotiated, when nothing else writes."""
        view = memoryview(data)
        pieces = [view[i : i + RECORD_BYTES_MAX] for i in range(0, len(view), RECORD_BYTES_MAX)]
        with trio.CancelScope(shield=True):
            await self.send(self.seal(pieces))

    def get_remote_address(self) -> tuple[str, int] | None:
        """Address and port of the peer; None once the socket is closed."""
        try:
            ip, port, *_ = self._stream.socket.getpeername()
        except OSError:
            return None
        return str(ip), int(port)

    def close_nowait(self) -> None:
        """Closes the socket at once; whoever reads or writes gets trio.ClosedResourceError."""
        self._stream.socket.close()

    async def close(self) -> None:
        self.close_nowait()
        await trio.lowlevel.checkpoint()


class FastNoise(StockNoise):
    """Noise XX whose sessions belong to ``owner``: a host passes this as its only security transport."""

    def __init__(self, key_pair: KeyPair, owner: ConnectionOwner) -> None:
        super().__init__(key_pair, noise_privkey=new_x25519_key_pair().private_key)
        self._owner = owner

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return NoiseSession(cast(SecureSession, await super().secure_inbound(conn)), self._owner)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return NoiseSession(cast(SecureSession, await super().secure_outbound(conn, peer_id)), self._owner)
