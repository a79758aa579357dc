"""What a test concludes from its counts, and what keeps it from concluding."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.abtests import decision, statistics
from coordinator.abtests.decision import (
    HARM_UNITS_MIN,
    UNITS_MIN,
    WORDS,
    GuardrailReport,
    GuardrailState,
    Report,
    Verdict,
    judge,
    planned_units,
)
from coordinator.abtests.plan import SHARE_WHOLE, AbState, Arm, ArmCounts, Guardrail, Metric, Plan, Tally, UnitKind

HOURS = 48.0


def plan(*names: str, **changed: Any) -> Plan:
    """Arms of equal shares, of which the first is the control."""
    names = names or ("base", "new")
    arms = tuple(Arm(name, "chat", "1", f"address-{name}", SHARE_WHOLE // len(names)) for name in names)
    return replace(Plan("test", "chat", arms, names[0]), **changed)


def spread(mean: float, sd: float, units: int) -> Tally:
    """Of one job a unit."""
    return Tally(units, units, mean * units, units * mean**2 + (units - 1) * sd**2, units, mean * units)


def share(successes: int, units: int) -> Tally:
    return Tally(units, units, successes, successes, units, successes)


def arm(units: int = 2000, **tallies: Tally) -> ArmCounts:
    return ArmCounts(units=units, jobs=units, tallies={Metric(name): tally for name, tally in tallies.items()})


def latencies(**means: float) -> dict[str, ArmCounts]:
    """2,000 units in each arm, with a deviation of 100."""
    return {name: arm(latency=spread(mean, 100, 2000)) for name, mean in means.items()}


def p_value(report: Report, name: str = "new") -> float:
    found = report.arm(name)
    assert found is not None and found.comparison is not None and found.comparison.sequence is not None
    return found.comparison.sequence.p_value


def guardrail(report: Report, name: str = "new") -> GuardrailReport:
    found = report.arm(name)
    assert found is not None
    return found.guardrails[0]


BETTER = latencies(base=1000, new=950)


def test_the_better_arm_is_promoted() -> None:
    report = judge(plan(), BETTER, HOURS)
    assert (report.verdict, report.winner, report.blocked, report.waiting) == (Verdict.PROMOTE, "new", (), ())
    found = report.arm("new")
    assert found is not None and found.comparison is not None and found.comparison.lift is not None
    assert found.comparison.sequence is not None and found.comparison.sequence.high < 0
    assert found.comparison.lift.value == pytest.approx(-0.05) and found.comparison.better
    assert found.estimates[Metric.LATENCY].mean == pytest.approx(950)


def test_a_hundred_and_a_hundred_and_thirty_of_a_thousand() -> None:
    """Significant for a fixed test, nothing for one that may be looked at again."""
    counts = {"base": arm(1000, success=share(100, 1000)), "new": arm(1000, success=share(130, 1000))}
    report = judge(plan(primary_metric=Metric.SUCCESS), counts, HOURS)
    comparison = report.arms[1].comparison
    assert comparison is not None and comparison.fixed is not None and comparison.sequence is not None
    assert comparison.fixed.p_value == pytest.approx(0.0354, abs=5e-5)
    assert comparison.sequence.p_value > 0.3 and not comparison.conclusive
    assert (report.verdict, report.winner, report.waiting) == (Verdict.COLLECTING, None, ("not_conclusive",))


def test_a_worse_arm_leaves_the_base() -> None:
    report = judge(plan(), latencies(base=1000, new=1050), HOURS)
    assert (report.verdict, report.winner, report.waiting) == (Verdict.KEEP_BASE, None, ("not_conclusive",))
    assert judge(plan(), latencies(base=1000, new=1050), 1.0).verdict is Verdict.COLLECTING  # not before the minimum time


@pytest.mark.parametrize("metric", [metric for metric in Metric if not metric.lower_is_better])
def test_more_is_better_for_some_metrics(metric: Metric) -> None:
    high, low = (ArmCounts(units=2000, tallies={metric: share(of, 2000)}) for of in (1900, 1500))
    up, down = (judge(plan(primary_metric=metric), {"base": base, "new": new}, HOURS) for base, new in ((low, high), (high, low)))
    assert (up.verdict, down.verdict) == (Verdict.PROMOTE, Verdict.KEEP_BASE)


# -- minimums


def test_the_minimum_time_has_to_pass() -> None:
    for hours in (-5.0, 0.0, 23.9):
        report = judge(plan(), BETTER, hours)
        assert (report.verdict, report.winner, report.waiting) == (Verdict.COLLECTING, None, ("minimum_hours",))
    assert judge(plan(), BETTER, 24.0).verdict is Verdict.PROMOTE


def test_every_arm_needs_the_minimum_of_units() -> None:
    report = judge(plan(minimum_samples=2001), BETTER, HOURS)
    assert (report.verdict, report.waiting) == (Verdict.COLLECTING, ("minimum_samples",))
    three = latencies(base=1000, new=900, other=1000) | {"other": arm(2000, latency=spread(1000, 100, 999))}
    assert judge(plan("base", "new", "other"), three, HOURS).waiting == ("minimum_samples",)


def test_only_units_with_the_metric_count() -> None:
    """Units whose jobs all failed, or came from the cache, have no latency."""
    counts = {name: replace(BETTER[name], tallies={Metric.LATENCY: spread(mean, 1, 900)}) for name, mean in (("base", 10), ("new", 9))}
    assert judge(plan(), counts, HOURS).waiting == ("minimum_samples",)


def test_too_few_units_conclude_nothing_whatever_the_plan_says() -> None:
    small = plan(minimum_samples=2)
    counts = {name: arm(units, latency=spread(mean, 1, units)) for name, mean, units in (("base", 100, 200), ("new", 50, UNITS_MIN - 1))}
    report = judge(small, counts, HOURS)
    assert (report.verdict, report.waiting[0]) == (Verdict.BLOCKED, "too_few_units")  # 99 and 200 are no halves either
    counts["base"] = arm(UNITS_MIN, latency=spread(100, 1, UNITS_MIN))
    report = judge(small, counts, HOURS)
    comparison = report.arms[1].comparison
    assert (report.verdict, report.waiting) == (Verdict.COLLECTING, ("too_few_units", "not_conclusive"))
    assert comparison is not None and comparison.sequence is not None and comparison.sequence.high < 0  # but it is shown
    counts["new"] = arm(UNITS_MIN, latency=spread(50, 1, UNITS_MIN))
    assert judge(small, counts, HOURS).verdict is Verdict.PROMOTE


def test_one_user_with_most_jobs_is_one_user() -> None:
    """2,000 units, of which one brings 95 % of the jobs: no figure is made of that."""
    jobs = [38_000] + [1] * 1999
    count, squares = sum(jobs), sum(n * n for n in jobs)
    lopsided = Tally(2000, count, 10 * count, 100 * squares, squares, 10 * squares)
    counts = {"base": arm(latency=spread(20, 1, 2000)), "new": arm(latency=lopsided)}
    assert judge(plan(), counts, HOURS).waiting == ("too_few_units", "not_conclusive")


def test_nothing_counted_yet() -> None:
    report = judge(plan(guardrails=(Guardrail(Metric.SUCCESS, 1.0),)), {}, 0.0)
    assert (report.verdict, report.winner, report.blocked, report.ratio_p) == (Verdict.COLLECTING, None, (), None)
    assert report.waiting == ("minimum_hours", "minimum_samples", "too_few_units", "not_conclusive")
    assert guardrail(report).state is GuardrailState.NOT_YET and report.arms[1].estimates == {}


# -- what blocks


@pytest.mark.parametrize(("units", "verdict"), [((4600, 5400), Verdict.BLOCKED), ((5080, 4920), Verdict.PROMOTE)])
def test_the_sample_ratio_blocks(units: tuple[int, int], verdict: Verdict) -> None:
    """Units count, not jobs: also those whose answers all came from the cache."""
    counts = {name: replace(BETTER[name], units=number, jobs=7) for name, number in zip(("base", "new"), units, strict=True)}
    report = judge(plan(), counts, HOURS)
    assert report.verdict is verdict and report.ratio_sound == (verdict is Verdict.PROMOTE)
    assert report.blocked == (() if report.ratio_sound else ("sample_ratio",)) and (report.winner is None) != report.ratio_sound


def test_the_ratio_is_that_of_the_plan() -> None:
    ninety = plan()
    ninety = replace(ninety, arms=(replace(ninety.arms[0], share=90_000), replace(ninety.arms[1], share=10_000)))
    counts = {"base": replace(BETTER["base"], units=18_000), "new": BETTER["new"]}
    assert judge(ninety, counts, HOURS).verdict is Verdict.PROMOTE
    assert judge(plan(), counts, HOURS).blocked == ("sample_ratio",)


def test_a_held_test_promotes_nothing() -> None:
    report = judge(plan(), BETTER, HOURS, "new was suspended")
    assert (report.verdict, report.winner, report.blocked) == (Verdict.BLOCKED, None, ("held",))
    assert report.held_because == "new was suspended"


# -- guardrails


def with_success(base: int, new: int, units: int = 2000) -> dict[str, ArmCounts]:
    counts = {"base": (1000, base), "new": (950, new)}
    return {name: arm(units, latency=spread(mean, 100, units), success=share(of, units)) for name, (mean, of) in counts.items()}


SUCCESS = plan(guardrails=(Guardrail(Metric.SUCCESS, 5.0),))


@pytest.mark.parametrize(
    ("new", "state", "verdict"),
    [
        (1900, GuardrailState.HOLDS, Verdict.PROMOTE),
        (1880, GuardrailState.HOLDS, Verdict.PROMOTE),  # a little worse is within the margin
        (1830, GuardrailState.NOT_YET, Verdict.COLLECTING),
        (1780, GuardrailState.NOT_YET, Verdict.COLLECTING),  # beyond it, but not surely
        (1600, GuardrailState.VIOLATED, Verdict.HARMFUL),
    ],
)
def test_guardrails(new: int, state: GuardrailState, verdict: Verdict) -> None:
    report = judge(SUCCESS, with_success(1900, new), HOURS)
    found = guardrail(report)
    assert (found.state, report.verdict) == (state, verdict)
    assert found.regression == pytest.approx(100 * (1900 - new) / 1900) and found.low is not None and found.high is not None
    assert (found.high <= 5) == (state is GuardrailState.HOLDS) and (found.low > 5) == (state is GuardrailState.VIOLATED)
    assert report.waiting == (() if state is GuardrailState.HOLDS else ("guardrail_open",))
    assert report.blocked == (("guardrail_violated",) if state is GuardrailState.VIOLATED else ())


def test_a_guardrail_of_a_metric_that_is_better_low() -> None:
    slow = plan(primary_metric=Metric.SUCCESS, guardrails=(Guardrail(Metric.LATENCY, 10.0),))

    def state(mean: float, regression: float) -> GuardrailState:
        counts = {"base": arm(latency=spread(100, 20, 2000)), "new": arm(latency=spread(mean, 20, 2000))}
        found = guardrail(judge(slow, counts, HOURS))
        assert found.regression == pytest.approx(regression)
        return found.state

    assert state(90, -10) is GuardrailState.HOLDS and state(105, 5) is GuardrailState.HOLDS
    assert state(110, 10) is GuardrailState.NOT_YET and state(115, 15) is GuardrailState.VIOLATED


def test_harm_is_seen_before_the_minimums_and_whatever_else_blocks() -> None:
    counts = with_success(HARM_UNITS_MIN, 0, HARM_UNITS_MIN)
    report = judge(SUCCESS, counts, 0.1, "held")
    assert (report.verdict, report.blocked) == (Verdict.HARMFUL, ("guardrail_violated", "held"))
    fewer = judge(SUCCESS, with_success(HARM_UNITS_MIN - 1, 0, HARM_UNITS_MIN - 1), 0.1)
    assert (fewer.verdict, guardrail(fewer).state) == (Verdict.COLLECTING, GuardrailState.NOT_YET)


def test_a_guardrail_without_any_failure_holds_only_with_enough_units() -> None:
    """None of 200 failed in either arm: up to some percent may."""
    strict = plan(minimum_samples=100, guardrails=(Guardrail(Metric.SUCCESS, 1.0),))
    assert guardrail(judge(strict, with_success(200, 200, 200), HOURS)).state is GuardrailState.NOT_YET
    assert guardrail(judge(strict, with_success(2000, 2000, 2000), HOURS)).state is GuardrailState.HOLDS


def test_a_guardrail_nobody_measured_keeps_the_test_open() -> None:
    report = judge(plan(guardrails=(Guardrail(Metric.THUMBS, 5.0),)), BETTER, HOURS)
    assert (report.verdict, report.waiting) == (Verdict.COLLECTING, ("guardrail_open",))


def test_a_guardrail_holds_only_with_enough_units_of_its_own() -> None:
    rated = plan(guardrails=(Guardrail(Metric.COST, 50.0),))

    def state(units: int) -> GuardrailState:
        counts = {name: arm(latency=spread(mean, 100, 2000), cost=spread(10, 0.1, units)) for name, mean in (("base", 1000), ("new", 950))}
        return guardrail(judge(rated, counts, HOURS)).state

    assert (state(UNITS_MIN - 1), state(UNITS_MIN)) == (GuardrailState.NOT_YET, GuardrailState.HOLDS)


def test_guardrails_share_alpha() -> None:
    """Each of two has the interval that the only one of a plan with half the alpha would have."""
    rule, other = Guardrail(Metric.SUCCESS, 5.0), Guardrail(Metric.LATENCY, 50.0)
    counts = with_success(1900, 1880)
    both = guardrail(judge(plan(guardrails=(rule, other)), counts, HOURS))
    assert both == guardrail(judge(plan(alpha=0.025, guardrails=(rule,)), counts, HOURS))
    assert both != guardrail(judge(plan(guardrails=(rule,)), counts, HOURS))


def test_what_costs_nothing_may_go_on_costing_nothing() -> None:
    """The control's mean is 0, so there is no percentage, but there is an answer."""
    free = plan(guardrails=(Guardrail(Metric.COST, 5.0),))

    def state(cost: float) -> GuardrailState:
        counts = {"base": 0.0, "new": cost}
        return guardrail(judge(free, {name: arm(cost=spread(mean, 0, 2000)) for name, mean in counts.items()}, HOURS)).state

    assert (state(0), state(3)) == (GuardrailState.HOLDS, GuardrailState.VIOLATED)


