"""``/v1/embeddings``: OpenAI's request and answer over a Cargo that makes vectors.

The Cargo is always asked for base64, which is exact and small; where the client wants numbers they are written here, each with the fewest
digits that read back as the same float32. Its result is checked before anybody pays for it.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.http.answers import to_json
from coordinator.http.errors import bad_request, unsupported
from coordinator.http.fields import Fields, text_of, wrong_type
from coordinator.http.line_answers import LineAnswer, LineRequest
from coordinator.jobs import ChoiceResult, Event
from protocol import limits
from protocol.cargo_io import DoneLine, encode_input
from protocol.cargo_jobs import SEED_BYTES, CargoInput
from protocol.errors import Code, LocalProtocolError, Refused

KIND = "embedding"
TEXTS_MAX = limits.TEXTS_MAX
DIMENSIONS_MAX = 65_536
FORMATS = ("float", "base64")

Vectors = npt.NDArray[np.float32]

_FLOAT_DIGITS = (8, 7, 6)  # tried from the most to the fewest
_POWERS = np.array([float(f"1e{exponent}") for exponent in range(64)])  # float32 goes down to 1e-45
_BLOCK_NUMBERS = 16_384  # so many doubles stay in a CPU's cache, and other threads get their turn in between


@dataclass(slots=True)
class EmbeddingCheck:
    """Whether a Cargo's result is one vector for each of ``count`` texts. ``vectors``: of the result, once it was seen."""

    model: str
    count: int
    vectors: Vectors | None = field(default=None)

    def __call__(self, event: Event) -> None:
        """Raises Refused."""
        if isinstance(event, ChoiceResult):
            self.vectors = read_vectors(event.done or DoneLine(), self.model, self.count)

    def of(self, answer: LineAnswer) -> Vectors:
        """The vectors of an answer; one that was kept has not been seen yet."""
        return self.vectors if self.vectors is not None else read_vectors(answer.done, self.model, self.count)


@dataclass(frozen=True, slots=True)
class EmbeddingRequest(LineRequest):
    """``is_base64``: how the client wants the vectors."""

    is_base64: bool = False
    vectors: EmbeddingCheck = field(kw_only=True)


def parse_embeddings(body: Mapping[str, Any]) -> EmbeddingRequest:
    """``POST /v1/embeddings``. Raises ApiError 400."""
    fields = Fields(body)
    model = fields.text("model", limits.NAME_CHARS_MAX, required=True)
    texts = _texts(fields.get("input"))
    form = fields.get("encoding_format")
    if form is not None and form not in FORMATS:
        raise bad_request(f"encoding_format must be {' or '.join(FORMATS)}", "encoding_format")
    dimensions = fields.integer("dimensions", 1, DIMENSIONS_MAX)
    asked: dict[str, object] = {"input": texts, "encoding_format": "base64"}
    if dimensions is not None:
        asked["dimensions"] = dimensions
    try:
        given = CargoInput(encode_input(asked), secrets.token_bytes(SEED_BYTES))
    except (LocalProtocolError, ValueError) as error:
        raise bad_request(str(error), "input", "input_too_large") from None
    check = EmbeddingCheck(model, len(texts))
    return EmbeddingRequest(model, given, check, is_base64=form == "base64", vectors=check)


def _texts(value: object) -> list[str]:
    if value is None:
        raise bad_request("you must provide input, a text or an array of texts", "input", "missing_required_parameter")
    if isinstance(value, str):
        return [_text(value, "input")]
    if not isinstance(value, list):
        raise wrong_type("input", "a string or an array of strings", value)
    if not value:
        raise bad_request("input must hold at least one text", "input", "empty_array")
    if any(type(entry) in (int, list) for entry in value):
        raise unsupported("input", "as arrays of tokens is not supported here, since models cut texts differently; send the texts")
    if len(value) > TEXTS_MAX:
        raise bad_request(f"there are {len(value)} texts; the limit is {TEXTS_MAX}", "input", "array_above_max_length")
    return [_text(entry, f"input[{index}]") for index, entry in enumerate(value)]


