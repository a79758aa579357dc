"""A plan as plain JSON, as it is kept and shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.abtests.plan import SHARE_WHOLE, Arm, Guardrail, Metric, Plan, RampStep, UnitKind


def plan_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "base_cargo": plan.base_cargo,
        "variants": [arm_to_json(arm) for arm in plan.arms],
        "control": plan.control,
        "primary_metric": str(plan.primary_metric),
        "minimum_samples": plan.minimum_samples,
        "minimum_hours": plan.minimum_hours,
        "guardrails": [{"metric": str(one.metric), "max_regression_percent": one.max_regression_percent} for one in plan.guardrails],
        "alpha": plan.alpha,
        "unit": str(plan.unit),
        "ramp": [{"percent": step.percent, "hours": step.hours} for step in plan.ramp],
        "auto_promote": plan.auto_promote,
    }


def arm_to_json(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "cargo": arm.cargo,
        "release": arm.release,
        "address": arm.address,
        "traffic_percent": arm.share * 100 / SHARE_WHOLE,
    }


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    """Of what ``plan_to_json`` made. Raises KeyError or ValueError for anything else."""
    return Plan(
        name=value["name"],
        base_cargo=value["base_cargo"],
        arms=tuple(
            Arm(one["name"], one["cargo"], one["release"], one["address"], round(one["traffic_percent"] * SHARE_WHOLE / 100))
            for one in value["variants"]
        ),
        control=value["control"],
        primary_metric=Metric(value["primary_metric"]),
        minimum_samples=value["minimum_samples"],
        minimum_hours=value["minimum_hours"],
        guardrails=tuple(Guardrail(Metric(one["metric"]), one["max_regression_percent"]) for one in value["guardrails"]),
        alpha=value["alpha"],
        unit=UnitKind(value["unit"]),
        ramp=tuple(RampStep(one["percent"], one["hours"]) for one in value["ramp"]),
        auto_promote=value["auto_promote"],
    )
