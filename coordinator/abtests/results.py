"""What is known of an A/B test at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.abtests.decision import Report
from coordinator.abtests.plan import ArmCounts
from coordinator.books.ab_tests import AbTest


@dataclass(frozen=True, slots=True)
class Results:
    """``counts`` by the arms' names, of those that have any; ``exposure_percent``: of all units that are enrolled now; ``held_because``:
    why the test stands still, in words, empty where it does not."""

    test: AbTest
    counts: Mapping[str, ArmCounts]
    report: Report
    exposure_percent: float
    held_because: str
