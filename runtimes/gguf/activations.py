"""Hidden states to bytes and back: protocol.activations says how they travel.

Error of a value x: f32 none; f16 at most |x| / 2048 (subnormal below 6e-5); int8 at most half of its block's scale, that is 1/254 of the
largest magnitude among 32 neighbours. Only f32 keeps answers exactly those of the whole model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocol.activations import INT8_BLOCK, Activations
from protocol.errors import Code, Refused

Floats = npt.NDArray[np.float32]

_F16_MAX = 65504.0


def encode(hidden: Floats, kind: Activations) -> bytes:
    """Hidden states (n, width) as bytes, row by row. Raises Refused(BAD_INPUT) for values that f16 cannot hold or that are no numbers."""
    if not np.isfinite(hidden).all():
        raise Refused(Code.BAD_INPUT, "the hidden states are no finite numbers")
    if kind is Activations.F32:
        return np.ascontiguousarray(hidden, "<f4").tobytes()
    if kind is Activations.F16:
        if np.abs(hidden).max(initial=0.0) > _F16_MAX:
            raise Refused(Code.BAD_INPUT, "the hidden states are too large for f16; choose f32 or int8")
        return hidden.astype("<f2").tobytes()
    return _encode_int8(hidden)


def decode(data: bytes | memoryview, width: int, kind: Activations) -> Floats:
    """Hidden states (n, width). Raises Refused(BAD_INPUT) for a length that is no whole number of rows, NaN and infinities."""
    row_bytes = kind.row_bytes(width)
    if not data or len(data) % row_bytes:
        raise Refused(Code.BAD_INPUT, f"{len(data)} bytes are no hidden states of {row_bytes} bytes")
    if kind is Activations.F32:
        hidden: Floats = np.frombuffer(data, "<f4").reshape(-1, width).astype(np.float32, copy=False)
    elif kind is Activations.F16:
        hidden = np.frombuffer(data, "<f2").reshape(-1, width).astype(np.float32)
    else:
        hidden = _decode_int8(data, width, row_bytes)
    if not np.isfinite(hidden).all():
        raise Refused(Code.BAD_INPUT, "hidden states came that are no finite numbers")
    return hidden


def _blocks(width: int) -> int:
    return -(-width // INT8_BLOCK)


def _encode_int8(hidden: Floats) -> bytes:
    """Each row: the scales of its blocks (f32), then its values (int8)."""
    rows, width = hidden.shape
    blocks = _blocks(width)
    padded = np.zeros((rows, blocks * INT8_BLOCK), np.float32)
    padded[:, :width] = hidden
    grouped = padded.reshape(rows, blocks, INT8_BLOCK)
    scales = (np.abs(grouped).max(axis=2) / 127.0).astype("<f4")
    divisors = np.where(scales > 0, scales, 1.0)
    values = np.rint(grouped / divisors[:, :, None]).astype(np.int8).reshape(rows, -1)[:, :width]
    return np.concatenate([scales.view(np.uint8).reshape(rows, -1), values.view(np.uint8)], axis=1).tobytes()


def _decode_int8(data: bytes | memoryview, width: int, row_bytes: int) -> Floats:
    raw = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
    blocks = _blocks(width)
    scales = np.ascontiguousarray(raw[:, : 4 * blocks]).view("<f4")
    values = raw[:, 4 * blocks :].view(np.int8).astype(np.float32)
    hidden: Floats = values * np.repeat(scales, INT8_BLOCK, axis=1)[:, :width]
    return hidden
