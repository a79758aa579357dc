"""What an A/B test says so far, and what is to be done about it. Pure: a plan and counts in, a report out.

The same function answers for the results that people look at, for the promotion by itself and for one by hand, so they cannot disagree.
It may be called as often as one likes: what it concludes holds for all looks together (statistics.py). How alpha is spent: the primary
metric of each of k arms on trial gets alpha/k, each of its g guardrails alpha/(kg). Beside that stands one question that is always asked:
whether Consumers give up on an arm more often than on the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from coordinator.abtests.plan import Arm, ArmCounts, Guardrail, Metric, Plan
from coordinator.abtests.statistics import (
    Anytime,
    Estimate,
    Fixed,
    Lift,
    compare_fixed,
    contrast,
    lift,
    mean_and_variance,
    sample_ratio,
    sequential,
    with_unseen,
)

UNITS_MIN = 100  # effective units of an arm before anything is concluded: means of skewed latencies are near enough to normal there
HARM_UNITS_MIN = 50  # the same before a test is stopped for harm: waiting costs users more than stopping a good test costs its publisher
RATIO_P_MIN = 0.001  # below it units went astray
PLANNED_MULTIPLE = 2.0  # of the units at which minimum_samples are reached: the sequence is tightest at twice as many
ABANDONED_P_MIN = 0.001  # two-sided, shared by the arms on trial; below it an arm on trial is given up on more often than the control
ABANDONED_HARM_POINTS_MIN = 5.0  # of percent; so much more is harm, whatever guardrails the plan has
_BINARY = (Metric.SUCCESS, Metric.ABANDONED, Metric.THUMBS)


class Verdict(StrEnum):
    """``collecting``: go on; ``promote``: the winner may take the base's place; ``keep_base``: every arm on trial is worse; ``blocked``:
    what was counted cannot be trusted, or the test is held; ``harmful``: an arm breaks a guardrail, or is given up on far more often than
    the control, so the test has to stop now."""

    COLLECTING = "collecting"
    PROMOTE = "promote"
    KEEP_BASE = "keep_base"
    BLOCKED = "blocked"
    HARMFUL = "harmful"


class GuardrailState(StrEnum):
    """Shown to hold, shown to be broken, or neither."""

    HOLDS = "holds"
    NOT_YET = "not_yet"
    VIOLATED = "violated"


# What stands in ``Report.blocked`` and ``Report.waiting``, in words.
WORDS: Mapping[str, str] = {
    "sample_ratio": "units did not go to the variants in the shares of the plan, so these cannot be compared",
    "guardrail_violated": "a variant is worse by more than a guardrail allows",
    "abandoned": "Consumers give up on a variant more often than on the control, so the times of the jobs that ended cannot be compared",
    "held": "the test is held",
    "minimum_hours": "the minimum time has not passed",
    "minimum_samples": "a variant has fewer units than the minimum",
    "too_few_units": f"a variant has fewer than {UNITS_MIN} units that count, or few units bring most of its jobs",
    "not_conclusive": "no variant is shown to be better",
    "guardrail_open": "a guardrail of the better variant is not shown to hold",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm's primary metric against the control's. ``sequence`` decides, at ``alpha``; ``fixed`` is valid only for one look, at the
    plan's alpha. ``conclusive``: enough units, and zero outside; ``better``: in the good direction. None: not known yet."""

    metric: Metric
    alpha: float
    planned_units: float
    sequence: Anytime | None
    lift: Lift | None
    fixed: Fixed | None
    enough_units: bool
    conclusive: bool
    better: bool


@dataclass(frozen=True, slots=True)
class GuardrailReport:
    """``regression``, ``low`` and ``high`` in percent of the control's mean, above 0 is worse; the sequence of the regression at the
    guardrail's part of alpha. None: not known, or not bounded."""

    metric: Metric
    state: GuardrailState
    max_regression_percent: float
    regression: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Abandonment:
    """How much more often Consumers give up on an arm than on the control, in ``points`` of percent, and the p-value of that, for one look.
    ``enough_units``: to conclude anything from the arm's other metrics; ``is_more``: surely; ``is_harmful``: and by much."""

    points: float
    p_value: float
    enough_units: bool
    is_more: bool
    is_harmful: bool


@dataclass(frozen=True, slots=True)
class ArmReport:
    """``estimates``: of the metrics of which anything is known. The control has neither ``comparison`` nor ``guardrails`` nor
    ``abandonment``, which is None as well where it is not known."""

    name: str
    counts: ArmCounts
    estimates: Mapping[Metric, Estimate]
    comparison: Comparison | None
    guardrails: tuple[GuardrailReport, ...]
    abandonment: Abandonment | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """``arms`` in the plan's order. ``blocked`` and ``waiting``: keys of ``WORDS``; while one of them is there nothing is promoted by
    itself. ``ratio_p``: None with too few units to say."""

    arms: tuple[ArmReport, ...]
    ratio_p: float | None
    ratio_sound: bool
    blocked: tuple[str, ...]
    waiting: tuple[str, ...]
    held_because: str
    winner: str | None
    verdict: Verdict

    def arm(self, name: str) -> ArmReport | None:
        return next((arm for arm in self.arms if arm.name == name), None)


