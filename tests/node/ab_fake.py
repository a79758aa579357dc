"""A Coordinator's A/B tests for tests of the command: answers that were written down before, and what was asked of it.

The answers are made by the Coordinator's own functions, from counts that are given.
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coordinator.abtests.decision import judge
from coordinator.abtests.plan import AbState, Arm, ArmCounts, Guardrail, Metric, Plan, RampStep, Tally
from coordinator.abtests.results import Results
from coordinator.books.ab_tests import AbTest
from coordinator.http.ab_json import results_json, test_json

ID = "ab_4f1c2a9b8d7e6f5a4b3c2d1e"
Answer = tuple[int, Any]  # status, and JSON or bytes

PLAN = Plan(
    name="faster",
    base_cargo="answers",
    arms=(Arm("old", "answers", "1.0.0", "aa" * 32, 50_000), Arm("new", "answers", "2.0.0", "bb" * 32, 50_000)),
    control="old",
    minimum_samples=1000,
    guardrails=(Guardrail(Metric.SUCCESS, 5.0),),
    ramp=(RampStep(5.0, 1.0),),
)
STARTED_MS, HOUR_MS = 1_772_359_200_000, 3_600_000


def ab_test(state: AbState = AbState.ACTIVE, hours: float = 3.2, plan: Plan = PLAN, winner: str = "", note: str = "") -> AbTest:
    """A test that has run for so long."""
    started_ms = 0 if state is AbState.DRAFT else STARTED_MS
    ended_ms = STARTED_MS + round(hours * HOUR_MS) if state.ended else 0
    active_ms = round(hours * HOUR_MS) if started_ms else 0
    return AbTest(ID, "ann", plan, state, 1, STARTED_MS - 60_000, started_ms, ended_ms, active_ms, winner=winner, note=note)


def told(state: AbState = AbState.ACTIVE, **more: Any) -> dict[str, Any]:
    """As the Coordinator tells it."""
    return test_json(ab_test(state, **more))


def arm(
    units: int, latency_ms: float, failed: int = 0, cached: int = 0, rated: int = 0, up: int = 0, abandoned: int = 0
) -> ArmCounts:
    """What an arm has come to whose units have brought one job each, and as many others one that they gave up; no first tokens."""
    tallies = {
        Metric.LATENCY: _tally(units - failed, latency_ms * 1000, 100_000),
        Metric.SUCCESS: _shares(units, units - failed),
        Metric.ABANDONED: _shares(units + abandoned, abandoned),
        Metric.TOKENS_PER_SECOND: _tally(units - failed, 41_250.0, 500.0),
        Metric.COST: _tally(units - failed, 1200.0, 0.0),
        Metric.THUMBS: _shares(rated, up),
    }
    return ArmCounts(units, units, units - failed, cached, 20 * units, tallies)


def _tally(units: int, mean: float, sd: float) -> Tally:
    return Tally(units, units, units * mean, units * (mean * mean + sd * sd), units, units * mean)


def _shares(units: int, good: int) -> Tally:
    return Tally(units, units, good, good, units, good)


def results(made: AbTest | None = None, *arms: ArmCounts, exposure: float = 100.0, held: str = "") -> dict[str, Any]:
    """As the Coordinator tells them: of a test, and what the arms of its plan have come to."""
    made = made or ab_test()
    counts = {one.name: its for one, its in zip(made.plan.arms, arms or FEW, strict=True)}
    report = judge(made.plan, counts, made.active_ms / HOUR_MS, held)
    return results_json(Results(made, counts, report, exposure, held))


FEW = (arm(433, 412.34, failed=3, cached=40), arm(412, 389.21, failed=2, cached=38, rated=8, up=7, abandoned=6))
MANY = (arm(2000, 412.34, failed=10), arm(2010, 350.0, failed=9))


def refusal(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


class FakeCoordinator(http.server.ThreadingHTTPServer):
    """``answers`` by method and path, in turn; the last one stays. ``asked``: method, path and JSON of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.keys: list[str | None] = []
        self.missing_bytes = 0  # of each answer, at its end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def say(self, what: str, *answers: Answer) -> None:
        """``what``: such as ``POST /activate``, behind the test's address."""
        method, _, path = what.partition(" ")
        self.answers[f"{method} /api/v1/ab-tests/{ID}{path}"] = list(answers)

    def take(self, method: str, path: str) -> Answer:
        answers = self.answers.get(f"{method} {path}")
        if not answers:
            return 404, refusal("there is no such A/B test; see GET /api/v1/ab-tests", "unknown_ab_test")
        return answers.pop(0) if len(answers) > 1 else answers[0]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeCoordinator

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, json.loads(body) if body else None))
        self.server.keys.append(self.headers.get("Authorization"))
        status, answer = self.server.take(self.command, self.path)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + self.server.missing_bytes))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        """Nobody reads it."""


@contextmanager
def fake_coordinator() -> Iterator[FakeCoordinator]:
    server = FakeCoordinator()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
