"""Calls of tools in the text of an answer: framed in one way, read from pieces that end anywhere, and from Islands that write nonsense."""

from __future__ import annotations

import random

import pytest

from protocol import limits
from protocol.tool_calls import (
    ARGUMENTS,
    CALL,
    END,
    AnswerReader,
    CallArguments,
    CallBegan,
    Words,
    read_answer,
    without_marks,
)

TWO = f'Well: {CALL}now{ARGUMENTS}{{}}{END}and{CALL}weather{ARGUMENTS}{{"city":"Bern"}}{END}'


def put_together(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """What a reader makes of pieces; asserts that indices count and that arguments belong to the call that began last."""
    reader, words, calls = AnswerReader(), "", list[tuple[str, str]]()
    for part in [part for piece in pieces for part in reader.feed(piece)]:
        if isinstance(part, Words):
            words += part.text
        elif isinstance(part, CallBegan):
            assert part.index == len(calls)
            calls.append((part.name, ""))
        else:
            assert isinstance(part, CallArguments) and part.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    assert reader.calls == len(calls)
    return words, calls


def test_words_and_calls() -> None:
    assert read_answer(TWO) == ("Well: and", [("now", "{}"), ("weather", '{"city":"Bern"}')])
    assert read_answer("only words") == ("only words", []) and read_answer("") == ("", [])


def test_pieces_may_end_anywhere() -> None:
    chance = random.Random(5)
    for _ in range(200):
        cuts = sorted(chance.randrange(len(TWO) + 1) for _ in range(chance.randrange(12)))
        pieces = [TWO[low:high] for low, high in zip([0, *cuts], [*cuts, len(TWO)], strict=True)]
        assert put_together(pieces) == read_answer(TWO)


def test_a_call_that_is_cut_off_has_the_arguments_that_came() -> None:
    assert read_answer(TWO[: TWO.index("Bern") + 2])[1][-1] == ("weather", '{"city":"Be')
    assert read_answer(f"x{CALL}wea") == ("x", []), "a name that is cut off is none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"a{END}b{ARGUMENTS}c", "abc"),
        (f"{CALL}two words{ARGUMENTS}rest", "two wordsrest"),
        (f"{CALL}{ARGUMENTS}rest", "rest"),
        (f"{CALL}{'n' * (limits.TOOL_NAME_CHARS_MAX + 1)}{ARGUMENTS}rest", "n" * (limits.TOOL_NAME_CHARS_MAX + 1) + "rest"),
        (f"{CALL}a{CALL}b{END}c", "abc"),
    ],
    ids=["marks alone", "no name", "an empty name", "a long name", "marks in a name"],
)
def test_nonsense_is_words(text: str, words: str) -> None:
    assert read_answer(text) == (words, [])
    assert put_together(list(text)) == (words, [])


def test_marks_are_kept_out_of_what_is_framed() -> None:
    assert without_marks(f"a{CALL}b{ARGUMENTS}c{END}d") == "a\ufffdb\ufffdc\ufffdd"