def judge(plan: Plan, counts: Mapping[str, ArmCounts], running_hours: float, held_because: str = "") -> Report:
    """``counts`` by name of arm; ``running_hours`` that the test was active; ``held_because``: why it must not promote, in words, whatever
    the figures say. Raises ValueError for sums or hours that are no finite numbers, and for a plan without its control."""
    control = plan.arm(plan.control)
    if control is None:
        raise ValueError("the plan has no arm with the control's name")
    if not math.isfinite(running_hours):
        raise ValueError("running_hours has to be a finite number")
    estimates = {arm.name: _estimates(counts.get(arm.name, ArmCounts())) for arm in plan.arms}
    arms = tuple(_arm_report(plan, control, arm, counts.get(arm.name, ArmCounts()), estimates) for arm in plan.arms)
    ratio_p = sample_ratio([arm.counts.units for arm in arms], [arm.share for arm in plan.arms])
    sound = ratio_p is None or ratio_p >= RATIO_P_MIN
    on_trial = [arm for arm in arms if arm.name != plan.control]
    blocked = _blocked(on_trial, sound, held_because)
    minimums = _minimums(plan, arms, running_hours)
    candidates = [arm for arm in on_trial if arm.comparison and arm.comparison.better and _is_seen_whole(arm)]
    passed = [arm for arm in candidates if all(one.state is GuardrailState.HOLDS for one in arm.guardrails)]
    waiting = minimums + _open(on_trial, candidates, passed)
    winner = _best(plan.primary_metric, passed) if passed and not blocked and not minimums else None
    verdict = _verdict(on_trial, blocked, minimums, winner)
    return Report(arms, ratio_p, sound, blocked, waiting, held_because, winner, verdict)


def planned_units(plan: Plan, arm: Arm) -> float:
    """Of the arm and the control together, for which the sequence is made tight. From the plan alone, so that it is fixed before the
    start: ``PLANNED_MULTIPLE`` times as many as there are when the smaller of the two has the minimum."""
    shares = [one.share for one in plan.arms if one.name in (plan.control, arm.name)]
    parts = sum(shares) / min(shares) if min(shares) > 0 else float(len(shares))
    return PLANNED_MULTIPLE * parts * max(plan.minimum_samples, UNITS_MIN)


# -- one arm


def _estimates(counts: ArmCounts) -> dict[Metric, Estimate]:
    found = {metric: mean_and_variance(counts.tally(metric)) for metric in counts.tallies or ()}
    return {metric: estimate for metric, estimate in found.items() if estimate is not None}


def _arm_report(
    plan: Plan, control: Arm, arm: Arm, counts: ArmCounts, estimates: Mapping[str, Mapping[Metric, Estimate]]
) -> ArmReport:
    own, base = estimates[arm.name], estimates[control.name]
    if arm.name == control.name:
        return ArmReport(arm.name, counts, own, None, ())
    alpha, planned = plan.alpha / (len(plan.arms) - 1), planned_units(plan, arm)
    guardrails = tuple(_guardrail(one, base, own, alpha / len(plan.guardrails), planned) for one in plan.guardrails)
    abandonment = _abandonment(base, own, len(plan.arms) - 1)
    return ArmReport(arm.name, counts, own, _comparison(plan, base, own, alpha, planned), guardrails, abandonment)


def _comparison(
    plan: Plan, base: Mapping[Metric, Estimate], own: Mapping[Metric, Estimate], alpha: float, planned: float
) -> Comparison:
    metric = plan.primary_metric
    pair = _pair(metric, base, own)
    if pair is None:
        return Comparison(metric, alpha, planned, None, None, None, False, False, False)
    sequence, enough = sequential(*pair, alpha, planned), _have(pair, UNITS_MIN)
    conclusive = enough and sequence is not None and (sequence.low > 0 or sequence.high < 0)
    better = conclusive and sequence is not None and (sequence.difference < 0) == metric.lower_is_better
    fixed = compare_fixed(base[metric], own[metric], plan.alpha, proportions=metric in _BINARY)
    return Comparison(metric, alpha, planned, sequence, lift(*pair, alpha, planned), fixed, enough, conclusive, better)


def _guardrail(
    rule: Guardrail, base: Mapping[Metric, Estimate], own: Mapping[Metric, Estimate], alpha: float, planned: float
) -> GuardrailReport:
    margin = rule.max_regression_percent
    pair = _pair(rule.metric, base, own)
    if pair is None:
        return GuardrailReport(rule.metric, GuardrailState.NOT_YET, margin, None, None, None)
    sign = 1.0 if rule.metric.lower_is_better else -1.0
    # How far the arm is beyond the worst mean that is allowed.
    sequence = contrast(*pair, 1 + sign * margin / 100, alpha, planned)
    state = GuardrailState.NOT_YET
    if sequence is not None:
        low, high = (sequence.low, sequence.high) if sign > 0 else (-sequence.high, -sequence.low)
        if high <= 0 and _have(pair, UNITS_MIN):
            state = GuardrailState.HOLDS
        elif low > 0 and _have(pair, HARM_UNITS_MIN):
            state = GuardrailState.VIOLATED
    return GuardrailReport(rule.metric, state, margin, *_regression(lift(*pair, alpha, planned), sign))


