"""From what a client asks for to the plan of an A/B test. Pure: what the registry says comes in as facts.

Every rule of a test is fixed here, before it starts. What is wrong is refused as a whole, by an AbRefused that names the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.abtests.errors import AbFault, AbRefused
from coordinator.abtests.plan import SHARE_WHOLE, Arm, Guardrail, Metric, Plan, RampStep, UnitKind
from coordinator.abtests.reading import Part, choice_of, invalid
from coordinator.cargo_rules import CargoState
from coordinator.registry import Entry
from protocol import limits
from protocol.cargo_jobs import TEXT_RUNTIMES
from protocol.cargos import CargoManifest

VARIANTS_MIN = 2
SAMPLES_DEFAULT = 1_000
HOURS_DEFAULT = 24.0
ALPHA_DEFAULT = 0.05
REGRESSION_PERCENT_DEFAULT = 5.0
# What clients may call the metrics; each is also called by its own name.
METRICS: Mapping[str, Metric] = {
    **{str(metric): metric for metric in Metric},
    "ttft": Metric.TIME_TO_FIRST_TOKEN,
    "success_rate": Metric.SUCCESS,
    "throughput": Metric.TOKENS_PER_SECOND,
    "price": Metric.COST,
    "rating": Metric.THUMBS,
}
UNITS: Mapping[str, UnitKind] = {str(unit): unit for unit in UnitKind}
TEXTS = "texts"  # the kind of all Cargos that write texts

_BASE_NAMES = ("base_cargo", "base_workload", "base_workload_id")
_CARGO_NAMES = ("cargo", "workload", "workload_id")
_FIELDS = (
    "name",
    *_BASE_NAMES,
    "variants",
    "primary_metric",
    "minimum_samples",
    "minimum_hours",
    "guardrails",
    "alpha",
    "unit",
    "ramp",
    "auto_promote",
)
_VARIANT_FIELDS = ("name", *_CARGO_NAMES, "traffic_percent")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")  # may stand in headers and paths
_PERCENT_MIN = 100 / SHARE_WHOLE
_NOISE_PERCENT = 1e-9  # of adding doubles
_WHY_NOT = {
    CargoState.SUBMITTED: "has not been approved yet",
    CargoState.REJECTED: "was rejected",
    CargoState.SUSPENDED: "is suspended",
}


@dataclass(frozen=True, slots=True)
class CargoFacts:
    """What a test has to know of a Cargo. ``kind``: in words what it takes and gives; Cargos of one kind can stand in for one another.
    ``why_not``: why no job may be given to it, empty where one may; ``is_public``: others than its account may know of it."""

    name: str
    release: str
    address: str
    runtime: str
    account: str
    kind: str
    why_not: str = ""
    is_public: bool = True

    @property
    def may_run(self) -> bool:
        return not self.why_not


Find = Callable[[str], CargoFacts | None]


def facts_of(entry: Entry, may_run: bool) -> CargoFacts:
    """``may_run``: as the registry says it (``Registry.may_run``)."""
    manifest = entry.cargo.manifest
    return CargoFacts(
        name=manifest.name,
        release=manifest.release,
        address=entry.cargo.address,
        runtime=str(manifest.runtime),
        account=entry.account,
        kind=kind_of(manifest),
        why_not="" if may_run else _why_not(entry),
        is_public=entry.is_public,
    )


def kind_of(manifest: CargoManifest) -> str:
    """Texts are one kind, whatever the model. Lines are of one kind where their options name the same task; those that name none are of
    their runtime's own."""
    if manifest.runtime in TEXT_RUNTIMES:
        return TEXTS
    task = json.loads(manifest.options).get("task")
    return f"lines of the task {task}" if isinstance(task, str) and task else f"lines of the runtime {manifest.runtime}"


def _why_not(entry: Entry) -> str:
    return "was revoked" if entry.revoked_at_ms else _WHY_NOT.get(entry.state, "has expired")


