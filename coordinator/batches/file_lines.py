"""The lines of a JSONL file of requests: where they are, and what is wrong with them. Pure.

Theory of operation. A file is scanned once, a piece at a time. Of each line only its place is remembered, in arrays of machine numbers, and
what is wrong with it where something is; so 50,000 lines are 1.2 MB, whatever stands in them. A line is read again when it is its turn.
What is wrong with a line is that line's matter: the others run. (OpenAI fails the whole batch; the codes are OpenAI's.)
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.http import schema
from coordinator.http.errors import ApiError
from protocol import limits

CUSTOM_ID_CHARS_MAX = 256
MODELS_MAX = 64  # whose Islands are counted for how many lines may run at once
METHOD = "POST"
_MODEL_NAMES = ("model", "cargo", "workload")  # the fields that say what is to run
_NEWLINE = b"\n"
_ID_BYTES = 16  # of a hash: two of 50,000 custom_ids collide by 1e-29


@dataclass(frozen=True, slots=True)
class LineFault:
    """What is wrong with a line. ``line``: from 1, blank ones counted; ``custom_id``: empty where it has none."""

    line: int
    code: str
    message: str
    param: str | None = None
    custom_id: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


@dataclass(frozen=True, slots=True)
class LineRequest:
    """What a line asks for."""

    custom_id: str
    body: dict[str, Any]


class LineWrong(Exception):
    """A line that is no request."""

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.custom_id = code, message, param, custom_id

    def at(self, line: int) -> LineFault:
        return LineFault(line, self.code, self.message, self.param, self.custom_id)


def read_line(data: bytes, endpoint: str) -> LineRequest:
    """Raises LineWrong."""
    try:
        value = schema.parse_json(data)
    except ApiError as error:
        is_json = error.code == "invalid_type"  # but no object
        text = "a line has to be a JSON object" if is_json else "this line could not be read as JSON"
        raise LineWrong("invalid_json_line", text) from None
    custom_id = _custom_id(value)
    method = value.get("method", METHOD)
    if method != METHOD:
        raise LineWrong("invalid_value", "method must be POST", "method", custom_id)
    if value.get("url") is None:
        raise LineWrong("missing_required_parameter", f"you must provide url, here {endpoint}", "url", custom_id)
    if value["url"] != endpoint:
        raise LineWrong("url_mismatch", f"url must be the batch's endpoint, {endpoint}", "url", custom_id)
    body = value.get("body")
    if not isinstance(body, dict):
        raise LineWrong("missing_required_parameter", "you must provide body, an object: the request itself", "body", custom_id)
    return LineRequest(custom_id, body)


def _custom_id(value: Mapping[str, Any]) -> str:
    found = value.get("custom_id")
    if not isinstance(found, str) or not found:
        raise LineWrong("missing_required_parameter", "you must provide custom_id, a text that no other line has", "custom_id")
    if len(found) > CUSTOM_ID_CHARS_MAX or not _has_utf8(found):
        raise LineWrong("invalid_value", f"custom_id takes at most {CUSTOM_ID_CHARS_MAX} characters", "custom_id")
    return found


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class TooManyLines(Exception):
    """More than FILE_LINES_MAX."""


class LineIndex:
    """Where the lines of a file are, blank ones left out; made by ``feed`` with all its pieces in their order, and ``end``.

    ``faults``: index -> what is wrong with it; ``models``: those that lines name, the first MODELS_MAX of them.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._starts, self._ends, self._numbers = array("Q"), array("Q"), array("L")
        self.faults: dict[int, LineFault] = {}
        self.models: set[str] = set()
        self._seen: set[bytes] = set()
        self._offset = 0  # of the first byte that has not been looked at
        self._line_start = 0
        self._line_number = 1
        self._begun = bytearray()  # of the line that goes on in the next piece
        self._is_long = False

    def __repr__(self) -> str:
        return f"<LineIndex {len(self)} lines, {len(self.faults)} of them wrong>"

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> tuple[int, int]:
        """First byte of a line, and that behind its last."""
        return self._starts[index], self._ends[index]

    def number(self, index: int) -> int:
        """As an editor counts."""
        return int(self._numbers[index])

    def feed(self, piece: bytes) -> None:
        """Raises TooManyLines."""
        at = 0
        while (end := piece.find(_NEWLINE, at)) >= 0:
            self._go_on(piece[at:end])
            self._close(self._offset + end)
            self._line_start = self._offset + end + 1
            self._line_number += 1
            at = end + 1
        self._go_on(piece[at:])
        self._offset += len(piece)

    def end(self) -> None:
        """Raises TooManyLines."""
        self._close(self._offset)
        self._seen.clear()

    def _go_on(self, part: bytes) -> None:
        if self._is_long or len(self._begun) + len(part) > limits.FILE_LINE_BYTES_MAX:
            self._is_long = True
            self._begun.clear()
        else:
            self._begun += part

    def _close(self, end: int) -> None:
        data, is_long = bytes(self._begun), self._is_long
        self._begun.clear()
        self._is_long = False
        if not is_long and not data.strip():
            return
        index = len(self)
        if index >= limits.FILE_LINES_MAX:
            raise TooManyLines
        self._starts.append(self._line_start)
        self._ends.append(end)
        self._numbers.append(self._line_number)
        try:
            if is_long:
                raise LineWrong("line_too_long", f"a line may have {limits.FILE_LINE_BYTES_MAX} bytes")
            self._check(data)
        except LineWrong as wrong:
            self.faults[index] = wrong.at(self._line_number)

    def _check(self, data: bytes) -> None:
        request = read_line(data, self._endpoint)
        custom_id, body = request.custom_id, request.body
        model = next((body[name] for name in _MODEL_NAMES if body.get(name) is not None), None)
        digest = hashlib.blake2b(custom_id.encode(), digest_size=_ID_BYTES).digest()
        if digest in self._seen:
            raise LineWrong("duplicate_custom_id", "another line has this custom_id already", "custom_id", custom_id)
        self._seen.add(digest)
        if isinstance(model, str) and len(model) <= limits.NAME_CHARS_MAX and len(self.models) < MODELS_MAX:
            self.models.add(model)


def to_line(value: object) -> bytes:
    """One line of JSONL. JSON may hold half a surrogate pair, which has no UTF-8: as an escape it has."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + _NEWLINE
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode() + _NEWLINE
