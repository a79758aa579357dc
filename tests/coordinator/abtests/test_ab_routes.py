"""The addresses of A/B tests over HTTP, in front of a service that the tests play; and what answers say of the test that they are in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio

from coordinator.abtests.decision import Verdict, judge
from coordinator.abtests.definition import TEXTS, CargoFacts, read_plan
from coordinator.abtests.errors import AbFault, AbRefused
from coordinator.abtests.plan import AbState, ArmCounts, Metric, Tally
from coordinator.abtests.results import Results
from coordinator.books.ab_tests import AbEvent, AbTest
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job, JobState
from coordinator.cargo_rules import Fault, RegistryRefused
from coordinator.http import ab_json
from coordinator.http.ab_routes import STATUS, AbRoutes
from coordinator.http.app import Api, Services
from coordinator.http.bridge import Bridge
from coordinator.http.errors import ApiError
from coordinator.http.job_events import sse
from coordinator.http.job_routes import job_json
from coordinator.http.metrics import Metrics
from coordinator.http.thread import HttpThread
from coordinator.jobs import Accepted, Assigned, CacheWaits, ChoiceResult, Emit, Event, Text
from coordinator.keys import ApiKey
from coordinator.orders import Order
from coordinator.statistics import Statistics
from protocol import limits
from protocol.cargo_io import DoneLine, Usage
from protocol.generation import FinishReason
from tests.coordinator.abtests import ab_net
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import JOBS, error_of, events_of, get, url_of

PAGE = (Path(__file__).parents[3] / "specs" / "http-api.md").read_text()
AB = "/api/v1/ab-tests"
ONE = f"{AB}/ab_1"
OLD = CargoFacts("talk", "1.0.0", "a1" * 32, "gguf", "ann", TEXTS)
NEW = replace(OLD, release="2.0.0", address="a2" * 32)
FOUND = {"talk": OLD, "talk@2.0.0": NEW}
BODY: dict[str, Any] = {
    "name": "is it quicker",
    "base_cargo": "talk",
    "variants": [
        {"name": "old", "cargo": "talk", "traffic_percent": 50},
        {"name": "new", "cargo": "talk@2.0.0", "traffic_percent": 50},
    ],
    "minimum_samples": 100,
    "minimum_hours": 0,
    "guardrails": ["success", {"metric": "cost", "max_regression_percent": 10}],
}
PLAN = read_plan(BODY, FOUND.get, "ann")
DRAFT = AbTest("ab_1", "ann", PLAN, AbState.DRAFT, created_at_ms=1_700_000_000_000)


def tally(mean: float, sd: float, units: int) -> Tally:
    """Of one job a unit."""
    return Tally(units, units, mean * units, units * mean**2 + (units - 1) * sd**2, units, mean * units)


def counts(latency_us: float, units: int) -> ArmCounts:
    good = units - 4
    tallies = {
        Metric.LATENCY: tally(latency_us, 100_000, good),
        Metric.SUCCESS: Tally(units, units, good, good, units, good),
        Metric.ABANDONED: Tally(units, units, 5, 5, units, 5),
        Metric.TOKENS_PER_SECOND: tally(41_500, 500, good),
        Metric.COST: tally(1_500, 10, good),
        Metric.THUMBS: Tally(8, 8, 6, 6, 8, 6),
    }
    return ArmCounts(units, units, good, 17, 40 * good, tallies)


@dataclass
class Played:
    """A service that remembers what it was asked, and refuses what a test wants. ``said``: name of what was asked, and with what."""

    said: list[tuple[Any, ...]] = field(default_factory=list)
    refusal: Exception | None = None
    counted: Mapping[str, ArmCounts] = field(default_factory=dict)
    test: AbTest = DRAFT

    async def _did(self, *what: Any) -> None:
        self.said.append(what)
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal

    async def create(self, account: str, body: Mapping[str, Any]) -> AbTest:
        await self._did("create", account)
        return replace(DRAFT, plan=read_plan(body, FOUND.get, account))

    async def find(self, account: str, id: str) -> AbTest:
        await self._did("find", account, id)
        return self.test

    async def activate(self, account: str, id: str) -> AbTest:
        await self._did("activate", account, id)
        return replace(self.test, state=AbState.ACTIVE, started_at_ms=1_700_000_000_250)

    async def pause(self, account: str, id: str) -> AbTest:
        await self._did("pause", account, id)
        return replace(self.test, state=AbState.PAUSED, note="somebody wanted it")

    async def promote(self, account: str, id: str, variant: str, force: bool) -> AbTest:
        await self._did("promote", account, id, variant, force)
        return replace(self.test, state=AbState.PROMOTED, winner=variant or "new", ended_at_ms=1_700_000_000_500)

    async def rollback(self, account: str, id: str) -> AbTest:
        await self._did("rollback", account, id)
        return replace(self.test, state=AbState.ROLLED_BACK)

    async def results(self, account: str, id: str) -> Results:
        await self._did("results", account, id)
        active = replace(self.test, state=AbState.ACTIVE, active_ms=5_400_000)
        return Results(active, self.counted, judge(active.plan, self.counted, 1.5), 25.0, "")

    async def events(self, account: str, id: str) -> Sequence[AbEvent]:
        await self._did("events", account, id)
        return [AbEvent(1_700_000_000_000, "created", "ann", {}), AbEvent(1_700_000_000_250, "promoted", "", {"variant": "new"})]

    async def rate(self, account: str, job_id: str, rating: int) -> Job:
        await self._did("rate", account, job_id, rating)
        return replace(JOB, rating=rating)

    async def list(self, account: str, limit: int, offset: int) -> tuple[Sequence[AbTest], int]:
        await self._did("list", account, limit, offset)
        return [self.test], 7


JOB = Job("j1", "ann", "talk", "chat", JobState.SUCCEEDED, 0, 1, "explicit", "c", 1, 1, ab_test="ab_1", ab_arm="new")


@dataclass
class Answering:
    """Whoever runs orders: says these events."""

    events: list[Event] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    waits: trio.Event | None = None  # behind the first event

    async def run(self, order: Order, emit: Emit) -> None:
        self.orders.append(order)
        for number, one in enumerate(self.events):
            if number == 1 and self.waits is not None:
                await self.waits.wait()
            await emit(one)

    async def collect(self, order: Order) -> list[Event]:
        self.orders.append(order)
        return self.events


class Keys:
    """The key is the account's name; one that ends in ``-reader`` may only read."""

    async def admit(self, request: Any, scope: str) -> tuple[ApiKey, dict[str, str]]:
        account = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not account:
            raise ApiError(401, "no key", code="invalid_api_key")
        scopes = frozenset({"read"} if account.endswith("-reader") else {"read", "write"})
        if scope not in scopes:
            raise ApiError(403, "no such scope", code="insufficient_scope")
        return ApiKey(1, account, scopes, 0), {}


