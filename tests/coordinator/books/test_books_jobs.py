"""Jobs in the books: opened, placed, settled and taken over, on rows in a dictionary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.books.accounts import (
    ACCOUNTS,
    DAY_MS,
    EARNING_KARMA_MILLI,
    ISLANDS,
    KARMA_EVENTS,
    IslandRecord,
    PairIsland,
    SetPublisher,
)
from coordinator.books.errors import Why
from coordinator.books.jobs import (
    ENDED,
    JOBS,
    RECEIPTS,
    REQUESTS,
    Adopt,
    Earned,
    Job,
    JobState,
    OpenJob,
    Outcome,
    Placed,
    ReceiptRecord,
    Request,
    SettleJob,
    StartJob,
    WantCancel,
)
from coordinator.books.ledger import AMOUNT_MAX, BALANCES, HOLDS, SIGN_UP_MICROS, Balance, HoldState, escrow, user
from protocol import limits
from protocol.prices import Ask
from tests.coordinator.books.plain_books import CREDIT, NOON_MS, PlainBooks, job

ADA, BOB, EVE = user("ada"), user("bob"), user("eve")
HOLD_MS = NOON_MS + 3_600_000
KEY_MS = NOON_MS + 600_000
SECOND_MS = 1000
MINUTE_MS = 60_000


@pytest.fixture
def books() -> PlainBooks:
    """Ada, Bob and Eve have 10,000 credits each."""
    books = PlainBooks()
    for name in ("ada", "bob", "eve"):
        books.account(name)
    return books


def opening(id: str = "j1", floor: int | None = None, key: str = "", key_ms: int = KEY_MS, **changes: Any) -> OpenJob:
    return OpenJob(job(id, **changes), HOLD_MS, floor, key, key_ms)


def outcome(state: JobState = JobState.SUCCEEDED, **changes: Any) -> Outcome:
    return Outcome(state, **changes)


def settle(
    *earned: Earned, id: str = "j1", failed: tuple[str, ...] = (), end: Outcome | None = None, account: str = "ada", boot: int = 1
) -> SettleJob:
    return SettleJob(id, account, "echo", "c1", boot, end or outcome(), earned, failed)


def from_p1(credits: float, compute_ms: int = SECOND_MS, receipt: bytes = b"") -> Earned:
    return Earned("p1", int(credits * CREDIT), compute_ms, receipt)


def start(id: str = "j1", state: JobState = JobState.RUNNING, island: str = "p1", boot: int = 1) -> StartJob:
    return StartJob(id, "c1", boot, Placed(island, "eu", Ask(1, 2, 3), "why"), state)


def adopt(id: str = "j1", boot: int = 1, owner: str = "c2", owner_boot: int = 7) -> Adopt:
    return Adopt(id, "ada", "c1", boot, owner, owner_boot)


def paired(books: PlainBooks, peer: str, account: str, karma_milli: int = EARNING_KARMA_MILLI) -> None:
    books.put(ISLANDS, IslandRecord(peer, account, karma_milli=karma_milli))


# Opening


def test_a_job_is_opened_with_its_hold(books: PlainBooks) -> None:
    made = books.do(opening(input=b"sealed"))
    assert made == job("j1", input=b"sealed") == books.job("j1")
    assert (books.hold("j1").account, books.hold("j1").amount) == (ADA, 100 * CREDIT)
    assert books.balance(ADA) == (SIGN_UP_MICROS, 100 * CREDIT)
    books.check()


def test_a_job_is_opened_once(books: PlainBooks) -> None:
    books.do(opening())
    started = books.do(start())
    books.now_ms += 5
    assert books.unchanged_by(opening()) == started, "as it is now"


def test_a_job_may_cost_nothing(books: PlainBooks) -> None:
    books.do(opening(bid=0))
    assert books.hold("j1").amount == 0
    books.do(settle())
    books.check()


OPENINGS = [
    # bid, floor, credits held before, the bid that is held, or why not
    (10_000, None, 0, 10_000),
    (10_001, None, 0, Why.NO_CREDIT),
    (10_001, 10_001, 0, Why.NO_CREDIT),
    (10_001, 10_000, 0, 10_000),
    (20_000, 1, 0, 10_000),
    (20_000, 1, 9_000, 1_000),
    (20_000, 1_001, 9_000, Why.NO_CREDIT),
    (20_000, 0, 10_000, 0),
    (500, 1, 0, 500),
    (500, 501, 0, 500),
    (-1, None, 0, Why.BAD_AMOUNT),
    (-1, 0, 0, Why.BAD_AMOUNT),
]


@pytest.mark.parametrize(("bid", "floor", "held", "wanted"), OPENINGS)
def test_a_bid_is_cut_to_what_is_there_down_to_its_floor(
    books: PlainBooks, bid: int, floor: int | None, held: int, wanted: int | Why
) -> None:
    if held:
        books.do(opening("j0", bid=held * CREDIT))
    operation = opening(bid=bid * CREDIT, floor=None if floor is None else floor * CREDIT)
    if isinstance(wanted, Why):
        assert books.refused(operation) is wanted
        assert books.find(JOBS, "j1") is None and books.find(HOLDS, "j1") is None
    else:
        assert books.do(operation).bid_micros == wanted * CREDIT == books.hold("j1").amount
    books.check()


def test_an_account_is_needed(books: PlainBooks) -> None:
    assert books.refused(opening(account="nobody", bid=0)) is Why.NO_ACCOUNT


def test_the_days_refill_comes_before_the_hold(books: PlainBooks) -> None:
    books.do(opening("j0", bid=SIGN_UP_MICROS))
    books.do(settle(Earned("p1", SIGN_UP_MICROS, 1), id="j0"))
    assert books.refused(opening(bid=1)) is Why.NO_CREDIT
    books.now_ms += DAY_MS
    assert books.refused(opening(bid=SIGN_UP_MICROS + 1)) is Why.NO_CREDIT
    assert books.posted(ADA) == 0, "what is refused does not refill"
    books.do(opening(bid=SIGN_UP_MICROS))
    assert books.balance(ADA) == (SIGN_UP_MICROS, SIGN_UP_MICROS)
    account = books.find(ACCOUNTS, "ada")
    assert account is not None and account.refilled_day == books.now_ms // DAY_MS
    books.check()


# Idempotency keys


def keyed(id: str, fingerprint: str = "same", **changes: Any) -> OpenJob:
    return opening(id, key="k", fingerprint=fingerprint, **changes)


def test_a_key_stands_for_its_first_job(books: PlainBooks) -> None:
    books.do(keyed("j1", can_rerun=True))
    assert books.find(REQUESTS, "ada/k") == Request("ada/k", "same", "j1", KEY_MS)
    assert books.unchanged_by(keyed("j2")).id == "j1", "which may be waited for"
    books.do(settle())
    assert books.unchanged_by(keyed("j3")).state is JobState.SUCCEEDED


def test_a_key_whose_job_cannot_be_waited_for_is_in_use(books: PlainBooks) -> None:
    books.do(keyed("j1"))
    assert books.refused(keyed("j2")) is Why.RUNNING
    assert books.unchanged_by(keyed("j1")).id == "j1", "the very job again is no second request"


@pytest.mark.parametrize("ended", [False, True])
def test_a_key_is_for_one_request(books: PlainBooks, ended: bool) -> None:
    books.do(keyed("j1"))
    if ended:
        books.do(settle())
    assert books.refused(keyed("j2", "other")) is Why.REUSED


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_what_failed_may_be_tried_again_under_its_key(books: PlainBooks, state: JobState) -> None:
    books.do(keyed("j1"))
    books.do(settle(end=outcome(state)))
    assert books.do(keyed("j2")).id == "j2"
    request = books.find(REQUESTS, "ada/k")
    assert request is not None and request.job_id == "j2"
    assert books.refused(keyed("j3")) is Why.RUNNING


def test_a_key_is_free_again_when_its_time_is_over(books: PlainBooks) -> None:
    books.do(keyed("j1"))
    books.do(settle())
    books.now_ms = KEY_MS
    assert books.do(keyed("j2")).id == "j1"
    books.now_ms = KEY_MS + 1
    assert books.do(keyed("j2", "other", key_ms=KEY_MS + 99)).id == "j2"


def test_keys_are_of_an_account(books: PlainBooks) -> None:
    books.do(keyed("j1"))
    assert books.do(keyed("j2", "other", account="bob")).id == "j2"


# Steps


STEPS = {
    JobState.SUBMITTED: {JobState.ASSIGNED, JobState.RUNNING},
    JobState.ASSIGNED: {JobState.ASSIGNED, JobState.RUNNING},
    JobState.RUNNING: {JobState.ASSIGNED, JobState.RUNNING},
}


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("step", [JobState.ASSIGNED, JobState.RUNNING])
def test_a_job_takes_steps_until_it_has_ended(books: PlainBooks, state: JobState, step: JobState) -> None:
    books.do(opening())
    books.put(JOBS, job("j1", state=state))
    if step in STEPS.get(state, ()):
        made = books.do(start(state=step))
        assert (made.state, made.island, made.region, made.ask) == (step, "p1", "eu", Ask(1, 2, 3))
        assert (made.placement, made.started_at_ms) == ("why", NOON_MS)
    else:
        assert books.refused(start(state=step)) is Why.STATE


@pytest.mark.parametrize("step", [JobState.ASSIGNED, JobState.RUNNING])
def test_a_step_may_be_said_again(books: PlainBooks, step: JobState) -> None:
    """The books try a commit again whose outcome they do not know."""
    books.do(opening())
    books.do(start(state=step))
    books.now_ms += 5
    books.unchanged_by(start(state=step))


def test_only_the_run_that_owns_a_job_changes_it(books: PlainBooks) -> None:
    books.do(opening())
    assert books.refused(start(boot=2)) is Why.NOT_OWNER
    assert books.refused(settle(from_p1(1), boot=2)) is Why.NOT_OWNER
    assert books.refused(StartJob("j1", "c2", 1, Placed("p1", "", Ask()))) is Why.NOT_OWNER
    assert books.refused(start("j9")) is Why.NO_JOB
    assert books.refused(settle(id="j9")) is Why.NO_JOB
    assert books.refused(adopt("j9")) is Why.NO_JOB


# Settling


def test_a_job_pays_what_was_earned_and_frees_the_rest(books: PlainBooks) -> None:
    paired(books, "p1", "bob")
    books.do(opening(input=b"sealed"))
    books.do(start())
    books.now_ms += 5
    end = outcome(
        prompt_tokens=3, completion_tokens=4, compute_ms=5, output=b"answer", result_expires_at_ms=9, placed=Placed("p2", "us", Ask(7))
    )
    ended = books.do(settle(from_p1(30, receipt=b"signed"), end=end))
    assert ended == replace(
        job("j1"),
        state=JobState.SUCCEEDED,
        price_micros=30 * CREDIT,
        island="p2",
        region="us",
        ask_per_job=7,
        placement="why",
        started_at_ms=NOON_MS,
        finished_at_ms=NOON_MS + 5,
        prompt_tokens=3,
        completion_tokens=4,
        compute_ms=5,
        output=b"answer",
        result_expires_at_ms=9,
    )
    assert (books.balance(ADA), books.posted(BOB)) == ((9_970 * CREDIT, 0), 10_030 * CREDIT)
    assert books.find(RECEIPTS, "j1:0") == ReceiptRecord("j1:0", "j1", "p1", b"signed", 30 * CREDIT, NOON_MS + 5)
    books.check()


def test_a_job_ends_once(books: PlainBooks) -> None:
    books.do(opening())
    ended = books.do(settle(from_p1(30)))
    books.now_ms += 5
    assert books.unchanged_by(settle(from_p1(30))) == ended
    assert books.unchanged_by(settle(from_p1(40), failed=("p2",))) == ended, "whatever is said the second time"
    for state in (JobState.FAILED, JobState.CANCELLED):
        assert books.refused(settle(end=outcome(state))) is Why.STATE


@pytest.mark.parametrize("state", sorted(ENDED))
def test_a_job_that_earned_nobody_anything_releases_its_hold(books: PlainBooks, state: JobState) -> None:
    books.do(opening(input=b"sealed"))
    ended = books.do(settle(from_p1(0), end=outcome(state, error_code="oops", error_message="text")))
    assert (ended.state, ended.price_micros, ended.error_code, ended.input) == (state, 0, "oops", b"")
    assert books.hold("j1").state is HoldState.RELEASED
    assert books.balance(ADA) == (SIGN_UP_MICROS, 0)
    assert books.transfers("j1") == []
    books.check()


def test_who_leaves_pays_for_what_was_delivered(books: PlainBooks) -> None:
    paired(books, "p1", "bob")
    books.do(opening())
    books.do(settle(from_p1(2), end=outcome(JobState.CANCELLED)))
    assert books.posted(BOB) == 10_002 * CREDIT
    assert books.island("p1").jobs_done == 0, "karma is of successes"
    books.check()


def test_a_job_costs_at_most_its_bid(books: PlainBooks) -> None:
    books.do(opening())
    assert books.refused(settle(from_p1(100.000001))) is Why.OVER_HOLD
    assert books.refused(settle(from_p1(60), Earned("p2", 41 * CREDIT, 1))) is Why.OVER_HOLD
    assert books.job("j1").state is JobState.SUBMITTED
    books.do(settle(from_p1(60), Earned("p2", 40 * CREDIT, 1)))
    assert books.balance(ADA) == (9_900 * CREDIT, 0)


@pytest.mark.parametrize("amount", [-1, AMOUNT_MAX + 1, 0.5])
def test_nobody_earns_less_than_nothing(books: PlainBooks, amount: Any) -> None:
    books.do(opening())
    assert books.refused(settle(Earned("p1", amount, 1))) is Why.BAD_AMOUNT
    assert books.refused(settle(Earned("p1", amount, 1), Earned("p1", 5, 1))) is Why.BAD_AMOUNT


def test_nobody_computes_for_less_than_no_time(books: PlainBooks) -> None:
    books.do(opening())
    assert books.refused(settle(Earned("p1", 1, -1))) is Why.BAD_AMOUNT


def test_a_settlement_that_one_payee_cannot_take_settles_nothing(books: PlainBooks) -> None:
    paired(books, "p1", "bob", EARNING_KARMA_MILLI - 1)
    books.fund(escrow("p1"), 5)
    books.put(BALANCES, Balance(BOB, AMOUNT_MAX))
    books.do(opening())
    before = books.everything()
    assert books.refused(settle(from_p1(1, 60 * MINUTE_MS))) is Why.BAD_AMOUNT, "its karma would pay it out"
    assert books.everything() == before


def test_stages_are_paid_in_one_chain(books: PlainBooks) -> None:
    paired(books, "p1", "bob")
    paired(books, "p2", "eve")
    books.do(opening())
    books.do(settle(from_p1(30), Earned("p2", 20 * CREDIT, 1), Earned("p3", 10 * CREDIT, 1, b"signed")))
    assert books.transfers("j1") == [(ADA, BOB, 30 * CREDIT), (ADA, EVE, 20 * CREDIT), (ADA, escrow("p3"), 10 * CREDIT)]
    assert books.job("j1").price_micros == 60 * CREDIT
    assert books.find(RECEIPTS, "j1:2") is not None and books.find(RECEIPTS, "j1:0") is None
    books.check()


def test_each_payee_has_one_share(books: PlainBooks) -> None:
    paired(books, "p1", "bob")
    paired(books, "p2", "bob")
    books.do(opening())
    books.do(settle(from_p1(30), Earned("p2", 20 * CREDIT, 1), from_p1(1)))
    assert books.transfers("j1") == [(ADA, BOB, 51 * CREDIT)]
    assert books.island("p1").earned_micros == 31 * CREDIT
    assert books.island("p2").earned_micros == 20 * CREDIT


PUBLISHED = [
    # share in millionths, earned, the publisher's part: rounded down, the Island has the rest
    (0, 1_000_000, 0),
    (100_000, 1_000_000, 100_000),
    (100_000, 9, 0),
    (100_000, 19, 1),
    (333_333, 1_000_001, 333_333),
    (999_999, 1, 0),
    (999_999, 1_000_000, 999_999),
    (1_000_000, 7, 7),
    (1, 999_999, 0),
    (1, 1_000_000, 1),
]


@pytest.mark.parametrize(("ppm", "earned", "part"), PUBLISHED)
def test_a_publisher_has_his_part_of_each_charge(books: PlainBooks, ppm: int, earned: int, part: int) -> None:
    books.do(SetPublisher("echo", "eve", ppm))
    books.do(opening())
    books.do(settle(Earned("p1", earned, 1)))
    assert books.posted(EVE) - SIGN_UP_MICROS == part
    assert books.posted(escrow("p1")) == earned - part == books.island("p1").earned_micros
    assert books.job("j1").price_micros == earned
    assert all(transfer.amount for transfer in books.charges("j1"))
    books.check()


def test_parts_are_rounded_for_each_charge(books: PlainBooks) -> None:
    books.do(SetPublisher("echo", "eve", 500_000))
    books.do(opening())
    books.do(settle(*(Earned(f"p{number}", 3, 1) for number in range(3))))
    assert books.posted(EVE) - SIGN_UP_MICROS == 3
    assert [books.posted(escrow(f"p{number}")) for number in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("karma_milli", [0, EARNING_KARMA_MILLI])
def test_nobody_pays_himself(books: PlainBooks, karma_milli: int) -> None:
    """Nor into the escrow of his own young Island."""
    paired(books, "p1", "ada", karma_milli)
    books.do(SetPublisher("echo", "eve", 100_000))
    books.do(opening())
    ended = books.do(settle(Earned("p1", 30 * CREDIT, 1, b"one"), Earned("p2", 10 * CREDIT, 1, b"two")))
    assert {record.island: record.paid_micros for record in books.all_of(RECEIPTS)} == {"p1": 3 * CREDIT, "p2": 10 * CREDIT}
    assert books.posted(escrow("p1")) == 0
    assert ended.price_micros == (3 + 10) * CREDIT, "the publisher's part of both, and the other Island's"
    assert books.posted(EVE) == SIGN_UP_MICROS + 4 * CREDIT
    assert books.posted(ADA) == SIGN_UP_MICROS - 13 * CREDIT
    assert books.island("p1").earned_micros == 0
    books.check()


def test_on_his_own_islands_a_publisher_pays_nothing(books: PlainBooks) -> None:
    paired(books, "p1", "ada")
    books.do(SetPublisher("echo", "ada", 100_000))
    books.do(opening())
    assert books.do(settle(from_p1(30))).price_micros == 0
    assert books.hold("j1").state is HoldState.RELEASED
    books.check()


# Escrow and karma


def test_an_unpaired_island_earns_into_escrow(books: PlainBooks) -> None:
    books.do(opening())
    books.do(settle(from_p1(30)))
    assert books.posted(escrow("p1")) == 30 * CREDIT == books.island("p1").earned_micros


@pytest.mark.parametrize(("account", "karma_milli"), [("", EARNING_KARMA_MILLI), ("bob", EARNING_KARMA_MILLI - 1), ("", 0)])
def test_earnings_wait_until_island_and_karma_are_there(books: PlainBooks, account: str, karma_milli: int) -> None:
    paired(books, "p1", account, karma_milli)
    books.do(opening())
    books.do(settle(from_p1(30)))
    assert (books.posted(escrow("p1")), books.posted(BOB)) == (30 * CREDIT, SIGN_UP_MICROS)


def test_the_job_that_brings_the_karma_pays_out_the_escrow_and_itself(books: PlainBooks) -> None:
    paired(books, "p1", "bob", EARNING_KARMA_MILLI - 1000)
    books.do(opening("j0"))
    books.do(settle(from_p1(20, 20 * MINUTE_MS), id="j0"))
    assert books.posted(escrow("p1")) == 20 * CREDIT
    books.do(opening("j1"))
    books.do(settle(from_p1(10, 20 * MINUTE_MS), id="j1"))
    assert books.island("p1").earns
    assert (books.posted(escrow("p1")), books.posted(BOB)) == (0, 10_030 * CREDIT)
    books.unchanged_by(settle(from_p1(10, 20 * MINUTE_MS), id="j1"))
    books.unchanged_by(PairIsland("p1", "bob"))
    books.do(opening("j2"))
    books.do(settle(from_p1(5), id="j2"))
    assert (books.posted(escrow("p1")), books.posted(BOB)) == (0, 10_035 * CREDIT)
    books.check()


def test_an_island_that_falls_below_the_threshold_waits_again(books: PlainBooks) -> None:
    paired(books, "p1", "bob", EARNING_KARMA_MILLI)
    books.do(opening("j0"))
    books.do(settle(id="j0", failed=("p1",), end=outcome(JobState.FAILED)))
    assert books.island("p1").karma_milli == EARNING_KARMA_MILLI - 100
    books.do(opening("j1"))
    books.do(settle(from_p1(10), id="j1"))
    assert books.posted(escrow("p1")) == 10 * CREDIT
    books.do(opening("j2"))
    books.do(settle(from_p1(1, 40 * MINUTE_MS), id="j2"))
    assert (books.posted(escrow("p1")), books.posted(BOB)) == (0, 10_011 * CREDIT)
    books.check()


def test_an_account_pays_nothing_to_no_one_for_karma(books: PlainBooks) -> None:
    """Jobs between an account and its own Islands change no karma, whatever becomes of them."""
    paired(books, "p1", "ada", 500)
    for number, state in enumerate((JobState.SUCCEEDED, JobState.FAILED)):
        books.do(opening(f"j{number}"))
        books.do(settle(from_p1(1, 600 * MINUTE_MS), id=f"j{number}", failed=("p1",), end=outcome(state)))
    island = books.island("p1")
    assert (island.karma_milli, island.pending_ms, island.compute_ms, island.jobs_done, island.jobs_failed) == (500, 0, 0, 0, 0)
    assert not books.all_of(KARMA_EVENTS)


def test_islands_that_broke_on_the_way_lose_karma(books: PlainBooks) -> None:
    books.do(opening())
    books.do(settle(from_p1(1, 40 * MINUTE_MS), failed=("p2", "p3", "p2")))
    assert [books.island(peer).karma_milli for peer in ("p1", "p2", "p3")] == [1_000, -200, -100]
    assert [books.island(peer).jobs_failed for peer in ("p1", "p2", "p3")] == [0, 2, 1]
    assert sorted(event.id for event in books.all_of(KARMA_EVENTS)) == ["j1:0", "j1:1", "j1:2", "j1:3"]


def test_a_failed_job_earns_no_karma(books: PlainBooks) -> None:
    books.do(opening())
    books.do(settle(from_p1(1, 40 * MINUTE_MS), end=outcome(JobState.FAILED)))
    assert books.island("p1").karma_milli == 0


# Taking over


@pytest.mark.parametrize("state", [JobState.SUBMITTED, JobState.ASSIGNED, JobState.RUNNING])
def test_a_job_that_can_be_run_again_is_submitted_again(books: PlainBooks, state: JobState) -> None:
    books.do(opening(can_rerun=True, input=b"sealed"))
    if state is not JobState.SUBMITTED:
        books.do(start(state=state))
    taken = books.do(adopt())
    assert (taken.state, taken.tries, taken.owner, taken.owner_boot) == (JobState.SUBMITTED, 2, "c2", 7)
    assert (taken.island, taken.region, taken.input) == ("", "", b"sealed")
    assert books.hold("j1").state is HoldState.PENDING
    assert books.refused(settle(from_p1(1))) is Why.NOT_OWNER, "the first owner wakes up"
    assert books.refused(start()) is Why.NOT_OWNER
    books.check()


def test_a_job_is_taken_over_by_one(books: PlainBooks) -> None:
    books.do(opening(can_rerun=True))
    books.do(adopt(owner="c2"))
    assert books.refused(adopt(owner="c3")) is Why.NOT_OWNER
    assert books.refused(adopt(owner_boot=8)) is Why.NOT_OWNER, "another run of the same one"


@pytest.mark.parametrize("can_rerun", [True, False])
def test_taking_over_may_be_said_again(books: PlainBooks, can_rerun: bool) -> None:
    """The books try a commit again whose outcome they do not know: who has the job has to hear so."""
    books.do(opening(can_rerun=can_rerun))
    taken = books.do(adopt())
    books.now_ms += 5
    assert books.unchanged_by(adopt()) == taken


def test_another_run_of_the_same_coordinator_takes_over(books: PlainBooks) -> None:
    books.do(opening(can_rerun=True))
    taken = books.do(adopt(owner="c1", owner_boot=2))
    assert (taken.owner, taken.owner_boot) == ("c1", 2)
    assert books.refused(settle()) is Why.NOT_OWNER
    books.do(settle(boot=2))


def lost(books: PlainBooks) -> Job:
    ended = books.do(adopt())
    assert ended == books.job("j1") and ended.ended
    assert (ended.finished_at_ms, ended.input, ended.owner) == (NOON_MS, b"", "c2")
    assert books.hold("j1").state is HoldState.RELEASED
    assert books.balance(ADA) == (SIGN_UP_MICROS, 0)
    books.check()
    return ended


def test_a_job_that_cannot_be_run_again_fails(books: PlainBooks) -> None:
    books.do(opening(input=b"sealed"))
    ended = lost(books)
    assert (ended.state, ended.error_code) == (JobState.FAILED, "coordinator_lost")


def test_a_job_is_run_so_often_and_no_more(books: PlainBooks) -> None:
    books.do(opening(can_rerun=True))
    owner, boot = "c1", 1
    for tries in range(2, limits.JOB_TRIES_MAX + 1):
        taken = books.do(Adopt("j1", "ada", owner, boot, "c2", tries))
        assert (taken.state, taken.tries) == (JobState.SUBMITTED, tries)
        owner, boot = "c2", tries
    ended = books.do(Adopt("j1", "ada", owner, boot, "c2", 99))
    assert (ended.state, ended.tries) == (JobState.FAILED, limits.JOB_TRIES_MAX)
    assert books.hold("j1").state is HoldState.RELEASED


def test_a_job_that_nobody_wants_is_not_run_again(books: PlainBooks) -> None:
    books.do(opening(can_rerun=True))
    books.do(WantCancel("j1", "ada"))
    assert lost(books).state is JobState.CANCELLED


def test_a_job_that_has_ended_is_not_taken_over(books: PlainBooks) -> None:
    books.do(opening(can_rerun=True))
    books.do(settle(from_p1(1)))
    assert books.refused(adopt()) is Why.STATE


def test_an_account_cancels_its_own_jobs(books: PlainBooks) -> None:
    books.do(opening())
    assert books.refused(WantCancel("j1", "bob")) is Why.NO_JOB
    assert books.refused(WantCancel("j2", "ada")) is Why.NO_JOB
    wanted = books.do(WantCancel("j1", "ada"))
    assert (wanted.state, wanted.cancel_wanted) == (JobState.SUBMITTED, True)
    books.unchanged_by(WantCancel("j1", "ada"))
    ended = books.do(settle(end=outcome(JobState.CANCELLED)))
    assert books.unchanged_by(WantCancel("j1", "ada")) == ended
