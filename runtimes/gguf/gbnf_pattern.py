"""A regular expression of a JSON schema (ECMA-262) as grammar rules. Pure."""

from __future__ import annotations

import re

from protocol import limits
from runtimes.gguf.gbnf_rules import EMPTY, Rules, escape, literal, repeated
from runtimes.gguf.schema import NoSchema

_Set = list[tuple[int, int]]  # code points, from and to
_LAST = 0x10FFFF
_SETS: dict[str, _Set] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [
        *((9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F)),
        *((0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
    ],
}
_LINE_ENDS: _Set = [(10, 10), (13, 13), (0x2028, 0x2029)]
_NEVER_RAW: _Set = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)]
_ESCAPED = {0x22: r"\"", 0x5C: r"\\", 8: r"\b", 9: r"\t", 10: r"\n", 12: r"\f", 13: r"\r"}  # how JSON writes them
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}


class Pattern:
    """A regular expression (ECMA-262) as the rule of what stands between the quotes of a JSON string. Raises NoSchema."""

    def __init__(self, rules: Rules, char: str, text: str) -> None:
        self._rules, self._char, self._text = rules, char, text
        self._at = self._depth = 0

    def rule(self) -> str:
        options = self._options(is_top=True)
        if self._at < len(self._text):
            raise self._wrong("a bracket that was not opened")
        return self._rules.any_of(options)

    def _wrong(self, what: str) -> NoSchema:
        return NoSchema(f"a pattern in the JSON schema has {what}, which cannot be used here (character {self._at})")

    def _eat(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self._at == len(self._text):
            raise self._wrong("an end that comes too early")
        self._at += 1
        return self._text[self._at - 1]

    def _options(self, is_top: bool) -> list[str]:
        options = [self._sequence(is_top)]
        while self._eat("|"):
            options.append(self._sequence(is_top))
        return options

    def _sequence(self, is_top: bool) -> str:
        """Pieces up to the end of an option. A pattern may match anywhere, so what is not anchored has any characters around it."""
        parts = [f"{self._char}*"] if is_top and not self._eat("^") else []
        is_anchored = False
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if is_anchored:
                raise self._wrong("an anchor in its middle")
            is_anchored = is_top and self._eat("$")
            if not is_anchored:
                parts.append(self._piece())
        if is_top and not is_anchored:
            parts.append(f"{self._char}*")
        return " ".join(parts) or EMPTY

    def _piece(self) -> str:
        atom = self._atom()
        for sign in "*+?":
            if self._eat(sign):
                return self._quantified(f"{atom}{sign}")
        if found := re.compile(r"\{(\d+)(,(\d*))?\}").match(self._text, self._at):
            self._at = found.end()
            low = int(found[1])
            high = low if not found[2] else int(found[3]) if found[3] else None
            if high is not None and low > high:
                raise self._wrong("a repetition whose least is over its most")
            return self._quantified(repeated(atom, low, high))
        return atom

    def _quantified(self, piece: str) -> str:
        self._eat("?")  # fewest first: the same texts fit
        if self._at < len(self._text) and self._text[self._at] in "*+?":
            raise self._wrong("a repetition of a repetition")
        return piece

    def _atom(self) -> str:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._characters(self._class())
        if char == ".":
            return self._characters(_complement(_LINE_ENDS))
        if char == "\\":
            return self._characters(self._escaped())
        if char in "*+?{}^$)]":
            raise self._wrong(f"{char} at an unusual place")
        return self._characters([(ord(char), ord(char))])

    def _group(self) -> str:
        if self._eat("?") and not self._eat(":"):
            raise self._wrong("a group that begins with (?")
        self._depth += 1
        if self._depth > limits.SCHEMA_DEPTH_MAX:
            raise self._wrong(f"groups nested deeper than {limits.SCHEMA_DEPTH_MAX}")
        options = self._options(is_top=False)
        if not self._eat(")"):
            raise self._wrong("a group without an end")
        self._depth -= 1
        return self._rules.any_of(options)

    def _class(self) -> _Set:
        is_negated = self._eat("^")
        found: _Set = []
        while not self._eat("]"):
            low = self._member()
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._member()
                if len(low) != 1 or low[0][0] != low[0][1] or len(high) != 1 or high[0][0] != high[0][1] or low[0][0] > high[0][0]:
                    raise self._wrong("a range without two ends")
                low = [(low[0][0], high[0][0])]
            found += low
        if not found:
            raise self._wrong("an empty class")
        return _complement(found) if is_negated else found

    def _member(self) -> _Set:
        char = self._next()
        if char == "\\":
            return [(8, 8)] if self._eat("b") else self._escaped()
        return [(ord(char), ord(char))]

    def _escaped(self) -> _Set:
        char = self._next()
        if char.lower() in _SETS:
            return _SETS[char] if char in _SETS else _complement(_SETS[char.lower()])
        if char in _CONTROLS:
            code = _CONTROLS[char]
        elif char in "xu":
            digits = self._text[self._at : self._at + (2 if char == "x" else 4)]
            if not re.fullmatch("[0-9a-fA-F]{2}|[0-9a-fA-F]{4}", digits):
                raise self._wrong("an escape without its digits")
            self._at += len(digits)
            code = int(digits, 16)
        elif char.isalnum():
            raise self._wrong(f"\\{char}")
        else:
            code = ord(char)
        return [(code, code)]

    def _characters(self, wanted: _Set) -> str:
        """The rule of one character of a set, written as JSON writes it."""
        raw = _complement(_complement(wanted) + _NEVER_RAW)
        spans = "".join(f"{escape(low)}-{escape(high)}" if low < high else escape(low) for low, high in raw)
        options = [f"[{spans}]"] if raw else []
        options += [literal(text) for code, text in _ESCAPED.items() if any(low <= code <= high for low, high in wanted)]
        return self._rules.any_of(options)


def _complement(codes: _Set) -> _Set:
    """All other code points, in order."""
    others, at = [], 0
    for low, high in sorted(codes):
        if low > at:
            others.append((at, low - 1))
        at = max(at, high + 1)
    return [*others, (at, _LAST)] if at <= _LAST else others
