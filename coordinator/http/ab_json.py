"""A/B tests and their results as JSON, in units for people: milliseconds, tokens a second, credits, percent. null: not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.abtests.decision import WORDS, ArmReport, Comparison, GuardrailReport
from coordinator.abtests.plan import SHARE_WHOLE, AbState, Arm, Metric, Plan
from coordinator.abtests.plan_json import arm_to_json, plan_to_json
from coordinator.abtests.results import Results
from coordinator.books.ab_tests import AbEvent, AbTest
from coordinator.statement import time_text
from protocol import limits

FIXED_NOTE = "holds for one look at a moment that was chosen before the start; it decides nothing here"
_MS_PER_HOUR = 3_600_000
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Shown:
    """``field``: of a variant's mean; ``factor``: from the metric's own unit (plan.Metric) to ``unit``."""

    field: str
    unit: str
    factor: float


SHOWN: Mapping[Metric, Shown] = {
    Metric.LATENCY: Shown("avg_latency_ms", "ms", 0.001),
    Metric.TIME_TO_FIRST_TOKEN: Shown("avg_time_to_first_token_ms", "ms", 0.001),
    Metric.SUCCESS: Shown("success_rate", "percent", 100.0),
    Metric.ABANDONED: Shown("abandoned_percent", "percent", 100.0),
    Metric.TOKENS_PER_SECOND: Shown("avg_tokens_per_second", "tokens/s", 0.001),
    Metric.COST: Shown("avg_cost", "credits", 1 / limits.CREDIT_MICROS),
    Metric.THUMBS: Shown("thumbs_up_percent", "percent", 100.0),
}


def test_json(test: AbTest) -> dict[str, Any]:
    """With its plan. ``status`` is its state once more, for readers of other APIs."""
    return {
        "id": test.id,
        "object": "ab_test",
        **plan_to_json(test.plan),
        "state": str(test.state),
        "status": str(test.state),
        "created_at": _time(test.created_at_ms),
        "started_at": _time(test.started_at_ms),
        "ended_at": _time(test.ended_at_ms),
        "running_hours": running_hours(test),
        "winner": test.winner or None,
        "note": test.note or None,
        "reason": test.reason or None,
    }


def event_json(event: AbEvent) -> dict[str, Any]:
    """``account`` is null for what the test did by itself."""
    return {"at": time_text(event.at_ms), "kind": event.kind, "account": event.account or None, "detail": dict(event.detail)}


def results_json(results: Results) -> dict[str, Any]:
    test, report = results.test, results.report
    plan = test.plan
    reasons = (*report.blocked, *report.waiting)
    return {
        "object": "ab_results",
        "test": test_json(test),
        "variants": [_variant(plan, arm, report.arm(arm.name)) for arm in plan.arms],
        "comparisons": [_comparison(plan, arm.name, arm.comparison) for arm in report.arms if arm.comparison is not None],
        "guardrails": [_guardrail(plan, arm.name, one) for arm in report.arms for one in arm.guardrails],
        "sample_ratio": _sample_ratio(results),
        "decision": {
            "verdict": str(report.verdict) if results.test.state is not AbState.DRAFT else "not_started",
            "winner": report.winner,
            "blocked": list(report.blocked),
            "waiting": list(report.waiting),
            "reasons": {code: WORDS[code] for code in reasons if code in WORDS},
        },
        "exposure_percent": number(results.exposure_percent),
        "running_hours": running_hours(test),
        "held_because": results.held_because or None,
    }


def running_hours(test: AbTest) -> float:
    return round(test.active_ms / _MS_PER_HOUR, 4)


def number(value: float | None, factor: float = 1.0) -> float | None:
    """To six digits; None for what is no number, which JSON has no word for."""
    if value is None or not math.isfinite(value * factor):
        return None
    return float(f"{value * factor:.{_DIGITS}g}")


def _variant(plan: Plan, arm: Arm, report: ArmReport | None) -> dict[str, Any]:
    """``samples``: units of which the primary metric is known, which ``minimum_samples`` counts."""
    counts, estimates = (report.counts, report.estimates) if report is not None else (None, {})
    primary = estimates.get(plan.primary_metric)
    means = {shown.field: number(estimates[metric].mean, shown.factor) if metric in estimates else None for metric, shown in SHOWN.items()}
    return {
        **arm_to_json(arm),
        "is_control": arm.name == plan.control,
        "units": counts.units if counts is not None else 0,
        "samples": primary.units if primary is not None else 0,
        "job_count": counts.jobs if counts is not None else 0,
        "cached_count": counts.cached if counts is not None else 0,
        **means,
        "rated": counts.tally(Metric.THUMBS).count if counts is not None else 0,
        "total_tokens": counts.tokens if counts is not None else 0,
    }


def _comparison(plan: Plan, variant: str, found: Comparison) -> dict[str, Any]:
    """``p_value`` and ``interval`` are the sequence's, which hold for all looks together."""
    shown, sequence, lift = SHOWN[found.metric], found.sequence, found.lift
    return {
        "variant": variant,
        "control": plan.control,
        "metric": str(found.metric),
        "unit": shown.unit,
        "difference": number(sequence.difference, shown.factor) if sequence is not None else None,
        "interval": _interval(sequence.low, sequence.high, found.alpha, shown.factor) if sequence is not None else None,
        "lift_percent": number(lift.value, 100) if lift is not None else None,
        "lift_interval": _interval(lift.low, lift.high, found.alpha, 100) if lift is not None else None,
        "p_value": number(sequence.p_value) if sequence is not None else None,
        "fixed_p_value": number(found.fixed.p_value) if found.fixed is not None else None,
        "fixed_p_note": FIXED_NOTE,
        "enough_units": found.enough_units,
        "conclusive": found.conclusive,
        "better": found.better,
    }


def _guardrail(plan: Plan, variant: str, found: GuardrailReport) -> dict[str, Any]:
    """In percent of the control's mean; above 0 is worse."""
    alpha = plan.alpha / (len(plan.arms) - 1) / len(plan.guardrails)
    return {
        "variant": variant,
        "metric": str(found.metric),
        "state": str(found.state),
        "max_regression_percent": number(found.max_regression_percent),
        "regression_percent": number(found.regression),
        "interval": _interval(found.low, found.high, alpha),
    }


def _interval(low: float | None, high: float | None, alpha: float, factor: float = 1.0) -> dict[str, float | None] | None:
    if low is None and high is None:
        return None
    return {"low": number(low, factor), "high": number(high, factor), "level": number(1 - alpha)}


def _sample_ratio(results: Results) -> dict[str, Any]:
    """``expected``: of the units that there are, by the plan's shares."""
    plan, report = results.test.plan, results.report
    observed = {arm.name: results.counts[arm.name].units if arm.name in results.counts else 0 for arm in plan.arms}
    total = sum(observed.values())
    return {
        "p_value": number(report.ratio_p),
        "ok": report.ratio_sound if report.ratio_p is not None else None,
        "expected": {arm.name: round(total * arm.share / SHARE_WHOLE, 1) for arm in plan.arms},
        "observed": observed,
    }


def _time(unix_ms: int) -> str | None:
    return time_text(unix_ms) if unix_ms else None


assert set(SHOWN) == set(Metric)
