"""Which inputs are worth sending to a second Island, when nothing is left to begin. Pure.

Theory of operation. As long as inputs wait, a second copy would only take an Island from a first one: greedy list scheduling does the rest.
At the end a batch waits for its slowest Island, while the fast ones idle. An input is sent again where its Island is known to be slow and a
fast one would end it sooner, or where it runs for much longer than inputs usually do. Answers differ in length, so "much longer" is a
factor of the median (MapReduce's back-up tasks do the same: Dean and Ghemawat 2004, section 3.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

STRAGGLER_FACTOR = 1.5  # so much longer than the median is unusual
STRAGGLER_GAIN_S_MIN = 0.05  # what a second copy has to save; below that it costs more than it brings
_NEVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class Underway:
    """An input that runs on one Island alone, for so long since the Island took it."""

    index: int
    island: str
    running_s: float


def who_straggles(underway: Sequence[Underway], took_s: Mapping[str, Sequence[float]]) -> tuple[list[Underway], float]:
    """Who is to be sent to a second Island now, the slowest first, and in how many seconds to look again. ``took_s``: Island -> how long
    inputs of this batch took there; none: no evidence that another one would be any faster."""
    medians = {island: median(times) for island, times in took_s.items() if times}
    waits = [(_due_s(each, medians, took_s), each) for each in underway]
    due = sorted((each for wait_s, each in waits if wait_s <= 0.0), key=lambda each: -each.running_s)
    return due, min((wait_s for wait_s, _ in waits if wait_s > 0.0), default=_NEVER_S)


def _due_s(each: Underway, medians: Mapping[str, float], took_s: Mapping[str, Sequence[float]]) -> float:
    """In how many seconds this input is a straggler; 0.0 or less: it is one."""
    others = [value for island, value in medians.items() if island != each.island]
    if not others:
        return _NEVER_S
    best_s, own_s = min(others), medians.get(each.island)
    if own_s is None:
        usual_s = median([value for times in took_s.values() for value in times])
    else:
        usual_s = own_s
        is_slow = own_s > STRAGGLER_FACTOR * best_s
        if is_slow and each.running_s + best_s + STRAGGLER_GAIN_S_MIN < own_s:
            return 0.0
    return max(STRAGGLER_FACTOR * usual_s, usual_s + STRAGGLER_GAIN_S_MIN) - each.running_s
