"""What an embedding job brings and gets: ``{"input": text or texts, "encoding_format": "float" or "base64"}`` in, vectors out.

Floats have nine significant digits, which name a float32 exactly (IEEE 754-2008, 5.12.2). Pure.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol import checks, limits
from protocol.cargo_io import decode_input
from protocol.errors import Code, Refused, RemoteProtocolError

Vector = npt.NDArray[np.float32]

TEXTS_MAX = limits.TEXTS_MAX
TASK = "embeddings"
_KNOWN = frozenset({"input", "text", "encoding_format", "dimensions", "model", "user"})
_FLOAT_BYTES, _BASE64_BYTES = 16, 5.4  # of one number at most: "-1.23456789e-05,", and 4 bytes of 6 bits a character
_ROOM_BYTES = 4096  # for what stands round them
_NORM_MIN = 1e-12


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """``is_one``: a text came, and not a list of them."""

    texts: tuple[str, ...]
    is_base64: bool
    is_one: bool


def read_input(data: bytes, dimensions: int) -> EmbeddingInput:
    """Raises Refused(bad_input) with a sentence that says what would do."""
    try:
        fields = decode_input(data)
    except RemoteProtocolError as error:
        raise Refused(Code.BAD_INPUT, str(error)) from None
    unknown = sorted(fields.keys() - _KNOWN)
    if unknown:
        raise _bad(f"field {checks.made_printable(unknown[0], 40)!r} is not known; an embedding takes input and encoding_format")
    if fields.get("dimensions") not in (None, dimensions):
        raise _bad(f"dimensions of this model are {dimensions}")
    form = fields.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise _bad("encoding_format must be float or base64")
    if fields.get("input") is not None and fields.get("text") is not None:
        raise _bad("input and text say the same; send one of them")
    given = fields.get("text") if fields.get("input") is None else fields.get("input")
    texts = given if isinstance(given, list) else [given]
    if not 1 <= len(texts) <= TEXTS_MAX:
        raise _bad(f"input has {len(texts)} texts; 1 to {TEXTS_MAX} are allowed")
    checked = EmbeddingInput(tuple(map(_text, texts)), form == "base64", not isinstance(given, list))
    _check_room(checked, dimensions)
    return checked


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _bad("input must be a text or a list of texts")
    if not value.strip():
        raise _bad("input has a text with nothing in it")
    try:
        checks.utf8("input", value, limits.JOB_INPUT_BYTES_MAX)
    except ValueError as error:
        raise _bad(str(error)) from None
    return value


def _check_room(given: EmbeddingInput, dimensions: int) -> None:
    each = int(dimensions * (_BASE64_BYTES if given.is_base64 else _FLOAT_BYTES))
    most = (limits.CARGO_LINE_BYTES_MAX - _ROOM_BYTES) // each
    count = len(given.texts) + given.is_one
    if count > most:
        hint = "send fewer" if given.is_base64 else "send fewer, or ask for encoding_format base64"
        raise _bad(f"{count} vectors of {dimensions} numbers are more than one answer holds, {most}; {hint}")


def _bad(message: str) -> Refused:
    return Refused(Code.BAD_INPUT, message)


def normalized(vector: Vector) -> Vector:
    """Of length 1 (L2); zeros stay."""
    return vector / np.float32(max(float(np.linalg.norm(vector)), _NORM_MIN))


def written(vector: Vector, is_base64: bool) -> str:
    """A vector as JSON; written here, since Python's own way by its floats takes four times as long."""
    if is_base64:
        return f'"{base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()}"'
    return "[" + ",".join(["%.9g"] * len(vector)) % tuple(vector.tolist()) + "]"


def result(vectors: Sequence[str], dimensions: int, is_one: bool) -> str:
    """A DoneLine's result, of written vectors."""
    one = f'"embedding":{vectors[0]},' if is_one else ""
    return f'{{{one}"embeddings":[{",".join(vectors)}],"dimensions":{dimensions},"task":"{TASK}"}}'