# -- Consumers who give up


def given_up(base: tuple[int, int], new: tuple[int, int], means: tuple[float, float] = (1000, 950)) -> dict[str, ArmCounts]:
    """Of each arm how many jobs ended and how many more were given up, each of a unit of its own."""
    found = {}
    for name, (ended, gone), mean in zip(("base", "new"), (base, new), means, strict=True):
        latency, success = spread(mean, 100, ended) if ended else Tally(), share(ended, ended) if ended else Tally()
        tallies = {Metric.LATENCY: latency, Metric.SUCCESS: success, Metric.ABANDONED: share(gone, ended + gone)}
        found[name] = ArmCounts(units=ended + gone, jobs=ended, tallies=tallies)
    return found


@pytest.mark.parametrize(
    ("gone", "verdict", "blocked"),
    [
        ((100, 100), Verdict.PROMOTE, ()),
        ((100, 130), Verdict.PROMOTE, ()),  # a little more, by chance
        ((100, 170), Verdict.BLOCKED, ("abandoned",)),  # surely, but not by five points
        ((100, 400), Verdict.HARMFUL, ("abandoned",)),
        ((400, 100), Verdict.PROMOTE, ()),  # a better version is given up on less
        ((0, 0), Verdict.PROMOTE, ()),
    ],
)
def test_who_gives_up_is_not_forgotten(gone: tuple[int, int], verdict: Verdict, blocked: tuple[str, ...]) -> None:
    """Whatever the latencies of the rest say, and without a guardrail."""
    report = judge(plan(), given_up((2000 - gone[0], gone[0]), (2000 - gone[1], gone[1])), HOURS)
    assert (report.verdict, report.blocked) == (verdict, blocked)
    assert (report.winner == "new") == (verdict is Verdict.PROMOTE)


