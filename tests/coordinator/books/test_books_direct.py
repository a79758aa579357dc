"""Tickets of the direct path in the books: a hold each, settled once, and paid up where the Consumer had signed more than he reported."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.books.accounts import CreateAccount, PairIsland
from coordinator.books.direct import (
    TICKETS,
    EndDirectJob,
    GrantTicket,
    OpenDirectJob,
    SettleTicket,
    ShortenHold,
    TicketRecord,
    TicketState,
)
from coordinator.books.errors import Why
from coordinator.books.jobs import RECEIPTS, Earned, Job, JobState
from coordinator.books.ledger import SIGN_UP_MICROS, HoldState, Move, TransferKind, escrow, user
from tests.coordinator.books.plain_books import NOON_MS, PlainBooks

ISLAND, CONSUMER = "island-1", "consumer-1"
LIMIT = 5000


def ticket(id: str = "t1") -> TicketRecord:
    return TicketRecord(id, "job", "ann", "echo", ISLAND, 0, 1000, 0, LIMIT, TicketState.OPEN, 0, 0, NOON_MS)


@pytest.fixture
def books() -> PlainBooks:
    books = PlainBooks()
    for name in ("ann", "owner"):
        books.do(CreateAccount(name))
    job = Job("job", "ann", "echo", "chat", JobState.SUBMITTED, 0, LIMIT, "market", "me", 1, NOON_MS, holder=CONSUMER)
    books.do_all(OpenDirectJob(job), GrantTicket(ticket(), NOON_MS + 1_000_000))
    return books


def settle(amount: int, tokens: int, *, claim: bool = False, whole: bool = True, receipt: bytes = b"receipt") -> SettleTicket:
    earned = (Earned(ISLAND, amount, 100, receipt),) if amount or whole else ()
    return SettleTicket("t1", "job", "ann", "echo", earned, tokens, 7, whole, is_claim=claim)


def end(state: JobState = JobState.SUCCEEDED) -> EndDirectJob:
    return EndDirectJob("job", "ann", CONSUMER, state)


def test_a_report_pays_and_a_claim_for_as_much_changes_nothing(books: PlainBooks) -> None:
    assert books.balance(user("ann")) == (SIGN_UP_MICROS, LIMIT)
    paid, (job, free) = books.do_all(settle(2000, 100), end())
    assert (paid.state, paid.paid_micros, paid.paid_tokens) == (TicketState.PAID, 2000, 100)
    assert (job.state, job.price_micros, job.completion_tokens, job.prompt_tokens) == (JobState.SUCCEEDED, 2000, 100, 7)
    assert books.balance(user("ann")) == (free, 0) == (SIGN_UP_MICROS - 2000, 0)
    assert books.unchanged_by(settle(2000, 100, claim=True)) == paid
    assert books.unchanged_by(settle(4000, 200)) == paid  # a second report is not a claim
    assert books.posted(escrow(ISLAND)) == 2000


def test_who_signs_more_than_he_reports_pays_the_rest_once(books: PlainBooks) -> None:
    books.do_all(settle(500, 25, whole=False), end())
    late = books.do(settle(2000, 100, claim=True))
    assert (late.paid_micros, late.paid_tokens) == (2000, 100)
    assert books.unchanged_by(settle(2000, 100, claim=True)) == late
    assert books.posted(user("ann")) == SIGN_UP_MICROS - 2000 and books.posted(escrow(ISLAND)) == 2000
    job = books.job("job")
    assert (job.price_micros, job.completion_tokens, job.compute_ms) == (2000, 100, 100)
    assert books.island(ISLAND).earned_micros == 2000
    assert [row.id for row in books.all_of(RECEIPTS)] == ["t1:0"]


def test_escrow_of_late_pay_leaves_it_too(books: PlainBooks) -> None:
    """What is paid up later must not be stranded when the Island is paired in between."""
    books.do(settle(500, 25, whole=False))
    books.do(PairIsland(ISLAND, "owner"))
    before = books.island(ISLAND).earned_micros
    books.do(settle(2000, 100, claim=True))
    assert (before, books.island(ISLAND).earned_micros) == (500, 2000)


def test_own_islands_of_a_route_cost_nothing_late_either(books: PlainBooks) -> None:
    """Two stages, one of them the Consumer's own: what is due later is due to the other alone."""
    books.do(PairIsland("own", "ann"))

    def stages(amount: int, tokens: int, claim: bool) -> SettleTicket:
        earned = (Earned("own", amount, 1, b"a"), Earned(ISLAND, amount, 1, b"b"))
        return SettleTicket("t1", "job", "ann", "echo", earned, tokens, 7, True, is_claim=claim)

    assert books.do(stages(500, 25, claim=False)).paid_micros == 500
    assert books.do(stages(601, 30, claim=True)).paid_micros == 601
    assert books.unchanged_by(stages(601, 30, claim=True)).paid_micros == 601
    assert books.posted(user("ann")) == SIGN_UP_MICROS - 601 and books.posted(escrow(ISLAND)) == 601
    assert books.posted(escrow("own")) == 0
    assert {row.island: row.paid_micros for row in books.all_of(RECEIPTS)} == {"own": 0, ISLAND: 601}


