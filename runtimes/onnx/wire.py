"""Reads an ONNX file's protobuf just far enough to know what it would open: its operators' domains and the files its tensors lie in.

Why not the ``onnx`` package: it copies a model of gigabytes to look at a few names, and it is one more parser of native code for strangers'
bytes in a process that needs none. Here the file is mapped and only lengths and the few wanted fields are read; a tensor's data is
stepped over. Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3); a message that stands
twice is walked twice, as protobuf would merge it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from protocol.errors import ConfigError

FIELDS_MAX = 4_000_000  # of one model; a graph of 10,000 nodes has some 200,000
DEPTH_MAX = 32  # of graphs in attributes of nodes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1  # TensorProto.DataLocation

# Message -> field number -> message that it holds.
_INSIDE: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
        "training": {1: "graph", 2: "graph"},
        "graph": {1: "node", 5: "tensor", 15: "sparse"},
        "function": {7: "node", 9: "opset", 11: "attribute"},
        "node": {5: "attribute"},
        "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
        "sparse": {1: "tensor", 2: "tensor"},
        "tensor": {13: "entry"},
    }
)


@dataclass(slots=True)
class ModelNotes:
    """What a model names. ``external``: (location, offset, length) of each tensor outside the file, as the file says them, in text."""

    has_graph: bool = False
    ir_version: int = 0
    domains: set[str] = field(default_factory=set)  # of nodes and of imported operator sets
    own_domains: set[str] = field(default_factory=set)  # of functions that the model brings itself
    external: list[tuple[str, str, str]] = field(default_factory=list)


def read_notes(data: memoryview) -> ModelNotes:
    """Raises ConfigError for bytes that are no ONNX model."""
    walker = _Walker(data)
    walker.walk("model", 0, len(data), 0)
    if not walker.notes.has_graph or walker.notes.ir_version < 1:
        raise ConfigError("the model has no graph; only ONNX models are taken")
    return walker.notes


class _Walker:
    def __init__(self, data: memoryview) -> None:
        self.notes = ModelNotes()
        self._data = data
        self._fields = 0

    def walk(self, kind: str, start: int, end: int, depth: int) -> None:
        if depth > DEPTH_MAX:
            raise ConfigError(f"the model nests its graphs deeper than {DEPTH_MAX} levels")
        inside = _INSIDE[kind]
        strings: dict[int, str] = {}
        numbers: dict[int, int] = {}
        entries: dict[str, str] = {}
        for number, wire, low, high in self._each(start, end):
            if wire == _VARINT:
                numbers[number] = low
            elif wire == _BYTES and (what := inside.get(number)) == "entry":
                key, value = self._entry(low, high)
                if key in entries:
                    raise ConfigError(f"the model says twice what {key[:80]!r} of a tensor is")
                entries[key] = value
            elif wire == _BYTES and what in ("opset", None):
                self._note(kind, number, what, low, high, strings)
            elif wire == _BYTES and what is not None:
                self.notes.has_graph |= kind == "model" and what == "graph"
                self.walk(what, low, high, depth + (what == "graph"))
        self._finish(kind, strings, numbers, entries)

    def _note(self, kind: str, number: int, what: str | None, low: int, high: int, strings: dict[int, str]) -> None:
        if what == "opset":
            self.notes.domains.add(self._string(low, high, 1))
        elif (kind, number) in (("node", 7), ("function", 10)):
            strings[number] = self._text(low, high)

    def _finish(self, kind: str, strings: dict[int, str], numbers: dict[int, int], entries: dict[str, str]) -> None:
        if kind == "model":
            self.notes.ir_version = numbers.get(1, 0)
        elif kind == "node":
            self.notes.domains.add(strings.get(7, ""))
        elif kind == "function":
            self.notes.own_domains.add(strings.get(10, ""))
        elif kind == "tensor" and (entries or numbers.get(14) == _EXTERNAL):
            self.notes.external.append((entries.get("location", ""), entries.get("offset", "0"), entries.get("length", "")))

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        return self._string(start, end, 1), self._string(start, end, 2)

    def _string(self, start: int, end: int, wanted: int) -> str:
        found = ""
        for number, wire, low, high in self._each(start, end):
            if number == wanted and wire == _BYTES:
                found = self._text(low, high)
        return found

    def _text(self, low: int, high: int) -> str:
        if high - low > 4096:
            raise ConfigError("the model has a name of more than 4,096 bytes")
        try:
            return bytes(self._data[low:high]).decode()
        except UnicodeDecodeError:
            raise ConfigError("the model has a name that is not UTF-8") from None

    def _each(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(field, wire type, start, end) of a message's fields; of a varint its value instead of the start."""
        at = start
        while at < end:
            self._fields += 1
            if self._fields > FIELDS_MAX:
                raise ConfigError(f"the model has more than {FIELDS_MAX:,} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise _not_onnx(at)
            if wire == _VARINT:
                value, at = self._varint(at, end)
                yield number, wire, value, at
                continue
            if wire == _BYTES:
                size, at = self._varint(at, end)
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:
                raise _not_onnx(at)
            if size > end - at:
                raise _not_onnx(at)
            yield number, wire, at, at + size
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise _not_onnx(at)
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise _not_onnx(at)


def _not_onnx(at: int) -> ConfigError:
    return ConfigError(f"the model is no whole ONNX file: it makes no sense at byte {at}; only ONNX models are taken")