def test_a_version_that_always_hangs_is_harmful() -> None:
    """Not one of its jobs has ended, so nothing else is known of it; long before any minimum."""
    report = judge(plan(), given_up((HARM_UNITS_MIN, 0), (0, HARM_UNITS_MIN)), 0.1)
    assert (report.verdict, report.blocked) == (Verdict.HARMFUL, ("abandoned",))
    fewer = judge(plan(), given_up((HARM_UNITS_MIN, 0), (0, HARM_UNITS_MIN - 1)), 0.1)
    assert (fewer.verdict, fewer.blocked) == (Verdict.COLLECTING, ())
    both = judge(plan(), given_up((0, 2000), (0, 2000)), HOURS)
    assert (both.verdict, both.blocked) == (Verdict.COLLECTING, ())


def test_one_account_alone_makes_no_version_look_given_up() -> None:
    """Nor hides it: of a test in which it brings most of the jobs nothing is concluded."""
    counts = given_up((1900, 100), (1900, 100))
    assert judge(plan(), counts, HOURS).verdict is Verdict.PROMOTE
    for jobs, gone in ((3_000, 3_000), (100_000, 100_000), (100_000, 0)):
        tallies = dict(counts["new"].tallies or {})
        known = tallies[Metric.ABANDONED]
        tallies[Metric.ABANDONED] = Tally(
            known.units + 1,
            known.count + jobs,
            known.total + gone,
            known.total_squares + gone**2,
            known.count_squares + jobs**2,
            known.cross + gone * jobs,
        )
        report = judge(plan(), counts | {"new": replace(counts["new"], tallies=tallies)}, HOURS)
        assert (report.verdict, report.blocked, report.waiting) == (Verdict.COLLECTING, (), ("too_few_units", "not_conclusive"))


