"""JSON pointers (RFC 6901): where in a document something stands, or is to be put. Only what workflows need, so no library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.workflows.errors import FlowError
from protocol import limits

_BAD_ESCAPE = re.compile(r"~(?![01])")
_INDEX = re.compile(r"(0|[1-9][0-9]{0,6})\Z")  # "leading zeros are not allowed"
MISSING = object()


@dataclass(frozen=True, slots=True)
class Pointer:
    """``/a/0`` as its tokens; none: the whole document."""

    tokens: tuple[str, ...]

    def __str__(self) -> str:
        return "".join("/" + token.replace("~", "~0").replace("/", "~1") for token in self.tokens)

    def find(self, document: Any) -> Any:
        """What stands there; MISSING where nothing does."""
        value = document
        for token in self.tokens:
            value = _below(value, token)
            if value is MISSING:
                return MISSING
        return value


def parse_pointer(text: str) -> Pointer:
    """Raises FlowError for what is no pointer."""
    if text and not text.startswith("/"):
        raise FlowError("", "a JSON pointer begins with /, as in /translate/output/text")
    if len(text) > limits.FLOW_POINTER_CHARS_MAX:
        raise FlowError("", f"a JSON pointer may have at most {limits.FLOW_POINTER_CHARS_MAX} characters")
    if _BAD_ESCAPE.search(text):
        raise FlowError("", "in a JSON pointer ~ is written ~0 and / is written ~1")
    tokens = tuple(token.replace("~1", "/").replace("~0", "~") for token in text.split("/")[1:])
    if len(tokens) > limits.FLOW_DEPTH_MAX:
        raise FlowError("", f"a JSON pointer may have at most {limits.FLOW_DEPTH_MAX} parts")
    return Pointer(tokens)


def placed(document: Any, pointer: Pointer, value: Any) -> Any:
    """A document like this one, with ``value`` at the pointer; objects on the way there are made, lists are not. ``-`` stands for the place
    after the last of a list, which also is where one item may be added by its number. Shares with the old one what has not changed.

    Raises FlowError where an item of a list or a part of something else than a list or an object is named.
    """
    return _placed(document, pointer.tokens, value)


def _placed(document: Any, tokens: tuple[str, ...], value: Any) -> Any:
    if not tokens:
        return value
    token, *rest = tokens
    if document is MISSING or isinstance(document, Mapping):
        fields: dict[str, Any] = dict(document) if isinstance(document, Mapping) else {}
        fields[token] = _placed(fields.get(token, MISSING), tuple(rest), value)
        return fields
    if not isinstance(document, Sequence) or isinstance(document, str):
        raise FlowError("", f"there is no {token[:40]!r} in a {_kind(document)}")
    items = list(document)
    place = len(items) if token == "-" else int(token) if _INDEX.match(token) else -1
    if not 0 <= place <= len(items):
        raise FlowError("", f"a list of {len(items)} has no place {token[:40]!r}")
    items[place : place + 1] = [_placed(items[place] if place < len(items) else MISSING, tuple(rest), value)]
    return items


def _below(value: Any, token: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(token, MISSING)
    if isinstance(value, Sequence) and not isinstance(value, str) and _INDEX.match(token) and int(token) < len(value):
        return value[int(token)]
    return MISSING


def _kind(value: object) -> str:
    return {str: "text", bool: "boolean", type(None): "null"}.get(type(value), "number")
