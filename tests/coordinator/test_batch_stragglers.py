"""Who is sent to a second Island, and when to look again."""

from __future__ import annotations

import math

import pytest

from coordinator.batches.stragglers import STRAGGLER_FACTOR, STRAGGLER_GAIN_S_MIN, Underway, who_straggles

FAST, SLOW, NEW = "fast", "slow", "new"


@pytest.mark.parametrize(
    ("underway", "took_s", "due", "wait_s"),
    [
        # nothing is known of any other Island: no copy, whatever it takes
        ([Underway(0, FAST, 99.0)], {}, [], math.inf),
        ([Underway(0, FAST, 99.0)], {FAST: [1.0, 1.0]}, [], math.inf),
        ([], {FAST: [1.0]}, [], math.inf),
        # an Island of which nothing is known: by the median of all
        ([Underway(0, NEW, 1.0)], {FAST: [1.0, 1.0, 9.0]}, [], STRAGGLER_FACTOR - 1.0),
        ([Underway(0, NEW, 1.6)], {FAST: [1.0, 1.0, 9.0]}, [0], math.inf),
        # one that is known to be slow: at once, where the other would still be first
        ([Underway(0, SLOW, 0.0)], {FAST: [1.0], SLOW: [5.0]}, [0], math.inf),
        ([Underway(0, SLOW, 3.9)], {FAST: [1.0], SLOW: [5.0]}, [0], math.inf),
        # and not where it would not; later, when it takes longer there than it does there usually
        ([Underway(0, SLOW, 4.5)], {FAST: [1.0], SLOW: [5.0]}, [], 3.0),
        ([Underway(0, SLOW, 7.5)], {FAST: [1.0], SLOW: [5.0]}, [0], math.inf),
        # a little slower is not slow
        ([Underway(0, SLOW, 0.1)], {FAST: [1.0], SLOW: [1.2]}, [], 1.7),
        # a fast one that stands still
        ([Underway(0, FAST, 1.0)], {FAST: [1.0], SLOW: [5.0]}, [], 0.5),
        ([Underway(0, FAST, 1.5)], {FAST: [1.0], SLOW: [5.0]}, [0], math.inf),
        # what takes milliseconds is not worth a copy for a few more of them
        ([Underway(0, FAST, 0.03)], {FAST: [0.001], SLOW: [0.001]}, [], STRAGGLER_GAIN_S_MIN + 0.001 - 0.03),
        # several: who runs longest first
        ([Underway(0, FAST, 2.0), Underway(1, NEW, 0.5), Underway(2, SLOW, 8.0)], {FAST: [1.0], SLOW: [5.0]}, [2, 0], 4.0),
    ],
)
def test_who_straggles(underway: list[Underway], took_s: dict[str, list[float]], due: list[int], wait_s: float) -> None:
    found, again_s = who_straggles(underway, took_s)
    assert [each.index for each in found] == due
    assert again_s == pytest.approx(wait_s)
