"""The one I/O contract of all runtimes: lines, their reader over hostile bytes, their writer, the input."""

from __future__ import annotations

import json
import random

import pytest

from protocol import limits
from protocol.cargo_io import (
    DoneLine,
    ErrorLine,
    ImageLine,
    Line,
    LineReader,
    OutputLimits,
    ProgressLine,
    StatusLine,
    TokenLine,
    Usage,
    decode_input,
    decode_line,
    done,
    encode_input,
    encode_line,
    is_last,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError

SAMPLES: list[Line] = [
    StatusLine("loading"),
    TokenLine("Grüße\n\u2028 \U0001f3dd"),
    TokenLine(""),
    ProgressLine(3, 20),
    ProgressLine(7, 0),
    ImageLine("aGFsbG8=", "png", 64, 32),
    DoneLine(),
    DoneLine(Usage(7, 0), 42, '{"label":"cat","scores":[0.5,1e-07]}'),
    ErrorLine("no such column"),
]
DONE = b'{"type":"done"}\n'


def read_all(data: bytes, most: OutputLimits | None = None) -> list[Line]:
    reader = LineReader(most)
    return reader.feed(data) + reader.finish()


@pytest.mark.parametrize("line", SAMPLES, ids=lambda line: type(line).__name__)
def test_what_is_written_is_read(line: Line) -> None:
    data = encode_line(line)
    assert data.endswith(b"\n") and data.count(b"\n") == 1
    assert decode_line(data[:-1]) == line
    assert is_last(line) == isinstance(line, DoneLine | ErrorLine)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_may_be_cut_anywhere(seed: int) -> None:
    chance = random.Random(seed)
    lines = [line for line in SAMPLES if not is_last(line)] * 3 + [SAMPLES[7]]
    data, got = b"".join(map(encode_line, lines)), []
    reader = LineReader()
    while data:
        size = chance.randint(1, 9)
        got += reader.feed(data[:size])
        data = data[size:]
    assert got + reader.finish() == lines
    assert reader.last == SAMPLES[7]


def test_blank_lines_and_carriage_returns_say_nothing() -> None:
    assert read_all(b'\n \r\n{"type":"token","content":"a"}\r\n\n' + DONE + b"\n  ") == [TokenLine("a"), DoneLine()]


def test_a_last_line_without_a_break_counts() -> None:
    reader = LineReader()
    assert reader.feed(DONE[:-1]) == [] and reader.last is None
    assert reader.finish() == [DoneLine()]


def test_done_keeps_what_it_does_not_know() -> None:
    line = decode_line(b'{"type": "done", "seed": null, "usage": {"prompt_tokens": 3}, "rows": [1, 2.5, {"a": null}], "n": "\\u00e9"}')
    assert line == DoneLine(Usage(3, 0), None, '{"rows":[1,2.5,{"a":null}],"n":"é"}')


def test_other_lines_leave_it_out_and_messages_become_printable() -> None:
    assert decode_line(b'{"type":"progress","step":1,"total":2,"phase":"x"}') == ProgressLine(1, 2)
    assert decode_line(b'{"type":"error","message":"a\\u001b[2Jb\\nc"}') == ErrorLine("a [2Jb c")
    long = decode_line(json.dumps({"type": "status", "message": "x" * 5000}).encode())
    assert long == StatusLine("x" * limits.TEXT_CHARS_MAX)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"hello", "line 1 of the Cargo's output is not JSON at character 0"),
        (b'{"type":"token"', "not JSON"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b'{"type":"token","content":"\xc3"}', "not UTF-8 at byte 27"),
        ('{"type":"done"}'.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf" + DONE, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 200_000, "not JSON"),
        (b'{"type":"done","a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "JSON"),
        (b'{"type":"done","n":' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"type":"done","n":NaN}', "not JSON"),
        (b'{"type":"done","n":1e999}', "no valid done"),
        (b'{"type":"done","s":"\\ud800"}', "no valid done"),
        (b'{"type":"done","usage":[]}', "usage must be an object"),
        (b'{"type":"done","usage":{"prompt_tokens":-1}}', "prompt_tokens must be between"),
        (b'{"type":"done","usage":{"prompt_tokens":true}}', "prompt_tokens must be an integer"),
        (b'{"type":"done","seed":1.5}', "seed must be an integer"),
        (b'{"type":"shell"}', "no known type"),
        (b'{"type":["done"]}', "no known type"),
        (b"{}", "no known type"),
        (b'{"type":"token"}', "content must be a string"),
        (b'{"type":"token","content":"\\udfff"}', "half a surrogate"),
        (b'{"type":"progress","step":3,"total":2}', "step must be between 0 and 2"),
        (b'{"type":"progress","step":1e3,"total":2000}', "step must be an integer"),
        (b'{"type":"image","data":"a","format":"png","width":1,"height":1}', "data must be base64"),
        (b'{"type":"image","data":"aGE=","format":"p/../\\n","width":1,"height":1}', "format is not a valid name"),
        (b'{"type":"image","data":"aGE=","format":"png","width":0,"height":1}', "width must be between 1"),
        (b'{"type":"image","data":"aGE=","format":"png","width":1,"height":100000}', "height must be between 1"),
    ],
)
def test_a_breach_is_named(raw: bytes, says: str) -> None:
    with pytest.raises(RemoteProtocolError) as error:
        read_all(raw + b"\n" + DONE)
    assert says in str(error.value)


