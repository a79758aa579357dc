"""Accounts, Islands and karma in the books, on rows in a dictionary."""

from __future__ import annotations

import pytest

from coordinator.books.accounts import (
    ACCOUNTS,
    DAY_MS,
    EARNING_KARMA_MILLI,
    FAILURE_COST_MILLI,
    ISLANDS,
    KARMA_EVENTS,
    KARMA_MILLI_MIN,
    PUBLISHERS,
    Account,
    Approve,
    CreateAccount,
    GrantCredits,
    IslandRecord,
    KarmaEvent,
    LimitAccount,
    PairIsland,
    Publisher,
    Refill,
    SetPublisher,
    Unpair,
    earn_karma,
    karma_rows,
    lose_karma,
)
from coordinator.books.errors import Why
from coordinator.books.ledger import (
    AMOUNT_MAX,
    BALANCES,
    ISSUE,
    SIGN_UP_MICROS,
    TRANSFERS,
    Balance,
    Move,
    PlaceHold,
    TransferKind,
    escrow,
    user,
)
from tests.coordinator.books.plain_books import CREDIT, NOON_MS, PlainBooks, issued

HOUR_MS = 3_600_000
ADA, BOB = user("ada"), user("bob")
TODAY = NOON_MS // DAY_MS


@pytest.fixture
def books() -> PlainBooks:
    return PlainBooks()


def spend(books: PlainBooks, account: str, micros: int) -> None:
    books.do(Move(f"spent:{len(books.everything())}", account, user("shop"), micros, TransferKind.TRANSFER))


# Sign-up, grants and limits


def test_an_account_begins_with_ten_thousand_credits(books: PlainBooks) -> None:
    assert books.do(CreateAccount("ada")) == Account("ada", NOON_MS, 0, TODAY)
    assert books.balance(ADA) == (10_000 * CREDIT, 0)
    assert issued(books) == 10_000 * CREDIT
    books.check()


def test_an_account_is_created_once(books: PlainBooks) -> None:
    made = books.do(CreateAccount("ada", 60))
    spend(books, ADA, 5)
    books.now_ms += DAY_MS
    assert books.unchanged_by(CreateAccount("ada", 60)) == made
    assert books.unchanged_by(CreateAccount("ada", 99, 7)) == made


def test_an_account_may_begin_with_nothing(books: PlainBooks) -> None:
    books.do(CreateAccount("ada", grant_micros=0))
    assert books.balance(ADA) == (0, 0) and not books.all_of(TRANSFERS)


@pytest.mark.parametrize("micros", [-1, AMOUNT_MAX + 1])
def test_an_account_does_not_begin_with_less_than_nothing(books: PlainBooks, micros: int) -> None:
    assert books.refused(CreateAccount("ada", grant_micros=micros)) is Why.BAD_AMOUNT


def test_a_grant_is_given_once(books: PlainBooks) -> None:
    books.account("ada", 1)
    made = books.do(GrantCredits("ada", 5, "prize"))
    assert books.unchanged_by(GrantCredits("ada", 5, "prize")) == made
    assert books.posted(ADA) == CREDIT + 5
    assert books.refused(GrantCredits("ada", 6, "prize")) is Why.DIFFERS
    assert books.refused(GrantCredits("bob", 5, "prize")) is Why.NO_ACCOUNT
    assert books.refused(GrantCredits("ada", 0, "other")) is Why.BAD_AMOUNT
    books.check()


def test_an_account_is_limited(books: PlainBooks) -> None:
    assert books.refused(LimitAccount("ada", 5)) is Why.NO_ACCOUNT
    books.account("ada")
    assert books.do(LimitAccount("ada", 5)).rate_limit_per_minute == 5
    books.unchanged_by(LimitAccount("ada", 5))


# Refills


def test_a_refill_tops_up_once_a_day(books: PlainBooks) -> None:
    books.account("ada")
    spend(books, ADA, 300)
    assert books.unchanged_by(Refill("ada")) == 0, "not on the day of sign-up"
    books.now_ms += DAY_MS
    assert books.do(Refill("ada")) == 300
    assert books.posted(ADA) == SIGN_UP_MICROS
    spend(books, ADA, 50)
    assert books.unchanged_by(Refill("ada")) == 0
    books.now_ms += DAY_MS
    assert books.do(Refill("ada")) == 50
    assert books.find(TRANSFERS, f"refill:ada:{TODAY + 2}") is not None
    books.check()


def test_a_day_begins_at_midnight_utc(books: PlainBooks) -> None:
    books.account("ada")
    spend(books, ADA, 300)
    midnight_ms = (TODAY + 1) * DAY_MS
    books.now_ms = midnight_ms - 1
    assert books.do(Refill("ada")) == 0
    books.now_ms = midnight_ms
    assert books.do(Refill("ada")) == 300


