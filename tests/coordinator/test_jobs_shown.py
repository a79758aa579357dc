"""What a job's account is shown of it: why it waits, when it ran, how it ended, and what was given back."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator.books.accounts import CreateAccount
from coordinator.books.database import Database
from coordinator.books.direct import GrantTicket, OpenDirectJob, SettleTicket, TicketRecord, TicketState
from coordinator.books.job_queries import charges_of, refunded_of
from coordinator.books.jobs import Earned, Job, OpenJob, Outcome, SettleJob
from coordinator.books.jobs import JobState as State
from coordinator.books.ledger import Move, Refund, TransferKind, user
from protocol.prices import Ask, format_credits
from tests.coordinator.accounts_api import TODAY_MS, do, peer
from tests.coordinator.clients import http
from tests.coordinator.desks import JOBS, chat, ended, get, opened, rows, submit, until, url_of
from tests.coordinator.fakes import Running, Script, island

ASK = Ask(per_job=100, per_1k_output=20_000)
TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def shown(running: Running, job_id: str) -> dict[str, Any]:
    """By itself and in the list, which have to say the same."""
    one = (await get(running, f"{JOBS}/{job_id}")).json()
    listed = {job["id"]: job for job in (await get(running, JOBS)).json()["data"]}
    assert listed[job_id] == one
    return dict(one)


async def test_a_job_whose_bid_is_too_low_says_so_while_it_waits(tmp_path: Path) -> None:
    one = island(1, ask=Ask(1000))
    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running, bid_price="0.0005")
        await until(lambda: running.server.statistics()["waiting"] == 1)
        job = await shown(running, job_id)
        assert job["state"] == "submitted" and job["started_at"] is None
        assert "for at most 0.0005 credits per choice; the cheapest wants up to 0.001" in job["waiting_for"]
        one.offers = (replace(one.offers[0], ask=Ask(400)),)
        running.port.advertise(one)
        job = await ended(running, job_id)
        assert (job["state"], job["price"], job["waiting_for"]) == ("succeeded", "0.0004", None)


async def test_a_job_that_waits_for_room_says_so(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=1, until=more), slots_total=1, slots_free=1)
    async with opened(url_of(tmp_path), one) as running:
        first = await submit(running)
        await until(lambda: one.open_now == 1)
        second = await submit(running)
        await until(lambda: running.server.statistics()["waiting"] == 1)
        assert "busy" in (await shown(running, second))["waiting_for"]
        assert (await shown(running, first))["waiting_for"] is None
        more.set()
        for job_id in (first, second):
            assert (await ended(running, job_id))["waiting_for"] is None


async def test_a_job_that_never_ran_has_not_started(tmp_path: Path) -> None:
    one = island(1, ask=Ask(1000))
    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running, bid_price="0.0005")
        await until(lambda: running.server.statistics()["waiting"] == 1)
        async with http(running) as client:
            await client.delete(f"{JOBS}/{job_id}")
        job = await ended(running, job_id)
        assert job["state"] == "cancelled" and job["started_at"] is None and job["island"] is None
        assert TIME.fullmatch(job["created_at"]) and TIME.fullmatch(job["completed_at"])
        assert job["error"] == {"code": "cancelled", "message": "the job was cancelled, or its client left"}
        output = (await get(running, f"{JOBS}/{job_id}/output")).json()
        assert output["error"] == job["error"]


async def test_rows_of_earlier_versions_that_never_ran_have_not_started(tmp_path: Path) -> None:
    """They had a start at their end."""
    async with opened(url_of(tmp_path), island(1)) as running:
        job_id = await submit(running)
        job = await ended(running, job_id)
        assert all(TIME.fullmatch(job[name]) for name in ("created_at", "started_at", "completed_at", "output_until"))

        def as_before(connection: Any) -> None:
            connection.exec_driver_sql("UPDATE jobs SET started_at_ms = finished_at_ms, island = '', state = 'failed'")

        await running.server.books.change(as_before)
        assert (await shown(running, job_id))["started_at"] is None


async def test_a_refund_is_shown(tmp_path: Path) -> None:
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        first, second = await submit(running), await submit(running)
        for job_id in (first, second):
            assert (await ended(running, job_id))["refunded"] is None
        await chat(running)
        await running.server.books.do(Refund(tuple(await running.server.books.ask(charges_of, first))))
        job = await shown(running, first)
        assert job["refunded"] == job["price"] == format_credits(ASK.price(5, 0))
        assert (await shown(running, second))["refunded"] is None


async def test_a_refund_of_a_long_chain_that_the_network_has_to_bear_is_whole(database_url: str) -> None:
    """One share for each Island; what one of them has spent already comes from the network."""
    islands = [island(number, ask=ASK) for number in range(1, 4)]
    async with opened(database_url, *islands) as running:
        books, desk = running.server.books, running.server.desk
        await chat(running)
        (paid,) = await rows(running)
        fresh = replace(paid, id="long", state=State.SUBMITTED, bid_micros=1000, price_micros=0, fingerprint="", finished_at_ms=0)
        await books.do(OpenJob(fresh, 2**50))
        earned = tuple(Earned(one.peer, 7 + number, 1000) for number, one in enumerate(islands))
        await books.do(SettleJob("long", paid.account, "echo", desk.me.owner, desk.me.boot, Outcome(State.SUCCEEDED), earned))
        charges = await books.ask(charges_of, "long")
        assert [charge.amount for charge in charges] == [7, 8, 9]

        await books.do(Move("spent", charges[1].credit, user("somebody"), 5, TransferKind.TRANSFER))
        await books.do(Refund(tuple(charges)))
        assert await books.ask(refunded_of, [paid.id, "long", "nobody's"]) == {"long": 24}


@pytest.mark.parametrize("was_freed", [False, True])
def test_a_refund_gives_back_what_was_paid_up_late_too(database_url: str, was_freed: bool) -> None:
    """The Island's claim said more than the Consumer's report, or came after the ticket was given up."""
    with closing(Database(database_url)) as database:
        direct = Job("direct", "ann", "echo", "chat", State.SUBMITTED, 0, 5000, "market", "me", 1, TODAY_MS, holder="bridge")
        ticket = TicketRecord("t1", "direct", "ann", "echo", peer(1), 0, 1000, 0, 5000, TicketState.OPEN, 0, 0, TODAY_MS)
        do(database, CreateAccount("ann"), OpenDirectJob(direct), GrantTicket(ticket, TODAY_MS + 1_000_000))
        first = () if was_freed else (Earned(peer(1), 500, 100, b"receipt"),)
        do(database, SettleTicket("t1", "direct", "ann", "echo", first, 0 if was_freed else 25, 7, not was_freed))
        whole = (Earned(peer(1), 2000, 100, b"receipt"),)
        do(database, SettleTicket("t1", "direct", "ann", "echo", whole, 100, 7, True, is_claim=True))
        with database.reading() as connection:
            charges = charges_of(connection, "direct")
            assert refunded_of(connection, ["direct"]) == {}
        assert [charge.amount for charge in charges] == ([2000] if was_freed else [1500, 500])
        do(database, Refund(tuple(charges)))
        with database.reading() as connection:
            assert refunded_of(connection, ["direct", "another"]) == {"direct": 2000}


def test_a_refund_of_a_bridges_job_is_found_by_its_tickets(database_url: str) -> None:
    with closing(Database(database_url)) as database:
        direct = Job("direct", "ann", "echo", "chat", State.SUBMITTED, 0, 5000, "market", "me", 1, TODAY_MS, holder="bridge")
        ticket = TicketRecord("t1", "direct", "ann", "echo", peer(1), 0, 1000, 0, 5000, TicketState.OPEN, 0, 0, TODAY_MS)
        do(database, CreateAccount("ann"), OpenDirectJob(direct), GrantTicket(ticket, TODAY_MS + 1_000_000))
        earned = (Earned(peer(1), 2000, 100, b"receipt"),)
        do(database, SettleTicket("t1", "direct", "ann", "echo", earned, 100, 7, True))
        with database.reading() as connection:
            charges = charges_of(connection, "direct")
            assert refunded_of(connection, ["direct"]) == {}
        do(database, Refund(tuple(charges)))
        with database.reading() as connection:
            assert refunded_of(connection, ["direct", "another"]) == {"direct": 2000}
