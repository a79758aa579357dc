"""``embeddings``: one vector for each text, by the mean of its tokens' states or as the model pools them itself.

Floats are written with nine significant digits, which name a float32 exactly (IEEE 754-2008, 5.12.2), in 0.6 of the bytes and a quarter of
the time of a float64's seventeen; base64 of little-endian float32 takes a tenth of that again.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol import limits
from protocol.cargo_io import DoneLine, Usage
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob, LineJob
from runtimes.onnx import fields
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Session
from runtimes.onnx.texts import TextModel

Vectors = npt.NDArray[np.float32]

_FLOAT_BYTES = 16  # of "-0.0123456789,", and of "-1.23456789e-05,"
_BASE64_BYTES = 5.4  # of a float32, rounded up
_ROOM_BYTES = 4096
_NORM_MIN = 1e-12
_VALUE_MAX = 1e9  # below it nine digits need no more than _FLOAT_BYTES, however they are written


@dataclass(frozen=True, slots=True)
class Embeddings:
    """``pooling``: mean, cls, last, or none where the model's output is a vector already."""

    task: str
    model: TextModel
    output: str
    dimensions: int
    pooling: str
    normalize: bool

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("input", "text", "encoding_format", "dimensions"))
        texts, is_one = fields.texts(job.fields, "input", "text")
        form = fields.choice(job.fields, "encoding_format", ("float", "base64"))
        if job.fields.get("dimensions") not in (None, self.dimensions):
            raise BadJob(f"dimensions must be {self.dimensions}, as many as this model gives")
        self._check_room(len(texts) + is_one, form)
        rows = self.model.encode(texts)
        vectors = np.empty((len(rows), self.dimensions), np.float32)
        for places, arrays in self.model.batches(rows, job.check):
            vectors[places] = self._vectors(arrays)
        usage = Usage(sum(len(row.ids) for row in rows), 0)
        return DoneLine(usage, None, _result(self.task, vectors, is_one, form))

    def _check_room(self, count: int, form: str) -> None:
        each = int(self.dimensions * (_FLOAT_BYTES if form == "float" else _BASE64_BYTES))
        most = (limits.CARGO_LINE_BYTES_MAX - _ROOM_BYTES) // each
        if count > most:
            hint = "send fewer, or ask for encoding_format base64" if form == "float" else "send fewer"
            raise BadJob(f"{count} vectors of {self.dimensions} numbers are more than one answer holds, {most}; {hint}")

    def _vectors(self, arrays: dict[str, Array]) -> Vectors:
        rows, width = arrays["input_ids"].shape
        (states,) = self.model.session.run(arrays, [self.output])
        wanted = (rows, self.dimensions) if self.pooling == "none" else (rows, width, self.dimensions)
        if states.shape != wanted or states.dtype.kind != "f":
            raise BrokenJob(f"the model's {self.output} has shape {states.shape}; it must be {wanted}")
        mask = _mask(arrays, rows, width)
        pooled = pool(states.astype(np.float32, copy=False), mask, self.pooling)
        if not (np.abs(pooled) < _VALUE_MAX).all():  # nor NaN
            raise BrokenJob("the model gave a vector of numbers that are not finite, or beyond all reason")
        return normalized(pooled) if self.normalize else pooled


def _mask(arrays: dict[str, Array], rows: int, width: int) -> Vectors:
    if "attention_mask" not in arrays:
        return np.ones((rows, width), np.float32)
    return arrays["attention_mask"].astype(np.float32)


def pool(states: Vectors, mask: Vectors, pooling: str) -> Vectors:
    """States of [rows, tokens, dimensions] or, for none, [rows, dimensions]; mask of [rows, tokens]. Gives [rows, dimensions]."""
    if pooling == "none":
        return states
    if pooling == "cls":
        return states[:, 0, :]
    counts = np.maximum(mask.sum(axis=1, keepdims=True), 1.0)
    if pooling == "last":
        last: Vectors = states[np.arange(len(states)), counts[:, 0].astype(np.int64) - 1]
        return last
    # One small matrix product a row, without an array of the masked states.
    sums: Vectors = np.matmul(mask[:, None, :], states)[:, 0]
    means: Vectors = sums / counts
    return means


def normalized(vectors: Vectors) -> Vectors:
    """Of length 1 (L2); a vector of zeros stays."""
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    found: Vectors = vectors / np.maximum(lengths, np.float32(_NORM_MIN))
    return found


def _result(task: str, vectors: Vectors, is_one: bool, form: str) -> str:
    """The result as JSON, written here: by way of Python's floats it would take as long as some of the texts."""
    made = _base64_rows(vectors) if form == "base64" else _float_rows(vectors)
    one = f'"embedding":{made[0]},' if is_one else ""
    return f'{{{one}"embeddings":[{",".join(made)}],"dimensions":{vectors.shape[1]},"task":{json.dumps(task)}}}'


def _base64_rows(vectors: Vectors) -> list[str]:
    little = vectors.astype("<f4", copy=False)
    return [f'"{base64.b64encode(row.tobytes()).decode()}"' for row in little]


def _float_rows(vectors: Vectors) -> list[str]:
    form = "[" + ",".join(["%.9g"] * vectors.shape[1]) + "]"
    return [form % tuple(row) for row in vectors.tolist()]


def open_embeddings(task: str, session: Session, options: OptionReader, model: TextModel) -> Embeddings:
    """Reads options ``output``, ``pooling``, ``normalize``. Raises ConfigError."""
    output = options.text("output", next(iter(session.outputs)))
    if output not in session.outputs:
        raise ConfigError(f"option output names {output}, which the model does not give; it gives {', '.join(session.outputs)[:200]}")
    shape = session.outputs[output].shape
    pooling = options.choice("pooling", ("none",) if len(shape) == 2 else ("mean", "cls", "last"))
    if len(shape) not in (2, 3) or shape[-1] is None:
        given = session.outputs[output].shape_text
        raise ConfigError(f"the model's {output} has shape {given}; embeddings need [rows, tokens, a fixed number]")
    return Embeddings(task, model, output, shape[-1], pooling, options.flag("normalize", True))
