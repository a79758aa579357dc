"""Is this file a whole GGUF model? Reads the header only, and believes no number in it.

The header lists every tensor with its type, shape and offset; the file must reach to the end of the last one. That finds downloads that
were cut short before llama.cpp maps them. Layout: github.com/ggml-org/ggml, docs/gguf.md; versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from runtimes.store.errors import WrongContent

MAGIC = b"GGUF"
_TENSORS_MAX = 1_000_000
_ENTRIES_MAX = 100_000
_STRING_BYTES_MAX = 64 * 1024 * 1024
_ARRAY_ITEMS_MAX = 64 * 1024 * 1024
_DEPTH_MAX = 4
_DIMENSIONS_MAX = 4

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

# (elements of a block, bytes of a block) by ggml type; ggml's type traits table. An unknown type counts as nothing, so that a newer
# format is left for llama.cpp to judge.
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2)},
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 20: (32, 18), 39: (32, 17)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{29: (256, 56), 34: (256, 54), 35: (256, 66)},
}


class _Malformed(Exception):
    """The header breaks its own rules."""


class _Ended(Exception):
    """The file stops inside its header."""


def check_gguf(path: Path) -> None:
    """Raises WrongContent with a sentence that says what to do."""
    size = path.stat().st_size
    again = "Delete it and fetch it again."
    try:
        with open(path, "rb") as file:
            needed = _Header(file, size).bytes_needed()
    except _Malformed as error:
        raise WrongContent(f"{path} is not a GGUF model: {error}. {again}") from None
    except _Ended:
        raise WrongContent(f"{path} is cut short: it ends after {size:,} bytes, inside its header. {again}") from None
    if size < needed:
        raise WrongContent(f"{path} is cut short: it has {size:,} of at least {needed:,} bytes. {again}")


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._alignment = 32

    def bytes_needed(self) -> int:
        """Size of the smallest file that holds every tensor that the header lists."""
        if self._take(4) != MAGIC:
            raise _Malformed("it does not begin with GGUF")
        version, tensors, entries = struct.unpack("<IQQ", self._take(20))
        if version not in (2, 3) or tensors > _TENSORS_MAX or entries > _ENTRIES_MAX:
            raise _Malformed(f"version {version} with {tensors} tensors and {entries} entries")
        for _ in range(entries):
            self._skip_entry()
        data_bytes = max((self._tensor_end() for _ in range(tensors)), default=0)
        data_start = math.ceil(self._file.tell() / self._alignment) * self._alignment
        return data_start + data_bytes if tensors else self._file.tell()

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise _Ended
        return data

    def _number(self, form: str, count: int) -> int:
        return int(struct.unpack(form, self._take(count))[0])

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise _Ended
        self._file.seek(count, 1)

    def _text(self) -> bytes:
        length = self._number("<Q", 8)
        if length > _STRING_BYTES_MAX:
            raise _Malformed(f"a text of {length} bytes")
        return self._take(length)

    def _skip_entry(self) -> None:
        key = self._text()
        kind = self._number("<I", 4)
        if key == b"general.alignment" and kind == 4:
            self._alignment = self._number("<I", 4)
            if not 1 <= self._alignment <= 65536:
                raise _Malformed(f"an alignment of {self._alignment}")
            return
        self._skip_value(kind, 0)

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY and depth < _DEPTH_MAX:
            self._skip_array(depth)
        else:
            raise _Malformed(f"a value of type {kind}")

    def _skip_array(self, depth: int) -> None:
        kind, count = struct.unpack("<IQ", self._take(12))
        if count > _ARRAY_ITEMS_MAX:
            raise _Malformed(f"an array of {count} items")
        if kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind] * count)
            return
        for _ in range(count):
            self._skip_value(kind, depth + 1)

    def _tensor_end(self) -> int:
        """Where the next tensor of the list ends, counted from the beginning of the data."""
        self._text()
        dimensions = self._number("<I", 4)
        if dimensions > _DIMENSIONS_MAX:
            raise _Malformed(f"a tensor of {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))
        kind, offset = struct.unpack("<IQ", self._take(12))
        block, block_bytes = _BLOCKS.get(kind, (1, 0))
        elements: int = math.prod(shape)
        return int(offset) + elements // block * block_bytes
