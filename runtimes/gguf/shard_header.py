"""Reads the header of a GGUF file: what it says of itself, its tensors, and where their bytes lie. Layout: ggml's docs/gguf.md.

Versions 2 and 3, little-endian. No number in the file is believed before it is checked, and nothing large is kept: texts and long arrays
stay in the file, with their place noted. A file that passes is one that llama.cpp would map: no gaps, no overlaps, all there.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from protocol import checks, limits
from protocol.errors import ConfigError
from protocol.shards import LayerRange

MAGIC = b"GGUF"
_ENTRIES_MAX, _TENSORS_MAX = 4096, 200_000
_KEY_BYTES_MAX, _NAME_BYTES_MAX = 65_535, 63  # the specification's; GGML_MAX_NAME
_ARRAY_ITEMS_MAX = 64 * 1024 * 1024
_KEPT_TEXT_BYTES_MAX = 4096
_DIMENSIONS_MAX = 4
_ELEMENTS_MAX = 2**48
_ALIGNMENT_DEFAULT, _ALIGNMENT_MAX = 32, 65_536

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of ``struct`` by type of value."""

# (elements of a block, bytes of a block) by ggml type; ggml's type traits table. A type that is missing here has no size that is known.
BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2)},
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 20: (32, 18), 39: (32, 17)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{29: (256, 56), 34: (256, 54), 35: (256, 66), 40: (64, 36), 41: (128, 18), 42: (64, 18)},
}

_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)\Z", re.DOTALL)
MODEL_KEY, LOW_KEY, HIGH_KEY, TOTAL_KEY = (
    f"archipelag.{name}" for name in ("model_sha256", "layers_low", "layers_high", "layers_total")
)

Value = int | float | str | tuple[int | float, ...] | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the metadata. ``start``..``end``: where it lies in the file, key and value. ``items``: length of an array, else -1.
    ``value``: as Python knows it; None for long texts, long arrays and arrays of texts.
    """

    key: str
    kind: int
    item_kind: int
    items: int
    start: int
    end: int
    value: Value


@dataclass(frozen=True, slots=True)
class Tensor:
    """``start``: where its ``size`` bytes lie in the file; ``shape``: fastest dimension first; ``layer``: -1 where it belongs to none."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int
    layer: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.size // self.rows


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the data of a GGUF file, checked."""

    path: Path
    architecture: str
    alignment: int
    total_layers: int
    file_bytes: int
    entries: dict[str, Entry]
    tensors: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"<GgufHeader {self.architecture}, {self.total_layers} layers, {len(self.tensors)} tensors>"

    def value(self, name: str) -> Value:
        """Of the architecture's own entry ``name``, such as ``embedding_length``; None where there is none."""
        entry = self.entries.get(f"{self.architecture}.{name}")
        return entry.value if entry is not None else None

    def number(self, name: str, default: int = 0) -> int:
        """A positive figure; raises ConfigError where it is none and there is no default."""
        value = self.value(name)
        found = default if value is None else value
        if not isinstance(found, int) or not 0 < found < 2**31:
            raise refusal(self.path, f"its entry {self.architecture}.{name} is {value!r}")
        return found

    def numbers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        """One figure for each layer, where the file has one for all or one for each."""
        value = self.value(name)
        if value is None:
            return tuple(default)
        found = value if isinstance(value, tuple) else (value,) * self.total_layers
        if len(found) != self.total_layers or any(not isinstance(n, int) or not 0 <= n < 2**31 for n in found):
            raise refusal(self.path, f"its entry {self.architecture}.{name} is not one figure for each of {self.total_layers} layers")
        return tuple(int(n) for n in found)


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What a shard says of itself: its layers, those of the whole model, and the SHA-256 of the model's file."""

    layers: LayerRange
    total_layers: int
    model_sha256: str


def read_header(path: Path) -> GgufHeader:
    """The header of a whole model or of a shard. Raises ConfigError with a sentence that says what to do."""
    try:
        with open(path, "rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path and its rights") from error


def read_shard_layers(path: Path) -> ShardFacts | None:
    """Which layers a file holds; None for a whole model. Raises ConfigError."""
    return shard_facts(read_header(path))


def shard_facts(header: GgufHeader) -> ShardFacts | None:
    """None for a whole model. Raises ConfigError where it calls itself a shard and is none."""
    found = [header.entries[key].value if key in header.entries else None for key in (MODEL_KEY, LOW_KEY, HIGH_KEY, TOTAL_KEY)]
    if found == [None] * 4:
        return None
    digest, low, high, total = found
    try:
        if not isinstance(digest, str) or type(low) is not int or type(high) is not int or type(total) is not int:
            raise ValueError("entries are missing or of a wrong type")
        checks.content_hash("the model's hash", digest)
        layers = LayerRange(low, high)
        if not (len(layers) == header.total_layers and high <= total <= limits.LAYERS_MAX):
            raise ValueError(f"it has {header.total_layers} layers and calls them {low} to {high - 1} of {total}")
    except ValueError as error:
        raise ConfigError(f"{header.path} is no usable shard: {error}; fetch it again or cut it anew from the model") from None
    return ShardFacts(layers, total, digest)


def refusal(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path} cannot be cut: {what}; fetch it again or use another model file")


class _Ended(Exception):
    """The file stops inside its header."""


