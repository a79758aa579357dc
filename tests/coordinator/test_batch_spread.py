"""Jobs of one batch spread over Islands that are about as good; a much faster one still takes more of them."""

from __future__ import annotations

import random

import pytest

from coordinator.columns import Candidate, Columns
from coordinator.crowds import Crowds
from coordinator.matching import CROWD_POINTS_MAX, Choice, Wish, choose
from tests.coordinator.fakes import offer


def chosen(speeds: tuple[float, float], crowd: dict[str, int]) -> Choice:
    rows = [
        Candidate(name, 1, 1, False, offer(slots_total=4096, slots_free=4096, tokens_per_s=speed), 0, 0)
        for name, speed in zip("ab", speeds, strict=True)
    ]
    found = choose(Columns.of("echo", rows), Wish("echo", 10, crowd=crowd), 0.0, random.Random(1))
    assert isinstance(found, Choice)
    return found


@pytest.mark.parametrize(
    ("speeds", "crowd", "island"),
    [
        ((10.0, 10.0), {"a": 1}, "b"),
        ((10.0, 10.0), {"a": 2, "b": 3}, "a"),
        ((10.0, 9.9), {"a": 1}, "b"),
        ((100.0, 10.0), {"a": 1}, "a"),
        ((100.0, 10.0), {"a": 4000}, "a"),
        ((10.0, 10.0), {"gone": 5, "b": 1}, "a"),
    ],
)
def test_where_the_next_one_goes(speeds: tuple[float, float], crowd: dict[str, int], island: str) -> None:
    assert chosen(speeds, crowd).candidate.island == island


def test_the_reason_is_told_and_bounded() -> None:
    found = chosen((100.0, 10.0), {"a": 4000})
    assert dict(found.considered[0].terms)["siblings"] == -CROWD_POINTS_MAX
    assert any("other jobs of the same batch" in reason for reason in found.reasons)


def test_who_has_left_is_forgotten() -> None:
    crowds = Crowds()
    for island in ("a", "a", "b"):
        crowds.came("batch_1", island)
    crowds.came("", "a")
    assert dict(crowds.of("batch_1")) == {"a": 2, "b": 1} and dict(crowds.of("")) == {}
    for island in ("a", "b", "a"):
        crowds.left("batch_1", island)
    crowds.left("", "a")
    assert dict(crowds.of("batch_1")) == {} and repr(crowds) == "<Crowds of 0 groups>"
    with pytest.raises(KeyError):
        crowds.left("batch_1", "a")
