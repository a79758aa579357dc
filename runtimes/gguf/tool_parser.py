"""Reads a model's calls of tools out of its answer, as it is written, and writes them as protocol.tool_calls says.

Text is given out as soon as it is certain what it is; a call's arguments go on as they come, once its name is known and theirs begin. What
looks like a call and is none (an unknown name, no JSON, too long before its arguments) is words. White space before and behind calls is
nothing. The state depends on the text alone, which depends on the tokens alone.

    WORDS ──begin mark──▸ BETWEEN ──{──▸ HEAD ──name, arguments──▸ ARGUMENTS ──}──▸ REST ──}──▸ BETWEEN …
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum, auto
from typing import Any

from protocol.tool_calls import ARGUMENTS, CALL, END, without_marks
from runtimes.gguf.detokenize import overlap
from runtimes.gguf.tool_syntax import MARKS, ToolSyntax

_HEAD_CHARS_MAX = 8192  # so long it is looked for a name; a chunk's text can carry it
_SEPARATORS = " \t\r\n,;[]"
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"\\]*)"|[^\s"])')
_NAME_FIRST = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"')
_KEYS = frozenset({"name", "arguments", "parameters", "type", "function", "id"})


class _State(Enum):
    WORDS = auto()
    BETWEEN = auto()
    HEAD = auto()
    ARGUMENTS = auto()
    REST = auto()


class _Braces:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def end(self, text: str, start: int = 0) -> int:
        """Where the object ends, or -1. Each character is to be given once."""
        for at in range(start, len(text)):
            character = text[at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return -1


class CallParser:
    """Text of a model in, text with framed calls out. ``begun``: the prompt ends with the beginning of a call. ``is_over`` is true once a
    call has ended that is to be the only one."""

    def __init__(self, syntax: ToolSyntax, names: Collection[str], parallel: bool = True, begun: bool = False) -> None:
        self._marks, self._names, self._parallel = MARKS[syntax], frozenset(names), parallel
        self._state = _State.BETWEEN if begun or not self._marks.begin else _State.WORDS
        self._buffer = ""  # not yet given out
        self._lead = ""  # what stood before it, to be told as words where no call follows
        self._spaces = ""  # behind the last words
        self._braces, self._scanned = _Braces(), 0
        self._out: list[str] = []
        self.calls = 0
        self.is_over = False

    def __repr__(self) -> str:
        return f"<CallParser {self._state.name}, {self.calls} calls>"

    def feed(self, text: str) -> str:
        """What is certain now."""
        self._buffer += text
        steps = {
            _State.WORDS: self._words,
            _State.BETWEEN: self._between,
            _State.HEAD: self._head,
            _State.ARGUMENTS: self._arguments,
            _State.REST: self._rest,
        }
        while not self.is_over and steps[self._state]():
            pass
        return self._given_out()

    def finish(self) -> str:
        """The rest, when the answer is over."""
        if self.is_over:
            return ""
        if self._state in (_State.WORDS, _State.HEAD) or self._lead or self._buffer.strip(_SEPARATORS):
            self._say(self._lead + self._buffer)
        elif not self.calls:
            self._say(self._buffer)
        self._buffer = self._lead = ""
        if not self.calls:
            self._out.append(self._spaces)
        return self._given_out()

    def _given_out(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text

    def _say(self, words: str) -> None:
        """White space at their end waits: what follows may be a call."""
        words = self._spaces + words
        certain = words.rstrip()
        self._spaces = words[len(certain) :]
        self._out.append(without_marks(certain))

    # Each step returns whether there may be more to do at once.

    def _words(self) -> bool:
        begin = self._marks.begin
        at = self._buffer.find(begin) if begin else -1
        if at >= 0:
            self._say(self._buffer[:at])
            self._lead, self._buffer, self._state = begin, self._buffer[at + len(begin) :], _State.BETWEEN
            return True
        keep = overlap(self._buffer, begin) if begin else 0
        certain = len(self._buffer) - keep
        self._say(self._buffer[:certain])
        self._buffer = self._buffer[certain:]
        return False

    def _between(self) -> bool:
        """Before a call, or behind one."""
        rest = self._buffer.lstrip(_SEPARATORS)
        if not rest:
            return False
        if rest[0] == "{":
            self._lead, self._buffer = self._lead + self._buffer[: -len(rest)], rest
            self._state, self._braces, self._scanned = _State.HEAD, _Braces(), 0
            return True
        for mark in filter(None, (self._marks.begin, self._marks.optional, self._marks.end)):
            if rest.startswith(mark):
                passed = self._lead + self._buffer[: -len(rest)] + mark
                self._buffer = rest[len(mark) :]
                if mark != self._marks.end:
                    self._lead = passed
                    return True
                self._say(passed if self._lead else "")  # marks round nothing are words
                self._lead, self._state = "", _State.WORDS
                return True
            if mark.startswith(rest):
                return False
        return self._no_call()

    def _head(self) -> bool:
        found = _HEAD.match(self._buffer)
        if found:
            if found[1] not in self._names:
                return self._no_call()
            self._begin(found[1])
            self._buffer, self._state, self._braces = self._buffer[found.end() :], _State.ARGUMENTS, _Braces()
            return True
        first, name = _FIRST_KEY.match(self._buffer), _NAME_FIRST.match(self._buffer)
        if (first and first[1] not in _KEYS) or (name and name[1] not in self._names) or len(self._buffer) > _HEAD_CHARS_MAX:
            return self._no_call()
        end = self._braces.end(self._buffer, self._scanned)
        self._scanned = len(self._buffer)
        return end >= 0 and self._take_whole(end)

    def _take_whole(self, end: int) -> bool:
        """An object that has its name behind its arguments, or in another object."""
        call = _read_call(self._buffer[:end])
        if call is None or call[0] not in self._names:
            return self._no_call()
        self._begin(call[0])
        self._out += [without_marks(call[1]), END]
        self._buffer = self._buffer[end:]
        self._ended()
        return True

    def _arguments(self) -> bool:
        end = self._braces.end(self._buffer)
        if end < 0:
            self._out.append(without_marks(self._buffer))
            self._buffer = ""
            return False
        self._out += [without_marks(self._buffer[:end]), END]
        self._buffer, self._state, self._braces = self._buffer[end:], _State.REST, _Braces(depth=1)
        return True

    def _rest(self) -> bool:
        """From the end of the arguments to the end of the call, which a model may have forgotten to close."""
        mark, rest = self._marks.end, self._buffer.lstrip()
        if mark and rest and (rest.startswith(mark) or mark.startswith(rest)):
            if len(rest) < len(mark):
                return False
            self._ended()
            return True
        end = self._braces.end(self._buffer)
        if end < 0:
            self._buffer = ""
            return False
        self._buffer = self._buffer[end:]
        self._ended()
        return True

    def _begin(self, name: str) -> None:
        self._out += [CALL, name, ARGUMENTS]
        self._lead = self._spaces = ""
        self.calls += 1

    def _ended(self) -> None:
        self._state = _State.BETWEEN
        self.is_over = not self._parallel

    def _no_call(self) -> bool:
        """What stands here is words; the beginning of a call may stand in them."""
        self._say(self._lead)
        self._lead, self._state = "", _State.WORDS
        return True


def _read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments, where the text is a call."""
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    call = call["function"] if isinstance(call.get("function"), dict) else call
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str):
        return None
    if isinstance(arguments, str):
        return name, arguments
    arguments = {} if arguments is None else arguments
    written = json.dumps(arguments, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in written):
        written = json.dumps(arguments)
    return (name, written) if isinstance(arguments, dict) else None