class _Reader:
    """Reads a header and believes no number in it. Raises ConfigError."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._alignment = _ALIGNMENT_DEFAULT

    def header(self) -> GgufHeader:
        try:
            return self._header()
        except (_Ended, UnicodeDecodeError, struct.error) as error:
            where = "it is cut short inside its header" if isinstance(error, _Ended) else "its header is damaged"
            raise self._wrong(where) from None

    def _header(self) -> GgufHeader:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{self._path} is not a GGUF model; name a file that ends in .gguf")
        version, tensors, entries = self._unpack("<IQQ")
        if version not in (2, 3) or tensors > _TENSORS_MAX or entries > _ENTRIES_MAX:
            raise self._wrong(f"it has the version {version}, {tensors} tensors and {entries} entries")
        known: dict[str, Entry] = {}
        for _ in range(entries):
            entry = self._entry()
            if not entry.key or entry.key in known:
                raise self._wrong(f"its entry {entry.key[:80]!r} stands there twice")
            known[entry.key] = entry
        architecture = known["general.architecture"].value if "general.architecture" in known else None
        if not isinstance(architecture, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", architecture):
            raise self._wrong(f"its architecture is {architecture!r}")
        self._read_alignment(known)
        total = known[f"{architecture}.block_count"].value if f"{architecture}.block_count" in known else None
        if type(total) is not int or not 1 <= total <= limits.LAYERS_MAX:
            raise self._wrong(f"its number of layers is {total!r}")
        listed = self._tensors(tensors, total)
        return GgufHeader(self._path, architecture, self._alignment, total, self._size, known, listed)

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._path} is not a usable GGUF model: {what}; delete it and fetch it again")

    def _read_alignment(self, known: dict[str, Entry]) -> None:
        entry = known.get("general.alignment")
        if entry is None:
            return
        value = entry.value
        if entry.kind != UINT32 or type(value) is not int or not 1 <= value <= _ALIGNMENT_MAX or value & (value - 1):
            raise self._wrong(f"its alignment is {value!r}")
        self._alignment = value

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise _Ended
        return data

    def _unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise _Ended
        self._file.seek(count, os.SEEK_CUR)

    def _text(self, bytes_max: int) -> str:
        (length,) = self._unpack("<Q")
        if length > bytes_max:
            raise self._wrong(f"it has a name of {length} bytes")
        return self._take(length).decode()

    def _entry(self) -> Entry:
        start = self._file.tell()
        key = self._text(_KEY_BYTES_MAX)
        (kind,) = self._unpack("<I")
        item_kind, items = -1, -1
        value: Value = None
        if kind == ARRAY:
            item_kind, items = self._unpack("<IQ")
            value = self._array(item_kind, items)
        elif kind == STRING:
            value = self._kept_text()
        elif kind in SCALARS:
            (value,) = self._unpack(f"<{SCALARS[kind]}")
        else:
            raise self._wrong(f"its entry {key[:80]!r} has the type {kind}")
        return Entry(key, kind, item_kind, items, start, self._file.tell(), value)

    def _kept_text(self) -> str | None:
        (length,) = self._unpack("<Q")
        if length <= _KEPT_TEXT_BYTES_MAX:
            return self._take(length).decode("utf-8", "replace")
        self._skip(length)
        return None

    def _array(self, kind: int, count: int) -> Value:
        if count > _ARRAY_ITEMS_MAX or (kind != STRING and kind not in SCALARS):
            raise self._wrong(f"it has an array of {count} items of the type {kind}")
        if kind == STRING:
            for _ in range(count):
                self._skip(self._unpack("<Q")[0])
            return None
        if count > limits.LAYERS_MAX:
            self._skip(count * struct.calcsize(f"<{SCALARS[kind]}"))
            return None
        return self._unpack(f"<{count}{SCALARS[kind]}")

    def _tensors(self, count: int, total_layers: int) -> dict[str, Tensor]:
        """llama.cpp wants the tensors' data in the order of their list and without gaps, so that is asked for here as well."""
        listed, expected = [], 0
        for _ in range(count):
            name, shape, kind, offset, size = self._tensor()
            if offset != expected:
                raise self._wrong(f"its tensor {name[:80]!r} lies at {offset}, not behind the one before it")
            expected += size + -size % self._alignment
            listed.append((name, shape, kind, offset, size))
        base = self._file.tell() + -self._file.tell() % self._alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset, size in listed:
            layer = self._layer(name, total_layers)
            if name in tensors:
                raise self._wrong(f"its tensor {name!r} stands there twice")
            if base + offset + size > self._size:
                raise self._wrong(f"it is cut short: it has {self._size:,} of at least {base + offset + size:,} bytes")
            tensors[name] = Tensor(name, shape, kind, base + offset, size, layer)
        return tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int, int]:
        name = self._text(_NAME_BYTES_MAX)
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= _DIMENSIONS_MAX:
            raise self._wrong(f"its tensor {name!r} has {dimensions} dimensions")
        shape = self._unpack(f"<{dimensions}Q")
        kind, offset = self._unpack("<IQ")
        if kind not in BLOCKS:
            raise self._wrong(f"its tensor {name!r} has the type {kind}, which this program does not know")
        elements, (block, block_bytes) = math.prod(shape), BLOCKS[kind]
        if not 0 < elements <= _ELEMENTS_MAX or shape[0] % block:
            raise self._wrong(f"its tensor {name!r} has the shape {shape}")
        return name, shape, kind, offset, elements // block * block_bytes

    def _layer(self, name: str, total_layers: int) -> int:
        match = _LAYER_TENSOR.match(name)
        if match is None:
            if name.startswith("blk."):
                raise self._wrong(f"its tensor {name!r} belongs to no layer")
            return -1
        if int(match[1]) >= total_layers:
            raise self._wrong(f"its tensor {name!r} belongs to a layer behind the last, {total_layers - 1}")
        return int(match[1])