def test_arms_on_trial_share_how_surely_they_are_given_up_on() -> None:
    """At p = 0.0004 one arm on trial is, and one of three is not."""
    two = given_up((1900, 100), (1845, 155))
    found = judge(plan(), two, HOURS).arms[1].abandonment
    assert found is not None and 0.001 / 3 < found.p_value < 0.001 and found.is_more and found.points == pytest.approx(2.75)
    four = two | {name: two["base"] for name in ("b", "c")}
    found = judge(plan("base", "new", "b", "c"), four, HOURS).arms[1].abandonment
    assert found is not None and not found.is_more


def test_giving_up_may_be_what_a_test_is_about() -> None:
    asked = plan(primary_metric=Metric.ABANDONED, guardrails=(Guardrail(Metric.LATENCY, 10.0),))
    report = judge(asked, given_up((1700, 300), (1900, 100)), HOURS)
    assert (report.verdict, report.winner) == (Verdict.PROMOTE, "new")
    rule = plan(guardrails=(Guardrail(Metric.ABANDONED, 50.0),))
    assert guardrail(judge(rule, given_up((1700, 300), (1700, 300)), HOURS)).state is GuardrailState.HOLDS
    broken = judge(rule, given_up((1900, 100), (1700, 300)), HOURS)
    assert (broken.verdict, broken.blocked) == (Verdict.HARMFUL, ("guardrail_violated", "abandoned"))


