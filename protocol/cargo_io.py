"""What goes into a Cargo and comes out of it, in every runtime: one JSON object in, JSON lines out.

Theory of operation. A Cargo is somebody else's program, so its output is untrusted bytes. ``LineReader`` takes them as they come and gives
checked lines; it keeps at most one incomplete line. A line is a JSON object with a ``type``; any number of ``status``, ``token``,
``progress`` and ``image`` lines come first, then exactly one ``done`` or ``error``, then nothing. Fields that a line does not know are
left out, except in ``done``: there they are the Cargo's result, and kept as JSON. Breaches raise RemoteProtocolError, never with the
text of the line, which may be somebody's answer.

>>> reader = LineReader()
>>> for line in reader.feed(data): ...
>>> for line in reader.finish(): ...     # at the end of the output; says whether it was all
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from protocol import checks, limits
from protocol.errors import LocalProtocolError, RemoteProtocolError


@dataclass(frozen=True, slots=True)
class StatusLine:
    """What the Cargo is doing, for a person."""

    message: str

    def __post_init__(self) -> None:
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class TokenLine:
    """The next piece of a text."""

    content: str

    def __post_init__(self) -> None:
        checks.utf8("content", self.content, limits.CARGO_TOKEN_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """``step`` of ``total`` steps is done; ``total`` 0: not known."""

    step: int
    total: int

    def __post_init__(self) -> None:
        checks.in_range("total", self.total, 0, limits.CARGO_STEPS_MAX)
        checks.in_range("step", self.step, 0, self.total or limits.CARGO_STEPS_MAX)


@dataclass(frozen=True, slots=True)
class ImageLine:
    """``data``: the file in base64. ``format``: png, jpeg, ppm, …; ``width``, ``height`` in pixels."""

    data: str
    format: str
    width: int
    height: int

    def __post_init__(self) -> None:
        checks.label("format", self.format, limits.CARGO_IMAGE_FORMAT_CHARS_MAX)
        checks.in_range("width", self.width, 1, limits.CARGO_IMAGE_SIDE_MAX)
        checks.in_range("height", self.height, 1, limits.CARGO_IMAGE_SIDE_MAX)
        if not self.data or not self.data.isascii():
            raise ValueError("data must be base64")
        try:
            binascii.a2b_base64(self.data, strict_mode=True)
        except binascii.Error as error:
            raise ValueError(f"data must be base64 ({error})") from None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def __post_init__(self) -> None:
        checks.in_range("prompt_tokens", self.prompt_tokens, 0, limits.CARGO_TOKENS_MAX)
        checks.in_range("completion_tokens", self.completion_tokens, 0, limits.CARGO_TOKENS_MAX)


@dataclass(frozen=True, slots=True)
class DoneLine:
    """The job is done. ``result``: all further fields of the line, as the JSON text of one object."""

    usage: Usage | None = None
    seed: int | None = None
    result: str = "{}"

    def __post_init__(self) -> None:
        if self.seed is not None:
            checks.in_range("seed", self.seed, 0, limits.SEED_MAX)
        checks.utf8("result", self.result, limits.CARGO_LINE_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """The job has failed, and the Cargo says why."""

    message: str

    def __post_init__(self) -> None:
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


Line = StatusLine | TokenLine | ProgressLine | ImageLine | DoneLine | ErrorLine
_DONE_FIELDS = frozenset({"type", "usage", "seed"})


def is_last(line: Line) -> bool:
    """Whether nothing may follow."""
    return isinstance(line, DoneLine | ErrorLine)


@dataclass(frozen=True, slots=True)
class OutputLimits:
    """Of one run. ``line_bytes`` without the line break; empty lines count."""

    line_bytes: int = limits.CARGO_LINE_BYTES_MAX
    output_bytes: int = limits.CARGO_OUTPUT_BYTES_DEFAULT
    lines: int = limits.CARGO_LINES_MAX


class LineReader:
    """Bytes of one run in, checked lines out. After an error the run is over."""

    def __init__(self, most: OutputLimits | None = None) -> None:
        self._most = most or OutputLimits()
        self._buffer = bytearray()
        self._scanned = 0  # so many bytes of the buffer hold no line break
        self._bytes = self._lines = 0
        self._last: Line | None = None

    def __repr__(self) -> str:
        state = "ended" if self._last is not None else f"{len(self._buffer)} bytes pending"
        return f"<LineReader {self._lines} lines, {state}>"

    @property
    def last(self) -> Line | None:
        """The line that ended the output, once it has come."""
        return self._last

    def feed(self, data: bytes | bytearray | memoryview) -> list[Line]:
        """Lines that are complete now. Raises RemoteProtocolError; what came before the breach is lost with it."""
        self._bytes += len(data)
        if self._bytes > self._most.output_bytes:
            raise RemoteProtocolError(f"the Cargo's output is over {self._most.output_bytes} bytes")
        self._buffer += data
        lines: list[Line] = []
        start = 0
        while (end := self._buffer.find(b"\n", max(start, self._scanned))) >= 0:
            self._take(bytes(self._buffer[start:end]), lines)
            start = end + 1
        del self._buffer[:start]
        self._scanned = len(self._buffer)
        if self._scanned > self._most.line_bytes:
            self._too_long()
        return lines

    def finish(self) -> list[Line]:
        """At the end of the output: the last line, where it had no line break. Raises RemoteProtocolError without done or error."""
        lines: list[Line] = []
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._scanned = 0
        if rest:
            self._take(rest, lines)
        if self._last is None:
            raise RemoteProtocolError(f"the Cargo ended after {self._lines} lines without done or error")
        return lines

    def _take(self, raw: bytes, lines: list[Line]) -> None:
        self._lines += 1
        if self._lines > self._most.lines:
            raise RemoteProtocolError(f"the Cargo's output has more than {self._most.lines} lines")
        if len(raw) > self._most.line_bytes:
            self._too_long()
        if not raw.strip(b" \t\r"):
            return
        if self._last is not None:
            raise RemoteProtocolError(f"line {self._lines} of the Cargo's output comes after done or error")
        try:
            line = decode_line(raw)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"line {self._lines} of the Cargo's output {error}") from None
        if is_last(line):
            self._last = line
        lines.append(line)

    def _too_long(self) -> NoReturn:
        raise RemoteProtocolError(f"a line of the Cargo's output is over {self._most.line_bytes} bytes")


def decode_line(raw: bytes) -> Line:
    """One line without its line break. Raises RemoteProtocolError with a text that goes on from "line 3"."""
    fields = _object(raw)
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise RemoteProtocolError(f"has no known type ({', '.join(_READERS)})")
    try:
        return _READERS[kind](fields)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"is no valid {kind}: {error}") from None


def _object(raw: bytes) -> dict[str, Any]:
    """Raises RemoteProtocolError. Names no part of the bytes."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"is not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RemoteProtocolError(f"is not JSON{where}") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError("is not a JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string")
    return value


