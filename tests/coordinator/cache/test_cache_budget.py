"""The bound of Clopper and Pearson against published values, and when the semantic step is switched off."""

from __future__ import annotations

import random

import pytest

from coordinator.cache.budget import CHECKS_KEPT, ErrorBudget, lower_bound, tail, upper_bound

# Two-sided 95 % limits (2.5 % on each side) as tables of the exact binomial have them: Documenta Geigy, Scientific Tables (7th ed., 1970),
# p. 85, also scipy.stats.binomtest(k, n).proportion_ci().
TWO_SIDED = [
    (0, 10, 0.0, 0.3085),
    (1, 10, 0.0025, 0.4450),
    (2, 10, 0.0252, 0.5561),
    (5, 10, 0.1871, 0.8129),
    (10, 10, 0.6915, 1.0),
    (1, 20, 0.0013, 0.2487),
    (3, 20, 0.0321, 0.3789),
    (10, 20, 0.2720, 0.7280),
    (5, 50, 0.0333, 0.2181),
    (10, 100, 0.0490, 0.1762),
]


@pytest.mark.parametrize(("false", "checks", "low", "high"), TWO_SIDED)
def test_published_values(false: int, checks: int, low: float, high: float) -> None:
    assert lower_bound(false, checks, 0.975) == pytest.approx(low, abs=6e-5)
    assert upper_bound(false, checks, 0.975) == pytest.approx(high, abs=6e-5)


def test_closed_forms() -> None:
    for checks in (1, 7, 60, 500):
        assert upper_bound(0, checks, 0.95) == pytest.approx(1 - 0.05 ** (1 / checks))
        assert lower_bound(checks, checks, 0.95) == pytest.approx(0.05 ** (1 / checks))
        assert lower_bound(1, checks, 0.95) == pytest.approx(1 - 0.95 ** (1 / checks))
    assert upper_bound(0, 0, 0.95) == 1.0 and lower_bound(0, 0, 0.95) == 0.0
    assert upper_bound(0, 58, 0.95) > 0.05 > upper_bound(0, 59, 0.95)


def test_the_tail_is_a_probability_that_grows() -> None:
    for false in range(8):
        found = [tail(false, 7, share / 10) for share in range(11)]
        assert found == sorted(found) and found[-1] == (1.0 if false <= 7 else 0.0)
    assert tail(1, 7, 0.5) == pytest.approx(1 - 0.5**7)


@pytest.mark.parametrize(("false", "checks"), [(-1, 3), (4, 3)])
def test_what_cannot_be(false: int, checks: int) -> None:
    with pytest.raises(ValueError, match="cannot be false"):
        lower_bound(false, checks, 0.95)
    with pytest.raises(ValueError, match="cannot be false"):
        upper_bound(false, checks, 0.95)


def first_off(marks: list[bool], budget: float = 0.05) -> int | None:
    """After which check it was switched off."""
    errors = ErrorBudget(budget, 0.95)
    for number, is_false in enumerate(marks, 1):
        if errors.note("echo", is_false):
            assert errors.is_off("echo") and errors.switched_off() == ["echo"] and not errors.is_off("other")
            return number
    return None


def test_it_is_switched_off_when_the_bound_passes_the_budget() -> None:
    assert first_off([False] * 100) is None
    assert first_off([True]) is None  # 1 of 1 has the bound 0.05, which does not pass it
    assert first_off([True, True]) == 2
    assert first_off([False] * 5 + [True, True]) == 7  # 2 of 7: 0.053
    assert first_off([False] * 6 + [True, True]) is None  # 2 of 8: 0.046
    assert lower_bound(2, 7, 0.95) > 0.05 > lower_bound(2, 8, 0.95)


@pytest.mark.parametrize("seed", range(5))
def test_the_quick_way_is_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    errors, false = ErrorBudget(0.05, 0.95), 0
    for checks in range(1, 200):
        is_false = rng.random() < 0.06
        false += is_false
        errors.note("echo", is_false)
        assert errors.checks("echo") == (false, checks)
        low, high = errors.bounds("echo")
        assert low <= false / checks <= high
        if low > 0.05:
            assert errors.is_off("echo")
            return
        assert not errors.is_off("echo")


def test_a_good_past_does_not_hide_a_bad_present() -> None:
    errors = ErrorBudget(0.05, 0.95)
    for _ in range(10 * CHECKS_KEPT):
        errors.note("echo", False)
    marks = [errors.note("echo", number % 4 == 0) for number in range(CHECKS_KEPT)]
    assert any(marks) and marks.index(True) < 200
    assert errors.checks("echo")[1] == CHECKS_KEPT


def test_off_is_off_until_the_operator_speaks() -> None:
    errors = ErrorBudget(0.05, 0.95)
    errors.note("echo", True)
    assert errors.note("echo", True)
    for _ in range(CHECKS_KEPT):
        assert not errors.note("echo", False)  # said once
    assert errors.is_off("echo")
    errors.reset("echo")
    assert not errors.is_off("echo") and errors.checks("echo") == (0, 0) and errors.switched_off() == []