@dataclass
class Served:
    url: str
    service: Played
    worker: Answering

    async def ask(self, method: str, path: str, key: str = "ann", **more: Any) -> httpx.Response:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **more.pop("headers", {})}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60) as client:
            return await client.request(method, path, **more)


@asynccontextmanager
async def serving(service: Played | None = None, worker: Answering | None = None) -> AsyncIterator[Served]:
    service, worker = service or Played(), worker or Answering()
    async with trio.open_nursery() as nursery:
        bridge, nobody = Bridge(nursery), cast("Any", None)
        services = Services(
            bridge=bridge,
            worker=worker,
            islands=nobody,
            cargos=nobody,
            gate=cast("Any", Keys()),
            metrics=Metrics(Statistics(), dict),
            well_known=dict,
            salt_secret=bytes(32),
            version="test",
            body_bytes_max=1_000_000,
            keep_alive_comment_s=10.0,
            lines=nobody or cast("Any", object()),
            more=lambda admit: [AbRoutes(admit, bridge, service)],
        )
        thread = HttpThread(Api(services).application, "127.0.0.1", 0, None)
        nursery.start_soon(thread.run)
        await thread.wait_ended_or_started()
        try:
            yield Served(thread.url, service, worker)
        finally:
            thread.stop()


# ---- tests


