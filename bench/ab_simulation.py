"""How often A/B tests find what is not there, and how often what is: simulated tests, looked at 30 times.

Values are drawn, summed to tallies as the books keep them, and each look goes through the decision that a Coordinator makes. A test errs
if the sequence leaves zero out at any of its looks. Beside it stands a fixed test (Welch; for success a z-test) that is looked at as often.

    python -m bench.ab_simulation [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.bars import at_least, at_most
from coordinator.abtests.decision import RATIO_P_MIN, GuardrailState, Report, Verdict, judge
from coordinator.abtests.plan import Arm, ArmCounts, Guardrail, Metric, Plan, Tally
from coordinator.abtests.statistics import sample_ratio

TESTS, LOOKS, UNITS_PER_LOOK = 2000, 30, 100
ERRORS_MAX, POWER_MIN = 0.05, 0.75  # the bars
BLOCKED_MAX = 1.5  # percent of tests
EFFECT_SD = 0.1
SEED = 7
_CHUNK = 250  # tests drawn at once, some 100 MB

Numbers = npt.NDArray[Any]
# Sums of each test (row) at each look (column): units, ΣN, ΣS, ΣS², ΣN², ΣSN, in the order of Tally.
Sums = tuple[Numbers, ...]
# (chance, tests, units of this arm per look, whether it is the arm on trial) -> sums
Draw = Callable[[np.random.Generator, int, int, bool], Sums]


@dataclass(frozen=True)
class Scenario:
    """``share``: percent of the units in the arm on trial."""

    name: str
    draw: Draw
    metric: Metric = Metric.LATENCY
    share: int = 50


@dataclass
class Seen:
    """How many tests did this at one look at least."""

    tests: int = 0
    fixed: int = 0
    sequential: int = 0
    concluded: int = 0
    promoted: int = 0
    harmful: int = 0


# -- what units bring


def each_one_job(values: Callable[[np.random.Generator, tuple[int, ...]], Numbers], shift: float = 0.0) -> Draw:
    """Every unit brings one job and is seen once; the arm on trial has ``shift`` on top."""

    def draw(chance: np.random.Generator, tests: int, units: int, on_trial: bool) -> Sums:
        drawn = values(chance, (tests, LOOKS, units)) + (shift if on_trial else 0.0)
        seen = np.broadcast_to(np.arange(1, LOOKS + 1) * units, (tests, LOOKS))
        total = drawn.sum(2).cumsum(1)
        return seen, seen, total, (drawn * drawn).sum(2).cumsum(1), seen, total

    return draw


def clustered(users: int) -> Draw:
    """``users`` in each arm that come one after the other, bring jobs look after look, some many and some few (geometric in the mean of an
    exponential activity), and have slow or quick machines of their own: latencies are exponential about the user's mean."""

    def draw(chance: np.random.Generator, tests: int, units: int, on_trial: bool) -> Sums:
        shape = (tests, users, 1)
        slowness, activity = chance.lognormal(0, 0.5, shape), chance.exponential(1.0, shape)
        begins = (np.arange(users) * LOOKS // (2 * users))[None, :, None]
        jobs = chance.poisson(activity, (tests, users, LOOKS)) * (np.arange(LOOKS) >= begins)
        # Users without a job add nothing; one job of the first look keeps every arm from being empty.
        jobs[:, :2, 0] += 1
        sums = (np.where(jobs, chance.standard_gamma(np.maximum(jobs, 1)), 0) * slowness).cumsum(2)
        jobs = jobs.cumsum(2)
        parts = ((jobs > 0), jobs, sums, sums * sums, jobs * jobs, sums * jobs)
        return tuple(part.sum(1) for part in parts)

    return draw


def _normal(chance: np.random.Generator, shape: tuple[int, ...]) -> Numbers:
    return chance.standard_normal(shape) + 10


SCENARIOS = (
    Scenario("normal", each_one_job(_normal)),
    Scenario("exponential latencies", each_one_job(lambda chance, shape: chance.exponential(1.0, shape))),
    Scenario("log-normal latencies (σ 1)", each_one_job(lambda chance, shape: chance.lognormal(0, 1, shape))),
    Scenario("95 % succeed", each_one_job(lambda chance, shape: (chance.random(shape) < 0.95) * 1.0), Metric.SUCCESS),
    Scenario("log-normal, 90 and 10 % of units", each_one_job(lambda chance, shape: chance.lognormal(0, 1, shape)), share=10),
    Scenario("99.5 % succeed, 90 and 10 %", each_one_job(lambda chance, shape: (chance.random(shape) < 0.995) * 1.0), Metric.SUCCESS, 10),
    Scenario("60 users that come again", clustered(60)),
    Scenario("300 users that come again", clustered(300)),
)
BETTER = Scenario(f"better by {EFFECT_SD} sd", each_one_job(_normal, -EFFECT_SD))


# -- tests


def plan_of(scenario: Scenario, **changed: Any) -> Plan:
    """Two arms; the same metric is also a guardrail without any margin, so that false alarms of harm are counted."""
    arms = (Arm("base", "c", "1", "a", (100 - scenario.share) * 1000), Arm("new", "c", "2", "b", scenario.share * 1000))
    guardrails = (Guardrail(scenario.metric, 0.0),)
    plan = Plan("test", "c", arms, "base", scenario.metric, minimum_samples=100, minimum_hours=0, guardrails=guardrails)
    return replace(plan, **changed)


def reports(scenario: Scenario, plan: Plan, tests: int, chance: np.random.Generator) -> Iterator[list[Report]]:
    """Of each test what was decided at each look."""
    for start in range(0, tests, _CHUNK):
        number = min(_CHUNK, tests - start)
        on_trial = 2 * UNITS_PER_LOOK * scenario.share // 100
        sums = {
            "base": scenario.draw(chance, number, 2 * UNITS_PER_LOOK - on_trial, False),
            "new": scenario.draw(chance, number, on_trial, True),
        }
        columns = {name: [part.tolist() for part in parts] for name, parts in sums.items()}
        for test in range(number):
            yield [judge(plan, _counts(columns, plan.primary_metric, test, look), 24.0 * (look + 1)) for look in range(LOOKS)]


def _counts(columns: Mapping[str, list[list[list[float]]]], metric: Metric, test: int, look: int) -> dict[str, ArmCounts]:
    found = {}
    for name, parts in columns.items():
        units, count, *sums = (part[test][look] for part in parts)
        tally = Tally(int(units), int(count), *sums)
        found[name] = ArmCounts(units=int(units), jobs=int(count), tallies={metric: tally})
    return found


def seen(scenario: Scenario, plan: Plan, tests: int, chance: np.random.Generator) -> Seen:
    """How many of the tests ever did what ``Seen`` counts."""
    counted = Seen()
    for looks in reports(scenario, plan, tests, chance):
        compared = [comparison for report in looks if (comparison := report.arms[1].comparison) is not None]
        verdicts = {report.verdict for report in looks}
        counted.tests += 1
        counted.fixed += any(one.fixed is not None and one.fixed.p_value <= plan.alpha for one in compared)
        counted.sequential += any(one.sequence is not None and one.sequence.p_value <= one.alpha for one in compared)
        counted.concluded += any(one.conclusive for one in compared)
        counted.promoted += Verdict.PROMOTE in verdicts
        counted.harmful += any(one.state is GuardrailState.VIOLATED for report in looks for one in report.arms[1].guardrails)
    return counted


def ratios_blocked(share: float, tests: int, chance: np.random.Generator) -> float:
    """Of tests in which units go to the arm on trial by ``share`` where half was planned: those that are blocked at some look."""
    on_trial = chance.binomial(2 * UNITS_PER_LOOK, share, (tests, LOOKS)).cumsum(1).tolist()
    totals = [2 * UNITS_PER_LOOK * (look + 1) for look in range(LOOKS)]
    return sum(any(_ratio_blocks(one, total) for one, total in zip(test, totals, strict=True)) for test in on_trial) / tests


def _ratio_blocks(on_trial: int, total: int) -> bool:
    p_value = sample_ratio([total - on_trial, on_trial], [1, 1])
    return p_value is not None and p_value < RATIO_P_MIN


@dataclass
class GivenUp:
    """How many tests did this at one look at least; ``harmful_by``: the units a side that they had then, for each that was harmful."""

    tests: int = 0
    blocked: int = 0
    promoted: int = 0
    harmful_by: list[int] = field(default_factory=list)


def given_up(shares: tuple[float, float], faster: float, tests: int, chance: np.random.Generator) -> GivenUp:
    """Tests of latency, one job a unit, in which of the control's jobs and of those on trial such ``shares`` are given up. Of the others
    those on trial take ``faster`` less of their mean, with exponential latencies."""
    plan = plan_of(BETTER, guardrails=())
    counted = GivenUp()
    for _ in range(tests):
        gone = [(chance.random((LOOKS, UNITS_PER_LOOK)) < share) for share in shares]
        taken = [chance.exponential(mean, (LOOKS, UNITS_PER_LOOK)) for mean in (1.0, 1.0 - faster)]
        arms = {name: _seen_whole(left, its) for name, left, its in zip(("base", "new"), gone, taken, strict=True)}
        looks = [judge(plan, {name: its[look] for name, its in arms.items()}, 24.0 * (look + 1)) for look in range(LOOKS)]
        counted.tests += 1
        counted.blocked += any("abandoned" in report.blocked for report in looks)
        counted.promoted += any(report.verdict is Verdict.PROMOTE for report in looks)
        harmful = [look for look, report in enumerate(looks) if report.verdict is Verdict.HARMFUL]
        counted.harmful_by += [(harmful[0] + 1) * UNITS_PER_LOOK] if harmful else []
    return counted


def _seen_whole(gone: Numbers, taken: Numbers) -> list[ArmCounts]:
    """What an arm has come to at each look; the latency is known of the jobs that nobody gave up."""
    ended, left = (~gone).sum(1).cumsum().tolist(), gone.sum(1).cumsum().tolist()
    total, squares = ((taken**power * ~gone).sum(1).cumsum().tolist() for power in (1, 2))
    found = []
    for n, s, ss, a in zip(ended, total, squares, left, strict=True):
        tallies = {Metric.LATENCY: Tally(n, n, s, ss, n, s), Metric.ABANDONED: Tally(n + a, n + a, a, a, n + a, a)}
        found.append(ArmCounts(units=n + a, jobs=n, tallies=tallies))
    return found


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; about a minute, or some ten seconds when quick."""
    tests = TESTS // 8 if quick else TESTS
    chance = np.random.default_rng(SEED)
    same = {one.name: seen(one, plan_of(one), tests, chance) for one in SCENARIOS}
    power = seen(BETTER, plan_of(BETTER, minimum_samples=1000, guardrails=()), tests, chance)
    ratio = {f"{share:.0%}": ratios_blocked(share, tests, chance) for share in (0.5, 0.52, 0.54)}
    same_share, hangs = given_up((0.1, 0.1), 0.0, tests, chance), given_up((0.0, 0.2), 0.1, tests, chance)
    bars = [
        *(
            at_most(f"tests without a difference ever significant, {name}, %", 100 * one.sequential / one.tests, 100 * ERRORS_MAX)
            for name, one in same.items()
        ),
        at_least(f"a difference of {EFFECT_SD} sd found by 3,000 a side, %", 100 * power.promoted / power.tests, 100 * POWER_MIN),
        at_most("tests in which as many give up on both arms ever blocked for it, %", 100 * same_share.blocked / tests, BLOCKED_MAX),
        at_most("tests promoted whose arm never answers 20 % of its jobs, %", 100 * hangs.promoted / tests, 0.0),
    ]
    shares = {name: _shares(one) for name, one in (same | {BETTER.name: power}).items()}
    left = {"10 % in both arms": same_share, "20 % of those on trial, which are else 10 % quicker": hangs}
    return {
        "bench": "ab_simulation",
        "tests": tests,
        "looks": LOOKS,
        "scenarios": shares,
        "ratio_blocked": ratio,
        "given_up": {
            name: {"blocked": one.blocked, "promoted": one.promoted, "harmful": len(one.harmful_by)} for name, one in left.items()
        },
        "bars": bars,
    }


def _shares(counted: Seen) -> dict[str, float]:
    names = ("fixed", "sequential", "concluded", "promoted", "harmful")
    return {name: getattr(counted, name) / counted.tests for name in names}


def table(result: dict[str, Any]) -> str:
    head = f"ever at {result['looks']} looks, % of {result['tests']:,} tests"
    lines = [f"{head:<40}{'fixed':>8}{'sequence':>10}{'decided':>9}{'promoted':>10}{'harmful':>9}"]
    for name, shares in result["scenarios"].items():
        lines.append("{:<40}{:>8.1f}{:>10.1f}{:>9.1f}{:>10.1f}{:>9.1f}".format(f"  {name}", *(100 * one for one in shares.values())))
    blocked = ", ".join(f"{share}: {100 * one:.1f} %" for share, one in result["ratio_blocked"].items())
    lines += [
        f"  given up, {name}: {one['blocked']:,} blocked, {one['promoted']:,} promoted, {one['harmful']:,} harmful of {result['tests']:,}"
        for name, one in result["given_up"].items()
    ]
    return "\n".join([*lines, f"  blocked by the sample ratio, where half was planned and the arm got {blocked}"])


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))
