"""How an answer that may call tools is written as text: in one way, whatever the model's own.

Models write calls in many ways, and the model file says how. So the Island reads them, and the text of a job whose request has tools is

    words U+001D name U+001F arguments U+001E words …

with any number of calls. The three characters stand for nothing else: in words and arguments the Island puts U+FFFD in their place (JSON
writes them as escapes). The text comes in pieces that may end anywhere, and the last call may be cut off. It depends on the answer's tokens
alone, so another Island that continues the answer continues the text. A receiver takes what is out of order for words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from protocol import limits
from protocol.generation import check_tool_name

CALL, ARGUMENTS, END = "\x1d", "\x1f", "\x1e"
_MARKS = re.compile(f"([{CALL}{ARGUMENTS}{END}])")
_NONE_LEFT = {ord(mark): "\ufffd" for mark in (CALL, ARGUMENTS, END)}


def without_marks(text: str) -> str:
    """A text that frames no calls."""
    return text.translate(_NONE_LEFT)


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegan:
    """``index`` counts the calls of the answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments."""

    index: int
    text: str


Part = Words | CallBegan | CallArguments


class AnswerReader:
    """Pieces of text in, parts of the answer out. ``calls``: how many have begun."""

    def __init__(self) -> None:
        self.calls = 0
        self._place = END  # the mark that was passed last
        self._name = ""

    def __repr__(self) -> str:
        return f"<AnswerReader {self.calls} calls>"

    def feed(self, text: str) -> list[Part]:
        return list(self._parts(text))

    def _parts(self, text: str) -> Iterator[Part]:
        for piece in _MARKS.split(text):
            if piece == ARGUMENTS:
                yield from self._begin()
            elif piece in (CALL, END):
                if self._place == CALL:
                    yield from self._as_words()
                self._place = piece
            elif piece and self._place == CALL:
                self._name += piece
                if len(self._name) > limits.TOOL_NAME_CHARS_MAX:
                    yield from self._as_words()
            elif piece:
                yield CallArguments(self.calls - 1, piece) if self._place == ARGUMENTS else Words(piece)

    def _begin(self) -> Iterator[Part]:
        if self._place != CALL:
            return
        try:
            check_tool_name(self._name)
        except ValueError:
            yield from self._as_words()
            return
        yield CallBegan(self.calls, self._name)
        self.calls += 1
        self._place, self._name = ARGUMENTS, ""

    def _as_words(self) -> Iterator[Part]:
        """What should have been a name is none."""
        name, self._name, self._place = self._name, "", END
        if name:
            yield Words(name)


def read_answer(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The words of a whole answer, and name and arguments of each call."""
    words, calls = [], []
    for part in AnswerReader().feed(text):
        if isinstance(part, Words):
            words.append(part.text)
        elif isinstance(part, CallBegan):
            calls.append((part.name, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return "".join(words), calls