def read_plan(body: Mapping[str, Any], find: Find, account: str) -> Plan:
    """The plan of ``POST /api/v1/ab-tests``. ``find``: of a name, NAME@RELEASE or address what it stands for now; ``account``: who asks.
    Raises AbRefused."""
    part = Part(body, "", _FIELDS)
    name = part.text("name", chars_max=limits.AB_NAME_CHARS_MAX)
    base_name, base = _base(part, find, account)
    arms = _arms(part, base_name, base, find, account)
    primary = part.chosen("primary_metric", METRICS, Metric.LATENCY)
    return Plan(
        name=name,
        base_cargo=base_name,
        arms=arms,
        control=next((arm.name for arm in arms if arm.address == base.address), arms[0].name),
        primary_metric=primary,
        minimum_samples=part.whole("minimum_samples", limits.AB_SAMPLES_MIN, limits.AB_SAMPLES_MAX, SAMPLES_DEFAULT),
        minimum_hours=part.number("minimum_hours", 0, limits.AB_HOURS_MAX, HOURS_DEFAULT),
        guardrails=_guardrails(part.items("guardrails", len(Metric), ()), primary),
        alpha=part.number("alpha", limits.AB_ALPHA_MIN, limits.AB_ALPHA_MAX, ALPHA_DEFAULT),
        unit=part.chosen("unit", UNITS, UnitKind.USER),
        ramp=_ramp(part.items("ramp", limits.AB_RAMP_STEPS_MAX, ())),
        # where the base itself is not on trial nobody can say that a winner is better than that
        auto_promote=part.flag("auto_promote", True) and any(arm.address == base.address for arm in arms),
    )


# ---- Cargos


def _base(part: Part, find: Find, account: str) -> tuple[str, CargoFacts]:
    """A name, and what it stands for, which since a promotion may be a Cargo of another name."""
    reference = part.text(*_BASE_NAMES, chars_max=limits.NAME_CHARS_MAX)
    place = part.place(part.any_of(*_BASE_NAMES)[0])
    name, separator, _ = reference.partition("@")
    if separator:
        raise invalid(place, f"{place} is the name of a Cargo without its release: {name}")
    base = _own(reference, place, find, account)
    if reference == base.address:
        raise invalid(place, f"{place} is the name of a Cargo, not an address: {base.name}")
    return reference, base


def _own(reference: str, place: str, find: Find, account: str) -> CargoFacts:
    """A Cargo that runs and is the account's own; of what is not public only its account hears. Raises AbRefused."""
    facts = find(reference)
    if facts is None or (facts.account != account and not facts.is_public):
        told = f"{place}: no Cargo {reference} is known that may run; see GET /api/v1/cargos?mine=true"
        raise AbRefused(AbFault.UNKNOWN_CARGO, told, place)
    if facts.account != account:
        told = f"{place}: {reference} was published by another account; a test takes Cargos that you have published"
        raise AbRefused(AbFault.NOT_YOURS, told, place)
    if not facts.may_run:
        raise AbRefused(AbFault.NOT_OFFERED, f"{place}: {reference} {facts.why_not}; take a release that may run", place)
    return facts


def _arms(part: Part, base_name: str, base: CargoFacts, find: Find, account: str) -> tuple[Arm, ...]:
    given = part.items("variants", limits.AB_VARIANTS_MAX)
    if len(given) < VARIANTS_MIN:
        told = f"a test compares at least {VARIANTS_MIN} variants: name the Cargo as it is now as one of them"
        raise AbRefused(AbFault.VARIANTS, told, "variants")
    parts = [Part(one, f"variants[{index}]", _VARIANT_FIELDS) for index, one in enumerate(given)]
    names = _names(parts)
    shares = _shares([one.number("traffic_percent", _PERCENT_MIN, 100) for one in parts])
    cargos = _cargos(parts, base_name, base, find, account)
    return tuple(
        Arm(name, cargo.name, cargo.release, cargo.address, share) for name, cargo, share in zip(names, cargos, shares, strict=True)
    )