def _text(value: object, where: str) -> str:
    text = text_of(value, where, limits.JOB_INPUT_BYTES_MAX)
    if not text.strip():
        raise bad_request(f"{where} is empty; send a text with something in it", where)
    return text


def read_vectors(done: DoneLine, model: str, count: int) -> Vectors:
    """[texts, dimensions], of a Cargo's result: a list of base64 of little-endian float32, or of lists of numbers. Raises Refused:
    BAD_INPUT where the Cargo does something else, CARGO_FAILED where its vectors are none."""
    rows = json.loads(done.result).get("embeddings")
    if not isinstance(rows, list):
        raise Refused(Code.BAD_INPUT, f"{model} makes no embeddings; name a model that does")
    try:
        found = [_vector(row) for row in rows]
        vectors = np.stack(found) if found else np.empty((0, 0), np.float32)
    except (ValueError, TypeError, OverflowError, binascii.Error):
        raise Refused(Code.CARGO_FAILED, f"the vectors of {model} are none, or not of one length") from None
    if len(vectors) != count or not vectors.size or not np.isfinite(vectors).all():
        raise Refused(Code.CARGO_FAILED, f"{model} gave {len(vectors)} vectors for {count} texts, or some of numbers that are not finite")
    return vectors


def _vector(row: object) -> Vectors:
    if isinstance(row, str):
        return np.frombuffer(base64.b64decode(row, validate=True), "<f4").astype(np.float32, copy=False)
    if not isinstance(row, list) or any(type(number) not in (int, float) for number in row):
        raise ValueError("no vector")
    with np.errstate(over="ignore"):  # seen as not finite later
        return np.array(row, np.float64).astype(np.float32)


def shortest(vectors: Vectors) -> npt.NDArray[np.float64]:
    """Of each float32 a double that ``%.9g`` writes with the fewest digits that still read back as that float32.

    Nine digits always do (IEEE 754-2008, 5.12.2), often eight or seven, and with six a number is what it was meant to be: 0.1. At a power
    of two, where floats are closer on one side, there may be a digit more, and from 1e8 on there are always nine: below it n / 10^k is
    rounded once, as both are exact, and so right even in the middle between two floats. NumPy's own way takes one number at a time.
    """
    found = vectors.astype(np.float64)
    sizes = np.abs(found)
    sizes[sizes == 0] = 1.0
    exponents = _FLOAT_DIGITS[0] - 1 - np.floor(np.log10(sizes)).astype(np.int64)
    powers = _POWERS[np.maximum(exponents, 0)]
    exact = found.copy()
    for _ in _FLOAT_DIGITS:
        rounded = np.rint(exact * powers) / powers
        np.copyto(found, rounded, where=(rounded.astype(np.float32) == vectors) & (powers >= 1.0))
        powers /= 10.0
    return found


def vectors_json(vectors: Vectors, is_base64: bool) -> list[str]:
    """Each vector as JSON: an array of numbers, or base64 of little-endian float32 as a string."""
    if is_base64:
        return [f'"{base64.b64encode(row.tobytes()).decode()}"' for row in vectors.astype("<f4", copy=False)]
    form = "[" + ",".join(["%.9g"] * vectors.shape[1]) + "]"
    step = max(1, _BLOCK_NUMBERS // vectors.shape[1])
    blocks = (shortest(vectors[start : start + step]).tolist() for start in range(0, len(vectors), step))
    return [form % tuple(row) for block in blocks for row in block]


def whole(answer: LineAnswer, asked: EmbeddingRequest) -> bytes:
    """The body of an answer. Takes 0.3 s for 2,048 x 384 numbers, so it is for a thread."""
    rows: Sequence[str] = vectors_json(asked.vectors.of(answer), asked.is_base64)
    data = ",".join(f'{{"object":"embedding","index":{index},"embedding":{row}}}' for index, row in enumerate(rows))
    usage = {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}
    rest = to_json({"model": answer.model, "usage": usage, "metadata": answer.metadata()})
    return b'{"object":"list","data":[%b],%b' % (data.encode(), rest[1:])
