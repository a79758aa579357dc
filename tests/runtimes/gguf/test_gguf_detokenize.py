"""Text from bytes that are cut anywhere, and stop strings that are too."""

from __future__ import annotations

import random

import pytest

from runtimes.gguf.detokenize import TextStream


def pieces(text: str, seed: int) -> list[bytes]:
    data, chance, out = text.encode(), random.Random(seed), []
    while data:
        size = chance.randint(1, 3)
        out.append(data[:size])
        data = data[size:]
    return out


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_gives_the_same_text(seed: int) -> None:
    text = "Größe 🏝️ 島 — ok"
    stream = TextStream()
    assert "".join(stream.feed(piece) for piece in pieces(text, seed)) + stream.finish() == text


def test_no_half_characters() -> None:
    stream = TextStream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.feed("é".encode()[1:]) == "é"
    stream.feed("島".encode()[:2])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two STOP three", ("STOP",), "one two "),
        ("one ST two", ("STOP",), "one ST two"),
        ("aab aaab", ("aaab", "b"), "aa"),
        ("line\n\nnext", ("\n\n",), "line"),
        ("abcabd", ("abd",), "abc"),
        ("the end", ("end.",), "the end"),
        ("x", ("x",), ""),
        ("島と海と島", ("海と",), "島と"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str, seed: int) -> None:
    stream = TextStream(stop)
    got = "".join(stream.feed(piece) for piece in pieces(text, seed))
    assert got + stream.finish() == expected
    assert stream.stopped == (expected != text)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    stream = TextStream(("###",))
    assert stream.feed(b"a#") == "a"
    assert stream.feed(b"#") == ""
    assert stream.feed(b"b") == "##b"
