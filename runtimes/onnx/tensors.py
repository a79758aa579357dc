"""``tensors``: arrays by name in and out, for models that fit no other task.

    {"inputs": {"bytes": {"dtype": "int32", "shape": [1, 2048], "data": "BASE64"}, "sr": 16000},
     "outputs": ["output"], "encoding": "base64"}

``data`` is base64 of little-endian bytes, row by row; an input may also be nested lists, or one number. Answers are nested lists, or
base64 likewise. Texts go as lists only.
"""

from __future__ import annotations

import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol import limits
from protocol.cargo_io import DoneLine
from runtimes.lines.engine import BadJob, BrokenJob, LineJob
from runtimes.onnx import fields
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Port, Session

_AXES_MAX = 8
_ROOM_BYTES = 64 * 1024
_NUMBER_BYTES = 24  # of a float64 in JSON, its comma too


@dataclass(frozen=True, slots=True)
class Tensors:
    task: str
    session: Session

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("inputs", "outputs", "encoding"))
        encoding = fields.choice(job.fields, "encoding", ("list", "base64"))
        names = self._outputs(job.fields.get("outputs"))
        arrays = self._arrays(job.fields.get("inputs"))
        job.check()
        given = self.session.run_given(arrays, names)
        self._check_room(given, encoding)
        made = [f"{json.dumps(name)}:{_encoded(array, encoding)}" for name, array in zip(names, given, strict=True)]
        return DoneLine(None, None, f'{{"outputs":{{{",".join(made)}}},"task":{json.dumps(self.task)}}}')

    def _outputs(self, value: object) -> list[str]:
        if value is None:
            return list(self.session.outputs)
        if not isinstance(value, list) or not value or not all(isinstance(each, str) and each in self.session.outputs for each in value):
            raise BadJob(f"outputs must be a list of {', '.join(self.session.outputs)}")
        return list(dict.fromkeys(value))

    def _arrays(self, value: object) -> dict[str, Array]:
        takes = ", ".join(f"{port.name} ({port.dtype} {port.shape_text})" for port in self.session.inputs.values())
        if not isinstance(value, dict) or value.keys() != self.session.inputs.keys():
            raise BadJob(f"inputs must be an object with exactly {takes}")
        return {name: read_tensor(value[name], port) for name, port in self.session.inputs.items()}

    def _check_room(self, arrays: Sequence[Array], encoding: str) -> None:
        size = sum(_size_of(array, encoding) for array in arrays)
        if size > limits.CARGO_LINE_BYTES_MAX - _ROOM_BYTES:
            raise BadJob("the outputs are larger than one answer holds; ask for fewer outputs, or for encoding base64")


def read_tensor(value: object, port: Port) -> Array:
    """One input as the model wants it. Raises BadJob that says what it wants."""
    array = _of_bytes(value, port) if isinstance(value, dict) else _of_lists(value, port)
    if not port.takes(array.shape):
        raise BadJob(f"{port.name} has shape {list(array.shape)}; the model takes {port.shape_text}")
    return array


def _of_bytes(value: Mapping[str, Any], port: Port) -> Array:
    if value.keys() != {"dtype", "shape", "data"}:
        raise BadJob(f"{port.name} must have dtype, shape and data, or be nested lists")
    if port.dtype == "string" or value["dtype"] != port.dtype:
        raise BadJob(f"{port.name} must be {'nested lists of texts' if port.dtype == 'string' else f'of dtype {port.dtype}'}")
    shape, data = value["shape"], value["data"]
    if not isinstance(shape, list) or len(shape) > _AXES_MAX or not all(type(side) is int and side >= 0 for side in shape):
        raise BadJob(f"{port.name} must have a shape of at most {_AXES_MAX} whole numbers")
    try:
        raw = binascii.a2b_base64(data, strict_mode=True) if isinstance(data, str) else None
    except ValueError:
        raw = None
    kind = np.dtype(port.dtype).newbyteorder("<")
    if raw is None or len(raw) != math.prod(shape) * kind.itemsize:
        raise BadJob(f"{port.name} must have data in base64 of {kind.itemsize} bytes a number, as many as its shape has")
    if port.dtype == "bool" and raw.strip(b"\x00\x01"):
        raise BadJob(f"{port.name} must have bytes of 0 and 1 for false and true")
    return np.frombuffer(raw, kind).reshape(shape)


def _of_lists(value: object, port: Port) -> Array:
    kinds: dict[str, type | tuple[type, ...]] = {"s": str, "b": bool, "i": int, "u": int, "f": (int, float)}
    wanted = "s" if port.dtype == "string" else np.dtype(port.dtype).kind
    shape = _shape_of(value)
    flat: list[Any] = []
    if shape is None or not _flatten(value, shape, flat) or not all(_is_a(each, kinds[wanted]) for each in flat):
        raise BadJob(f"{port.name} must be nested lists of {port.dtype}, all rows of one length")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, object if wanted == "s" else port.dtype).reshape(shape)
    except (OverflowError, ValueError):
        raise BadJob(f"{port.name} has a number that no {port.dtype} holds") from None
    if wanted == "f" and not np.isfinite(array).all():
        raise BadJob(f"{port.name} has a number that no {port.dtype} holds")
    return array


def _is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _shape_of(value: object) -> tuple[int, ...] | None:
    """By the first entry of each level; None where it is too deep."""
    shape: list[int] = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(shape) > _AXES_MAX:
            return None
        value = value[0] if value else 0
    return tuple(shape)


def _flatten(value: Any, shape: tuple[int, ...], into: list[Any]) -> bool:
    if not shape:
        into.append(value)
        return not isinstance(value, list)
    if not isinstance(value, list) or len(value) != shape[0]:
        return False
    return all(_flatten(each, shape[1:], into) for each in value)


def _size_of(array: Array, encoding: str) -> int:
    if array.dtype.kind in "OSU":
        return sum(len(json.dumps(str(text))) + 8 for text in array.ravel())
    if encoding == "base64":
        return array.nbytes * 4 // 3 + 8
    rows = sum(math.prod(array.shape[:axis]) for axis in range(array.ndim))  # each has brackets and a comma, and may be empty
    return array.size * _NUMBER_BYTES + rows * 3


def _encoded(array: Array, encoding: str) -> str:
    is_text = array.dtype.kind in "OSU"
    if encoding == "base64" and not is_text:
        data = binascii.b2a_base64(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes(), newline=False).decode()
        return json.dumps({"dtype": array.dtype.name, "shape": list(array.shape), "data": data})
    try:
        return json.dumps(array.tolist(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise BrokenJob("the model gave numbers that are not finite, which JSON has no lists of; ask for encoding base64") from None


def open_tensors(task: str, session: Session, options: OptionReader) -> Tensors:
    return Tensors(task, session)
