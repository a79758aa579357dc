"""How many tokens an Island risks before its Consumer signs."""

from __future__ import annotations

import pytest

from coordinator.tickets import count_every
from protocol import limits

SPEEDS = [
    (0.0, limits.COUNT_EVERY_TOKENS),  # unknown
    (70.0, limits.COUNT_EVERY_TOKENS),
    (limits.COUNT_EVERY_TOKENS / limits.COUNT_EVERY_S, limits.COUNT_EVERY_TOKENS),
    (4000.0, int(4000.0 * limits.COUNT_EVERY_S)),
    (1e7, limits.COMPLETION_TOKENS_MAX),  # the most that an ad may claim
]


@pytest.mark.parametrize(("tokens_per_s", "every"), SPEEDS)
def test_a_quarter_second_of_work_is_risked(tokens_per_s: float, every: int) -> None:
    assert count_every(tokens_per_s) == every
