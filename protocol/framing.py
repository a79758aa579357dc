"""Length-prefixed frames: ``u32 header length | u32 body length | header | body``, big-endian.

The header is a MessagePack array (see registry), the body raw bytes. Nothing here reads or writes: a shell feeds bytes in, or asks
for the lengths and reads straight into a buffer of the right size when the body is large.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from protocol import limits
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.registry import Registry

_PREFIX = struct.Struct(">II")
PREFIX_BYTES = _PREFIX.size


def parse_prefix(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Lengths of header and body in bytes. Raises RemoteProtocolError over the limits, before anything is allocated."""
    header, body = _PREFIX.unpack(prefix)
    if not 0 < header <= limits.FRAME_HEADER_BYTES_MAX or body > limits.FRAME_BODY_BYTES_MAX:
        raise RemoteProtocolError(f"a frame of {header} + {body} bytes is outside the limits")
    return header, body


def encode_frame(registry: Registry, message: object) -> bytes:
    """One message as one piece of bytes. Raises LocalProtocolError over the limits."""
    header, body = registry.encode(message)
    if len(header) > limits.FRAME_HEADER_BYTES_MAX or len(body) > limits.FRAME_BODY_BYTES_MAX:
        raise LocalProtocolError(
            f"{type(message).__name__} is too large for a frame: {len(header)} + {len(body)} bytes"
        )
    return b"".join((_PREFIX.pack(len(header), len(body)), header, body))


class FrameDecoder:
    """Bytes in, messages out; keeps what is incomplete, never more than one frame and one read.

    >>> decoder = FrameDecoder(JOB)
    >>> for message in decoder.feed(data): ...
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._buffer = bytearray()

    def __repr__(self) -> str:
        return f"<FrameDecoder {self._registry.name}: {len(self._buffer)} bytes pending>"

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that has begun. Not 0 at the end of a stream means that the stream was cut."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Any]:
        """Messages that are complete now. Iterating raises RemoteProtocolError; after that the stream is unusable."""
        self._buffer += data
        return self._complete()

    def _complete(self) -> Iterator[Any]:
        buffer, offset = self._buffer, 0
        try:
            while len(buffer) - offset >= PREFIX_BYTES:
                header, body = parse_prefix(memoryview(buffer)[offset : offset + PREFIX_BYTES].tobytes())
                start = offset + PREFIX_BYTES
                end = start + header + body
                if len(buffer) < end:
                    break
                message = self._registry.decode(
                    bytes(buffer[start : start + header]), bytes(buffer[start + header : end])
                )
                offset = end
                yield message
        finally:
            del buffer[:offset]