def _names(parts: Sequence[Part]) -> list[str]:
    names: list[str] = []
    for part in parts:
        name = part.text("name", chars_max=limits.AB_NAME_CHARS_MAX)
        if not _LABEL.match(name):
            raise invalid(part.place("name"), f"{part.place('name')} takes letters, digits, dots, dashes and underscores, like new-model")
        if name in names:
            raise invalid(part.place("name"), f"{part.place('name')}: another variant is called {name} already")
        names.append(name)
    return names


def _cargos(parts: Sequence[Part], base_name: str, base: CargoFacts, find: Find, account: str) -> list[CargoFacts]:
    found: list[CargoFacts] = []
    for part in parts:
        reference = part.text(*_CARGO_NAMES, chars_max=limits.NAME_CHARS_MAX)
        place = part.place(part.any_of(*_CARGO_NAMES)[0])
        cargo = _own(reference, place, find, account)
        if cargo.kind != base.kind:
            told = f"{place}: {reference} gives {cargo.kind}, {base_name} gives {base.kind}; no request fits both"
            raise AbRefused(AbFault.KIND, told, place)
        if any(one.address == cargo.address for one in found):
            raise invalid(place, f"{place}: {reference} is the same version as another variant; name two that differ, as NAME@RELEASE")
        found.append(cargo)
    return found


def _shares(percents: Sequence[float]) -> list[int]:
    """In thousandths of a percent, adding up to ``SHARE_WHOLE``: each rounded down, then those that lost most get one more (largest
    remainders). Raises AbRefused where the percents are not 100 together."""
    total = math.fsum(percents)
    if abs(total - 100) > limits.AB_SHARE_TOLERANCE_PERCENT + _NOISE_PERCENT:
        told = f"traffic_percent of all variants has to add up to 100, not {total:.6g}"
        raise AbRefused(AbFault.SHARES, told, "variants")
    exact = [percent * SHARE_WHOLE / total for percent in percents]
    shares = [math.floor(share) for share in exact]
    lost = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in lost[: SHARE_WHOLE - sum(shares)]:
        shares[index] += 1
    return shares


# ---- rules


def _guardrails(given: Sequence[object], primary: Metric) -> tuple[Guardrail, ...]:
    found: list[Guardrail] = []
    for index, one in enumerate(given):
        guardrail, place = _guardrail(one, f"guardrails[{index}]")
        if guardrail.metric is primary:
            raise invalid(place, f"{place}: {primary} is the primary metric, which has to get better anyway; guard another one")
        if any(other.metric is guardrail.metric for other in found):
            raise invalid(place, f"{place}: {guardrail.metric} is guarded already")
        found.append(guardrail)
    return tuple(found)


def _guardrail(given: object, place: str) -> tuple[Guardrail, str]:
    """And where its metric stands."""
    if isinstance(given, str):
        return Guardrail(choice_of(given, place, METRICS), REGRESSION_PERCENT_DEFAULT), place
    part = Part(given, place, ("metric", "max_regression_percent"))
    metric = part.chosen("metric", METRICS)
    most = part.number("max_regression_percent", 0, 100, REGRESSION_PERCENT_DEFAULT, is_above=True)
    return Guardrail(metric, most), part.place("metric")


def _ramp(given: Sequence[object]) -> tuple[RampStep, ...]:
    steps: list[RampStep] = []
    for index, one in enumerate(given):
        part = Part(one, f"ramp[{index}]", ("percent", "hours"))
        percent = part.number("percent", 0, 100, is_above=True)
        low = steps[-1].percent if steps else 0.0
        if not low < percent < 100:
            told = f"{part.place('percent')} must be above {low:g} and below 100: a ramp goes up, and all take part behind it"
            raise invalid(part.place("percent"), told)
        steps.append(RampStep(percent, part.number("hours", 0, limits.AB_HOURS_MAX, is_above=True)))
    return tuple(steps)
