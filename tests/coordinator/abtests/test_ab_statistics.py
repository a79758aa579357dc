"""Estimates from sums, fixed tests, confidence sequences and the sample ratio: known figures, plain formulas, bad input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from coordinator.abtests.plan import Tally
from coordinator.abtests.statistics import (
    Estimate,
    compare_fixed,
    contrast,
    lift,
    mean_and_variance,
    sample_ratio,
    sequential,
    welch,
    with_unseen,
)


def tally(units: Sequence[Sequence[float]]) -> Tally:
    """Of each unit's values."""
    sums, counts = [sum(unit) for unit in units], [len(unit) for unit in units]
    return Tally(
        len(units),
        sum(counts),
        sum(sums),
        sum(one * one for one in sums),
        sum(one * one for one in counts),
        sum(one * count for one, count in zip(sums, counts, strict=True)),
    )


def changed(sums: Tally, field: str, value: Any) -> Tally:
    return replace(sums, **{field: value})


def estimate(units: Sequence[Sequence[float]]) -> Estimate:
    found = mean_and_variance(tally(units))
    assert found is not None
    return found


def proportion(successes: int, of: int) -> Estimate:
    found = mean_and_variance(Tally(of, of, successes, successes, of, successes))
    assert found is not None
    return found


CONTROL, TREATMENT = proportion(100, 1000), proportion(130, 1000)


# -- estimates


def test_one_job_a_unit_is_the_ordinary_variance() -> None:
    values = np.random.default_rng(1).lognormal(0, 1, 200)
    found = estimate([[float(one)] for one in values])
    assert found.mean == pytest.approx(values.mean()) and found.variance_of_mean == pytest.approx(values.var(ddof=1) / 200)
    assert (found.units, found.count, found.effective_units) == (200, 200, 200)


def test_units_are_the_observations() -> None:
    """Repeating each unit's job ten times adds nothing, where counting jobs would make the variance a tenth."""
    values = [[float(one)] for one in np.random.default_rng(2).normal(5, 1, 50)]
    once, often = estimate(values), estimate([unit * 10 for unit in values])
    assert often.mean == pytest.approx(once.mean) and often.variance_of_mean == pytest.approx(once.variance_of_mean)
    assert (often.units, often.count) == (50, 500) and often.effective_units == pytest.approx(50)


def test_the_delta_method_against_many_repetitions() -> None:
    """The variance of a ratio of sums, as it is over 2,000 samples of 80 units with 1 to 20 jobs."""
    chance = np.random.default_rng(3)
    jobs = chance.geometric(0.2, (2000, 80)).clip(max=20)
    sums = chance.lognormal(0, 0.5, (2000, 80)) * jobs
    found = [
        mean_and_variance(Tally(80, int(n.sum()), float(s.sum()), float(s @ s), float(n @ n), float(s @ n)))
        for s, n in zip(sums, jobs, strict=True)
    ]
    means = np.array([one.mean for one in found if one])
    variances = np.array([one.variance_of_mean for one in found if one])
    assert variances.mean() == pytest.approx(means.var(), rel=0.06)


def test_few_units_that_bring_most_jobs_are_few() -> None:
    assert estimate([[1.0]] * 99 + [[1.0] * 901]).effective_units == pytest.approx(1000**2 / (99 + 901**2))


