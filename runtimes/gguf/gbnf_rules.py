"""Named rules of a grammar in llama.cpp's notation (GBNF), and how a text is written in one. Pure."""

from __future__ import annotations

import json
import re

from runtimes.gguf.schema import Contradiction

EMPTY = '""'
_NAME = re.compile(r"\br\d+\b")
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]')




class Rules:
    """Named rules of one grammar. Equal ones become one."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._bodies: dict[str, str] = {}

    def add(self, body: str) -> str:
        """The name of a rule with this body."""
        if body in self._bodies:  # it is a name already
            return body
        if body not in self._names:
            self._names[body] = self.reserve()
            self._bodies[self._names[body]] = body
        return self._names[body]

    def reserve(self) -> str:
        """A name whose rule comes later, for what refers to itself."""
        name = f"r{len(self._bodies)}"
        self._bodies[name] = ""
        return name

    def set(self, name: str, body: str) -> None:
        self._bodies[name] = body

    def any_of(self, parts: list[str]) -> str:
        """One of these. None at all: nothing fits."""
        if not parts:
            raise Contradiction("the JSON schema contradicts itself: no value fits it")
        return self.add(" | ".join(dict.fromkeys(parts)))

    def text(self, root: str) -> str:
        """The grammar, without the rules of options that came to nothing."""
        used, waiting = {root}, [root]
        while waiting:
            for name in _NAME.findall(_LITERAL.sub(" ", self._bodies[waiting.pop()])):
                if name not in used:
                    used.add(name)
                    waiting.append(name)
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._bodies.items() if name in used)]) + "\n"


def literal(text: str) -> str:
    """A text in a grammar."""
    return '"' + "".join(c if c.isalnum() or c in " _-.,:;{}()+*/?!" else escape(ord(c)) for c in text) + '"'


def escape(code: int) -> str:
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def json_literal(value: object) -> str:
    """A literal that is this value's JSON."""
    text = json.dumps(value, ensure_ascii=False)
    if any("\ud800" <= c <= "\udfff" for c in text):
        text = json.dumps(value)
    return literal(text)


def repeated(rule: str, low: int, high: int | None) -> str:
    if high is None:
        return f"{rule}*" if low == 0 else f"{rule}{{{low},}}"
    return f"{rule}{{{low},{high}}}" if high else EMPTY