def _message(fields: Mapping[str, Any]) -> str:
    """For a person: made printable rather than refused."""
    return checks.made_printable(_text(fields, "message"))


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer")
    return value


def _image(fields: Mapping[str, Any]) -> ImageLine:
    width, height = _integer(fields, "width"), _integer(fields, "height")
    return ImageLine(_text(fields, "data"), _text(fields, "format"), width, height)


def _done(fields: Mapping[str, Any]) -> DoneLine:
    usage = fields.get("usage")
    if usage is not None and not isinstance(usage, dict):
        raise ValueError("usage must be an object")
    counts = None if usage is None else Usage(*(_integer({n: 0} | usage, n) for n in ("prompt_tokens", "completion_tokens")))
    seed = None if fields.get("seed") is None else _integer(fields, "seed")
    return DoneLine(counts, seed, _dump({k: v for k, v in fields.items() if k not in _DONE_FIELDS}))


_READERS: dict[str, Callable[[dict[str, Any]], Line]] = {
    "status": lambda fields: StatusLine(_message(fields)),
    "token": lambda fields: TokenLine(_text(fields, "content")),
    "progress": lambda fields: ProgressLine(_integer(fields, "step"), _integer(fields, "total")),
    "image": _image,
    "done": _done,
    "error": lambda fields: ErrorLine(_message(fields)),
}


def _dump(value: object) -> str:
    """Compact JSON. Raises ValueError for what has none: infinities that came as 1e999, half a surrogate pair is seen by checks.utf8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_line(line: Line) -> bytes:
    """One line with its line break, as a reader with the usual limits takes it. Raises LocalProtocolError."""
    data = _dump(_fields(line)).encode()
    if len(data) > limits.CARGO_LINE_BYTES_MAX:
        raise LocalProtocolError(f"a {type(line).__name__} of {len(data)} bytes is over {limits.CARGO_LINE_BYTES_MAX}")
    return data + b"\n"


def _fields(line: Line) -> dict[str, object]:
    match line:
        case StatusLine(message):
            return {"type": "status", "message": message}
        case TokenLine(content):
            return {"type": "token", "content": content}
        case ProgressLine(step, total):
            return {"type": "progress", "step": step, "total": total}
        case ImageLine(data, image_format, width, height):
            return {"type": "image", "data": data, "format": image_format, "width": width, "height": height}
        case ErrorLine(message):
            return {"type": "error", "message": message}
        case DoneLine(usage, seed, result):
            return _done_fields(usage, seed, result)


def _done_fields(usage: Usage | None, seed: int | None, result: str) -> dict[str, object]:
    try:
        further = _object(result.encode())
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"the result {error}") from None
    if taken := _DONE_FIELDS & further.keys():
        raise LocalProtocolError(f"a result has no field {', '.join(sorted(taken))} of its own")
    fields: dict[str, object] = {"type": "done"}
    if usage is not None:
        fields["usage"] = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    if seed is not None:
        fields["seed"] = seed
    return fields | further


def done(result: Mapping[str, object], usage: Usage | None = None, seed: int | None = None) -> DoneLine:
    """A DoneLine from the result as Python values. Raises LocalProtocolError for what JSON cannot say."""
    try:
        line = DoneLine(usage, seed, _dump(dict(result)))
    except (ValueError, TypeError, RecursionError) as error:
        raise LocalProtocolError(f"the result is no JSON: {error}") from None
    _done_fields(usage, seed, line.result)
    return line


def decode_input(data: bytes) -> dict[str, Any]:
    """The one JSON object that a job brings. Raises RemoteProtocolError."""
    if len(data) > limits.JOB_INPUT_BYTES_MAX:
        raise RemoteProtocolError(f"the input has {len(data)} bytes; at most {limits.JOB_INPUT_BYTES_MAX} are allowed")
    try:
        return _object(data)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"the input {error}") from None


def encode_input(fields: Mapping[str, object]) -> bytes:
    """The input of a job as a Cargo reads it. Raises LocalProtocolError for what JSON cannot say."""
    try:
        data = _dump(dict(fields)).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise LocalProtocolError(f"the input is no JSON: {error}") from None
    if len(data) > limits.JOB_INPUT_BYTES_MAX:
        raise LocalProtocolError(f"the input has {len(data)} bytes; at most {limits.JOB_INPUT_BYTES_MAX} are allowed")
    return data
