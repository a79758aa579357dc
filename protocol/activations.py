"""How hidden states travel between stages."""

from __future__ import annotations

from enum import StrEnum

INT8_BLOCK = 32
TOKEN_BYTES = 4  # int32, little-endian: what the first stage gets instead


class Activations(StrEnum):
    """How a hidden state travels. ``int8``: blocks of 32 values, each with its largest magnitude / 127 as an f32 scale, so a value is off
    by at most half a scale: 1/254 of the largest magnitude in its block."""

    F32 = "f32"
    F16 = "f16"
    INT8 = "int8"

    def row_bytes(self, width: int) -> int:
        """Bytes of one hidden state of so many values."""
        if self is Activations.F32:
            return 4 * width
        if self is Activations.F16:
            return 2 * width
        return width + 4 * (-(-width // INT8_BLOCK))
