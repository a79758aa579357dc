"""Which kept questions are worth a closer look: those that share words with a new one, found by an inverted index. Pure.

Within one scope and context each content word has a list of the entries that hold it. The words of a question are looked up from the rarest
to the commonest, until WORK_MAX entries were touched: a word that everybody uses says little, and would cost most. So a search never looks
at all entries, however many there are. A word weighs ln(1 + N / n) where n of N entries hold it (Sparck Jones, "A statistical
interpretation of term specificity", 1972).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

Slot = tuple[str, bytes]  # scope and key
Room = tuple[str, bytes]  # scope and context

CANDIDATES_MAX = 8
WORK_MAX = 2_000  # entries touched by one search: about 0.2 ms
WORDS_MAX = 64  # of one question
OVERLAP_MIN = 0.3  # of a question's weight that a candidate shares: what shares less is never vouched for by the guards


@dataclass(slots=True)
class _Room:
    size: int = 0
    holders: dict[str, dict[Slot, None]] = field(default_factory=dict)  # of each word, the oldest first


class Candidates:
    """The index. Entries are put in and taken out with the same words."""

    def __init__(self) -> None:
        self._rooms: dict[Room, _Room] = {}

    def __repr__(self) -> str:
        return f"<Candidates {len(self._rooms)} rooms, {sum(room.size for room in self._rooms.values())} entries>"

    def put(self, where: Room, slot: Slot, words: Iterable[str]) -> None:
        room = self._rooms.setdefault(where, _Room())
        room.size += 1
        for word in _distinct(words):
            room.holders.setdefault(word, {})[slot] = None

    def take(self, where: Room, slot: Slot, words: Iterable[str]) -> None:
        """The opposite of ``put``."""
        room = self._rooms[where]
        room.size -= 1
        for word in _distinct(words):
            holders = room.holders[word]
            del holders[slot]
            if not holders:
                del room.holders[word]
        if not room.size:
            del self._rooms[where]

    def __contains__(self, where: Room) -> bool:
        """Whether there is anything in a scope and context."""
        return where in self._rooms

    def find(self, where: Room, words: Iterable[str]) -> list[Slot]:
        """At most CANDIDATES_MAX entries, those first that share most."""
        room = self._rooms.get(where)
        if room is None:
            return []
        asked = [(len(room.holders.get(word, ())), word) for word in _distinct(words)]
        weights = {word: math.log1p(room.size / max(1, count)) for count, word in asked}
        shared: dict[Slot, float] = {}
        left = WORK_MAX
        for count, word in sorted(asked):
            for slot in _newest(room.holders.get(word), left):
                shared[slot] = shared.get(slot, 0.0) + weights[word]
            left = max(0, left - count)
        floor = OVERLAP_MIN * sum(weights.values())
        ranked = sorted(((-weight, slot) for slot, weight in shared.items() if weight >= floor), key=lambda pair: pair[0])
        return [slot for _, slot in ranked[:CANDIDATES_MAX]]


def _distinct(words: Iterable[str]) -> Sequence[str]:
    return tuple(islice(dict.fromkeys(words), WORDS_MAX))


def _newest(holders: dict[Slot, None] | None, count: int) -> Iterator[Slot]:
    return islice(reversed(holders), count) if holders else iter(())
