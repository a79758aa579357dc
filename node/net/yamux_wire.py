"""Frames of /yamux/1.0.0: ``version u8 | type u8 | flags u16 | stream u32 | length u32 | body``, big-endian."""

from __future__ import annotations

import struct

from node.net.fast_noise import RECORD_BYTES_MAX

HEADER = struct.Struct(">BBHII")
DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8

WINDOW_BYTES_MIN = 256 * 1024  # "both sides assume the initial 256KB window"
SEND_WINDOW_BYTES_MAX = 1 << 31
BODY_BYTES_MAX = RECORD_BYTES_MAX - HEADER.size  # a frame is exactly one Noise record


class YamuxViolation(Exception):
    """The peer sent what the specification forbids."""


def frame_header(kind: int, flags: int, stream_id: int, value: int) -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, value)
