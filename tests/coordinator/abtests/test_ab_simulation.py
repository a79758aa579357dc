"""Simulated tests, looked at 30 times, through the same decision: small counts here, the bars' counts in bench/ab_simulation.py."""

from __future__ import annotations

import numpy as np
import pytest

from bench import ab_simulation as simulation
from bench.ab_simulation import BETTER, SCENARIOS, Scenario, given_up, plan_of, ratios_blocked, reports, seen
from coordinator.abtests.decision import Verdict
from coordinator.abtests.plan import Metric

SEED = 11


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_without_a_difference_few_tests_find_one(scenario: Scenario) -> None:
    """At most 5 % are meant; of 80 tests 7 or more at a rate of 2 % (more than the benchmark measures) would be one case in 700."""
    counted = seen(scenario, plan_of(scenario), 80, np.random.default_rng(SEED))
    assert counted.tests == 80 and counted.sequential <= 6 and counted.harmful <= 6
    assert counted.promoted <= counted.concluded <= counted.sequential
    assert counted.fixed >= 10  # looked at as often, a fixed test is wrong in a quarter of them


def test_a_difference_of_a_tenth_of_a_deviation_is_found() -> None:
    counted = seen(BETTER, plan_of(BETTER, minimum_samples=1000, guardrails=()), 120, np.random.default_rng(SEED))
    assert counted.promoted >= 0.75 * 120


def test_a_ratio_that_is_off_promotes_nothing_at_any_look() -> None:
    """The same tests, in a plan by which the arm on trial should have had less."""
    plan = plan_of(BETTER, minimum_samples=1000, guardrails=())
    wrong = plan_of(Scenario("", BETTER.draw, Metric.LATENCY, 40), minimum_samples=1000, guardrails=())
    for looks in reports(BETTER, wrong, 20, np.random.default_rng(SEED)):
        assert all(report.winner is None for report in looks)
        assert looks[-1].verdict is Verdict.BLOCKED and looks[-1].blocked == ("sample_ratio",)
    assert any(looks[-1].winner for looks in reports(BETTER, plan, 20, np.random.default_rng(SEED)))


def test_a_look_at_each_step_blocks_a_sound_ratio_seldom() -> None:
    chance = np.random.default_rng(SEED)
    assert ratios_blocked(0.5, 500, chance) <= 0.03 and ratios_blocked(0.54, 100, chance) >= 0.95


def test_a_version_that_hangs_is_stopped_soon_however_quick_the_rest_is() -> None:
    """It never answers a fifth of its jobs, and is a tenth quicker in the others: who counts only what ended promotes it."""
    counted = given_up((0.0, 0.2), 0.1, 60, np.random.default_rng(SEED))
    assert counted.promoted == 0 and len(counted.harmful_by) == 60 and max(counted.harmful_by) <= 300
    assert given_up((0.0, 0.0), 0.1, 60, np.random.default_rng(SEED)).promoted >= 40, "as it would have been"


def test_where_as_many_give_up_on_both_arms_few_tests_are_blocked() -> None:
    """At most 1.5 % are meant, the benchmark measures some 0.5 %: of 200 tests 6 or more would be one case in 1,700."""
    counted = given_up((0.1, 0.1), 0.0, 200, np.random.default_rng(SEED))
    assert counted.blocked <= 5 and len(counted.harmful_by) <= 5


def test_the_benchmark_says_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "TESTS", 80)
    monkeypatch.setattr(simulation, "SCENARIOS", SCENARIOS[:1])
    result = simulation.run(quick=True)
    assert [bar["name"][:9] for bar in result["bars"]] == ["tests wit", "a differe", "tests in ", "tests pro"] and result["tests"] == 10
    assert "normal" in simulation.table(result) and "of 10 tests" in simulation.table(result)