def test_whoever_has_enough_gets_nothing_and_has_had_his_refill(books: PlainBooks) -> None:
    books.account("ada")
    books.fund(ADA, 1)
    books.now_ms += DAY_MS
    assert books.do(Refill("ada")) == 0
    spend(books, ADA, 500)
    assert books.do(Refill("ada")) == 0
    assert books.posted(ADA) == SIGN_UP_MICROS - 499


def test_what_is_held_is_not_filled_up(books: PlainBooks) -> None:
    books.account("ada")
    books.do(PlaceHold("h1", ADA, SIGN_UP_MICROS, 0))
    books.now_ms += DAY_MS
    assert books.do(Refill("ada")) == 0


CLOCKS = [
    # days of the clock after sign-up, one refill each, and how many of them give something
    ([1, 1, 1], 1),
    ([1, 0, 1, 0, 1], 1),
    ([-1, -400, 0], 0),
    ([5, 1, 2, 3, 4, 5], 1),
    ([5, 1, 6], 2),
    ([1, 2, 3], 3),
    ([100_000, 1, 2], 1),
]


@pytest.mark.parametrize(("days", "given"), CLOCKS)
def test_a_clock_that_jumps_gives_no_day_twice(books: PlainBooks, days: list[int], given: int) -> None:
    books.account("ada")
    got = []
    for day in days:
        spend(books, ADA, 10)
        books.now_ms = NOON_MS + day * DAY_MS
        got.append(books.do(Refill("ada")))
        books.check()
    assert sum(micros > 0 for micros in got) == given
    assert sum(got) <= 10 * len(days)


def test_nobody_refills_an_account_that_is_not_there(books: PlainBooks) -> None:
    assert books.refused(Refill("ada")) is Why.NO_ACCOUNT


# Pairing and escrow


def test_an_island_is_paired_with_one_account(books: PlainBooks) -> None:
    assert books.refused(PairIsland("p1", "ada")) is Why.NO_ACCOUNT
    books.account("ada")
    books.account("bob")
    assert books.do(PairIsland("p1", "ada")) == IslandRecord("p1", "ada", first_seen_ms=NOON_MS)
    books.now_ms += 1
    books.unchanged_by(PairIsland("p1", "ada"))
    assert books.refused(PairIsland("p1", "bob")) is Why.NOT_OWNER
    assert books.refused(Unpair("p1", "bob")) is Why.NOT_OWNER
    assert books.do(Unpair("p1", "ada")).account == ""
    assert books.do(PairIsland("p1", "bob")).account == "bob"


def island(books: PlainBooks, karma_milli: int, waiting: int, account: str = "") -> None:
    books.put(ISLANDS, IslandRecord("p1", account, karma_milli=karma_milli, earned_micros=waiting))
    books.fund(escrow("p1"), waiting)


@pytest.mark.parametrize(("karma_milli", "paid"), [(0, 0), (EARNING_KARMA_MILLI - 1, 0), (EARNING_KARMA_MILLI, 500)])
def test_pairing_pays_out_what_an_island_with_karma_has_earned(books: PlainBooks, karma_milli: int, paid: int) -> None:
    books.account("ada", 0)
    island(books, karma_milli, 500)
    books.do(PairIsland("p1", "ada"))
    assert (books.posted(ADA), books.posted(escrow("p1"))) == (paid, 500 - paid)
    assert books.island("p1").payee == (ADA if paid else escrow("p1"))
    books.unchanged_by(PairIsland("p1", "ada"))
    books.check()


def test_each_owner_is_paid_what_waited_for_him(books: PlainBooks) -> None:
    books.account("ada", 0)
    books.account("bob", 0)
    island(books, EARNING_KARMA_MILLI, 500)
    books.do(PairIsland("p1", "ada"))
    books.do(Unpair("p1", "ada"))
    books.do(PairIsland("p1", "bob"))
    assert (books.posted(ADA), books.posted(BOB)) == (500, 0), "what ada was paid is hers"
    books.do(Unpair("p1", "bob"))
    books.put(ISLANDS, IslandRecord("p1", karma_milli=EARNING_KARMA_MILLI, earned_micros=570))
    books.fund(escrow("p1"), 70)
    books.do(PairIsland("p1", "bob"))
    assert (books.posted(ADA), books.posted(BOB)) == (500, 70)
    books.check()


def test_a_pairing_whose_pay_out_is_refused_is_refused(books: PlainBooks) -> None:
    books.account("ada", 0)
    island(books, EARNING_KARMA_MILLI, 500)
    books.put(BALANCES, Balance(ADA, AMOUNT_MAX))
    assert books.refused(PairIsland("p1", "ada")) is Why.BAD_AMOUNT
    assert books.island("p1").account == ""


def test_approval_is_given_and_taken(books: PlainBooks) -> None:
    assert books.do(Approve("p1")).approved
    books.unchanged_by(Approve("p1"))
    assert not books.do(Approve("p1", False)).approved
    books.account("ada")
    books.do(PairIsland("p1", "ada"))
    assert books.do(Approve("p1")).account == "ada"


