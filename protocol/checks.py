"""Small checks that messages make of themselves when they are made.

They raise ``ValueError``; the codec turns it into ``RemoteProtocolError`` for bytes that came in, and everywhere else it is our bug.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sized

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*\Z")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """``low <= value <= high``; NaN and infinities are never in range."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value!r}")


def at_most(name: str, value: Sized, limit: int) -> None:
    if len(value) > limit:
        raise ValueError(f"{name} may have at most {limit} entries, not {len(value)}")


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
