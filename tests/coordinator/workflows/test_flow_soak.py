"""Random workflows under Coordinators that are killed at random points: what is settled is never done again, and the books add up.

Real Coordinators over SQLite, scripted Islands. Each job's prompt names its run, step and item, so the Islands' own lists say what was
asked of them after a Coordinator had gone.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator import upkeep
from coordinator.books import run_queries
from coordinator.books.books import Books, open_books
from coordinator.books.jobs import JobState
from coordinator.keys import ACCOUNT_DEFAULT, create_key
from coordinator.workflows.flows import Asked, Once
from coordinator.workflows.run_spec import task_of
from protocol.errors import Code
from protocol.prices import Ask
from tests.coordinator.desks import CREDIT, OTHER, funds, mortal, until, url_of
from tests.coordinator.fakes import COORDINATOR, FakeIsland, Running, Script, island

RUNS_AT_ONCE = 5
ASK = Ask(per_job=1000)
KILLS_MAX = 3
Done = tuple[str, str, int]  # run, step and item


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats of 40 ms; who is silent for 0.4 s is dead."""
    monkeypatch.setattr(upkeep, "BEAT_S", 0.04)
    monkeypatch.setattr(upkeep, "DEAD_S", 0.4)
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.1)
    monkeypatch.setattr("coordinator.runs.board._POLL_S", 0.02)


def random_flow(rng: random.Random) -> dict[str, Any]:
    """Edges go from earlier steps to later ones; some steps fan out, have conditions, are tried again or skipped."""
    steps: list[dict[str, Any]] = []
    for number in range(rng.randint(1, 10)):
        needs = rng.sample([one["key"] for one in steps], min(len(steps), rng.choice([0, 1, 1, 2, 3])))
        fans_out = rng.random() < 0.25
        said = " ".join(f"{{{{ {key}.state }}}}" for key in needs)
        prompt = f"{{{{ run.name }}}}|s{number}|{'{{ index }}' if fans_out else 0} words {said}"
        one: dict[str, Any] = {"key": f"s{number}", "cargo": "echo", "input": {"prompt": prompt}}
        if fans_out:
            one["for_each"] = [f"i{n}" for n in range(rng.randint(0, 4))]
        if rng.random() < 0.1:
            one["when"] = False
        if rng.random() < 0.7:
            one["retry"] = {"max_attempts": rng.randint(2, 4), "backoff_s": rng.choice([0.0, 0.02])}
        if rng.random() < 0.4:
            one["on_failure"] = rng.choice(["skip", "retry", "abort"])
        if rng.random() < 0.1:
            one["timeout_s"] = 0.03
        steps.append(one)
    return {"steps": steps, "fail_mode": rng.choice(["fail_fast", "best_effort"])}


def random_island(rng: random.Random, number: int) -> FakeIsland:
    """One job in twelve fails, some take long."""

    def script() -> Script:
        bad = rng.random() < 1 / 12
        token_s, accept_s = rng.choice([0.0, 0.002, 0.01]), rng.choice([0.0, 0.005])
        failure = rng.choice([Code.CARGO_FAILED, Code.WORKER_DIED, Code.LINK_LOST])
        return Script(token_s=token_s, accept_s=accept_s, fail_after=0 if bad else None, failure=failure, times=1)

    return island(number, *(script() for _ in range(60)), ask=ASK)


def asked_of(one: FakeIsland, since: int) -> list[Done]:
    """Run, step and item of each job that came to an Island after its first so many."""
    found = []
    for request in one.requests[since:]:
        run, step, item = request.prompt.split(" ")[0].split("|")
        found.append((run, step, int(item)))
    return found


async def settled(books: Books, run_ids: list[str]) -> dict[Done, int]:
    """Tasks that have succeeded in the books, and how often."""
    found: dict[Done, int] = {}
    for run_id in run_ids:
        for job in await books.ask(run_queries.children_of, run_id):
            task = task_of(run_id, job.id)
            assert task is not None
            if job.state is JobState.SUCCEEDED:
                found[run_id, task.step, task.index] = found.get((run_id, task.step, task.index), 0) + 1
    return found


async def begin(running: Running, run_id: str, flow: dict[str, Any]) -> None:
    asked = Asked(ACCOUNT_DEFAULT, run_id, flow)
    await running.server._parts.flows.start(asked, Once(run_id))


def all_ended(running: Running, runs: list[str]) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        found = [await running.server.books.ask(run_queries.any_run, run_id) for run_id in runs]
        return all(run is not None and run.ended for run in found)

    return look


async def survive(folder: Path, seed: int) -> dict[str, int]:
    """RUNS_AT_ONCE workflows, and Coordinators that go one after the other; what was counted."""
    rng = random.Random(seed)
    url, islands = url_of(folder), [random_island(rng, number) for number in (1, 2)]
    key = create_key(url)
    runs = [f"wf_{seed}x{number}" for number in range(RUNS_AT_ONCE)]
    flows = {run_id: random_flow(rng) for run_id in runs}
    kills = rng.randint(1, KILLS_MAX)
    counts = {"runs": len(runs), "kills": 0, "jobs": 0}
    done: dict[Done, int] = {}
    for life in range(kills + 1):
        marks = [len(one.requests) for one in islands]
        async with mortal(url, *islands, key=rng.choice([COORDINATOR, OTHER]), api_key=key) as one:
            if not life:
                for run_id in runs:
                    await begin(one.running, run_id, flows[run_id])
            is_over = all_ended(one.running, runs)
            if life < kills:
                with trio.move_on_after(rng.random() * 0.4):
                    await until(is_over)
            else:
                await until(is_over, 30.0)
                now = await settled(one.running.server.books, runs)
                counts["jobs"] = sum(now.values())
                assert max(now.values(), default=1) == 1, "a task succeeded twice"
                posted, held = await funds(one.running)
                assert (posted, held) == (10_000 * CREDIT - 1000 * len(now), 0)
            if life < kills:
                await one.kill()
                counts["kills"] += 1
        new = [task for at, each in zip(marks, islands, strict=True) for task in asked_of(each, at)]
        again = set(new) & done.keys()
        assert not again, f"seed {seed}: {sorted(again)} had been settled, and was done again"
        async with open_books(url) as books:
            done = await settled(books, runs)
    return counts


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_settled_is_never_done_again(seed: int, tmp_path: Path) -> None:
    counts = await survive(tmp_path, seed)
    assert counts["runs"] == RUNS_AT_ONCE and counts["kills"] >= 1


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_a_thousand_workflows(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    totals = {"runs": 0, "kills": 0, "jobs": 0}
    for seed in range(1000, 1000 + 1000 // RUNS_AT_ONCE):
        folder = tmp_path / str(seed)
        folder.mkdir()
        counts = await survive(folder, seed)
        totals = {name: totals[name] + counts[name] for name in totals}
    for name, count in totals.items():
        record_property(name, count)
    assert totals["runs"] == 1000 and totals["jobs"] > 1000
