"""Means, intervals and p-values of an A/B test, all from sums over units. Pure.

Theory of operation. A unit brings several jobs, which are alike, so not jobs are counted as observations but units: the mean of an arm is
the ratio ΣS/ΣN of sums over units, and its variance comes from how units differ (delta method: Deng, Knoblich and Lu, "Applying the delta
method in metric analytics", KDD 2018).

A fixed test (``compare_fixed``, after Welch) holds for one look. What decides is an asymptotic confidence sequence of the difference
(``sequential``): Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences",
Annals of Statistics 52(6), 2024, Theorem 2.2 (Gaussian mixture). With z = difference / standard error, t independent observations and
τ = tρ², zero is outside at some look, ever, with a probability of at most α where

    z² > 2 (1 + 1/τ) ln(√(1 + τ) / α),   and inverted   p = √(1 + τ) exp(-z² τ / (2 (1 + τ))).

ρ is fixed before the start, so that the sequence is tightest at a planned number of units (``_mixing``, the paper's approximation).

Three things the theorem leaves open, each to the safe side:
- How many observations is t? With one job a unit, the units. Else as many as the information has grown by, which lies between Kish's
  effective number (ΣN)²/ΣN² of units, where all differ, and the number of jobs, where units do not matter. The bound is taken at both
  ends; as a function of τ it falls, then rises, so it is nowhere higher in between.
- A small arm beside a large one has not seen the rare values yet, so its variance comes out too small: with 90 and 10 % of the units and
  log-normal latencies (σ 1) 8 % of all tests without a difference find one. The standard error is therefore at least that of a variance
  pooled over both arms, which is the same where arms are of one size.
- An arm without a single failure has a variance of nothing (``with_unseen``). With neither this nor the pooled variance, 31 % of tests
  find a difference in 99.5 % success at 90 and 10 % of the units.

Nothing here returns NaN; what is not known is None. Sums that are no finite numbers raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.abtests.plan import Tally

NOISE_SHARE = 1e-12  # of a sum of squares or of a mean; below it a variance or a difference is rounding (a double holds 1e-16)
EXPECTED_UNITS_MIN = 5.0  # of each arm, for chi-square to hold (Cochran 1954)


@dataclass(frozen=True, slots=True)
class Estimate:
    """``mean`` of the jobs; ``variance_of_mean``: the square of its standard error, None with fewer than two units; ``units`` and ``count``
    (of jobs) that it comes from; ``effective_units``: (ΣN)²/ΣN², at most ``units``, less where few units bring most of the jobs."""

    mean: float
    variance_of_mean: float | None
    units: int
    count: int
    effective_units: float


@dataclass(frozen=True, slots=True)
class Fixed:
    """Of a difference treatment - control. It holds for one look at a time that was fixed before, for no other."""

    p_value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Anytime:
    """Of a difference: it holds for all looks together. ``p_value`` is at most alpha exactly where 0 is not inside."""

    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Lift:
    """(treatment - control) / control, as a share. Bounds are None where the control's mean cannot be told from 0."""

    value: float
    low: float | None
    high: float | None


def mean_and_variance(tally: Tally) -> Estimate | None:
    """None where nothing was counted. Variance of the mean: m/(m-1) Σ(S_u - μN_u)² / (ΣN)² over the m units; with one job a unit s²/m."""
    _check(tally)
    if not tally.units or not tally.count:
        return None
    mean, units = tally.total / tally.count, tally.units
    variance = None
    if units > 1:
        spread = tally.total_squares - 2 * mean * tally.cross + mean * mean * tally.count_squares
        if spread < NOISE_SHARE * tally.total_squares:
            spread = 0.0
        variance = units / (units - 1) * spread / tally.count**2
    effective = tally.count**2 / tally.count_squares if tally.count_squares else 1.0
    return Estimate(mean, variance, units, tally.count, min(effective, float(units)))


