"""The parts of an A/B test's JSON, checked field by field. Every complaint is an AbRefused that names its field. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from coordinator.abtests.errors import AbFault, AbRefused

T = TypeVar("T")

_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
_SHOWN_CHARS = 40


class Part:
    """One object. ``where``: its place in the body (``variants[1]``), empty for the body itself; ``known``: the fields that it may have.
    null counts as absent. Raises AbRefused for what is no object and for unknown fields: one that is misspelt must not become a default."""

    def __init__(self, value: object, where: str, known: Collection[str]) -> None:
        if not isinstance(value, Mapping):
            raise wrong_type(where or "the body", "an object", value)
        self._value: Mapping[str, Any] = value
        self._where = where
        unknown = sorted(str(name) for name in value if name not in known)
        if unknown:
            told = f"{self.place(_shown(unknown[0]))} is not known here; there are {', '.join(known)}"
            raise invalid(self.place(_shown(unknown[0])), told)

    def place(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def any_of(self, *names: str) -> tuple[str, Any]:
        """A field that has several names, by the one that was said, or by its first. Raises AbRefused where it was said twice."""
        said = [name for name in names if self._value.get(name) is not None]
        if len(said) > 1:
            raise invalid(self.place(said[1]), f"{self.place(said[1])} means the same as {said[0]}; send one of them")
        return (said[0], self._value[said[0]]) if said else (names[0], None)

    def text(self, *names: str, chars_max: int) -> str:
        """Has to be there: printable, 1 to ``chars_max`` characters."""
        name, value = self.any_of(*names)
        place = self.place(name)
        if value is None or value == "":
            raise invalid(place, f"you must provide {place}")
        if not isinstance(value, str):
            raise wrong_type(place, "a string", value)
        if len(value) > chars_max or not value.isprintable():  # half a surrogate pair is not printable either
            raise invalid(place, f"{place} is printable text of at most {chars_max} characters")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None, is_above: bool = False) -> float:
        """``is_above``: ``low`` itself is too little. Has to be there where there is no default."""
        value = self._value.get(name)
        if value is None and default is not None:
            return default
        return number_of(value, self.place(name), low, high, is_above)

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        value = self._value.get(name)
        if value is None:
            return default
        place = self.place(name)
        if type(value) is not int:
            raise wrong_type(place, "a whole number", value)
        if not low <= value <= high:
            raise invalid(place, f"{place} must be between {low} and {high}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._value.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise wrong_type(self.place(name), "a boolean", value)
        return value

    def chosen(self, name: str, choices: Mapping[str, T], default: T | None = None) -> T:
        """Has to be there where there is no default."""
        value = self._value.get(name)
        if value is None and default is not None:
            return default
        return choice_of(value, self.place(name), choices)

    def items(self, name: str, most: int, default: Sequence[object] | None = None) -> Sequence[object]:
        """An array. Has to be there where there is no default."""
        value, place = self._value.get(name), self.place(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise invalid(place, f"you must provide {place}")
        if not isinstance(value, list | tuple):
            raise wrong_type(place, "an array", value)
        if len(value) > most:
            raise invalid(place, f"{place} has {len(value)} entries; at most {most} are allowed")
        return value


def number_of(value: object, place: str, low: float, high: float, is_above: bool = False) -> float:
    """A finite number. A whole one that is too large for a float fails the comparison, not the conversion."""
    if value is None:
        raise invalid(place, f"you must provide {place}")
    if not isinstance(value, float) and type(value) is not int:
        raise wrong_type(place, "a number", value)
    if isinstance(value, float) and not math.isfinite(value):  # 1e999 reads as infinity
        raise invalid(place, f"{place} must be a finite number")
    if not low <= value <= high or (is_above and value == low):
        raise invalid(place, f"{place} must be {'above' if is_above else 'at least'} {low:g} and at most {high:g}")
    return float(value)


def choice_of(value: object, place: str, choices: Mapping[str, T]) -> T:
    if value is None:
        raise invalid(place, f"you must provide {place}")
    if not isinstance(value, str):
        raise wrong_type(place, "a string", value)
    if value not in choices:
        raise invalid(place, f"{place} takes {', '.join(choices)}")
    return choices[value]


def invalid(place: str, message: str) -> AbRefused:
    return AbRefused(AbFault.INVALID, message, place)


def wrong_type(place: str, expected: str, value: object) -> AbRefused:
    return invalid(place, f"{place} must be {expected}, not {_KINDS.get(type(value), 'a number')}")


def _shown(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name[:_SHOWN_CHARS])
