"""The fields of a JSON body, checked one by one. Every complaint is an ApiError 400 that names its parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from coordinator.http.errors import bad_request


class Fields:
    """Typed access to a body; null counts as absent, as it does at OpenAI."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def text(self, name: str, limit: int, required: bool = False) -> str:
        value = self._body.get(name)
        if value is None and not required:
            return ""
        if value is None or value == "":
            raise bad_request(f"you must provide {name}", name, "missing_required_parameter")
        return text_of(value, name, limit)

    def flag(self, name: str) -> bool:
        value = self._body.get(name)
        if value is None:
            return False
        if type(value) is not bool:
            raise wrong_type(name, "a boolean", value)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._body.get(name)
        if value is None:
            return None
        if type(value) is not int:
            raise wrong_type(name, "an integer", value)
        _within(value, name, low, high)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self._body.get(name)
        return default if value is None else number_of(value, name, low, high)


def wrong_type(param: str, expected: str, value: object) -> Exception:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    got = kinds.get(type(value), "a number")
    return bad_request(f"{param} must be {expected}, not {got}", param, "invalid_type")


def _within(value: float, param: str, low: float, high: float) -> None:
    if not low <= value <= high:
        raise bad_request(f"{param} must be between {low} and {high}", param)


def number_of(value: object, param: str, low: float, high: float) -> float:
    """A finite number. An int that is too large for a float fails the comparison, not the conversion."""
    if not isinstance(value, float) and type(value) is not int:
        raise wrong_type(param, "a number", value)
    if isinstance(value, float) and not math.isfinite(value):  # 1e999 reads as infinity
        raise bad_request(f"{param} must be a finite number", param)
    _within(value, param, low, high)
    return float(value)


def text_of(value: object, param: str, limit: int) -> str:
    """A string that can be encoded: JSON allows lone surrogates, UTF-8 does not."""
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    if len(value) > limit:
        raise bad_request(
            f"{param} has {len(value)} characters; the limit is {limit}", param, "string_above_max_length"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_request(f"{param} holds half of a surrogate pair", param) from None
    return value