async def test_a_test_is_created() -> None:
    async with serving() as served:
        answer = await served.ask("POST", AB, json=BODY)
        assert answer.status_code == 201 and answer.headers["location"] == f"{AB}/ab_1"
        told = answer.json()
        assert told["variants"] == [
            {"name": "old", "cargo": "talk", "release": "1.0.0", "address": "a1" * 32, "traffic_percent": 50},
            {"name": "new", "cargo": "talk", "release": "2.0.0", "address": "a2" * 32, "traffic_percent": 50},
        ]
        assert {name: told[name] for name in ("id", "object", "control", "state", "status", "created_at", "winner", "note")} == {
            "id": "ab_1",
            "object": "ab_test",
            "control": "old",
            "state": "draft",
            "status": "draft",
            "created_at": "2023-11-14T22:13:20.000Z",
            "winner": None,
            "note": None,
        }
        assert (told["started_at"], told["ended_at"], told["running_hours"], told["unit"]) == (None, None, 0, "user")
        assert served.service.said == [("create", "ann")]


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"variants": [BODY["variants"][0], {**BODY["variants"][1], "traffic_percent": 49}]}, "shares_do_not_add_up", "variants"),
        ({"variants": BODY["variants"][:1]}, "too_few_variants", "variants"),
        ({"alpha": "0.05"}, "invalid_ab_test", "alpha"),
        ({"minimum_hour": 1}, "invalid_ab_test", "minimum_hour"),
    ],
)
async def test_what_is_wrong_is_told_by_its_field(changes: dict[str, Any], code: str, param: str) -> None:
    async with serving() as served:
        error_of(await served.ask("POST", AB, json={**BODY, **changes}), 400, code, param)


@pytest.mark.parametrize(("text", "code", "param"), [("NaN", "invalid_json", None), ("1e999", "invalid_ab_test", "alpha")])
async def test_numbers_that_are_none(text: str, code: str, param: str | None) -> None:
    raw = json.dumps({**BODY, "alpha": "?"}).replace('"?"', text)
    async with serving() as served:
        error_of(await served.ask("POST", AB, content=raw), 400, code, param)


async def test_every_step_of_a_test() -> None:
    async with serving() as served:
        assert (await served.ask("GET", ONE)).json()["state"] == "draft"
        begun = (await served.ask("POST", f"{ONE}/activate")).json()
        assert (begun["state"], begun["started_at"]) == ("active", "2023-11-14T22:13:20.250Z")
        paused = (await served.ask("POST", f"{ONE}/pause", json={})).json()
        assert (paused["state"], paused["note"]) == ("paused", "somebody wanted it")
        promoted = (await served.ask("POST", f"{ONE}/promote")).json()
        assert (promoted["state"], promoted["winner"], promoted["ended_at"]) == ("promoted", "new", "2023-11-14T22:13:20.500Z")
        named = await served.ask("POST", f"{ONE}/promote", json={"variant": "old", "force": True})
        assert named.json()["winner"] == "old"
        assert (await served.ask("POST", f"{ONE}/rollback")).json()["status"] == "rolled_back"
        assert [said[0] for said in served.service.said] == ["find", "activate", "pause", "promote", "promote", "rollback"]
        assert served.service.said[3:5] == [("promote", "ann", "ab_1", "", False), ("promote", "ann", "ab_1", "old", True)]


async def test_what_promote_takes() -> None:
    async with serving() as served:
        wrong: tuple[tuple[dict[str, Any], str], ...] = (
            ({"variant": 5}, "variant"),
            ({"variant": ""}, "variant"),
            ({"force": "yes"}, "force"),
            ({"forced": True}, "forced"),
        )
        for body, param in wrong:
            error_of(await served.ask("POST", f"{ONE}/promote", json=body), 400, "invalid_ab_test", param)
        error_of(await served.ask("POST", f"{ONE}/promote", content=b"[]"), 400, "invalid_type")
        assert served.service.said == []


async def test_lists_and_events() -> None:
    async with serving() as served:
        listed = (await served.ask("GET", f"{AB}?limit=5&offset=2")).json()
        assert listed["meta"] == {"total": 7, "limit": 5, "offset": 2} and [one["id"] for one in listed["data"]] == ["ab_1"]
        assert (await served.ask("GET", AB)).json()["meta"]["limit"] == 20
        assert served.service.said == [("list", "ann", 5, 2), ("list", "ann", 20, 0)]
        for wrong, name in (("limit=0", "limit"), ("limit=101", "limit"), ("offset=-1", "offset")):
            error_of(await served.ask("GET", f"{AB}?{wrong}"), 400, "invalid_value", name)
        assert (await served.ask("GET", f"{ONE}/events")).json() == {
            "data": [
                {"at": "2023-11-14T22:13:20.000Z", "kind": "created", "account": "ann", "detail": {}},
                {"at": "2023-11-14T22:13:20.250Z", "kind": "promoted", "account": None, "detail": {"variant": "new"}},
            ]
        }


