"""What all tests share: databases of both kinds, and the report of the long tests.

`make soak` writes what it found to bench/results/: name, outcome, seconds and recorded properties of each test.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hang_report import HangReport
from tests.postgres import PostgresServer, require_server

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
    if limit_s := float(config.getini("timeout")):
        config.pluginmanager.register(HangReport(limit_s))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One running server for all tests. Whoever kills it starts it again."""
    require_server()
    with PostgresServer() as server:
        server.start()
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh, empty database; the test runs once on each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'coordinator.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.new_database()
    yield url
    server.drop(url)