def _abandonment(base: Mapping[Metric, Estimate], own: Mapping[Metric, Estimate], arms_on_trial: int) -> Abandonment | None:
    """Whoever gives up on a slow job takes just a slow one out of the mean, so an arm that loses more of them looks quicker than it is.
    A fixed test at each look: it stops a promotion too often rather than too late, see specs/ab-tests.md for how often."""
    pair = _pair(Metric.ABANDONED, base, own)
    fixed = compare_fixed(*pair, ABANDONED_P_MIN, proportions=True) if pair is not None else None
    if pair is None or fixed is None:
        return None
    points = 100 * (pair[1].mean - pair[0].mean)
    is_more = points > 0 and fixed.p_value < ABANDONED_P_MIN / arms_on_trial and _have(pair, HARM_UNITS_MIN)
    return Abandonment(points, fixed.p_value, _have(pair, UNITS_MIN), is_more, is_more and points > ABANDONED_HARM_POINTS_MIN)


def _is_seen_whole(arm: ArmReport) -> bool:
    """Whether enough units say how often the arm is given up on: where few bring most of the jobs that were, the others are not heard."""
    return arm.abandonment is None or arm.abandonment.enough_units


def _regression(found: Lift | None, sign: float) -> tuple[float | None, float | None, float | None]:
    if found is None:
        return None, None, None
    low, high = (found.low, found.high) if sign > 0 else (found.high, found.low)
    return sign * found.value * 100, _scaled(low, sign), _scaled(high, sign)


def _scaled(value: float | None, sign: float) -> float | None:
    return None if value is None else sign * value * 100


def _pair(metric: Metric, base: Mapping[Metric, Estimate], own: Mapping[Metric, Estimate]) -> tuple[Estimate, Estimate] | None:
    if metric not in base or metric not in own:
        return None
    careful: Callable[[Estimate], Estimate] = with_unseen if metric in _BINARY else lambda estimate: estimate
    return careful(base[metric]), careful(own[metric])


def _have(pair: tuple[Estimate, Estimate], units: int) -> bool:
    return min(one.effective_units for one in pair) >= units


# -- the test


def _blocked(on_trial: list[ArmReport], ratio_sound: bool, held_because: str) -> tuple[str, ...]:
    violated = any(one.state is GuardrailState.VIOLATED for arm in on_trial for one in arm.guardrails)
    abandoned = any(arm.abandonment is not None and arm.abandonment.is_more for arm in on_trial)
    found = {
        "sample_ratio": not ratio_sound,
        "guardrail_violated": violated,
        "abandoned": abandoned,
        "held": bool(held_because),
    }
    return tuple(code for code, is_so in found.items() if is_so)


def _minimums(plan: Plan, arms: tuple[ArmReport, ...], running_hours: float) -> tuple[str, ...]:
    metric = plan.primary_metric
    units = min(arm.estimates[metric].units if metric in arm.estimates else 0 for arm in arms)
    found = {"minimum_hours": running_hours < plan.minimum_hours, "minimum_samples": units < plan.minimum_samples}
    return tuple(code for code, is_so in found.items() if is_so)


def _open(on_trial: list[ArmReport], candidates: list[ArmReport], passed: list[ArmReport]) -> tuple[str, ...]:
    found = {
        "too_few_units": any(not (arm.comparison is None or arm.comparison.enough_units) or not _is_seen_whole(arm) for arm in on_trial),
        "not_conclusive": not candidates,
        "guardrail_open": bool(candidates) and not passed,
    }
    return tuple(code for code, is_so in found.items() if is_so)


def _best(metric: Metric, passed: list[ArmReport]) -> str:
    sign = 1 if metric.lower_is_better else -1
    return min(passed, key=lambda arm: (sign * arm.estimates[metric].mean, arm.name)).name


def _verdict(on_trial: list[ArmReport], blocked: tuple[str, ...], minimums: tuple[str, ...], winner: str | None) -> Verdict:
    if "guardrail_violated" in blocked or any(arm.abandonment is not None and arm.abandonment.is_harmful for arm in on_trial):
        return Verdict.HARMFUL
    if blocked:
        return Verdict.BLOCKED
    if winner is not None:
        return Verdict.PROMOTE
    compared = [arm.comparison for arm in on_trial]
    all_worse = bool(compared) and all(one is not None and one.conclusive and not one.better for one in compared)
    return Verdict.KEEP_BASE if all_worse and not minimums else Verdict.COLLECTING
