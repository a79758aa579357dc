"""Whether the condition of a step holds."""

from __future__ import annotations

from typing import Any

_FALSE_WORDS = frozenset({"", "false", "0"})


def is_true(value: Any) -> bool:
    """What ``when`` gave: false are null, false, 0, empty lists and objects, and the texts ``""``, ``"false"`` and ``"0"``, whatever their
    case and with blanks round them; all else is true (``"no"`` and ``"null"`` too)."""
    if isinstance(value, str):
        return value.strip().lower() not in _FALSE_WORDS
    return bool(value)