# -- several arms


def test_the_best_of_several_wins() -> None:
    three = plan("base", "new", "newer")
    for order in itertools.permutations(three.arms):
        report = judge(replace(three, arms=order), latencies(base=1000, new=960, newer=950), HOURS)
        assert (report.verdict, report.winner) == (Verdict.PROMOTE, "newer")
        assert judge(replace(three, arms=order), latencies(base=1000, new=950, newer=950), HOURS).winner == "new"


def test_the_best_that_keeps_its_guardrails_wins() -> None:
    counts = {
        name: arm(latency=spread(mean, 100, 2000), success=share(of, 2000))
        for name, mean, of in (("base", 1000, 1900), ("new", 960, 1900), ("newer", 900, 1810))
    }
    report = judge(plan("base", "new", "newer", guardrails=(Guardrail(Metric.SUCCESS, 5.0),)), counts, HOURS)
    assert guardrail(report, "newer").state is GuardrailState.NOT_YET
    assert (report.verdict, report.winner) == (Verdict.PROMOTE, "new")


def test_several_arms_share_alpha() -> None:
    """A difference that is one for one arm on trial is none for each of five."""
    found = {}
    for names in (("base", "new"), ("base", "new", "b", "c", "d", "e")):
        counts = latencies(**dict.fromkeys(names, 1000.0)) | latencies(new=1000 - 10.5)
        found[len(names)] = judge(plan(*names), counts, HOURS)
    assert (found[2].winner, found[6].winner) == ("new", None)
    comparison = found[6].arms[1].comparison
    assert comparison is not None and comparison.alpha == pytest.approx(0.01)


