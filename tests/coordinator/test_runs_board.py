"""The board of runs, with runners of the tests' own: what their bugs end, and what a cancel does not wait for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from coordinator.books import run_queries
from coordinator.books.errors import BooksRefused
from coordinator.books.jobs import Job, JobState
from coordinator.books.runs import RunKind, RunState
from coordinator.runs.board import RunBoard, RunContext, RunResult
from coordinator.server import CoordinatorServer
from tests.coordinator.desks import opened, until, url_of

ACCOUNT = "local"


class Sleeper:
    """Runs until it is cancelled. ``breaks``: then it has a bug."""

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks
        self.seen: list[dict[str, Job]] = []

    async def run(self, context: RunContext) -> RunResult:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    async def cancelled(self, context: RunContext) -> RunResult:
        self.seen.append(dict(context.done))
        if self.breaks:
            raise LookupError("a bug")
        return RunResult(RunState.CANCELLED, {"kept": len(context.spec)})


def board_of(server: CoordinatorServer) -> RunBoard:
    return server._parts.runs


async def test_a_bug_while_it_is_cancelled_ends_this_run_only(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running:
        board = board_of(running.server)
        board.runners[RunKind.WORKFLOW] = Sleeper(breaks=True)
        await board.submit("wf_1", ACCOUNT, RunKind.WORKFLOW, "one", 1, b"spec")
        run = await board.cancel("wf_1", ACCOUNT, RunKind.WORKFLOW)
        assert (run.state, run.error_code) == (RunState.FAILED, "internal_error")
        await board.submit("wf_2", ACCOUNT, RunKind.WORKFLOW, "two", 1, b"spec")  # the board goes on
        assert board.is_live("wf_2")


async def test_a_cancel_does_not_wait_for_jobs_of_a_coordinator_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = Job("wf_1.a.0.1", ACCOUNT, "echo", "job", JobState.RUNNING, 0, 1, "market", "another", 1, 1, parent="wf_1")
    done = replace(left, id="wf_1.b.0.1", state=JobState.SUCCEEDED)
    async with opened(url_of(tmp_path)) as running:
        board, sleeper = board_of(running.server), Sleeper()
        board.runners[RunKind.WORKFLOW] = sleeper
        monkeypatch.setattr(run_queries, "children_of", lambda connection, run_id: [left, done])
        run, _ = await board.submit("wf_1", ACCOUNT, RunKind.WORKFLOW, "one", 1, b"spec")
        board._live["wf_1"].scope.cancel()  # as if it had gone with its Coordinator
        await until(lambda: not board.is_live("wf_1"))
        board._start(replace(run, state=RunState.RUNNING), None)
        await trio.testing.wait_all_tasks_blocked()
        assert len(sleeper.seen) == 1  # it waits
        live = board._live["wf_1"]
        live.scope.cancel()
        with trio.fail_after(5):
            await live.ended.wait()
        assert sleeper.seen[-1] == {done.id: done}


async def test_a_specification_that_cannot_be_read_is_a_lost_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url_of(tmp_path)) as running:
        board = board_of(running.server)
        board.runners[RunKind.WORKFLOW] = Sleeper()
        run, _ = await board.submit("wf_1", ACCOUNT, RunKind.WORKFLOW, "one", 1, b"spec")
        board._live["wf_1"].scope.cancel()
        await until(lambda: not board.is_live("wf_1"))
        results: list[RunResult] = []

        async def end(_run: object, result: RunResult) -> None:
            results.append(result)

        monkeypatch.setattr(board, "_end", end)
        board._start(replace(run, spec=b"damaged" * 10), None)
        await until(lambda: bool(results))
        assert (results[0].state, results[0].error_code) == (RunState.FAILED, "run_lost")


async def test_nobody_elses_run_can_be_cancelled(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running:
        board = board_of(running.server)
        board.runners[RunKind.WORKFLOW] = Sleeper()
        await board.submit("wf_1", ACCOUNT, RunKind.WORKFLOW, "one", 1, b"spec")
        with pytest.raises(BooksRefused):
            await board.cancel("wf_1", "somebody", RunKind.WORKFLOW)
        assert board.is_live("wf_1")
