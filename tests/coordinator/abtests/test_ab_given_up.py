"""Jobs of A/B tests on a whole Coordinator that end in no answer: who gives up, who goes down, and what upkeep ends."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import httpx
import pytest
import sqlalchemy as sql
import trio

from coordinator.books import job_queries, schema
from coordinator.books.ab_units import AbUnit
from coordinator.books.jobs import Job, JobState, OpenJob
from coordinator.keys import ACCOUNT_DEFAULT
from coordinator.upkeep import Upkeep
from tests.coordinator.abtests.ab_net import (
    NAME,
    NEW,
    NEW_ASK,
    OLD,
    OLD_ASK,
    chat,
    islands,
    offering,
    started,
    talking,
    units_of,
)
from tests.coordinator.clients import http
from tests.coordinator.desks import OTHER, complaints, opened, submit, until, url_of
from tests.coordinator.fakes import Running, Script, island

USERS = [f"user {number}" for number in range(12)]


async def given_up_by(running: Running, users: list[str], waits: Any) -> None:
    """Each asks, and hangs up once ``waits()`` says so."""
    async with http(running) as client, trio.open_nursery() as nursery:
        for user in users:
            nursery.start_soon(chat, running, user, "one two three", client)
        await until(waits)
        nursery.cancel_scope.cancel()


async def counted(running: Running, id: str, done: Any) -> dict[str, AbUnit]:
    """The counters once they are ``done``: who has hung up does not hear when."""
    with trio.fail_after(5):
        while not done(units := await units_of(running, id)):
            await trio.sleep(0.01)
    return units


async def test_who_gives_up_on_a_version_that_hangs_is_counted(database_url: str) -> None:
    """An API that a client hangs up on, and a job that is cancelled."""
    old, hung = offering(OLD, 1, OLD_ASK), offering(NEW, 2, NEW_ASK, Script(hang_after=1))
    async with talking(database_url, old, hung) as running:
        id = await started(running)
        jobs = [await submit(running, cargo=NAME, user=f"job {number}") for number in range(6)]
        live, asked = running.server.desk.live, len(USERS) + len(jobs)
        # what does not hang has been paid by then
        await given_up_by(running, USERS, lambda: len(old.requests) + len(hung.requests) == asked and len(live) == hung.open_now)
        async with http(running) as client:
            for job in jobs:
                await client.delete(f"/api/v1/jobs/{job}")
        units = await counted(running, id, lambda units: len(units) == asked)
        arms = Counter(unit.arm for unit in units.values())
        assert min(arms.values()) >= 3
        assert {(unit.arm, unit.jobs, unit.abandoned) for unit in units.values()} == {("control", 1, 0), ("new", 0, 1)}
        shown = [unit for unit in units.values() if unit.arm == "new"]
        assert len(shown) == len(hung.requests) and await complaints(running.server.books) == []


async def test_a_coordinator_that_goes_down_is_not_given_up_on(database_url: str) -> None:
    """What it has to leave is cancelled, and says nothing about how patient anybody is."""
    hung = [offering(OLD, 1, OLD_ASK, Script(hang_after=1)), offering(NEW, 2, NEW_ASK, Script(hang_after=1))]

    async def ask(running: Running, user: str) -> None:
        with contextlib.suppress(httpx.HTTPError):  # whatever is left of the connection
            await chat(running, user)

    async with trio.open_nursery() as nursery, talking(database_url, *hung) as first:
        id = await started(first)
        for user in USERS:
            nursery.start_soon(ask, first, user)
        await until(lambda: sum(one.open_now for one in hung) == len(USERS))
    async with opened(database_url, *islands(), key=OTHER, api_key=first.key) as second:
        units = await units_of(second, id)
        assert {(unit.jobs, unit.abandoned) for unit in units.values()} == {(0, 0)} and len(units) == len(USERS)
        states = await second.server.books.ask(ends_of, id)
        assert states == {("cancelled", "coordinator_lost")}


def ends_of(connection: Any, test: str) -> set[tuple[str, str]]:
    rows = connection.execute(sql.select(schema.jobs.c.state, schema.jobs.c.error_code).where(schema.jobs.c.ab_test == test))
    return {(row.state, row.error_code) for row in rows}


@pytest.mark.parametrize("ends", ["expired", "stray"])
async def test_what_upkeep_ends_makes_its_unit_known(tmp_path: Any, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def idle(_upkeep: Upkeep, sweep: bool) -> None:
        """Nothing is tended by itself, or a slow machine's first round takes the job over."""

    monkeypatch.setattr(Upkeep, "_round", idle)
    async with opened(url_of(tmp_path), island(1)) as running:
        books, upkeep, me = running.server.books, running.server._parts.upkeep, running.server.desk.me
        owner = ("gone", 7) if ends == "expired" else (me.owner, me.boot)
        of_test = {"ab_test": "t1", "ab_arm": "new", "ab_unit": "u1", "island": "island"}
        one = Job("j1", ACCOUNT_DEFAULT, NAME, "chat", JobState.SUBMITTED, 0, 0, "market", *owner, 1, **of_test)  # type: ignore[arg-type]
        await books.do(OpenJob(one, 1))
        if ends == "expired":
            await upkeep._sweep({})
        else:
            for _ in range(2):
                await upkeep._tend_own()
        (job,) = [await books.ask(job_queries.job_of, "j1", ACCOUNT_DEFAULT)]
        assert job is not None and job.error_code == ("expired" if ends == "expired" else "books_unavailable")
        assert await units_of(running, "t1") == {"t1/new/u1": AbUnit("t1/new/u1", "t1", "new", "u1")}
        assert await complaints(books) == []