async def test_keys_and_scopes() -> None:
    reads = [("GET", path) for path in (AB, ONE, f"{ONE}/results", f"{ONE}/events")]
    writes = [("POST", f"{ONE}/{action}") for action in ("activate", "pause", "promote", "rollback")]
    writes += [("POST", AB), ("POST", "/api/v1/jobs/j1/feedback")]
    async with serving() as served:
        for method, path in reads + writes:
            error_of(await served.ask(method, path, key=""), 401, "invalid_api_key")
        for method, path in writes:
            error_of(await served.ask(method, path, key="ann-reader"), 403, "insufficient_scope")
        for method, path in reads:
            assert (await served.ask(method, path, key="ann-reader")).status_code == 200
        assert {said[1] for said in served.service.said} == {"ann-reader"}


@pytest.mark.parametrize("fault", AbFault)
async def test_every_fault_has_its_status(fault: AbFault) -> None:
    async with serving(Played(refusal=AbRefused(fault, "no", "base_cargo"))) as served:
        error_of(await served.ask("POST", f"{ONE}/activate"), STATUS[fault], fault.value, "base_cargo")


async def test_what_else_may_be_in_the_way() -> None:
    away, unknown = BooksUnavailable("away"), "a" * 200
    async with serving(Played(refusal=away)) as served:
        assert error_of(await served.ask("GET", ONE), 503, "books_unavailable")["type"] == "server_error"
        served.service.refusal = RegistryRefused(Fault.REVOKED, "it was revoked")
        error_of(await served.ask("POST", f"{ONE}/promote"), 409, "cargo_revoked")
        for id in (unknown, "%00", "%C3%A9"):
            error_of(await served.ask("GET", f"{AB}/{id}"), 404, "unknown_ab_test")


# ---- results


async def test_results_in_units_for_people() -> None:
    service = Played(counted={"old": counts(900_000, 2_000), "new": counts(600_000, 2_050)})
    async with serving(service) as served:
        told = (await served.ask("GET", f"{ONE}/results")).json()
    old, new = told["variants"]
    assert (old["avg_latency_ms"], old["avg_tokens_per_second"], old["avg_cost"]) == (900, 41.5, 0.0015)
    assert (old["success_rate"], old["abandoned_percent"], old["thumbs_up_percent"], old["rated"]) == (99.8, 0.25, 75, 8)
    assert (new["units"], new["samples"], new["job_count"], new["cached_count"], new["total_tokens"]) == (2050, 2046, 2050, 17, 81_840)
    assert old["is_control"] and not new["is_control"] and old["avg_time_to_first_token_ms"] is None
    (compared,) = told["comparisons"]
    assert (compared["variant"], compared["control"], compared["metric"], compared["unit"]) == ("new", "old", "latency", "ms")
    assert compared["difference"] == -300 and compared["interval"]["low"] < -300 < compared["interval"]["high"] < 0
    assert compared["interval"]["level"] == 0.95 and compared["lift_percent"] == pytest.approx(-33.3333)
    assert compared["conclusive"] and compared["better"] and 0 <= compared["p_value"] <= 0.05 and compared["fixed_p_value"] <= 0.05
    assert [(one["variant"], one["metric"], one["max_regression_percent"]) for one in told["guardrails"]] == [
        ("new", "success", 5),
        ("new", "cost", 10),
    ]
    assert told["guardrails"][0]["interval"]["level"] == 0.975 and told["guardrails"][1]["state"] == "holds"
    assert told["sample_ratio"]["observed"] == {"old": 2000, "new": 2050} and told["sample_ratio"]["ok"]
    assert told["sample_ratio"]["expected"] == {"old": 2025, "new": 2025}
    assert told["decision"] == {"verdict": "promote", "winner": "new", "blocked": [], "waiting": [], "reasons": {}}
    assert (told["exposure_percent"], told["running_hours"], told["held_because"]) == (25, 1.5, None)
    assert told["test"]["state"] == "active" and told["test"]["running_hours"] == 1.5


async def test_results_of_nothing_are_null() -> None:
    async with serving() as served:
        told = (await served.ask("GET", f"{ONE}/results")).json()
    means = [shown.field for shown in ab_json.SHOWN.values()]
    assert all(one[name] is None for one in told["variants"] for name in means)
    numbers = ("units", "samples", "job_count", "cached_count", "rated", "total_tokens")
    assert all(one[name] == 0 for one in told["variants"] for name in numbers)
    (compared,) = told["comparisons"]
    nothing = ("difference", "interval", "lift_percent", "lift_interval", "p_value", "fixed_p_value")
    assert all(compared[name] is None for name in nothing) and not compared["conclusive"]
    assert {one["state"] for one in told["guardrails"]} == {"not_yet"}
    assert told["sample_ratio"] == {"p_value": None, "ok": None, "expected": {"old": 0, "new": 0}, "observed": {"old": 0, "new": 0}}
    decision = told["decision"]
    assert decision["verdict"] == "collecting" and set(decision["waiting"]) == set(decision["reasons"]) and decision["waiting"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, None])