def test_what_is_not_known_is_none() -> None:
    assert mean_and_variance(Tally()) is None
    one = estimate([[3.0, 5.0]])
    assert (one.mean, one.variance_of_mean) == (4.0, None)
    assert sequential(one, CONTROL, 0.05, 2000) is None and compare_fixed(CONTROL, one, 0.05) is None
    assert with_unseen(one) == one
    found = lift(one, CONTROL, 0.05, 2000)
    assert found is not None and (found.low, found.high) == (None, None)


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, 123_456_789.0])
def test_equal_values_have_no_variance(value: float) -> None:
    """Rounding is not taken for a spread, nor the rounding of a mean for a difference."""
    few, many = estimate([[value] * (1 + unit % 3) for unit in range(7)]), estimate([[value] * 3] * 1000)
    assert few.variance_of_mean == many.variance_of_mean == 0
    found = sequential(few, many, 0.05, 2000)
    assert found is not None and (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_difference_without_any_spread_is_certain() -> None:
    control, treatment = estimate([[5.0]] * 200), estimate([[6.0]] * 200)
    found, fixed = sequential(control, treatment, 0.05, 2000), compare_fixed(control, treatment, 0.05)
    assert found is not None and (found.low, found.high, found.p_value) == (1, 1, 0)
    assert fixed is not None and (fixed.low, fixed.high, fixed.p_value) == (1, 1, 0)


@pytest.mark.parametrize("field", [field.name for field in fields(Tally)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sums_that_are_no_numbers(field: str, value: float) -> None:
    good = tally([[1.0], [2.0], [4.0]])
    with pytest.raises(ValueError, match="finite"):
        mean_and_variance(changed(good, field, value))


def test_sums_below_zero() -> None:
    for field in ("units", "count", "total_squares", "count_squares"):
        with pytest.raises(ValueError, match="below 0"):
            mean_and_variance(changed(tally([[1.0], [2.0]]), field, -1))
    assert estimate([[-1.0], [-2.0]]).mean == -1.5


def test_an_arm_without_a_failure_does_not_know_that_there_are_none() -> None:
    spotless = proportion(200, 200)
    assert spotless.variance_of_mean == 0 and with_unseen(spotless).variance_of_mean == pytest.approx(1 / 200**2)
    added = with_unseen(CONTROL).variance_of_mean
    assert added is not None and CONTROL.variance_of_mean is not None
    assert 1 < added / CONTROL.variance_of_mean < 1.01


# -- one look


def test_welch() -> None:
    found = welch(0.41, 3.9, 3407, 0.70, 6.2, 3461)
    assert found is not None and found.p_value == pytest.approx(0.0201584, abs=5e-8)
    assert (found.low, found.high) == pytest.approx((0.04538, 0.53462), abs=5e-6)


def test_welch_against_scipy() -> None:
    from scipy.stats import ttest_ind

    chance = np.random.default_rng(4)
    a, b = chance.normal(0, 1, 12), chance.normal(1, 4, 30)
    found = welch(a.mean(), a.std(ddof=1), 12, b.mean(), b.std(ddof=1), 30)
    theirs = ttest_ind(b, a, equal_var=False)
    interval = theirs.confidence_interval()
    assert found is not None
    assert (found.p_value, found.low, found.high) == pytest.approx((theirs.pvalue, interval.low, interval.high))


def test_welch_with_bad_input() -> None:
    assert welch(1.0, 1.0, 1, 2.0, 1.0, 50) is None
    with pytest.raises(ValueError, match="finite"):
        welch(math.nan, 1.0, 10, 2.0, 1.0, 50)


def test_proportions_at_one_look() -> None:
    found = compare_fixed(CONTROL, TREATMENT, 0.05, proportions=True)
    assert found is not None and found.p_value == pytest.approx(0.0354, abs=5e-5)
    assert (found.low, found.high) == pytest.approx((0.0021, 0.0579), abs=6e-5)


# -- any number of looks


def test_proportions_at_any_look() -> None:
    found = sequential(CONTROL, TREATMENT, 0.05, 5000)
    assert found is not None and found.p_value == pytest.approx(0.37957, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((-0.01454, 0.07454), abs=5e-6)


def test_the_half_width_is_the_papers() -> None:
    """√N se √(2(Nρ²+1)/(N²ρ²) ln(√(Nρ²+1)/α)), written out."""
    found, n = sequential(CONTROL, TREATMENT, 0.01, 3000), 2000
    square = (-2 * math.log(0.01) + math.log(-2 * math.log(0.01) + 1)) / 3000
    error = math.sqrt((CONTROL.variance_of_mean or 0) + (TREATMENT.variance_of_mean or 0))
    bound = math.sqrt(2 * (n * square + 1) / (n**2 * square) * math.log(math.sqrt(n * square + 1) / 0.01))
    assert found is not None and found.high - found.difference == pytest.approx(math.sqrt(n) * error * bound)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_p_value_and_interval_agree(alpha: float) -> None:
    """An interval at the level of the p-value ends at zero, and p is at most alpha exactly where zero is outside."""
    for successes in range(100, 220, 2):
        found = sequential(CONTROL, proportion(successes, 1000), alpha, 2000)
        assert found is not None and (found.p_value <= alpha) == (found.low > 0)


def test_it_is_tightest_where_it_was_planned() -> None:
    """In standard errors."""
    units = [100 * 2**step for step in range(9)]

    def width(n: int) -> float:
        one = Estimate(0.0, 0.5 / n, n, n, float(n))
        found = sequential(one, one, 0.05, 3200)
        assert found is not None
        return found.high * math.sqrt(n)

    assert min(units, key=width) == 1600 and width(1600) == pytest.approx(3.035, abs=0.001)
    assert width(100) > 3.9 and width(25600) < 3.5


def test_jobs_of_the_same_units_do_not_count_as_units_nor_as_none() -> None:
    """The bound is taken where it is higher: at what the units are worth by themselves, or at all their jobs."""
    plain, jobs = Estimate(0.0, 0.0005, 1000, 1000, 1000.0), Estimate(0.0, 0.0005, 1000, 1_000_000, 1000.0)
    uneven = Estimate(0.0, 0.0005, 1000, 5000, 50.0)
    widths = [found.high for one in (plain, jobs, uneven) if (found := sequential(one, one, 0.05, 2000))]
    assert len(widths) == 3 and widths[0] < widths[1] < widths[2]


def test_a_small_arm_borrows_the_variance_of_the_large_one() -> None:
    """Two hundred units without a failure beside 10,000 with 1 %: by their own variances z is 10, pooled it is 1.4."""
    small, large = proportion(200, 200), proportion(9900, 10_000)
    for pair in ((large, small), (small, large)):
        found = sequential(*pair, 0.05, 2000)
        assert found is not None and found.p_value > 0.5
    wide, narrow = Estimate(5.0, 4 / 9000, 9000, 9000, 9000.0), Estimate(5.0, 1 / 1000, 1000, 1000, 1000.0)
    pooled = (9000 * 4 + 1000 * 1) / 10_000 * (1 / 9000 + 1 / 1000)
    even = Estimate(5.0, pooled / 2, 5000, 5000, 5000.0)
    found = sequential(wide, narrow, 0.05, 10_000)
    same = sequential(even, even, 0.05, 10_000)
    assert found is not None and same is not None and found.high == pytest.approx(same.high)
    swapped = sequential(replace(wide, variance_of_mean=1 / 9000), replace(narrow, variance_of_mean=4 / 1000), 0.05, 10_000)
    # Here its own variance is more than the pooled one, and counts: 4/1000 + 1/9000, by chance of algebra the same number.
    assert swapped is not None and swapped.high == pytest.approx(same.high)


def test_contrast_with_a_factor() -> None:
    slow = estimate([[float(one)] for one in np.random.default_rng(5).normal(104, 5, 4000)])
    base = estimate([[float(one)] for one in np.random.default_rng(6).normal(100, 5, 4000)])
    within, beyond = contrast(base, slow, 1.05, 0.05, 4000), contrast(base, slow, 1.03, 0.05, 4000)
    assert within is not None and beyond is not None and within.high < 0 < beyond.low


@pytest.mark.parametrize(("alpha", "planned"), [(0, 2000), (1, 2000), (math.nan, 2000), (0.05, 0), (0.05, math.inf)])
def test_contrast_with_bad_input(alpha: float, planned: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        sequential(CONTROL, TREATMENT, alpha, planned)


def test_huge_differences_do_not_overflow() -> None:
    found = sequential(Estimate(1.0, 1e-30, 500, 500, 500.0), Estimate(1e12, 1e-30, 500, 500, 500.0), 0.05, 2000)
    assert found is not None and found.p_value == 0 and math.isfinite(found.low)
    fixed = compare_fixed(Estimate(1.0, 1e-300, 500, 500, 500.0), Estimate(2.0, 1e-300, 500, 500, 500.0), 0.05)
    assert fixed is not None and fixed.p_value == 0 and math.isfinite(fixed.low)


# -- lift


def test_lift_agrees_with_the_difference() -> None:
    for successes in range(60, 220, 4):
        arm = proportion(successes, 1000)
        found, relative = sequential(CONTROL, arm, 0.05, 2000), lift(CONTROL, arm, 0.05, 2000)
        assert found is not None and relative is not None and relative.low is not None and relative.high is not None
        assert relative.value == pytest.approx(successes / 100 - 1) and relative.low <= relative.value <= relative.high
        assert (relative.low > 0) == (found.low > 0) and (relative.high < 0) == (found.high < 0)


def test_lift_ends_where_the_contrast_does() -> None:
    found = lift(CONTROL, TREATMENT, 0.05, 5000)
    assert found is not None and found.low is not None and found.high is not None
    ends = [contrast(CONTROL, TREATMENT, 1 + end, 0.05, 5000) for end in (found.low, found.high)]
    assert ends[0] is not None and ends[0].low == pytest.approx(0) and ends[1] is not None and ends[1].high == pytest.approx(0)


def test_no_lift_without_a_base() -> None:
    assert lift(proportion(0, 500), TREATMENT, 0.05, 2000) is None
    found = lift(proportion(1, 500), TREATMENT, 0.05, 2000)
    assert found is not None and (found.low, found.high) == (None, None)


# -- sample ratio


def test_sample_ratio() -> None:
    blocks, passes = sample_ratio([4600, 5400], [0.5, 0.5]), sample_ratio([5080, 4920], [50_000, 50_000])
    assert blocks == pytest.approx(1.2e-15, rel=0.05) and passes == pytest.approx(0.110, abs=0.0005)


def test_sample_ratio_of_three_against_scipy() -> None:
    from scipy.stats import chisquare

    assert sample_ratio([800, 110, 90], [80, 10, 10]) == pytest.approx(chisquare([800, 110, 90], [800, 100, 100]).pvalue)


def test_sample_ratio_with_little_or_nothing() -> None:
    assert sample_ratio([0, 0], [1, 1]) is None and sample_ratio([9, 0], [1, 1]) is None
    assert sample_ratio([10, 0], [1, 1]) == pytest.approx(0.00157, abs=1e-5)
    assert sample_ratio([500, 1], [1, 0]) == 0 and sample_ratio([500, 0], [1, 0]) is None


@pytest.mark.parametrize(("observed", "shares"), [([1], [1, 1]), ([-1, 2], [1, 1]), ([1, 2], [math.nan, 1]), ([1, 2], [1, math.inf])])
def test_sample_ratio_with_bad_input(observed: list[int], shares: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        sample_ratio(observed, shares)
