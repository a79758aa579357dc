"""The audit is silent where the books add up, and says which sum is off where they do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import sqlalchemy as sql

from coordinator.books.accounts import CreateAccount, GrantCredits, PairIsland, Refill, SetPublisher, Unpair
from coordinator.books.audit import CHECKS, SHOWN_MAX, audit
from coordinator.books.database import Database
from coordinator.books.direct import EndDirectJob, GrantTicket, OpenDirectJob, SettleTicket, TicketRecord, TicketState
from coordinator.books.job_queries import charges_of
from coordinator.books.jobs import Earned, Job, JobState, OpenJob, Outcome, SettleJob
from coordinator.books.ledger import PlaceHold, Refund, ReleaseHold, user
from coordinator.books.queries import Totals, account_view, island_view, totals
from tests.coordinator.accounts_api import TODAY_MS, do, peer, run_job

DAY_MS = 86_400_000
HOUR_MS = 3_600_000


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


def complaints(database: Database) -> list[str]:
    with database.snapshot() as connection:
        return audit(connection)


def ticket(id: str, job: str) -> TicketRecord:
    return TicketRecord(id, job, "ann", "echo", peer(2), 0, 0, 0, 5000, TicketState.OPEN, 0, 0, TODAY_MS)


def settle(id: str, job: str, amount: int, succeeded: bool = True, is_claim: bool = False) -> SettleTicket:
    earned = (Earned(peer(2), amount, 1000),) if amount else ()
    return SettleTicket(id, job, "ann", "echo", earned, 3, 5, succeeded, is_claim=is_claim)


def direct_job(id: str) -> Job:
    return Job(id, "ann", "echo", "chat", JobState.SUBMITTED, 0, 15_000, "explicit", "coordinator", 1, TODAY_MS, holder=peer(9))


def fill(database: Database) -> None:
    """Books in which everything has happened once."""
    do(database, CreateAccount("ann"), CreateAccount("bob"), GrantCredits("ann", 7, "grant:1"))
    do(database, PairIsland(peer(1), "bob"), SetPublisher("echo", "bob", 125_000))
    run_job(database, "job-1", "ann", (peer(1), 1001), (peer(2), 999))
    run_job(database, "job-2", "bob", (peer(1), 500), cargo="other")
    run_job(database, "job-3", "ann")
    run_job(database, "job-4", "ann", (peer(1), 100_000), compute_ms=10 * HOUR_MS)  # earns from now on
    run_job(database, "job-5", "ann", (peer(1), 300))
    run_job(database, "job-6", "bob", (peer(1), 300), (peer(2), 10))  # his own Island, and another
    tried = {"ab_test": "t1", "ab_arm": "new", "ab_unit": "u1"}
    ab_job = Job("job-8", "ann", "echo", "chat", JobState.SUBMITTED, 0, 4000, "explicit", "coordinator", 1, TODAY_MS, **tried)  # type: ignore[arg-type]
    ends = Outcome(JobState.SUCCEEDED, completion_tokens=3, latency_us=40)
    do(database, OpenJob(ab_job, TODAY_MS + 1000), SettleJob("job-8", "ann", "echo", "coordinator", 1, ends, unit="t1/new/u1"))
    open_job = Job("job-7", "ann", "echo", "chat", JobState.SUBMITTED, 0, 4000, "explicit", "coordinator", 1, TODAY_MS)
    do(database, OpenJob(open_job, TODAY_MS + 1000), Unpair(peer(1), "bob"), PlaceHold("alone", user("bob"), 11, TODAY_MS))
    do(database, PlaceHold("gone", user("bob"), 12, TODAY_MS), ReleaseHold("gone", user("bob")))
    with database.reading() as connection:
        charges = tuple(charges_of(connection, "job-5"))
    do(database, Refund(charges))
    do(database, Refill("ann"), now_ms=TODAY_MS + DAY_MS)
    do(database, OpenDirectJob(direct_job("direct-1")), GrantTicket(ticket("t1", "direct-1"), TODAY_MS + 1000))
    do(database, GrantTicket(ticket("t2", "direct-1"), TODAY_MS + 1000, others=("t1",)))
    do(database, GrantTicket(ticket("t3", "direct-1"), TODAY_MS + 1000, others=("t1", "t2")))
    do(database, OpenDirectJob(direct_job("direct-2")), GrantTicket(ticket("t4", "direct-2"), TODAY_MS + 1000))
    do(database, settle("t4", "direct-2", 0, succeeded=False))  # its Consumer has gone
    do(database, settle("t1", "direct-1", 2000), settle("t2", "direct-1", 0, succeeded=False))
    do(database, EndDirectJob("direct-1", "ann", peer(9), JobState.SUCCEEDED), settle("t2", "direct-1", 1500, is_claim=True))


def test_books_in_which_everything_has_happened_add_up(database: Database) -> None:
    assert complaints(database) == []
    fill(database)
    assert complaints(database) == []


def test_all_credits_are_somewhere(database: Database) -> None:
    fill(database)
    with database.snapshot() as connection:
        sums = totals(connection)
        ann, bob = account_view(connection, "ann"), account_view(connection, "bob")
        islands = [island_view(connection, peer(number)) for number in (1, 2)]
    assert ann is not None and bob is not None and None not in islands
    assert sums.issued - (sums.users + sums.escrow) == -sums.losses <= 0
    assert sums == Totals(sums.issued, ann.posted + bob.posted, sums.escrow, sums.losses, 4000 + 11 + 5000, 2)
    assert sums.escrow == sum(island.escrow for island in islands if island is not None) > 0


# what somebody does to the tables, and complaints that begin like this
BREAKS: tuple[tuple[str, ...], ...] = (
    (
        "UPDATE balances SET posted = posted + 1 WHERE account = 'user:ann'",
        "all balances together are 1 micro-credits instead of 0",
        "the balance of user:ann is ",
    ),
    (
        "DELETE FROM balances WHERE account = 'system:issue'",
        "all balances together are 2",
        "the balance of system:issue is 0 micro-credits, its transfers add up to -2",
    ),
    ("DELETE FROM transfers WHERE id = 'grant:1'", "the balance of user:ann is ", "the balance of system:issue is "),
    (
        "INSERT INTO transfers VALUES ('x', 'user:ghost', 'user:bob', 5, 'transfer', '', 1)",
        "the balance of user:ghost is 0 micro-credits, its transfers add up to -5",
    ),
    (
        "UPDATE balances SET held = held - 1 WHERE account = 'user:bob'",
        "user:bob has 10 micro-credits held, its pending holds add up to 11",
    ),
    ("DELETE FROM holds WHERE id = 'alone'", "user:bob has 11 micro-credits held, its pending holds add up to 0"),
    (
        "UPDATE balances SET posted = 10 WHERE account = 'user:bob'",
        "user:bob is below zero: 10 micro-credits posted, 11 held",
    ),
    (
        "UPDATE balances SET posted = -1 WHERE account LIKE 'escrow%'",
        f"escrow:{peer(2)} is below zero: -1 micro-credits posted, 0 held",
    ),
    ("UPDATE balances SET held = -5 WHERE account = 'user:bob'", "user:bob is below zero"),
    ("UPDATE transfers SET amount = 0 WHERE id = 'grant:1'", "transfer grant:1 moves 0 micro-credits"),
    (
        "UPDATE transfers SET debit = credit WHERE id = 'grant:1'",
        "transfer grant:1 moves 7 micro-credits from user:ann to user:ann",
    ),
    (
        "UPDATE holds SET posted = posted - 1 WHERE id = 'job-1'",
        "hold job-1 was posted with 1999 micro-credits, its charges add up to 2000",
    ),
    ("DELETE FROM transfers WHERE id = 'job-1:0'", "hold job-1 was posted with 2000"),
    (
        "UPDATE holds SET state = 'released' WHERE id = 'job-1'",
        "hold job-1 was posted with 0",
        "hold job-1 is released, of 1000000",
    ),
    (
        "INSERT INTO transfers VALUES ('job-3:0', 'user:ann', 'user:bob', 5, 'charge', 'job-3', 1)",
        "hold job-3 was posted with 0",
    ),
    (
        "UPDATE holds SET amount = 1 WHERE id = 'job-1'",
        "hold job-1 is posted, of 1 micro-credits, and 2000 of them are posted",
    ),
    (
        "UPDATE transfers SET debit = 'user:bob' WHERE id = 'job-1:0' AND credit <> 'user:bob'",
        "charge job-1:0 was taken from user:bob, its hold is of user:ann",
    ),
    ("UPDATE transfers SET amount = amount + 1 WHERE kind = 'refund' AND reference = 'job-5'", "user:ann was given back "),
    (
        "INSERT INTO transfers VALUES ('y', 'user:bob', 'user:ann', 1, 'refund', 'job-3', 1)",
        "user:ann was given back 1 micro-credits for job-3, and was charged 0",
    ),
    ("UPDATE holds SET state = 'pending', posted = 0 WHERE id = 'job-3'", "job job-3 is succeeded, its hold is pending"),
    ("DELETE FROM holds WHERE id = 'job-3'", "job job-3 is succeeded, its hold is missing"),
    ("UPDATE holds SET state = 'released' WHERE id = 'job-7'", "job job-7 is submitted, its hold is released"),
    ("UPDATE jobs SET state = 'running' WHERE id = 'job-3'", "job job-3 is running, its hold is released"),
    (
        "UPDATE jobs SET price_micros = 1 WHERE id = 'job-1'",
        "job job-1 cost 1 micro-credits, what its holds were posted with and its tickets paid is 2000",
    ),
    ("UPDATE jobs SET price_micros = 1 WHERE id = 'direct-1'", "job direct-1 cost 1 micro-credits"),
    (
        "UPDATE tickets SET paid_micros = 1 WHERE id = 't2'",
        "ticket t2 was paid 1 micro-credits, its charges add up to 1500",
        "job direct-1 cost 3500",
    ),
    ("UPDATE tickets SET state = 'open' WHERE id = 't1'", "ticket t1 is open, its hold is posted"),
    ("UPDATE tickets SET state = 'freed' WHERE id = 't3'", "ticket t3 is freed, its hold is pending"),
    (
        "UPDATE tickets SET issued_at_ms = issued_at_ms + 10800000 WHERE id = 't3'",
        "job direct-2 is running, and none of its tickets has been open for 3 hours",
    ),
    ("DELETE FROM holds WHERE id = 't3'", "ticket t3 is open, its hold is missing"),
    ("UPDATE jobs SET account = 'bob' WHERE id = 'job-1'", "job job-1 is of account bob, its hold of user:ann"),
    ("UPDATE ab_units SET jobs = 2 WHERE id = 't1/new/u1'", "unit t1/new/u1 of an A/B test has counted 2 jobs, there are 1"),
    (
        "UPDATE ab_units SET abandoned = 1 WHERE id = 't1/new/u1'",
        "unit t1/new/u1 of an A/B test has counted 1 jobs that were given up, there are 0",
    ),
    (
        "UPDATE ab_units SET latency_us = 41 WHERE id = 't1/new/u1'",
        "the sums of unit t1/new/u1 of an A/B test come to 45, those of its jobs to 44",
    ),
    (
        "DELETE FROM ab_units WHERE id = 't1/new/u1'",
        "job job-8 of an A/B test has ended, and its unit t1/new/u1 is not known",
        "unit t1/new/u1 of an A/B test has counted 0 jobs, there are 1",
    ),
)


class _Undo(Exception):
    """Rolls a transaction back."""


def test_the_audit_says_what_is_off(database: Database) -> None:
    fill(database)
    for statement, *expected in BREAKS:
        with contextlib.suppress(_Undo), database.writing() as connection:
            _without_constraints(connection)
            assert connection.execute(sql.text(statement)).rowcount >= 1, statement
            found = audit(connection)
            assert all(any(complaint.startswith(text) for complaint in found) for text in expected), (statement, found)
            raise _Undo
    assert complaints(database) == []


def _without_constraints(connection: sql.Connection) -> None:
    """The tables refuse some of this by themselves."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        return
    for table, name in (
        ("balances", "no_balance_below_zero"),
        ("transfers", "a_transfer_moves_something"),
        ("holds", "posted_at_most_what_is_held"),
    ):
        connection.exec_driver_sql(f"ALTER TABLE {table} DROP CONSTRAINT {name}")


def test_every_check_is_seen_to_complain() -> None:
    starts = {check.says.split("{")[0] for check in CHECKS} - {""}
    said = [text for _, *expected in BREAKS for text in expected]
    assert all(any(text.startswith(start) for text in said) for start in starts)
    middles = {check.says.split("}")[1].split("{")[0] for check in CHECKS if check.says.startswith("{")}
    assert middles == {" has ", " is below zero: ", " was given back "}


def test_what_is_off_in_many_places_is_cut_short(database: Database) -> None:
    do(database, *(CreateAccount(f"account-{number:02}") for number in range(SHOWN_MAX + 5)))
    with database.writing() as connection:
        connection.execute(sql.text("UPDATE balances SET posted = posted + 1"))
    found = complaints(database)
    assert len(found) == 1 + SHOWN_MAX + 1 and "more" in found[-1]


def test_the_audit_sees_one_moment(database: Database) -> None:
    fill(database)
    with database.snapshot() as connection:
        before = totals(connection)
        do(database, CreateAccount("eve"), GrantCredits("eve", 5, "grant:eve"))
        assert totals(connection) == before and audit(connection) == []
    with database.snapshot() as connection:
        assert totals(connection) != before
