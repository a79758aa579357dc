"""Query parameters and parts of a path, checked before anything asks the database for them. Raises ApiError 400 naming the parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from aiohttp import web

from coordinator.http.errors import bad_request

T = TypeVar("T")

_DIGITS_MAX = 15


def whole(text: str) -> int | None:
    """A number of at most 15 ASCII digits; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX else None


def whole_number(request: web.Request, name: str, low: int, high: int) -> int | None:
    """None where the parameter is absent."""
    text = request.query.get(name)
    if text is None:
        return None
    value = whole(text)
    if value is None or not low <= value <= high:
        raise bad_request(f"{name} must be a whole number from {low} to {high}", name)
    return value


def one_of(request: web.Request, name: str, allowed: Collection[str], default: str) -> str:
    value = request.query.get(name, default)
    if value not in allowed:
        raise bad_request(f"{name} takes {' or '.join(allowed)}", name)
    return value


def parsed(request: web.Request, name: str, parse: Callable[[str], T]) -> T | None:
    """What ``parse`` makes of it, None where it is absent; its ValueError is for the client."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise bad_request(f"{name}: {error}", name) from None