def test_no_number_is_null(value: float | None) -> None:
    assert ab_json.number(value, 1000) is None


def test_numbers_have_six_digits() -> None:
    assert [ab_json.number(value) for value in (123456.789, 0.0000123456789, 0.0)] == [123457.0, 1.23457e-05, 0.0]


# ---- ratings


@pytest.mark.parametrize(("rating", "value"), [("up", 1), ("down", -1), (None, 0)])
@pytest.mark.parametrize("id", ["j1", "chatcmpl-j1", "cmpl-j1"])
async def test_thumbs(id: str, rating: str | None, value: int) -> None:
    async with serving() as served:
        told = (await served.ask("POST", f"/api/v1/jobs/{id}/feedback", json={"rating": rating})).json()
        metadata = {"ab_test_id": "ab_1", "ab_variant_name": "new"}
        assert told == {"object": "feedback", "job_id": "j1", "rating": rating, "metadata": metadata}
        assert served.service.said == [("rate", "ann", "j1", value)]


async def test_ratings_that_are_none() -> None:
    path = "/api/v1/jobs/j1/feedback"
    async with serving() as served:
        wrongs: tuple[Any, ...] = (1, "UP", "", True, ["up"], {})
        for wrong in wrongs:
            error_of(await served.ask("POST", path, json={"rating": wrong}), 400, "invalid_value", "rating")
        error_of(await served.ask("POST", path, json={}), 400, "missing_required_parameter", "rating")
        error_of(await served.ask("POST", "/api/v1/jobs/chatcmpl-/feedback", json={"rating": "up"}), 404, "unknown_job")
        assert served.service.said == []
        served.service.refusal = BooksRefused(Why.NO_JOB, "there is no such job")
        error_of(await served.ask("POST", path, json={"rating": "up"}), 404, "unknown_job")


# ---- what answers say

RESULT = ChoiceResult(0, FinishReason.STOP, ("i",), ("e",), 3, 0, 1, 1, 1, 1)
ASSIGNED = Assigned("ab_1", "new")
WORDS: list[Event] = [Accepted(0, "i", "e", 0.1), Text(0, "hello"), RESULT]
SAYS = {"x-archipelag-ab-test": "ab_1", "x-archipelag-ab-variant": "new"}
METADATA = {"ab_test_id": "ab_1", "ab_variant_name": "new"}
CHAT = "/v1/chat/completions"


def about_tests(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "ab_" in name or "-ab-" in name}


