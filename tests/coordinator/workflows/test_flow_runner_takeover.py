"""Workflows whose Coordinator dies, goes in good order, loses the database or is asked about at another one."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator import upkeep
from coordinator.books import run_queries
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import JobState
from coordinator.books.runs import OpenRun, Run, RunKind, RunState
from coordinator.orders import Identity
from coordinator.runs.board import RunBoard
from privacy.sealed_rows import RowSealer
from protocol.errors import Code
from protocol.prices import Ask
from tests.coordinator.desks import CREDIT, OTHER, Event, funds, get, mortal, opened, until, url_of
from tests.coordinator.fakes import FakeIsland, Running, Script, island
from tests.coordinator.workflows.flow_http import CHAIN, RUNS, begin, by_key, ended, send, shown, states, step, watch

ALL = 10_000 * CREDIT
ASK = Ask(per_job=1000)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats of 40 ms; who is silent for 0.4 s is dead."""
    monkeypatch.setattr(upkeep, "BEAT_S", 0.04)
    monkeypatch.setattr(upkeep, "DEAD_S", 0.4)
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.1)
    monkeypatch.setattr("coordinator.runs.board._POLL_S", 0.02)
    monkeypatch.setattr("coordinator.workflows.flows._POLL_S", 0.02)


def prompts(*islands: FakeIsland) -> list[str]:
    return [request.prompt for one in islands for request in one.requests]


async def test_another_coordinator_goes_on_behind_the_finished_steps(database_url: str) -> None:
    hung, fresh = island(1, Script(times=1), Script(hang_after=0), ask=ASK), island(2, ask=ASK)
    async with mortal(database_url, hung) as first, opened(database_url, fresh, key=OTHER, api_key=first.running.key) as second:
        run_id = await begin(first.running, *CHAIN["steps"], body={"input": {"text": "one"}})
        await until(lambda: len(hung.requests) == 2)

        async def is_seen() -> bool:
            return states(await shown(second, run_id))["first"] == "succeeded"

        await until(is_seen)
        there = await shown(second, run_id)
        assert there["state"] == "running" and by_key(there)["first"]["output"]["text"] == "one" and states(there)["third"] == "pending"
        seen: list[Event] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, second, run_id, seen)
            await until(lambda: bool(seen))
            await first.kill()
            run = await ended(second, run_id)
        assert (run["state"], run["output"]["third"]["text"]) == ("succeeded", "then got one")
        assert prompts(hung) == ["one", "got one"] and prompts(fresh) == ["got one", "then got one"]
        assert [(each["attempts"], len(each["job_ids"])) for each in run["steps"]] == [(1, 1), (2, 2), (1, 1)]
        assert seen[-1][0] == "complete" and {data["key"] for name, data in seen if name == "step"} == {"first", "second", "third"}
        assert await funds(second) == (ALL - 3000, 0)
        told = (await get(second, f"{RUNS}/{run_id}/timeline")).json()["events"]
        assert [(it["type"], it["error"] and it["error"]["code"]) for it in told if it["step"] == "second"] == [
            ("begun", None),
            ("failed", "coordinator_lost"),
            ("tried_again", None),
            ("succeeded", None),
        ]


