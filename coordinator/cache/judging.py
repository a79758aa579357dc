"""Whether two answers say the same, by which the hits of the semantic step are checked in the shadow. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ANSWER_COSINE_MIN = 0.9
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_DENIALS = frozenset("no not never none nothing nobody nowhere neither nor cannot without false wrong nicht kein keine nie".split())
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def unit(vector: Sequence[float] | npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    """The vector with length 1; None for one that has no direction."""
    found = np.asarray(vector, np.float32)
    length = float(np.linalg.norm(found))
    return found / np.float32(length) if found.ndim == 1 and np.isfinite(length) and length > 0 else None


def says_the_same(one: str, other: str) -> bool | None:
    """By the words alone: equal but for spacing and case, or with other numbers, or where only one denies. None: they do not tell."""
    if one.lower().split() == other.lower().split():
        return True
    if Counter(_NUMBER.findall(one)) != Counter(_NUMBER.findall(other)) or _denies(one) != _denies(other):
        return False
    return None


def looks_the_same(one: Sequence[float], other: Sequence[float]) -> bool:
    """By the vectors of the two answers."""
    first, second = unit(one), unit(other)
    return first is not None and second is not None and float(first @ second) >= ANSWER_COSINE_MIN


def _denies(text: str) -> bool:
    words = _WORD.findall(text.lower().replace("\u2019", "'"))
    return any(word in _DENIALS or word.endswith("n't") for word in words)