def _check(tally: Tally) -> None:
    sums = (tally.units, tally.count, tally.total, tally.total_squares, tally.count_squares, tally.cross)
    if not all(map(math.isfinite, sums)):
        raise ValueError("a tally's sums have to be finite numbers")
    if min(tally.units, tally.count, tally.total_squares, tally.count_squares) < 0:
        raise ValueError("a tally's numbers and sums of squares cannot be below 0")


def with_unseen(estimate: Estimate) -> Estimate:
    """For values that are 0 or 1: with the variance that one more unit for which all failed and one for which all went well would bring,
    (μ² + (1-μ)²)/m². Of 200 units without a failure we know that about 1 in 200 may fail, not that none does."""
    if estimate.variance_of_mean is None:
        return estimate
    unseen = (estimate.mean**2 + (1 - estimate.mean) ** 2) / estimate.units**2
    return replace(estimate, variance_of_mean=estimate.variance_of_mean + unseen)


# -- one look


def welch(mean_a: float, sd_a: float, n_a: int, mean_b: float, sd_b: float, n_b: int, alpha: float = 0.05) -> Fixed | None:
    """Welch's test of b - a from means, standard deviations and sizes; None with fewer than two values on a side."""
    sides = ((mean_a, sd_a, n_a), (mean_b, sd_b, n_b))
    if not all(map(math.isfinite, (*sides[0], *sides[1]))):
        raise ValueError("means, deviations and sizes have to be finite numbers")
    if min(n_a, n_b) < 2:
        return None
    control, treatment = (Estimate(mean, sd * sd / n, n, n, float(n)) for mean, sd, n in sides)
    return compare_fixed(control, treatment, alpha)


def compare_fixed(control: Estimate, treatment: Estimate, alpha: float, proportions: bool = False) -> Fixed | None:
    """Welch's test with units as observations, and his degrees of freedom (Satterthwaite); for ``proportions`` the z-test that is usual for
    them, with a variance for each arm. None where a variance is not known."""
    from scipy.special import stdtr, stdtrit  # kept out of processes that test nothing

    if control.variance_of_mean is None or treatment.variance_of_mean is None:
        return None
    difference, v_c, v_t = _difference(control, treatment, 1.0), control.variance_of_mean, treatment.variance_of_mean
    if v_c + v_t == 0:
        return Fixed(0.0 if difference else 1.0, difference, difference)
    # As shares, since the square of a tiny variance is 0.
    share_c, share_t = v_c / (v_c + v_t), v_t / (v_c + v_t)
    freedom = math.inf if proportions else 1 / (share_c**2 / (control.units - 1) + share_t**2 / (treatment.units - 1))
    error = math.sqrt(v_c + v_t)
    half = float(stdtrit(freedom, 1 - alpha / 2)) * error
    p_value = 2 * float(stdtr(freedom, -abs(difference) / error))
    return Fixed(min(1.0, p_value), difference - half, difference + half)


# -- any number of looks


def sequential(control: Estimate, treatment: Estimate, alpha: float, planned_units: float) -> Anytime | None:
    """Confidence sequence of treatment - control at 1 - alpha. ``planned_units``: of both arms, fixed before the start; the sequence is
    tightest there and valid everywhere. None where a variance is not known."""
    return contrast(control, treatment, 1.0, alpha, planned_units)


def contrast(control: Estimate, treatment: Estimate, factor: float, alpha: float, planned_units: float) -> Anytime | None:
    """The same for treatment - factor * control: whether a mean is below 1.05 times the control's is asked so."""
    if not (0 < alpha < 1 and math.isfinite(planned_units) and planned_units > 0 and math.isfinite(factor)):
        raise ValueError("alpha has to be between 0 and 1, planned_units above 0, and the factor a finite number")
    variances = _variances(control, treatment)
    if variances is None:
        return None
    difference = _difference(control, treatment, factor)
    error = math.sqrt(variances[1] + factor**2 * variances[0])
    if error == 0:
        return Anytime(difference, difference, difference, 0.0 if difference else 1.0)
    taus = _taus(control, treatment, alpha, planned_units)
    half = error * max(_critical(tau, alpha) for tau in taus)
    z = difference / error
    p_value = max(math.exp(0.5 * math.log1p(tau) - z * z * tau / (2 * (1 + tau))) for tau in taus)
    return Anytime(difference, difference - half, difference + half, min(1.0, p_value))