async def test_a_coordinator_that_was_only_asleep_leaves_the_run_to_who_has_it(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job ends after another one has taken the run over: it is not paid, and nothing behind it begins here."""
    gate = trio.Event()
    sleeper, fresh = island(1, Script(hang_after=1, until=gate, times=1), ask=ASK), island(2, ask=ASK)
    async with opened(database_url, sleeper) as first, opened(database_url, fresh, key=OTHER, api_key=first.key) as second:
        run_id = await begin(first, *CHAIN["steps"], body={"input": {"text": "one two"}})
        await until(lambda: len(sleeper.requests) == 1)

        def nothing(*_arguments: Any) -> Any:
            raise BooksUnavailable("asleep")

        with pytest.MonkeyPatch.context() as asleep:
            asleep.setattr(first.server._parts.upkeep, "_beat", nothing)
            run = await ended(second, run_id)
            gate.set()
            await until(lambda: run_id not in first.server._parts.flows._runner.live)
        assert run["state"] == "succeeded" and run["output"]["third"]["text"] == "then got one two"
        assert prompts(sleeper) == ["one two"] and prompts(fresh) == ["one two", "got one two", "then got one two"]
        assert await funds(second) == (ALL - 3000, 0)
        assert (await shown(first, run_id))["state"] == "succeeded"


async def test_a_coordinator_that_goes_in_good_order_leaves_its_runs(tmp_path: Path) -> None:
    """Its jobs are cancelled, which is no try of theirs."""
    url, one = url_of(tmp_path), island(1, Script(hang_after=0, times=1), ask=ASK)
    async with opened(url, one) as running:
        run_id = await begin(running, step("a", retry={"max_attempts": 1}), step("b", "b {{ a.output.text }}"))
        await until(lambda: one.open_now == 1)
        key = running.key
    async with opened(url, one, api_key=key) as again:
        run = await ended(again, run_id)
        assert run["state"] == "succeeded" and prompts(one) == ["from a", "from a", "b from a"]
        jobs = {job.id: job.state for job in await again.server.books.ask(run_queries.children_of, run_id)}
        assert jobs[f"{run_id}.a.0.1"] is JobState.CANCELLED and jobs[f"{run_id}.a.0.2"] is JobState.SUCCEEDED


async def test_a_run_is_cancelled_at_another_coordinator(database_url: str) -> None:
    one = island(1, Script(times=1), Script(hang_after=0), ask=ASK)
    async with opened(database_url, one) as first, opened(database_url, island(2), key=OTHER, api_key=first.key) as second:
        run_id = await begin(first, *CHAIN["steps"], body={"input": {"text": "one"}})
        await until(lambda: len(one.requests) == 2)
        await send(second, f"{RUNS}/{run_id}", None, "DELETE")
        run = await ended(second, run_id)
        assert run["state"] == "cancelled" and states(run) == {"first": "succeeded", "second": "cancelled", "third": "cancelled"}
        assert by_key(run)["first"]["output"]["text"] == "one" and one.cancelled == 1


async def test_a_run_that_is_to_be_cancelled_is_not_gone_on_with(database_url: str) -> None:
    hung, fresh = island(1, Script(times=1), Script(hang_after=0), ask=ASK), island(2, ask=ASK)
    async with mortal(database_url, hung) as first, opened(database_url, fresh, key=OTHER, api_key=first.running.key) as second:
        run_id = await begin(first.running, *CHAIN["steps"], body={"input": {"text": "one"}})
        await until(lambda: len(hung.requests) == 2)
        await first.kill()
        await send(second, f"{RUNS}/{run_id}", None, "DELETE")
        run = await ended(second, run_id)
        assert run["state"] == "cancelled" and states(run)["first"] == "succeeded" and not fresh.requests


async def test_the_database_is_away_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was settled meanwhile is found; what could not be is done again; nothing is paid twice."""
    gate = trio.Event()
    one = island(1, Script(times=1), Script(hang_after=0, until=gate, times=1), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        run_id = await begin(running, *CHAIN["steps"], body={"input": {"text": "one"}})
        await until(lambda: len(one.requests) == 2)
        with pytest.MonkeyPatch.context() as away:
            break_books(running, away)
            gate.set()
            await until(lambda: not running.server._parts.flows._runner.live)
        run = await ended(running, run_id)
        assert (run["state"], run["output"]["third"]["text"]) == ("succeeded", "then got one")
        assert prompts(one).count("one") == 1 and prompts(one).count("then got one") == 1
        assert await funds(running) == (ALL - 3000, 0)


def break_books(running: Running, away: pytest.MonkeyPatch) -> None:
    async def nothing(*_arguments: Any) -> Any:
        raise BooksUnavailable("as the test wants it")

    for name in ("do", "do_all", "ask", "change"):
        away.setattr(running.server.books, name, nothing)


async def test_failures_and_pauses_go_on_at_another_coordinator(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    one = island(1, *(Script(fail_after=0, failure=Code.CARGO_FAILED, times=1) for _ in range(2)), ask=ASK)
    retry = {"max_attempts": 3, "backoff_s": 0.6, "factor": 1.0, "jitter": 0.0}
    async with mortal(url, one) as first:
        run_id = await begin(first.running, step("a", retry=retry), step("b", depends_on=["a"]))
        await until(lambda: len(one.requests) == 2)
        await until(lambda: not first.running.server.desk.live)
        await first.kill()
        async with opened(url, one, api_key=first.running.key) as again:
            run = await ended(again, run_id)
            assert run["state"] == "succeeded" and by_key(run)["a"]["attempts"] == 3 and len(one.requests) == 4


async def test_an_output_that_is_gone_fails_the_run(tmp_path: Path) -> None:
    url, one = url_of(tmp_path), island(1, Script(times=1), Script(hang_after=0), ask=ASK)
    async with mortal(url, one) as first:
        run_id = await begin(first.running, *CHAIN["steps"], body={"input": {"text": "one"}})
        await until(lambda: len(one.requests) == 2)

        def forget(connection: Any) -> None:
            connection.exec_driver_sql("UPDATE jobs SET output = '', result_expires_at_ms = 0 WHERE state = 'succeeded'")

        await until(lambda: len(first.running.server.desk.live) == 1)
        await first.running.server.books.change(forget)
        await first.kill()
        async with opened(url, one, api_key=first.running.key) as again:
            run = await ended(again, run_id)
            assert (run["state"], run["error"]["code"], len(one.requests)) == ("failed", "output_expired", 2)


async def test_a_run_that_is_adopted_while_we_go_down_is_left(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        parts, books = running.server._parts, running.server.books
        parts.upkeep._runs = None
        desk, sealer = running.server.desk, RowSealer(bytes(32))
        board = RunBoard(books, desk, desk.kept, sealer, Identity("other", 1), desk._clock_ms, secrets.token_bytes, 60.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(board.run)
            nursery.cancel_scope.cancel()
        await books.do(OpenRun(Run("wf_x", "local", RunKind.WORKFLOW, "", RunState.RUNNING, "gone", 1, 1)))
        await board.tend({})
        run = await books.ask(run_queries.any_run, "wf_x")
        assert run is not None and (run.owner, run.ended, board.is_live("wf_x")) == ("other", False, False)
        new, is_new = await board.submit("wf_y", "local", RunKind.WORKFLOW, "", 1, b"{}")
        assert is_new and not new.ended and not board.is_live("wf_y")


async def test_what_is_kept_of_a_run_goes_after_its_time(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        run_id = await begin(running, *CHAIN["steps"], body={"input": {"text": "one"}})
        await ended(running, run_id)
        await running.server.books.change(run_queries.forget_runs, 2**52)
        run = await shown(running, run_id)
        assert (run["state"], run["steps"], run["output"], run["price"]) == ("succeeded", [], None, "0.003")
        assert (await send(running, f"{RUNS}/{run_id}/rerun", {"from": "first"})).status_code == 410
        events = await watch(running, run_id)
        assert [name for name, _ in events] == ["complete"]
