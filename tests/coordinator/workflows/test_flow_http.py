"""Workflows over HTTP: what a run looks like, how it is cancelled, run again and priced, and what is wrong with a request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator.books import run_queries
from coordinator.books.jobs import Job, JobState
from coordinator.keys import create_key
from privacy.keys import NodeKey
from protocol.envelope import Label, seal
from protocol.errors import Code
from protocol.prices import Ask, format_credits
from tests.coordinator.clients import http
from tests.coordinator.desks import CREDIT, error_of, funds, get, opened, rows, until, url_of
from tests.coordinator.fakes import FakeIsland, Running, Script, island
from tests.coordinator.workflows.flow_http import (
    CHAIN,
    RUNS,
    SAVED,
    begin,
    by_key,
    ended,
    send,
    shown,
    states,
    step,
    watch,
)

ALL = 10_000 * CREDIT
ASK = Ask(per_job=1000)
AGAIN = {"x-stainless-retry-count": "1"}


async def test_a_run_from_its_request_to_its_output(database_url: str) -> None:
    async with opened(database_url, island(1, ask=ASK)) as running:
        answer = await send(running, RUNS, {"name": "talk", "definition": CHAIN, "input": {"text": "one two"}})
        assert answer.status_code == 201 and answer.headers["Location"] == f"{RUNS}/{answer.json()['id']}"
        run = await ended(running, answer.json()["id"])
        assert (run["state"], run["name"], run["error"], run["origin"]) == ("succeeded", "talk", None, None)
        assert run["output"]["third"]["text"] == "then got one two"
        assert [each["output"]["text"] for each in run["steps"]] == ["one two", "got one two", "then got one two"]
        assert [(each["state"], each["attempts"], each["price"]) for each in run["steps"]] == 3 * [("succeeded", 1, "0.001")]
        assert run["price"] == format_credits(3000) and run["completed_at"] > run["created_at"]
        for each in run["steps"]:
            assert each["started_at"] <= each["completed_at"] and each["job_ids"] == [f"{run['id']}.{each['key']}.0.1"]
        listed = (await get(running, RUNS)).json()
        assert listed["meta"]["total"] == 1 and listed["data"][0] == {key: run[key] for key in listed["data"][0]}
        assert (await get(running, "/api/v1/jobs")).json()["data"] == [], "its jobs are not listed as jobs of their own"
        job = (await get(running, f"/api/v1/jobs/{run['steps'][0]['job_ids'][0]}/output")).json()
        assert job["output"]["text"] == "one two"
        assert await funds(running) == (ALL - 3000, 0)


async def test_a_live_run_shows_what_is_done(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(times=1), Script(hang_after=0, until=more, times=1), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        run_id = await begin(running, *CHAIN["steps"], body={"input": {"text": "one"}})
        seen: list[Any] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, running, run_id, seen)
            await until(lambda: one.open_now == 1 and len(one.requests) == 2)
            await until(lambda: len(seen) >= 2)
            run = await shown(running, run_id)
            assert states(run) == {"first": "succeeded", "second": "running", "third": "pending"}
            assert run["state"] == "running" and by_key(run)["first"]["output"]["text"] == "one" and run["output"] is None
            assert run["price"] == "0.001" and by_key(run)["second"]["completed_at"] is None
            more.set()
        assert (await ended(running, run_id))["state"] == "succeeded"
        told = [(data.get("key"), data["state"]) for _, data in seen]
        assert told[-1] == (None, "succeeded") and seen[-1][0] == "complete"
        assert [each for each in told if each[1] == "succeeded"][:3] == [(key, "succeeded") for key in ("first", "second", "third")]
        assert told.index(("second", "running")) < told.index(("second", "succeeded"))
        late = await watch(running, run_id)
        assert [(name, data["state"]) for name, data in late] == 3 * [("step", "succeeded")] + [("complete", "succeeded")]


async def test_the_timeline(tmp_path: Path) -> None:
    one = island(1, Script(refuse=None, times=1), Script(fail_after=0, failure=Code.CARGO_FAILED, times=1), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        run_id = await begin(running, step("a"), step("b", depends_on=["a"], retry={"max_attempts": 2, "backoff_s": 0.01}))
        await ended(running, run_id)
        told = (await get(running, f"{RUNS}/{run_id}/timeline")).json()
        events = [(event["type"], event["step"], event["attempt"]) for event in told["events"]]
        assert events == [
            ("run_begun", None, None),
            ("begun", "a", 1),
            ("succeeded", "a", 1),
            ("begun", "b", 1),
            ("failed", "b", 1),
            ("tried_again", "b", 2),
            ("succeeded", "b", 2),
            ("run_succeeded", None, None),
        ]
        assert all(event["island"] == one.peer and event["duration_ms"] >= 0 for event in told["events"] if event["type"] == "succeeded")
        assert told["events"][4]["error"]["code"] == "cargo_failed"


async def test_an_island_that_dies_costs_a_try_elsewhere(tmp_path: Path) -> None:
    dying, other = island(1, Script(fail_after=1, failure=Code.LINK_LOST, times=1), ask=ASK), island(2, ask=ASK)
    async with opened(url_of(tmp_path), dying, other) as running:
        run_id = await begin(running, step("a", "one two three"), step("b", "{{ a.output.text }}"))
        run = await ended(running, run_id)
        assert run["state"] == "succeeded" and by_key(run)["b"]["output"]["text"] == "one two three"
        assert by_key(run)["a"]["attempts"] == 1, "the job itself went on at another Island"


async def test_failures_over_http(tmp_path: Path) -> None:
    def bad() -> Script:
        return Script(fail_after=0, failure=Code.CARGO_FAILED, times=3)

    async with opened(url_of(tmp_path), one := island(1, bad(), ask=ASK)) as running:
        trying = step("a", retry={"max_attempts": 3, "backoff_s": 0.01})
        run = await ended(running, await begin(running, trying, step("b", depends_on=["a"])))
        assert (run["state"], states(run)) == ("failed", {"a": "failed", "b": "blocked"})
        assert run["error"]["code"] == "cargo_failed" and run["error"]["message"].startswith("step a: ")
        assert (by_key(run)["a"]["attempts"], by_key(run)["a"]["error"]["code"], by_key(run)["a"]["price"]) == (3, "cargo_failed", "0")
        one.scripts = [bad()]
        skipping = step("a", on_failure={"action": "skip", "max_attempts": 3, "backoff_s": 0.01}), step("b", "b {{ a.state }}")
        run = await ended(running, await begin(running, *skipping))
        assert (run["state"], states(run)) == ("succeeded", {"a": "skipped", "b": "succeeded"})
        assert by_key(run)["a"]["output"] is None and by_key(run)["b"]["output"]["text"] == "b skipped"
        assert await funds(running) == (ALL - 1000, 0)


async def test_a_fan_out_and_what_its_items_said(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        steps = (
            step("each", "say {{ item }}", for_each="{{ input.words }}"),
            step("join", "{{ each.outputs | map(attribute='text') | join(', ') }}"),
        )
        run = await ended(running, await begin(running, *steps, body={"input": {"words": ["one", "two", "three"]}}))
        each = by_key(run)["each"]
        assert each["output"] is None and [it["text"] for it in each["outputs"]] == ["say one", "say two", "say three"]
        assert each["tasks"] == each["attempts"] == 3 and len(each["job_ids"]) == 3 and each["price"] == "0.003"
        assert run["output"] == {"join": by_key(run)["join"]["output"]} and run["output"]["join"]["text"] == "say one, say two, say three"


async def test_an_output_of_ones_own_and_best_effort(tmp_path: Path) -> None:
    one = island(1, Script(fail_after=0, failure=Code.CARGO_FAILED, times=1), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        run_id = await begin(
            running,
            step("a"),
            step("b", "b", depends_on=["a"]),
            output={"it": "{{ a.state }}"},
            fail_mode="fail_fast",
            body={"fail_mode": "best_effort"},
        )
        run = await ended(running, run_id)
        assert (run["state"], run["output"], states(run)) == ("failed", {"it": "failed"}, {"a": "failed", "b": "blocked"})


async def test_a_run_that_is_cancelled(tmp_path: Path) -> None:
    one = island(1, Script(times=1), Script(hang_after=0), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        run_id = await begin(running, *CHAIN["steps"], body={"input": {"text": "one"}})
        await until(lambda: len(one.requests) == 2)
        answer = await send(running, f"{RUNS}/{run_id}", None, "DELETE")
        message = "the run was cancelled; what its finished steps said is kept"
        assert answer.json() == {"id": run_id, "state": "cancelled", "message": message}
        assert one.cancelled == 1
        run = await shown(running, run_id)
        assert states(run) == {"first": "succeeded", "second": "cancelled", "third": "cancelled"}
        assert by_key(run)["first"]["output"]["text"] == "one" and run["output"] is None and run["state"] == "cancelled"
        assert await funds(running) == (ALL - 1000, 0)
        assert (await send(running, f"{RUNS}/{run_id}", None, "DELETE")).json()["state"] == "cancelled"
        one.scripts = []
        again = await send(running, f"{RUNS}/{run_id}/rerun", {"from": "second"})
        run = await ended(running, again.json()["id"])
        assert run["state"] == "succeeded" and len(one.requests) == 4 and run["output"]["third"]["text"] == "then got one"


async def test_run_again_from_a_step(database_url: str) -> None:
    async with opened(database_url, one := island(1, ask=ASK)) as running:
        steps = (
            step("a", "{{ input }}"),
            step("each", "{{ item }} {{ a.output.text }}", for_each=["x", "y"]),
            step("b", "b {{ a.output.text }}"),
            step("end", "{{ each.outputs[1].text }} + {{ b.output.text }}"),
        )
        first = await ended(running, await begin(running, *steps, body={"input": "one"}))
        assert len(one.requests) == 5
        one.scripts = [Script(words=("other",), times=1)]
        answer = await send(running, f"{RUNS}/{first['id']}/rerun", {"from": "b"})
        assert answer.status_code == 201
        second = await ended(running, answer.json()["id"])
        assert (second["state"], second["origin"], second["name"]) == ("succeeded", first["id"], "test")
        assert len(one.requests) == 7 and second["output"]["end"]["text"] == "y one + other"
        assert [each["taken_over"] for each in second["steps"]] == [True, True, False, False]
        assert by_key(second)["each"]["outputs"][0]["text"] == "x one" and by_key(second)["a"]["job_ids"] == []
        third = await ended(running, (await send(running, f"{RUNS}/{second['id']}/rerun", {"from": "end"})).json()["id"])
        assert len(one.requests) == 8 and third["output"]["end"]["text"] == "y one + other", "what it took over is taken over again"
        error_of(await send(running, f"{RUNS}/{first['id']}/rerun", {"from": "nothing"}), 400, "unknown_step", "from")
        error_of(await send(running, f"{RUNS}/{first['id']}/rerun", {}), 400, "missing_required_parameter", "from")
        error_of(await send(running, f"{RUNS}/wf_nothing/rerun", {"from": "a"}), 404, "unknown_job")
        books = running.server.books
        await books.change(lambda connection: connection.exec_driver_sql("UPDATE jobs SET output = '', result_expires_at_ms = 0"))
        error_of(await send(running, f"{RUNS}/{first['id']}/rerun", {"from": "b"}), 410, "output_expired")


async def test_a_run_that_goes_on_is_not_run_again(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, Script(hang_after=0), ask=ASK)) as running:
        run_id = await begin(running, step("a"))
        error_of(await send(running, f"{RUNS}/{run_id}/rerun", {"from": "a"}), 409, "run_running")
        await send(running, f"{RUNS}/{run_id}", None, "DELETE")


async def test_a_request_that_comes_again_makes_no_second_run(database_url: str) -> None:
    async with opened(database_url, one := island(1, ask=ASK)) as running:
        body = {"name": "x", "definition": {"steps": [step("a")]}, "max_price": "1"}
        first = await send(running, RUNS, body, headers={"Idempotency-Key": "k1"})
        again = await send(running, RUNS, body, headers={"Idempotency-Key": "k1"})
        assert first.json()["id"] == again.json()["id"] and again.headers["x-archipelag-replayed"] == "true"
        assert "x-archipelag-replayed" not in first.headers
        other = await send(running, RUNS, {**body, "name": "y"}, headers={"Idempotency-Key": "k1"})
        error_of(other, 422, "idempotency_key_reused")
        await ended(running, first.json()["id"])
        retry = await send(running, RUNS, body, headers=AGAIN)
        assert retry.json()["id"] == first.json()["id"] and len(one.requests) == 1
        plain = await send(running, RUNS, body)
        assert plain.json()["id"] != first.json()["id"]
        await ended(running, plain.json()["id"])
        rerun = f"{RUNS}/{first.json()['id']}/rerun"
        ids = {(await send(running, rerun, {"from": "a"}, headers={"Idempotency-Key": "k2"})).json()["id"] for _ in range(2)}
        assert len(ids) == 1
        await ended(running, ids.pop())


async def test_nobody_sees_anothers_runs(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        run_id = await begin(running, step("a"))
        await ended(running, run_id)
        stranger = create_key(running.database_url, "stranger")
        for path in ("", "/timeline", "/stream"):
            error_of(await get(running, f"{RUNS}/{run_id}{path}", stranger), 404, "unknown_job")
        error_of(await send(running, f"{RUNS}/{run_id}", None, "DELETE", key=stranger), 404, "unknown_job")
        error_of(await send(running, f"{RUNS}/{run_id}/rerun", {"from": "a"}, key=stranger), 404, "unknown_job")
        assert (await get(running, RUNS, stranger)).json()["data"] == []
        assert (await get(running, f"{RUNS}/{run_id}", "")).status_code == 401
        reading = create_key(running.database_url, scopes=("read",))
        assert (await send(running, RUNS, {"definition": {"steps": [step("a")]}}, key=reading)).status_code == 403


async def test_a_quote_for_all_of_it(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), one := island(1, ask=ASK)) as running:
        steps = [step("a"), step("each", "{{ item }}", for_each="{{ input }}", max_items=5), step("own", bid_price="0.5")]
        definition = {"steps": [*steps, {"key": "no", "cargo": "nobody", "input": {}}]}
        quoted = (await send(running, f"{RUNS}/quote", {"definition": definition, "input": ["x"]})).json()
        prices = {line["step"]: (line["jobs_max"], line["price_each_max"]) for line in quoted["steps"]}
        assert prices == {"a": (1, "0.00105"), "each": (5, "0.00105"), "own": (1, "0.5")} and quoted["unpriced"] == ["no"]
        assert (quoted["price_max"], quoted["jobs_max"]) == ("0.5063", 7)
        bid = (await send(running, f"{RUNS}/quote", {"definition": {"steps": steps}, "bid_price": "0.002"})).json()
        assert bid["price_max"] == "0.512"
        dear = {"definition": {"steps": steps}, "input": ["x"], "max_price": "0.5"}
        error_of(await send(running, RUNS, dear), 402, "over_max_price", "max_price")
        assert not one.requests
        run_id = (await send(running, RUNS, {**dear, "max_price": "0.6"})).json()["id"]
        run = await ended(running, run_id)
        assert (run["state"], run["quote"]["price_max"]) == ("succeeded", "0.5063")
        held = {job.id.split(".")[1]: job.bid_micros for job in await jobs_of(running, run_id)}
        assert held == {"a": 1050, "each": 1050, "own": 500_000}


async def jobs_of(running: Running, run_id: str) -> list[Job]:
    return await running.server.books.ask(run_queries.children_of, run_id)


async def test_a_run_stops_at_its_price(tmp_path: Path) -> None:
    """Prices rise after its quote: it spends no more than it may."""
    one = island(1, Script(times=1), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        gate = trio.Event()
        one.scripts = [Script(hang_after=0, until=gate, times=1)]
        run_id = await begin(running, step("a"), step("b", depends_on=["a"]), body={"max_price": "0.0025"})
        await until(lambda: one.open_now == 1)
        one.offers = (replace(one.offers[0], ask=Ask(per_job=9000)),)
        running.port.advertise(one)
        gate.set()
        run = await ended(running, run_id)
        assert (run["state"], run["error"]["code"], run["price"]) == ("failed", "over_max_price", "0.001")
        assert await funds(running) == (ALL - 1000, 0)


BAD: dict[str, tuple[Any, str, str | None]] = {
    "nothing": ({}, "missing_required_parameter", "definition"),
    "both": ({"definition": {"steps": []}, "workflow": "x"}, "invalid_value", "definition"),
    "no object": ({"definition": []}, "invalid_type", "definition"),
    "no steps": ({"definition": {"steps": []}}, "invalid_workflow", "steps"),
    "itself": ({"definition": {"steps": [step("a", depends_on=["a"])]}}, "invalid_workflow", "steps[0].depends_on[0]"),
    "circle": ({"definition": {"steps": [step("a", depends_on=["b"]), step("b", depends_on=["a"])]}}, "invalid_workflow", "steps"),
    "unknown": ({"definition": {"steps": [step("a", "{{ nobody.output.text }}")]}}, "invalid_workflow", "steps[0].input.prompt"),
    "attribute": ({"definition": {"steps": [step("a", "{{ ''.__class__ }}")]}}, "invalid_workflow", "steps[0].input.prompt"),
    "fail mode": ({"definition": {"steps": [step("a")]}, "fail_mode": "never"}, "invalid_workflow", "fail_mode"),
    "no mode": ({"definition": {"steps": [step("a")]}, "fail_mode": 7}, "invalid_type", "fail_mode"),
    "price": ({"definition": {"steps": [step("a")]}, "max_price": "-1"}, "invalid_value", "max_price"),
    "bid": ({"definition": {"steps": [step("a")]}, "bid_price": "x"}, "invalid_value", "bid_price"),
    "name": ({"definition": {"steps": [step("a")]}, "name": "a\nb"}, "invalid_value", "name"),
    "long name": ({"definition": {"steps": [step("a")]}, "name": "x" * 129}, "string_above_max_length", "name"),
    "quote": ({"definition": {"steps": [step("a")]}, "quote": "q"}, "invalid_value", "quote"),
    "policy": ({"definition": {"steps": [step("a")]}, "policy": {"regions": 7}}, "invalid_value", "policy"),
    "half": ({"definition": {"steps": [step("a")]}, "input": "\ud800"}, "invalid_value", "input"),
    "reference": ({"workflow": "a@b@c"}, "invalid_value", "workflow"),
}


async def test_bad_requests_cost_nothing(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), one := island(1, ask=ASK)) as running:
        for name, (body, code, param) in BAD.items():
            answer = await raw(running, json.dumps(body))
            assert answer.status_code == 400, (name, answer.text)
            error_of(answer, 400, code, param)
        deep = "[" * 500 + "]" * 500
        answer = await raw(running, '{"definition": {"steps": [{"key": "a", "cargo": "echo"}]}, "input": ' + deep + "}")
        error_of(answer, 400, "invalid_value", "input")
        error_of(await send(running, RUNS, {"workflow": "nobody/has@1"}), 404, "unknown_workflow")
        error_of(await get(running, f"{RUNS}/nothing"), 404, "unknown_job")
        error_of(await get(running, f"{RUNS}/wf_%00"), 404, "unknown_job")
        error_of(await get(running, f"{RUNS}?limit=x"), 400, "invalid_value", "limit")
        assert not one.requests and await rows(running) == []


async def raw(running: Running, body: str) -> httpx.Response:
    async with http(running) as client:
        return await client.post(RUNS, content=body)


async def test_what_is_too_large_to_be_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        run_id = await begin(running, step("a", "word " * 100), step("b", depends_on=["a"]))
        await ended(running, run_id)
        monkeypatch.setattr("protocol.limits.FLOW_TAKEN_BYTES_MAX", 500)
        error_of(await send(running, f"{RUNS}/{run_id}/rerun", {"from": "b"}), 422, "outputs_too_large")
        monkeypatch.setattr("protocol.limits.FLOW_SHOWN_BYTES_MAX", 300)
        error_of(await get(running, f"{RUNS}/{run_id}"), 422, "outputs_too_large")
        error_of(await send(running, f"{RUNS}/{run_id}/rerun", {"from": "b"}), 422, "outputs_too_large")
        assert [name for name, _ in await watch(running, run_id)] == ["step", "step", "complete"]
        assert len((await get(running, f"{RUNS}/{run_id}/timeline")).json()["events"]) == 6


async def test_so_many_runs_of_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.FLOW_RUNS_OPEN_MAX", 1)
    async with opened(url_of(tmp_path), island(1, Script(hang_after=0, times=1), ask=ASK)) as running:
        body = {"definition": {"steps": [step("a")]}}
        first = await send(running, RUNS, body, headers={"Idempotency-Key": "k"})
        error = await send(running, RUNS, body)
        error_of(error, 429, "too_many_runs")
        assert error.headers["Retry-After"]
        assert (await send(running, RUNS, body, headers={"Idempotency-Key": "k"})).json()["id"] == first.json()["id"]
        await send(running, f"{RUNS}/{first.json()['id']}", None, "DELETE")
        assert (await send(running, RUNS, body)).status_code == 201


# ---- saved definitions


async def test_saved_versions_run_and_are_published(database_url: str) -> None:
    async with opened(database_url, island(1, ask=ASK)) as running:
        first = await send(running, f"{SAVED}/talk", {"definition": CHAIN}, "PUT")
        assert (first.status_code, first.json()["version"], first.json()["is_new"]) == (201, 1, True)
        again = await send(running, f"{SAVED}/talk", {"definition": CHAIN}, "PUT")
        assert (again.status_code, again.json()["version"], again.json()["is_new"]) == (200, 1, False)
        other = {"steps": [step("only", "saved {{ input }}")]}
        assert (await send(running, f"{SAVED}/talk", {"definition": other}, "PUT")).json()["version"] == 2
        one = (await get(running, f"{SAVED}/talk@1")).json()
        assert one["definition"]["steps"][0]["key"] == "first" and one["address"] == first.json()["address"] and one["signer"] is None
        assert (await get(running, f"{SAVED}/talk")).json()["version"] == 2
        assert [it["version"] for it in (await get(running, f"{SAVED}/talk/versions")).json()["data"]] == [2, 1]
        assert [it["id"] for it in (await get(running, SAVED)).json()["data"]] == ["local/talk@2"]
        run = await ended(running, (await send(running, RUNS, {"workflow": "talk", "input": "x"})).json()["id"])
        assert (run["name"], run["workflow"], run["output"]["only"]["text"]) == ("talk", "local/talk@2", "saved x")
        stranger = create_key(running.database_url, "stranger")
        for path in (f"{SAVED}/local/talk@1", f"{SAVED}/local/talk"):
            error_of(await get(running, path, stranger), 404, "unknown_workflow")
        error_of(await send(running, RUNS, {"workflow": "local/talk@1"}, key=stranger), 404, "unknown_workflow")
        told = (await send(running, f"{SAVED}/talk/publish", {"version": 1})).json()
        assert (told["id"], told["is_published"]) == ("local/talk@1", True)
        found = (await get(running, f"{SAVED}/local/talk@1", stranger)).json()
        assert found["definition"] == one["definition"]
        assert [it["id"] for it in (await get(running, f"{SAVED}?published=true", stranger)).json()["data"]] == ["local/talk@1"]
        begun = await send(running, RUNS, {"workflow": "local/talk@1", "input": {"text": "hi"}}, key=stranger)
        assert begun.status_code == 201 and begun.json()["workflow"] == "local/talk@1"
        error_of(await send(running, f"{SAVED}/talk/publish", {"version": 1}, key=stranger), 404, "unknown_workflow")
        assert (await send(running, f"{SAVED}/talk", None, "DELETE")).json() == {"name": "talk", "deleted": 1}
        error_of(await send(running, f"{SAVED}/talk", None, "DELETE"), 409, "workflow_published")
        error_of(await send(running, f"{SAVED}/nothing", None, "DELETE"), 404, "unknown_workflow")
        error_of(await get(running, f"{SAVED}/nothing/versions"), 404, "unknown_workflow")
        await until(lambda: not running.server.desk.live)


async def test_what_is_saved_is_checked_and_sealed(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        error_of(await send(running, f"{SAVED}/x", {"definition": {"steps": []}}, "PUT"), 400, "invalid_workflow", "steps")
        error_of(await send(running, f"{SAVED}/.x", {"definition": CHAIN}, "PUT"), 400, "invalid_value", "name")
        error_of(await send(running, f"{SAVED}/x", {}, "PUT"), 400, "missing_required_parameter", "definition")
        secret = "a-secret-prompt-of-mine"
        await send(running, f"{SAVED}/x", {"definition": {"steps": [step("a", secret)]}}, "PUT")
        run_id = await begin(running, step("a", secret))
        await ended(running, run_id)
        files = [file for file in tmp_path.iterdir() if file.is_file()]
        assert not [file for file in files if secret.encode() in file.read_bytes()]
        error_of(await send(running, f"{SAVED}/x/publish", {"envelope": "xyz"}), 400, "invalid_value", "envelope")
        error_of(await send(running, f"{SAVED}/x/publish", {"envelope": "00"}), 400, "bad_signature")
        error_of(await send(running, f"{SAVED}/x/publish", {"version": 0}), 400, "invalid_value", "version")
        found = (await get(running, f"{SAVED}/x")).json()
        key = NodeKey(bytes([3]) * 32)
        signed = seal(Label.WORKFLOW, json.dumps(found["definition"], sort_keys=True, separators=(",", ":")).encode(), key)
        told = (await send(running, f"{SAVED}/x/publish", {"envelope": signed.hex()})).json()
        assert (told["signer"], told["envelope"]) == (key.peer_id, signed.hex())


def counted(*islands: FakeIsland) -> list[str]:
    return sorted(request.prompt for one in islands for request in one.requests)


async def test_children_leave_nothing_behind(tmp_path: Path) -> None:
    """A cancelled run's jobs are all ended, and hold nothing."""
    one = island(1, Script(hang_after=0), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        many = step("many", "{{ item }}", for_each="{{ input }}", max_items=100)
        run_id = await begin(running, many, body={"input": [str(n) for n in range(100)]})
        await until(lambda: one.open_now == 64)
        await send(running, f"{RUNS}/{run_id}", None, "DELETE")
        assert {job.state for job in await jobs_of(running, run_id)} == {JobState.CANCELLED} and one.open_now == 0
        assert await funds(running) == (ALL, 0) and len(counted(one)) == 64