def test_a_cargo_has_one_publisher(books: PlainBooks) -> None:
    assert books.refused(SetPublisher("echo", "ada", 5)) is Why.NO_ACCOUNT
    books.account("ada")
    books.account("bob")
    for ppm in (-1, 1_000_001):
        assert books.refused(SetPublisher("echo", "ada", ppm)) is Why.BAD_AMOUNT
    for ppm in (0, 1_000_000):
        assert books.do(SetPublisher("echo", "ada", ppm)) == Publisher("echo", "ada", ppm)
    books.unchanged_by(SetPublisher("echo", "ada", 1_000_000))
    books.do(SetPublisher("echo", "bob", 5))
    assert books.find(PUBLISHERS, "echo") == Publisher("echo", "bob", 5)


# Karma


KARMA = [
    # karma and pending ms before, compute ms, karma and pending ms after: 60 minutes are a point
    (10_000, 0, HOUR_MS, 11_000, 0),
    (10_000, 0, HOUR_MS - 1, 10_000, HOUR_MS - 1),
    (10_000, HOUR_MS - 1, 1, 11_000, 0),
    (10_000, 0, 150 * 60_000, 12_000, HOUR_MS // 2),
    (10_000, 7, 0, 10_000, 7),
    # below the threshold a minute counts half as much again
    (0, 0, 40 * 60_000, 1_000, 0),
    (9_999, 0, HOUR_MS, 10_999, HOUR_MS // 2),
    (0, 0, 10 * 40 * 60_000, 10_000, 0),
    (-10_000, 0, 40 * 60_000, -9_000, 0),
    (0, 0, 1, 0, 1),
    (0, HOUR_MS - 2, 2, 1_000, 1),
]


@pytest.mark.parametrize(("karma", "pending", "compute", "karma_after", "pending_after"), KARMA)
def test_karma_comes_of_compute(karma: int, pending: int, compute: int, karma_after: int, pending_after: int) -> None:
    before = IslandRecord("p1", karma_milli=karma, pending_ms=pending, jobs_done=3, compute_ms=5)
    after, gained = earn_karma(before, compute)
    assert (after.karma_milli, after.pending_ms, gained) == (karma_after, pending_after, karma_after - karma)
    assert (after.jobs_done, after.compute_ms, after.jobs_failed) == (4, 5 + compute, 0)


def test_minutes_count_the_same_in_any_pieces() -> None:
    island = IslandRecord("p1", karma_milli=EARNING_KARMA_MILLI)
    whole, _ = earn_karma(island, 5 * HOUR_MS)
    for _ in range(300):
        island, _ = earn_karma(island, 60_000)
    assert (island.karma_milli, island.pending_ms) == (whole.karma_milli, whole.pending_ms) == (15_000, 0)


FAILURES = [(0, -100), (10_000, 9_900), (KARMA_MILLI_MIN + 30, KARMA_MILLI_MIN), (KARMA_MILLI_MIN, KARMA_MILLI_MIN)]


@pytest.mark.parametrize(("karma", "after"), FAILURES)
def test_a_failure_costs_karma_down_to_a_floor(karma: int, after: int) -> None:
    changed, lost = lose_karma(IslandRecord("p1", karma_milli=karma, pending_ms=9))
    assert (changed.karma_milli, changed.jobs_failed, changed.pending_ms) == (after, 1, 9)
    assert -FAILURE_COST_MILLI <= lost == after - karma <= 0


def test_what_changes_karma_is_written_down(books: PlainBooks) -> None:
    books.rows.load(ISLANDS, "p1", None)
    karma_rows(books.rows, "p1", 10 * 60_000, "j1", NOON_MS, 0)
    assert not books.all_of(KARMA_EVENTS), "not a whole point yet"
    karma_rows(books.rows, "p1", 30 * 60_000, "j2", NOON_MS, 0)
    karma_rows(books.rows, "p1", None, "j2", NOON_MS, 1)
    assert sorted(books.all_of(KARMA_EVENTS), key=lambda event: event.id) == [
        KarmaEvent("j2:0", "p1", "compute", 1_000, 1_000, "j2", NOON_MS),
        KarmaEvent("j2:1", "p1", "failure", -100, 900, "j2", NOON_MS),
    ]
    assert books.island("p1").karma_milli == 900


def test_the_first_word_of_an_island_is_kept(books: PlainBooks) -> None:
    books.do(Approve("p1"))
    books.now_ms += 5
    books.do(Approve("p1", False))
    assert books.island("p1").first_seen_ms == NOON_MS


def test_accounts_and_ledger_accounts_have_names_of_their_own(books: PlainBooks) -> None:
    """Nobody can call himself the network's own account or an escrow."""
    for name in ("system:issue", "escrow:p1", "user:ada", ISSUE):
        books.do(CreateAccount(name, grant_micros=1))
        assert books.posted(user(name)) == 1
        assert books.refused(Move("t", user(name), ADA, 2, TransferKind.TRANSFER)) is Why.NO_CREDIT
    assert books.find(ACCOUNTS, "system:issue") is not None
    books.check()
