"""Decisions on a pair of questions, ours and that of plain word overlap, for tests and the benchmark."""

from __future__ import annotations

import re

from coordinator.cache.candidates import Candidates
from coordinator.cache.guards import veto
from coordinator.cache.normal import content_words, core, normalise
from tests.coordinator.cache.cache_minilm import MiniLm

OVERLAP_MIN = 0.85
COSINE_MIN = 0.85


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def jaccard(one: str, other: str) -> float:
    """Shared words, as a part of all words of both."""
    first, second = words_of(one), words_of(other)
    return len(first & second) / max(len(first | second), 1)


def dice(one: str, other: str) -> float:
    """Twice the shared words, as a part of the words of the one and of the other."""
    first, second = words_of(one), words_of(other)
    return 2 * len(first & second) / max(len(first) + len(second), 1)


def is_candidate(asked: str, kept: str) -> bool:
    """Whether the index of words names the kept question, alone in it, for the asked one."""
    index = Candidates()
    slot = ("", b"kept")
    index.put(("", b""), slot, content_words(core(kept)))
    return slot in index.find(("", b""), content_words(core(asked)))


def refusal(model: MiniLm | None, asked: str, kept: str) -> str:
    """Empty where the whole decision gives the kept answer; else which step refuses. Without a model, all that comes before its cosine."""
    if normalise(asked) == normalise(kept):
        return ""
    if not is_candidate(asked, kept):
        return "candidate"
    if reason := veto(asked, kept):
        return str(reason)
    if model is None:
        return ""
    first, second = model.vectors([core(asked), core(kept)])
    return "" if float(first @ second) >= COSINE_MIN else "cosine"