def test_the_base_stays_only_when_every_arm_is_worse() -> None:
    three = plan("base", "new", "newer")
    assert judge(three, latencies(base=1000, new=1050, newer=1001), HOURS).verdict is Verdict.COLLECTING
    assert judge(three, latencies(base=1000, new=1050, newer=1040), HOURS).verdict is Verdict.KEEP_BASE


# -- what may not matter, and what may not come in


@pytest.mark.parametrize("means", [(1000, 950), (1000, 985), (1000, 995), (1000, 1050)])
def test_neither_the_unit_nor_the_order_of_arms_matters(means: tuple[float, float]) -> None:
    """Of seconds and of nanoseconds the same is concluded."""
    one = judge(plan(), latencies(base=means[0], new=means[1]), HOURS)
    swapped = judge(replace(plan(), arms=plan().arms[::-1]), latencies(base=means[0], new=means[1]), HOURS)
    assert (swapped.verdict, swapped.winner, swapped.arm("new")) == (one.verdict, one.winner, one.arm("new"))
    for scale in (1e-6, 1e6):
        counts = {name: arm(latency=spread(mean * scale, 100 * scale, 2000)) for name, mean in zip(("base", "new"), means, strict=True)}
        other = judge(plan(), counts, HOURS)
        assert (other.verdict, other.winner, other.waiting) == (one.verdict, one.winner, one.waiting)
        assert p_value(other) == pytest.approx(p_value(one))


def test_the_plan_says_when_the_sequence_is_tightest() -> None:
    ninety = plan(minimum_samples=1000)
    ninety = replace(ninety, arms=(replace(ninety.arms[0], share=90_000), replace(ninety.arms[1], share=10_000)))
    assert planned_units(plan(), plan().arms[1]) == 4000 and planned_units(ninety, ninety.arms[1]) == 20_000
    assert planned_units(plan(minimum_samples=1), plan().arms[1]) == 4 * UNITS_MIN


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_that_are_no_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="running_hours"):
        judge(plan(), BETTER, value)
    with pytest.raises(ValueError, match="finite"):
        judge(plan(), BETTER | {"new": arm(latency=replace(spread(950, 100, 2000), total=value))}, HOURS)
    with pytest.raises(ValueError, match="finite"):
        judge(plan(guardrails=(Guardrail(Metric.LATENCY, value),)), BETTER, HOURS)


def test_a_plan_without_its_control() -> None:
    with pytest.raises(ValueError, match="control"):
        judge(plan(control="nobody"), BETTER, HOURS)


def test_every_code_has_words() -> None:
    broken = with_success(1900, 1600)
    found = [
        judge(plan(), given_up((1900, 100), (1600, 400)), HOURS),
        judge(SUCCESS, broken | {"base": replace(broken["base"], units=9)}, HOURS, "held"),
        judge(SUCCESS, with_success(1900, 1830), 0.0),
        judge(plan(), {}, 0.0),
    ]
    assert {code for report in found for code in (*report.blocked, *report.waiting)} == set(WORDS)


def test_the_page_and_the_code_say_the_same() -> None:
    page = (Path(__file__).parents[3] / "specs" / "ab-tests.md").read_text()
    rows = dict(re.findall(r"^\| `((?:decision|statistics)\.[A-Z_]+)` \| ([0-9.e,-]+) \|", page, re.MULTILINE))
    for name, written in rows.items():
        home, _, constant = name.rpartition(".")
        assert getattr({"decision": decision, "statistics": statistics}[home], constant) == float(written.replace(",", "")), name
    named = set(re.findall(r"`((?:decision|statistics)\.[A-Z]+_[A-Z_]+)`", page))
    assert len(rows) == 8 and named <= set(rows)
    for word in (*WORDS, *Verdict, *GuardrailState, *Metric, *UnitKind, *AbState):
        assert f"`{word}`" in page, word
    for field, default in (("minimum_samples", "1,000"), ("minimum_hours", "24"), ("alpha", "0.05")):
        assert f"| `{field}` | {default} |" in page and getattr(plan(), field) == float(default.replace(",", ""))