def test_an_error_does_not_repeat_the_line() -> None:
    with pytest.raises(RemoteProtocolError) as error:
        read_all(b'{"type":"token","content":"my secret", oops}\n')
    assert "secret" not in str(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("last", [DONE, b'{"type":"error","message":"x"}\n'])
def test_nothing_comes_after_the_end(last: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"line 2 .* after done or error"):
        read_all(last + DONE)


@pytest.mark.parametrize("data", [b"", b"\n\n", b'{"type":"token","content":"a"}\n'])
def test_an_end_is_needed(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="without done or error"):
        read_all(data)


def test_limits_hold_before_memory_is_spent() -> None:
    most = OutputLimits(line_bytes=100, output_bytes=1000, lines=5)
    with pytest.raises(RemoteProtocolError, match=r"a line .* over 100 bytes"):
        LineReader(most).feed(b"x" * 101)
    with pytest.raises(RemoteProtocolError, match=r"a line .* over 100 bytes"):
        LineReader(most).feed(b" " * 101 + b"\n")
    with pytest.raises(RemoteProtocolError, match="output is over 1000 bytes"):
        LineReader(most).feed(b"x" * 1001)
    with pytest.raises(RemoteProtocolError, match="more than 5 lines"):
        LineReader(most).feed(b"\n" * 6)
    reader = LineReader(most)
    assert reader.feed(DONE[:-1] + b" " * 85 + b"\n" + b"\n" * 4) == [DoneLine()]
    assert reader.finish() == []


def test_a_long_line_in_small_pieces_is_scanned_once() -> None:
    """Quadratic work would take minutes here."""
    reader = LineReader()
    piece = b"a" * 64
    reader.feed(b'{"type":"done","a":"')
    for _ in range(100_000):
        reader.feed(piece)
    (line,) = reader.feed(b'"}\n')
    assert isinstance(line, DoneLine) and len(line.result) == 6_400_000 + 8


def test_the_writer_refuses_what_a_reader_would() -> None:
    with pytest.raises(LocalProtocolError, match="no JSON"):
        done({"x": float("nan")})
    with pytest.raises(LocalProtocolError, match="no JSON"):
        done({"x": "\ud800"})
    with pytest.raises(LocalProtocolError, match="no field seed"):
        done({"seed": 1})
    with pytest.raises(LocalProtocolError, match="is not JSON"):
        encode_line(DoneLine(result="{"))
    with pytest.raises(ValueError, match="content has"):
        TokenLine("x" * (limits.CARGO_TOKEN_BYTES_MAX + 1))
    assert encode_line(done({"a": 1}, Usage(1, 2), 5)) == (
        b'{"type":"done","usage":{"prompt_tokens":1,"completion_tokens":2},"seed":5,"a":1}\n'
    )


def test_the_input_is_one_object() -> None:
    assert decode_input(encode_input({"text": "é", "n": [1]})) == {"text": "é", "n": [1]}
    with pytest.raises(RemoteProtocolError, match="the input is not a JSON object"):
        decode_input(b"[]")
    with pytest.raises(RemoteProtocolError, match="the input is not UTF-8"):
        decode_input(b"\x80")
    with pytest.raises(RemoteProtocolError, match="at most"):
        decode_input(b" " * (limits.JOB_INPUT_BYTES_MAX + 1))
    with pytest.raises(LocalProtocolError, match="no JSON"):
        encode_input({"x": {1, 2}})
