"""Who is in a test, and in which arm."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from coordinator.abtests.assignment import arm_of, exposure_percent, is_enrolled, unit_key
from coordinator.abtests.plan import SHARE_WHOLE, Arm, Plan, RampStep, UnitKind

SECRET = bytes(range(32))
UNITS = 100_000
HOUR_MS = 3_600_000


def plan_of(*percents: float) -> Plan:
    arms = tuple(
        Arm(f"arm{index}", "talk", f"{index + 1}.0.0", f"{index:064x}", round(percent * SHARE_WHOLE / 100))
        for index, percent in enumerate(percents)
    )
    return Plan("a test", "talk", arms, "arm0")


def units(count: int = UNITS, kind: UnitKind = UnitKind.USER) -> list[str]:
    return [unit_key(SECRET, kind, "test-1", "ann", f"user {number}", f"job-{number}") for number in range(count)]


@pytest.mark.parametrize("percents", [(50, 50), (90, 10), (99, 1), (33.333, 33.333, 33.334), (12.5,) * 8])
def test_shares_are_within_half_a_percent(percents: tuple[float, ...]) -> None:
    plan = plan_of(*percents)
    got = Counter(arm_of(plan, "test-1", unit).name for unit in units())
    for arm, percent in zip(plan.arms, percents, strict=True):
        assert abs(100 * got[arm.name] / UNITS - percent) <= 0.5, (arm.name, got)


def test_a_unit_always_gets_the_same_arm_in_another_process_too() -> None:
    plan, some = plan_of(30, 70), units(500)
    here = [arm_of(plan, "test-1", unit).name for unit in some]
    assert here == [arm_of(plan, "test-1", unit).name for unit in units(500)]
    program = (
        "from tests.coordinator.abtests.test_ab_assignment import *\n"
        "plan = plan_of(30, 70)\n"
        "print(' '.join(arm_of(plan, 'test-1', unit).name for unit in units(500)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.split() == here


def test_tests_sort_units_independently() -> None:
    """Or the same half would get everything that is new."""
    plan, some = plan_of(50, 50), units(20_000)
    both = sum(arm_of(plan, "test-1", unit) is arm_of(plan, "test-2", unit) for unit in some)
    assert abs(both / len(some) - 0.5) < 0.02


def test_a_ramp_only_adds_units_and_moves_none() -> None:
    plan, some = plan_of(50, 50), units(20_000)
    before: set[str] = set()
    for percent in (1.0, 5.0, 25.0, 100.0):
        now = {unit for unit in some if is_enrolled("test-1", unit, percent)}
        assert before <= now and abs(100 * len(now) / len(some) - percent) < 1
        got = Counter(arm_of(plan, "test-1", unit).name for unit in now)
        assert abs(got["arm0"] / len(now) - 0.5) < (0.15 if percent < 5 else 0.03), "being enrolled says nothing about the arm"
        before = now
    assert len(before) == len(some)


def test_nobody_is_enrolled_at_no_percent() -> None:
    assert not any(is_enrolled("test-1", unit, 0.0) for unit in units(1000))


def test_exposure_follows_the_running_time() -> None:
    ramp = (RampStep(5, 1), RampStep(25, 2))
    hours = [0, 0.99, 1, 2.99, 3, 100]
    assert [exposure_percent(ramp, int(hour * HOUR_MS)) for hour in hours] == [5, 5, 25, 25, 100, 100]
    assert exposure_percent((), 0) == 100


def test_what_is_one_unit() -> None:
    def key(kind: UnitKind, account: str = "ann", user: str = "bo", job: str = "1", test: str = "t") -> str:
        return unit_key(SECRET, kind, test, account, user, job)

    assert key(UnitKind.USER) == key(UnitKind.USER, job="2") != key(UnitKind.USER, user="cy")
    assert key(UnitKind.USER) != key(UnitKind.USER, account="dan"), "users of two accounts are two"
    assert key(UnitKind.USER, user="") == key(UnitKind.ACCOUNT) == key(UnitKind.ACCOUNT, user="cy")
    assert key(UnitKind.JOB) == key(UnitKind.JOB, account="dan") != key(UnitKind.JOB, job="2")
    assert key(UnitKind.USER, user="") != key(UnitKind.USER, account="ann\0bo", user=""), "parts do not run into one another"
    assert key(UnitKind.USER) != key(UnitKind.USER, test="u"), "tests do not share what they know of units"
    assert key(UnitKind.USER) != unit_key(bytes(32), UnitKind.USER, "t", "ann", "bo", "1")
    assert "bo" not in key(UnitKind.USER) and len(key(UnitKind.USER)) == 24
    assert key(UnitKind.USER, user="half \ud800 a pair")