def test_a_ticket_that_is_not_reported_keeps_its_hold_for_a_while(books: PlainBooks) -> None:
    books.do_all(ShortenHold("t1", "ann", NOON_MS + 60_000), end())
    assert books.hold("t1").expires_at_ms == NOON_MS + 60_000 and books.balance(user("ann"))[1] == LIMIT
    books.unchanged_by(ShortenHold("t1", "ann", NOON_MS + 90_000))
    books.unchanged_by(ShortenHold("t1", "ben", NOON_MS + 1))  # not his
    paid = books.do(settle(2000, 100, claim=True))
    assert paid.state is TicketState.PAID and books.hold("t1").state is HoldState.POSTED


def test_a_freed_ticket_is_paid_late_with_its_karma(books: PlainBooks) -> None:
    books.do(SettleTicket("t1", "job", "ann", "echo", (), 0, 0, succeeded=False))
    assert books.hold("t1").state is HoldState.RELEASED and books.balance(user("ann")) == (SIGN_UP_MICROS, 0)
    paid = books.do(settle(2000, 100, claim=True))
    assert (paid.state, paid.paid_micros) == (TicketState.PAID, 2000)
    assert (books.island(ISLAND).jobs_done, books.island(ISLAND).earned_micros) == (1, 2000)
    assert books.unchanged_by(settle(2000, 100, claim=True)) == paid


def test_who_has_nothing_left_cannot_be_charged_late_and_nothing_is_half_done(books: PlainBooks) -> None:
    books.do_all(settle(500, 25, whole=False), end())
    books.do(Move("gone", user("ann"), user("owner"), SIGN_UP_MICROS - 500, TransferKind.TRANSFER))
    assert books.refused(settle(2000, 100, claim=True)) is Why.NO_CREDIT
    found = books.find(TICKETS, "t1")
    assert found is not None and found.paid_micros == 500


def test_nothing_below_nothing_and_nothing_of_others(books: PlainBooks) -> None:
    assert books.refused(settle(-1, 1)) is Why.BAD_AMOUNT
    assert books.refused(SettleTicket("t2", "job", "ann", "echo", (), 0, 0, True)) is Why.NO_JOB
    assert books.refused(SettleTicket("t1", "job", "owner", "echo", (), 0, 0, True)) is Why.NO_JOB
    assert books.refused(EndDirectJob("job", "ann", "another", JobState.FAILED)) is Why.NO_JOB
    assert books.refused(settle(LIMIT + 1, 100)) is Why.OVER_HOLD


def test_tickets_together_stay_within_the_bid(books: PlainBooks) -> None:
    assert books.refused(GrantTicket(ticket("t2"), NOON_MS + 1)) is Why.DIFFERS, "whoever does not know of the others must look"
    second = GrantTicket(ticket("t2"), NOON_MS + 1, others=("t1",))
    assert books.refused(second) is Why.OVER_HOLD
    books.do(settle(2000, 100, whole=False))
    assert books.refused(second) is Why.OVER_HOLD, "what is paid counts too"
    rest = replace(ticket("t2"), limit_micros=LIMIT - 2000)
    books.do(GrantTicket(rest, NOON_MS + 1, others=("t1",)))
    assert books.job("job").bid_micros == LIMIT and books.balance(user("ann")) == (SIGN_UP_MICROS - 2000, LIMIT - 2000)
    assert books.refused(GrantTicket(replace(rest, id="t3", limit_micros=1), NOON_MS + 1, others=("t1", "t2"))) is Why.OVER_HOLD


def test_no_ticket_for_a_job_that_is_over_or_is_none(books: PlainBooks) -> None:
    assert books.refused(GrantTicket(replace(ticket("t2"), job_id="none"), NOON_MS + 1)) is Why.NO_JOB
    books.do(end())
    assert books.refused(GrantTicket(ticket("t2"), NOON_MS + 1, others=("t1",))) is Why.STATE


def test_an_island_that_was_gone_is_paid_out_of_what_the_bid_leaves(books: PlainBooks) -> None:
    gone = SettleTicket("t1", "job", "ann", "echo", (), 0, 0, False, failed=(ISLAND,), is_broken=True)
    broken = books.do(gone)
    assert broken.state is TicketState.BROKEN and books.island(ISLAND).jobs_failed == 1
    assert books.unchanged_by(gone) == broken, "it fails once a ticket"
    books.do(GrantTicket(replace(ticket("t2"), limit_micros=LIMIT), NOON_MS + 1, others=("t1",)))
    other = SettleTicket("t2", "job", "ann", "echo", (Earned("island-2", 4000, 1, b"b"),), 9, 7, True)
    books.do_all(other, end())
    late = books.do(settle(2000, 100, claim=True))
    assert (late.state, late.paid_micros) == (TicketState.BROKEN, 1000)
    assert books.unchanged_by(settle(2000, 100, claim=True)) == late
    assert books.job("job").price_micros == LIMIT and books.posted(escrow(ISLAND)) == 1000


def test_what_is_reported_late_stays_within_the_bid(books: PlainBooks) -> None:
    books.do(SettleTicket("t1", "job", "ann", "echo", (), 0, 0, succeeded=False))
    books.do(GrantTicket(ticket("t2"), NOON_MS + 1, others=("t1",)))
    other = SettleTicket("t2", "job", "ann", "echo", (Earned("island-2", 4000, 1, b"b"),), 9, 7, True)
    books.do_all(other, end())
    books.do(replace(settle(2000, 100, claim=True), is_within_bid=True))
    assert books.job("job").price_micros == LIMIT
    assert books.do(settle(3000, 200, claim=True)).paid_micros == 3000, "he has signed for more than he reported"