def lift(control: Estimate, treatment: Estimate, alpha: float, planned_units: float) -> Lift | None:
    """The relative difference with Fieller's interval (1954) at the critical value of ``sequential``, so that the two agree on whether
    there is a difference. None where there is no control above 0 to compare with."""
    if control.mean <= 0:
        return None
    value = _difference(control, treatment, 1.0) / control.mean
    variances = _variances(control, treatment)
    if variances is None:
        return Lift(value, None, None)
    critical = max(_critical(tau, alpha) for tau in _taus(control, treatment, alpha, planned_units))
    v_c, v_t = (critical**2 * variance for variance in variances)
    c, t = control.mean, treatment.mean
    leading = c * c - v_c
    if leading <= 0:
        return Lift(value, None, None)
    # Roots of (c² - v_c) r² - 2tcr + (t² - v_t), the ratios r that the interval of t - rc does not exclude from 0.
    root = math.sqrt(max(0.0, v_t * leading + v_c * t * t))
    return Lift(value, (t * c - root) / leading - 1, (t * c + root) / leading - 1)


def _difference(control: Estimate, treatment: Estimate, factor: float) -> float:
    difference, base = treatment.mean - factor * control.mean, max(abs(treatment.mean), abs(factor * control.mean))
    return 0.0 if abs(difference) <= NOISE_SHARE * base else difference


def _variances(control: Estimate, treatment: Estimate) -> tuple[float, float] | None:
    """Of both means, raised in proportion to what a pooled variance would give, where that is more; None where one is not known."""
    v_c, v_t = control.variance_of_mean, treatment.variance_of_mean
    if v_c is None or v_t is None:
        return None
    own = v_c + v_t
    pooled = v_c * control.units / treatment.units + v_t * treatment.units / control.units
    return (v_c * pooled / own, v_t * pooled / own) if pooled > own else (v_c, v_t)


def _taus(control: Estimate, treatment: Estimate, alpha: float, planned_units: float) -> tuple[float, float]:
    """tρ² at the least and the most observations that the jobs may be worth."""
    mixing = _mixing(alpha, planned_units)
    return (control.effective_units + treatment.effective_units) * mixing, (control.count + treatment.count) * mixing


def _mixing(alpha: float, planned_units: float) -> float:
    """ρ², for which the sequence is tightest at ``planned_units``, to a good approximation (the paper's appendix on ρ)."""
    log = -2 * math.log(alpha)
    return (log + math.log(log + 1)) / planned_units


def _critical(tau: float, alpha: float) -> float:
    return math.sqrt(2 * (1 + 1 / tau) * (0.5 * math.log1p(tau) - math.log(alpha)))


# -- whether units went where they should


def sample_ratio(observed: Sequence[int], shares: Sequence[float]) -> float | None:
    """The p-value of chi-square for numbers of units against the shares they were meant to have (of any sum); None with too few units to
    say. Units in an arm without a share give 0."""
    from scipy.special import chdtrc

    if len(observed) != len(shares) or not all(math.isfinite(one) and one >= 0 for one in (*observed, *shares)):
        raise ValueError("a sample ratio takes a finite number of units and a finite share of each arm, none below 0")
    if any(units and not share for units, share in zip(observed, shares, strict=True)):
        return 0.0
    arms = [(units, share) for units, share in zip(observed, shares, strict=True) if share]
    total, whole = sum(observed), sum(shares)
    if len(arms) < 2 or total * min(share for _, share in arms) < EXPECTED_UNITS_MIN * whole:
        return None
    square = sum((units - total * share / whole) ** 2 / (total * share / whole) for units, share in arms)
    return float(chdtrc(len(arms) - 1, square))