@pytest.mark.parametrize("is_assigned", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_texts_say_their_test(path: str, is_assigned: bool) -> None:
    body = HELLO if path == CHAT else {"model": "echo", "prompt": "hello"}
    async with serving(worker=Answering([ASSIGNED, *WORDS] if is_assigned else WORDS)) as served:
        whole = await served.ask("POST", path, json=body)
        streamed = await served.ask("POST", path, json={**body, "stream": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if line.startswith("data: {")]
    for answer, metadata in ((whole, whole.json()["metadata"]), (streamed, chunks[-1]["metadata"])):
        assert about_tests(answer.headers) == (SAYS if is_assigned else {})
        assert about_tests(metadata) == (METADATA if is_assigned else {})


async def test_vectors_say_their_test() -> None:
    made = DoneLine(Usage(1, 0), None, '{"embeddings":[[1.0,2.0]],"dimensions":2,"task":"embeddings"}')
    async with serving(worker=Answering([ASSIGNED, Accepted(0, "i", "e", 0.1), replace(RESULT, done=made)])) as served:
        answer = await served.ask("POST", "/v1/embeddings", json={"model": "m", "input": "x", "user": "u"})
    assert answer.status_code == 200, answer.text
    assert about_tests(answer.headers) == SAYS and about_tests(answer.json()["metadata"]) == METADATA
    assert served.worker.orders[0].user == "u"


async def test_a_head_that_goes_out_early_says_nothing_of_the_cache_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is assigned says nothing of whether the cache knows the answer."""
    monkeypatch.setattr(limits, "HEADERS_WAIT_S", 0.01)
    waits = trio.Event()
    async with serving(worker=Answering([ASSIGNED, CacheWaits(), *WORDS], waits=waits)) as served:
        client = httpx.AsyncClient(base_url=served.url, headers={"Authorization": "Bearer ann"}, timeout=60)
        async with client, client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
            assert about_tests(answer.headers) == SAYS and "x-archipelag-cache" not in answer.headers
            waits.set()
            assert (await answer.aread()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "headers", "user"),
    [
        ({}, {}, ""),
        ({"user": "ann's daughter"}, {}, "ann's daughter"),
        ({"user": "old", "safety_identifier": "new"}, {}, "new"),
        ({"user": "old", "safety_identifier": "new"}, {"x-archipelag-unit": "header"}, "header"),
        ({"user": "old", "safety_identifier": ""}, {"x-archipelag-unit": ""}, "old"),
        ({"user": 5, "safety_identifier": ["x"]}, {}, ""),
        ({"user": "u" * 300}, {}, "u" * 256),
        ({"user": "\ud800"}, {}, "\ud800"),
    ],
)
async def test_whom_a_request_is_for(body: dict[str, Any], headers: dict[str, str], user: str) -> None:
    async with serving(worker=Answering(WORDS)) as served:
        answer = await served.ask("POST", CHAT, content=json.dumps({**HELLO, **body}), headers=headers)
        assert answer.status_code == 200, answer.text
        assert [order.user for order in served.worker.orders] == [user]


async def test_a_job_that_is_streamed_says_its_test_first(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    asked = {"cargo": ab_net.NAME, "input": {"prompt": "one two"}, "stream": True, "user": "bo"}
    async with ab_net.talking(url_of(tmp_path)) as running:
        id = await ab_net.started(running)
        async with http(running) as client, client.stream("POST", JOBS, json=asked) as answer:
            await events_of(answer, events)
        told = {name.removeprefix("x-archipelag-ab-"): value for name, value in about_tests(answer.headers).items()}
        name, data = events[0]
        assert (name, data["ab_test_id"], data["ab_variant_name"]) == ("assigned", id, told["variant"]) and told["test"] == id
        assert events[-1] == ("complete", {"type": "complete", "state": "succeeded"})
        shown = (await get(running, f"{JOBS}/{answer.headers['x-archipelag-job']}")).json()
        assert shown["metadata"] == {"ab_test_id": id, "ab_variant_name": told["variant"]}


def test_jobs_say_their_test() -> None:
    assert sse(ASSIGNED) == b'event: assigned\ndata: {"type":"assigned","ab_test_id":"ab_1","ab_variant_name":"new"}\n\n'
    shown = job_json(replace(JOB, rating=-1), 0, None)
    assert (shown["metadata"], shown["rating"]) == (METADATA, "down")
    plain = job_json(replace(JOB, ab_test="", ab_arm=""), 0, None)
    assert (plain["metadata"], plain["rating"]) == ({}, None)


# ---- the page


def fields_of(before: str) -> list[str]:
    """The names in the first braces behind these words."""
    found = re.search(re.escape(before) + r"`\{([^}]*)\}`", PAGE)
    assert found is not None, before
    return found[1].split(", ")


def test_the_page_has_every_field() -> None:
    told = ab_json.results_json(Results(DRAFT, {}, judge(PLAN, {}, 0.0), 0.0, ""))
    assert fields_of("A test: ") == list(told["test"])
    assert fields_of("a variant there is ") == list(told["test"]["variants"][0])
    assert fields_of("Results: ") == list(told)
    assert fields_of("- A variant: ") == list(told["variants"][0])
    assert fields_of("- A comparison of the primary metric: ") == list(told["comparisons"][0])
    assert fields_of("- A guardrail: ") == list(told["guardrails"][0])
    assert fields_of("- `sample_ratio`: ") == list(told["sample_ratio"])
    assert fields_of("- `decision`: ") == list(told["decision"])
    assert all(f"`{verdict}`" in PAGE for verdict in Verdict) and all(f"`{state}`" in PAGE for state in AbState)


def test_the_page_has_every_limit_and_code() -> None:
    written = dict(re.findall(r"^\| `(AB_\w+)` \| ([0-9.,]+) \|", PAGE, re.MULTILINE))
    assert {name: float(value.replace(",", "")) for name, value in written.items()} == {
        name: float(getattr(limits, name)) for name in written
    }
    assert {"AB_VARIANTS_MAX", "AB_SAMPLES_MIN", "AB_HOURS_MAX", "AB_UNIT_CHARS_MAX"} <= set(written)
    for fault in AbFault:
        assert re.search(rf"{STATUS[fault]} [^|;]*`{fault.value}`", PAGE), fault
