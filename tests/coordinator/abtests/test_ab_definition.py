"""From what a client asks for to a plan: what is taken, how it is rounded, and every way to get it wrong, by its field."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator.abtests.definition import METRICS, TEXTS, CargoFacts, facts_of, kind_of, read_plan
from coordinator.abtests.errors import AbFault, AbRefused
from coordinator.abtests.plan import SHARE_WHOLE, Guardrail, Metric, Plan, RampStep, UnitKind
from coordinator.abtests.plan_json import plan_from_json, plan_to_json
from coordinator.cargo_rules import CargoState
from coordinator.registry import Entry
from protocol import limits
from protocol.cargos import Runtime
from tests.protocol.cargo_samples import cargo

OLD = CargoFacts("talk", "1.0.0", "a1" * 32, "gguf", "ann", TEXTS)
NEW = replace(OLD, release="2.0.0", address="a2" * 32)
OTHER = replace(OLD, name="chat", address="a3" * 32)
LINES = CargoFacts("words", "1.0.0", "b1" * 32, "onnx", "ann", "lines of the task tensors")
BOBS = CargoFacts("bobs", "1.0.0", "c1" * 32, "gguf", "bob", TEXTS)
HIDDEN = replace(BOBS, name="hidden", address="c2" * 32, is_public=False)
GONE = replace(OLD, release="0.9.0", address="a0" * 32, why_not="was revoked")
ALL = (OLD, NEW, OTHER, LINES, BOBS, HIDDEN, GONE)
# "talk" was promoted to its first release; "moved" stands for a Cargo of another name
NAMES = {"talk": OLD, "chat": OTHER, "words": LINES, "bobs": BOBS, "moved": OTHER}


def find(reference: str) -> CargoFacts | None:
    if reference in NAMES:
        return NAMES[reference]
    return next((one for one in ALL if reference in (one.address, f"{one.name}@{one.release}")), None)


def variant(name: str, cargo: str, percent: Any = 50, **more: Any) -> dict[str, Any]:
    return {"name": name, "cargo": cargo, "traffic_percent": percent, **more}


PAIR = [variant("new", "talk@2.0.0"), variant("old", "talk")]


def body(**changes: Any) -> dict[str, Any]:
    return {"name": "is it quicker", "base_cargo": "talk", "variants": PAIR, **changes}


def read(**changes: Any) -> Plan:
    return read_plan(body(**changes), find, "ann")


def refused(fault: AbFault, param: str, **changes: Any) -> str:
    with pytest.raises(AbRefused) as caught:
        read(**changes)
    assert (caught.value.fault, caught.value.param) == (fault, param), (caught.value.fault, caught.value.param, caught.value.message)
    return caught.value.message


# ---- what is taken


def test_a_plan_of_the_least() -> None:
    plan = read()
    assert [(arm.name, arm.cargo, arm.release, arm.address, arm.share) for arm in plan.arms] == [
        ("new", "talk", "2.0.0", NEW.address, 50_000),
        ("old", "talk", "1.0.0", OLD.address, 50_000),
    ]
    assert plan == Plan("is it quicker", "talk", plan.arms, "old"), "what was not said is as plan.py has it"


def test_everything_that_can_be_said() -> None:
    plan = read(
        primary_metric="ttft",
        minimum_samples=250,
        minimum_hours=0.5,
        guardrails=["success_rate", {"metric": "cost", "max_regression_percent": 12.5}],
        alpha=0.01,
        unit="account",
        ramp=[{"percent": 1, "hours": 2}, {"percent": 25.5, "hours": 0.25}],
        auto_promote=False,
    )
    assert (plan.primary_metric, plan.minimum_samples, plan.minimum_hours) == (Metric.TIME_TO_FIRST_TOKEN, 250, 0.5)
    assert plan.guardrails == (Guardrail(Metric.SUCCESS, 5.0), Guardrail(Metric.COST, 12.5))
    assert (plan.alpha, plan.unit, plan.auto_promote) == (0.01, UnitKind.ACCOUNT, False)
    assert plan.ramp == (RampStep(1.0, 2.0), RampStep(25.5, 0.25))
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_null_is_absent() -> None:
    optional = ("primary_metric", "minimum_samples", "minimum_hours", "guardrails", "alpha", "unit", "ramp", "auto_promote")
    assert read(**dict.fromkeys(optional)) == read()


def test_the_control_is_what_the_base_stands_for_else_the_first() -> None:
    assert read(variants=[variant("a", NEW.address), variant("b", "chat")]).control == "a"
    assert read(variants=[variant("a", NEW.address), variant("b", OLD.address)]).control == "b"
    moved = read(base_cargo="moved")
    assert (moved.base_cargo, moved.control) == ("moved", "new"), "the name itself, whatever it stands for"
    assert read(base_cargo="moved", variants=[*PAIR[:1], variant("b", "moved")]).control == "b"


def test_names_of_other_apis() -> None:
    shared = {"traffic_percent": 50}
    given = [{"name": "new", "workload": "talk@2.0.0", **shared}, {"name": "old", "workload_id": "talk", **shared}]
    assert read(base_cargo=None, base_workload_id="talk", variants=given) == read()
    assert read(base_cargo=None, base_workload="talk") == read()
    assert "send one of them" in refused(AbFault.INVALID, "base_workload_id", base_workload_id="talk")
    both = [{**PAIR[0], "workload": "talk"}, PAIR[1]]
    refused(AbFault.INVALID, "variants[0].workload", variants=both)


def test_each_metric_has_its_own_name_too() -> None:
    assert all(METRICS[str(metric)] is metric for metric in Metric)


# ---- shares


@pytest.mark.parametrize(
    ("percents", "shares"),
    [
        ((50, 50), [50_000, 50_000]),
        ((90.5, 9.5), [90_500, 9_500]),
        ((99.999, 0.001), [99_999, 1]),
        ((100, 0.001), [99_999, 1]),  # within the tolerance; nobody is left without a share
        ((33.3, 66.7), [33_300, 66_700]),
        ((33.333, 33.333, 33.333), [33_334, 33_333, 33_333]),
        ((33.3333333, 33.3333333, 33.3333333), [33_334, 33_333, 33_333]),
        ((14.2857,) * 7, [14_286] * 5 + [14_285] * 2),
        ((12.5,) * 8, [12_500] * 8),
        ((50.0004, 49.9996), [50_000, 50_000]),
        ((0.0015, 99.9985), [2, 99_998]),
    ],
)
def test_shares_are_thousandths_of_a_percent(percents: tuple[float, ...], shares: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _shares(percents, monkeypatch) == shares


def test_any_shares_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(7)
    for _ in range(2_000):
        weights = [chance.uniform(0.001, 1) for _ in range(chance.randint(2, limits.AB_VARIANTS_MAX))]
        percents = [max(0.001, 100 * weight / math.fsum(weights)) for weight in weights]
        shares = _shares(percents, monkeypatch)
        assert sum(shares) == SHARE_WHOLE and min(shares) >= 1
        assert all(abs(share - 1000 * percent) < 1.01 for share, percent in zip(shares, percents, strict=True))


def _shares(percents: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    for number in range(len(percents)):
        monkeypatch.setitem(NAMES, f"v{number}", replace(OLD, name=f"v{number}", address=f"{number:064x}"))
    return [arm.share for arm in read(variants=[variant(f"v{n}", f"v{n}", percent) for n, percent in enumerate(percents)]).arms]


@pytest.mark.parametrize("percents", [(50, 49), (50, 50.002), (50, 49.998), (100, 100), (0.001, 0.001)])
def test_shares_that_do_not_add_to_100(percents: tuple[float, float]) -> None:
    given = [variant("a", "talk", percents[0]), variant("b", "talk@2.0.0", percents[1])]
    assert "add up to 100" in refused(AbFault.SHARES, "variants", variants=given)


@pytest.mark.parametrize("percent", [0, -1, 0.0009, 100.1, 10**400, math.nan, math.inf, -math.inf, True, "50", None, [50], 1e300])
def test_shares_that_are_none(percent: Any) -> None:
    refused(AbFault.INVALID, "variants[1].traffic_percent", variants=[PAIR[0], variant("old", "talk", percent)])


# ---- variants


@pytest.mark.parametrize("given", [[], [variant("all", "talk", 100)]])
def test_one_variant_is_no_test(given: list[Any]) -> None:
    assert "at least 2" in refused(AbFault.VARIANTS, "variants", variants=given)


def test_too_many_variants() -> None:
    assert "at most 8" in refused(AbFault.INVALID, "variants", variants=[variant(f"v{n}", "talk", 11) for n in range(9)])


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 65, "-a", "é", "a\n", 7, None, "\ud800"])
def test_names_of_variants(name: Any) -> None:
    refused(AbFault.INVALID, "variants[1].name", variants=[PAIR[0], {**PAIR[1], "name": name}])


def test_variants_that_are_the_same() -> None:
    refused(AbFault.INVALID, "variants[1].name", variants=[PAIR[0], variant("new", "talk")])
    same = [PAIR[0], variant("old", NEW.address)]
    assert "the same version" in refused(AbFault.INVALID, "variants[1].cargo", variants=same)


def test_a_variant_of_another_kind() -> None:
    told = refused(AbFault.KIND, "variants[1].cargo", variants=[PAIR[0], variant("old", "words")])
    assert "lines of the task tensors" in told and TEXTS in told
    # both of one kind, which is not the base's
    given = [variant("a", "talk"), variant("b", "talk@2.0.0")]
    refused(AbFault.KIND, "variants[0].cargo", base_cargo="words", variants=given)


@pytest.mark.parametrize(
    ("reference", "fault", "words"),
    [
        ("nobody", AbFault.UNKNOWN_CARGO, "no Cargo nobody is known"),
        ("talk@7.0.0", AbFault.UNKNOWN_CARGO, "no Cargo"),
        ("hidden@1.0.0", AbFault.UNKNOWN_CARGO, "no Cargo"),  # another account's, that nobody may know of
        ("bobs", AbFault.NOT_YOURS, "another account"),
        ("talk@0.9.0", AbFault.NOT_OFFERED, "was revoked"),
    ],
)
def test_cargos_that_cannot_be_tried(reference: str, fault: AbFault, words: str) -> None:
    assert words in refused(fault, "variants[1].cargo", variants=[PAIR[0], variant("old", reference)])


@pytest.mark.parametrize(
    ("base", "fault"),
    [
        ("nobody", AbFault.UNKNOWN_CARGO),
        ("bobs", AbFault.NOT_YOURS),
        ("talk@1.0.0", AbFault.INVALID),
        (OLD.address, AbFault.INVALID),
        ("", AbFault.INVALID),
        (None, AbFault.INVALID),
        (5, AbFault.INVALID),
        ("x" * 129, AbFault.INVALID),
        ("a\x00b", AbFault.INVALID),
    ],
)
def test_bases_that_are_none(base: Any, fault: AbFault) -> None:
    refused(fault, "base_cargo", base_cargo=base)


def test_an_account_that_has_published_nothing() -> None:
    with pytest.raises(AbRefused) as caught:
        read_plan(body(), find, "eve")
    assert caught.value.fault is AbFault.NOT_YOURS and caught.value.param == "base_cargo"


# ---- rules


NO_NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, True, False, "1", [1], {})


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, -1, 100.5, 10**400])
def test_minimum_samples(value: Any) -> None:
    refused(AbFault.INVALID, "minimum_samples", minimum_samples=value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, 8761, 10**400])
def test_minimum_hours(value: Any) -> None:
    refused(AbFault.INVALID, "minimum_hours", minimum_hours=value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 0.00001, 0.21, 1])
def test_alpha(value: Any) -> None:
    refused(AbFault.INVALID, "alpha", alpha=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_called_so(value: float) -> None:
    assert "finite" in refused(AbFault.INVALID, "alpha", alpha=value)
    assert "finite" in refused(AbFault.INVALID, "variants[1].traffic_percent", variants=[PAIR[0], variant("old", "talk", value)])


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("cost", "guardrails"),
        ([1], "guardrails[0]"),
        (["speed"], "guardrails[0]"),
        (["cost", {"metric": "price"}], "guardrails[1].metric"),  # the same by another name
        (["latency"], "guardrails[0]"),  # the primary metric
        ([{"metric": "cost", "max_regression_percent": 0}], "guardrails[0].max_regression_percent"),
        ([{"metric": "cost", "max_regression_percent": math.nan}], "guardrails[0].max_regression_percent"),
        ([{"metric": "cost", "max_regression_percent": 100.1}], "guardrails[0].max_regression_percent"),
        ([{"max_regression_percent": 5}], "guardrails[0].metric"),
        ([{"metric": "cost", "most": 5}], "guardrails[0].most"),
        (["cost"] * 8, "guardrails"),
    ],
)
def test_guardrails(value: Any, param: str) -> None:
    refused(AbFault.INVALID, param, guardrails=value)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({}, "ramp"),
        ([5], "ramp[0]"),
        ([{"percent": 5}], "ramp[0].hours"),
        ([{"hours": 5}], "ramp[0].percent"),
        ([{"percent": 100, "hours": 1}], "ramp[0].percent"),
        ([{"percent": 0, "hours": 1}], "ramp[0].percent"),
        ([{"percent": 10, "hours": 1}, {"percent": 10, "hours": 1}], "ramp[1].percent"),
        ([{"percent": 10, "hours": 0}], "ramp[0].hours"),
        ([{"percent": 10, "hours": math.inf}], "ramp[0].hours"),
        ([{"percent": math.nan, "hours": 1}], "ramp[0].percent"),
        ([{"percent": 1 + n, "hours": 1} for n in range(17)], "ramp"),
    ],
)
def test_ramps(value: Any, param: str) -> None:
    refused(AbFault.INVALID, param, ramp=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 65),
        ("name", "a\nb"),
        ("name", 3),
        ("variants", "talk"),
        ("variants", None),
        ("primary_metric", "speed"),
        ("primary_metric", 3),
        ("unit", "session"),
        ("unit", True),
        ("auto_promote", 1),
        ("auto_promote", "yes"),
    ],
)
def test_other_fields(field: str, value: Any) -> None:
    refused(AbFault.INVALID, field, **{field: value})


def test_unknown_fields_are_named() -> None:
    assert "minimum_sample is not known" in refused(AbFault.INVALID, "minimum_sample", minimum_sample=5)
    told = refused(AbFault.INVALID, "variants[0].percent", variants=[{**PAIR[0], "percent": 1}, PAIR[1]])
    assert "traffic_percent" in told
    refused(AbFault.INVALID, "variants[1]", variants=[PAIR[0], "talk"])
    message = refused(AbFault.INVALID, "?" * 40, **{"\n" * 1000: 1})
    assert len(message) < 400


# ---- what the registry says


def entry(state: CargoState = CargoState.APPROVED, revoked_at_ms: int = 0, **changes: Any) -> Entry:
    return Entry(cargo(**changes), "ann", state, 1, 2, revoked_at_ms)


def test_facts_of_an_entry() -> None:
    one = entry()
    assert facts_of(one, True) == CargoFacts(
        "text-stats", "1.0.0", one.cargo.address, "wasm", "ann", "lines of the runtime wasm", "", True
    )
    assert facts_of(one, True).may_run and not facts_of(one, False).may_run


@pytest.mark.parametrize(
    ("one", "words", "is_public"),
    [
        (entry(CargoState.SUBMITTED), "has not been approved yet", False),
        (entry(CargoState.REJECTED), "was rejected", False),
        (entry(CargoState.SUSPENDED), "is suspended", True),
        (entry(revoked_at_ms=5), "was revoked", True),
        (entry(), "has expired", True),
    ],
)
def test_why_one_may_not_run(one: Entry, words: str, is_public: bool) -> None:
    facts = facts_of(one, False)
    assert (facts.why_not, facts.is_public) == (words, is_public)


def test_kinds() -> None:
    def kind(runtime: Runtime, options: str = "{}") -> str:
        entry = f"image@sha256:{'ab' * 32}" if runtime is Runtime.CONTAINER else "module.wasm"
        return kind_of(cargo(runtime=runtime, options=options, entry=entry).manifest)

    task = '{"task":"embeddings"}'
    assert kind(Runtime.GGUF) == kind(Runtime.GGUF, task) == TEXTS
    assert kind(Runtime.ONNX, task) == kind(Runtime.WASM, task), "what they do, not how"
    assert len({kind(Runtime.ONNX, task), kind(Runtime.ONNX, '{"task":"tensors"}'), kind(Runtime.ONNX), kind(Runtime.WASM)}) == 4
    assert kind(Runtime.CONTAINER, '{"task":5}') == kind(Runtime.CONTAINER) != kind(Runtime.DIFFUSERS)
