"""Small checks that messages make of themselves when they are made.

They raise ``ValueError``; the codec turns it into ``RemoteProtocolError`` for bytes that came in, and everywhere else it is our bug.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence, Sized

from protocol import limits

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*\Z")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """``low <= value <= high``; NaN and infinities are never in range."""
    if not low <= value <= high or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value!r:.60}")


def at_most(name: str, value: Sized, limit: int) -> None:
    if len(value) > limit:
        raise ValueError(f"{name} may have at most {limit} entries, not {len(value)}")


def utf8(name: str, value: str, limit_bytes: int) -> None:
    """At most so many bytes in UTF-8; half a surrogate pair, which JSON may hold, has no UTF-8 and is refused."""
    if len(value) > limit_bytes:
        raise ValueError(f"{name} has {len(value)} characters; at most {limit_bytes} bytes are allowed")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair, which is no character") from None
    if size > limit_bytes:
        raise ValueError(f"{name} has {size} bytes in UTF-8; at most {limit_bytes} are allowed")


def printable(name: str, value: str, limit: int) -> None:
    """Text that may stand on a terminal or in a log as it is: no control characters, no line breaks."""
    if len(value) > limit or not value.isprintable():
        raise ValueError(f"{name} must be printable text of at most {limit} characters: {value[:80]!r}")


def made_printable(text: str, limit: int = limits.TEXT_CHARS_MAX) -> str:
    """Text of any library as ``printable`` wants it: other characters become spaces, what is too long is cut off."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])


def unique(name: str, values: Sequence[Hashable]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{name} names something twice")


def exactly(name: str, value: Sized, size: int) -> None:
    if len(value) != size:
        raise ValueError(f"{name} must have {size} bytes, not {len(value)}")


def peer_id(name: str, value: str) -> None:
    if not _PEER_ID.match(value):
        raise ValueError(f"{name} is not a peer id: {value[:80]!r}")


def content_hash(name: str, value: str) -> None:
    if not _HASH.match(value):
        raise ValueError(f"{name} is not a SHA-256 in lower-case hex: {value[:80]!r}")


def label(name: str, value: str, limit: int) -> None:
    """A name that may stand in logs, paths of metrics and headers: no spaces, no control characters."""
    if len(value) > limit or not _NAME.match(value):
        raise ValueError(f"{name} is not a valid name of at most {limit} characters: {value[:80]!r}")
