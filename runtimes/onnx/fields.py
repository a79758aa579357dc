"""A job's input, read with its types. What cannot be used is a BadJob that says what would do; it names fields and never their content."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from protocol import limits
from protocol.checks import made_printable
from runtimes.lines.engine import BadJob

TEXTS_MAX = limits.TEXTS_MAX
TEXT_CHARS_MAX = 1_000_000
_IGNORED = frozenset({"model", "user"})  # of OpenAI's requests; they say nothing to a Cargo


def only(fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """A misspelt field would silently change the answer, so it is refused."""
    names = sorted(known)
    for name in fields:
        if name not in names and name not in _IGNORED:
            raise BadJob(f"field {made_printable(name, 40)!r} is not known to this Cargo; it takes {', '.join(names)}")


def text(fields: Mapping[str, Any], *names: str) -> str:
    """The text in the first of ``names`` that is there."""
    name = _first(fields, names)
    return _checked(name, fields.get(name))


def texts(fields: Mapping[str, Any], *names: str) -> tuple[list[str], bool]:
    """A text or a list of them; whether it was one."""
    name = _first(fields, names)
    value = fields.get(name)
    if not isinstance(value, list):
        return [_checked(name, value, "a text or a list of texts")], True
    if not 1 <= len(value) <= TEXTS_MAX:
        raise BadJob(f"{name} has {len(value)} texts; 1 to {TEXTS_MAX} are allowed")
    return [_checked(name, each, "a text or a list of texts") for each in value], False


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    there = [name for name in names if fields.get(name) is not None]
    if not there:
        raise BadJob(f"{names[0]} is missing; send a text")
    if len(there) > 1:
        raise BadJob(f"{there[0]} and {there[1]} say the same; send one of them")
    return there[0]


def _checked(name: str, value: object, what: str = "a text") -> str:
    if not isinstance(value, str):
        raise BadJob(f"{name} must be {what}")
    if not value.strip():
        raise BadJob(f"{name} is empty; send {what} with something in it")
    if len(value) > TEXT_CHARS_MAX:
        raise BadJob(f"{name} has {len(value)} characters; at most {TEXT_CHARS_MAX} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadJob(f"{name} holds half a surrogate pair, which is no character") from None
    return value


def labels(fields: Mapping[str, Any], name: str, most: int) -> list[str]:
    value = fields.get(name)
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise BadJob(f"{name} must be a list of 1 to {most} texts")
    found = [_checked(name, each) for each in value]
    if len(set(found)) != len(found):
        raise BadJob(f"{name} has a text twice")
    return found


def number(fields: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise BadJob(f"{name} must be a number from {low:g} to {high:g}")
    return float(value)


def integer(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise BadJob(f"{name} must be a whole number from {low} to {high}")
    return value


def flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadJob(f"{name} must be true or false")
    return value


def choice(fields: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    """The first is the default."""
    value = fields.get(name)
    if value is None:
        return choices[0]
    if not isinstance(value, str) or value not in choices:
        raise BadJob(f"{name} must be one of {', '.join(choices)}")
    return value
