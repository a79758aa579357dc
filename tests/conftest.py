"""`make soak` writes what it found to bench/results/: name, outcome, seconds and recorded properties of each test."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import pytest

_RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


class _SoakReport:
    def __init__(self) -> None:
        self.tests: list[dict[str, object]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            self.tests.append(entry | dict(report.user_properties))

    def pytest_sessionfinish(self) -> None:
        if not self.tests:
            return
        _RESULTS.mkdir(parents=True, exist_ok=True)
        file = _RESULTS / f"soak-{time.strftime('%Y%m%d-%H%M%S')}.json"
        facts = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "machine": platform.machine()}
        file.write_text(json.dumps(facts | {"tests": self.tests}, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "soak" and not config.option.collectonly:
        config.pluginmanager.register(_SoakReport())
