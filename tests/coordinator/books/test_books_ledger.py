"""The ledger, operation by operation, on rows in a dictionary. The cases are those of TigerBeetle's table tests, as far as they fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.books.errors import Why
from coordinator.books.ledger import (
    AMOUNT_MAX,
    BALANCES,
    HOLDS,
    ISSUE,
    LOSSES,
    TRANSFERS,
    Balance,
    Empty,
    Hold,
    HoldState,
    Move,
    PlaceHold,
    PostHold,
    Refund,
    ReleaseHold,
    Share,
    Transfer,
    TransferKind,
    grant,
)
from coordinator.books.rows import Operation
from tests.coordinator.books.plain_books import NOON_MS, PlainBooks

A, B, C, D = "user:a", "user:b", "user:c", "escrow:d"
LATER_MS = NOON_MS + 3_600_000


def move(id: str = "t1", debit: str = A, credit: str = B, amount: int = 40, reference: str = "") -> Move:
    return Move(id, debit, credit, amount, TransferKind.TRANSFER, reference)


def hold(id: str = "h1", account: str = A, amount: int = 60, expires_at_ms: int = LATER_MS) -> PlaceHold:
    return PlaceHold(id, account, amount, expires_at_ms)


def post(*shares: tuple[str, int], id: str = "h1", account: str = A) -> PostHold:
    return PostHold(id, account, tuple(Share(payee, amount) for payee, amount in shares))


@pytest.fixture
def books() -> PlainBooks:
    """Account A has 100 micro-credits, nobody else has any."""
    books = PlainBooks()
    books.fund(A, 100)
    return books


# Moves


def test_a_move_changes_two_balances_and_leaves_a_transfer(books: PlainBooks) -> None:
    made = books.do(move(reference="for tea"))
    assert made == Transfer("t1", A, B, 40, TransferKind.TRANSFER, "for tea", NOON_MS)
    assert (books.balance(A), books.balance(B)) == ((60, 0), (40, 0))
    assert books.find(TRANSFERS, "t1") == made
    books.check()


def test_the_same_move_again_succeeds_and_changes_nothing(books: PlainBooks) -> None:
    made = books.do(move())
    books.now_ms += 999
    assert books.unchanged_by(move()) == made, "with the time at which it happened"


def test_the_same_move_again_succeeds_even_when_the_credits_are_gone(books: PlainBooks) -> None:
    books.do(move(amount=100))
    books.do(move("t2", B, C, 100))
    books.unchanged_by(move(amount=100))


DIFFERENT = [
    move(debit=C),
    move(credit=C),
    move(amount=41),
    move(reference="other"),
    Move("t1", A, B, 40, TransferKind.GRANT),
    grant(B, 40, "t1"),
]


@pytest.mark.parametrize("other", DIFFERENT)
def test_the_id_of_a_move_is_used_once(books: PlainBooks, other: Move) -> None:
    books.do(move())
    assert books.refused(other) is Why.DIFFERS


def test_all_that_is_there_can_move_and_no_more(books: PlainBooks) -> None:
    assert books.refused(move(amount=101)) is Why.NO_CREDIT
    books.do(move(amount=100))
    assert books.refused(move("t2", amount=1)) is Why.NO_CREDIT
    assert books.refused(move("t3", C, A, 1)) is Why.NO_CREDIT, "an account without a row has nothing"


def test_what_is_held_cannot_move(books: PlainBooks) -> None:
    books.do(hold(amount=60))
    assert books.refused(move(amount=41)) is Why.NO_CREDIT
    books.do(move(amount=40))
    assert books.balance(A) == (60, 60)


@pytest.mark.parametrize("amount", [0, -1, AMOUNT_MAX + 1, -(2**63), 1.5, float("nan"), True, None, "1"])
def test_amounts_are_positive_whole_numbers(books: PlainBooks, amount: Any) -> None:
    assert books.refused(move(amount=amount)) is Why.BAD_AMOUNT
    assert books.refused(post((B, amount))) is Why.BAD_AMOUNT
    if amount != 0 or amount is False:
        assert books.refused(hold(amount=amount)) is Why.BAD_AMOUNT


def test_a_move_needs_two_accounts(books: PlainBooks) -> None:
    assert books.refused(move(credit=A)) is Why.BAD_AMOUNT


def test_only_the_networks_own_accounts_go_below_zero(books: PlainBooks) -> None:
    books.do(move("t1", ISSUE, B, 5))
    books.do(move("t2", LOSSES, B, 5))
    assert (books.posted(ISSUE), books.posted(LOSSES)) == (-105, -5)
    assert books.refused(move("t3", "users:system:issue", B, 5)) is Why.NO_CREDIT
    books.check()


BOUNDS = [
    # balances before, amount of a move from A to B, why it is refused
    (AMOUNT_MAX, 0, AMOUNT_MAX, None),
    (AMOUNT_MAX, 1, AMOUNT_MAX - 1, None),
    (AMOUNT_MAX, 1, AMOUNT_MAX, Why.BAD_AMOUNT),
    (AMOUNT_MAX, AMOUNT_MAX, 1, Why.BAD_AMOUNT),
    (1, AMOUNT_MAX, 1, Why.BAD_AMOUNT),
    (1, AMOUNT_MAX - 1, 1, None),
]


@pytest.mark.parametrize(("has", "payee_has", "amount", "why"), BOUNDS)
def test_no_balance_passes_the_bound(has: int, payee_has: int, amount: int, why: Why | None) -> None:
    books = PlainBooks()
    books.put(BALANCES, Balance(A, has))
    books.put(BALANCES, Balance(B, payee_has))
    if why is not None:
        assert books.refused(move(amount=amount)) is why
    else:
        books.do(move(amount=amount))
        assert (books.posted(A), books.posted(B)) == (has - amount, payee_has + amount)


def test_no_more_is_issued_than_the_bound() -> None:
    books = PlainBooks()
    books.do(grant(A, AMOUNT_MAX, "g1"))
    assert books.refused(grant(B, 1, "g2")) is Why.BAD_AMOUNT


# Holds


def test_a_hold_reserves_and_leaves_the_posted_credits_alone(books: PlainBooks) -> None:
    made = books.do(hold())
    assert made == Hold("h1", A, 60, 0, HoldState.PENDING, NOON_MS, LATER_MS)
    assert books.balance(A) == (100, 60)
    books.check()


def test_pending_holds_count_as_if_all_of_them_were_taken(books: PlainBooks) -> None:
    books.do(hold("h1", amount=60))
    assert books.refused(hold("h2", amount=41)) is Why.NO_CREDIT
    books.do(hold("h3", amount=40))
    assert books.refused(hold("h4", amount=1)) is Why.NO_CREDIT
    books.do(ReleaseHold("h1", A))
    books.do(hold("h5", amount=60))
    assert books.balance(A) == (100, 100)


def test_what_an_account_is_owed_by_a_pending_hold_is_not_there_yet(books: PlainBooks) -> None:
    books.do(hold(amount=60))
    assert books.refused(hold("h2", B, 1)) is Why.NO_CREDIT


def test_a_hold_of_nothing_is_legal_even_where_nothing_is(books: PlainBooks) -> None:
    books.do(hold("h0", C, 0))
    books.do(post(id="h0", account=C))
    assert books.hold("h0").state is HoldState.POSTED
    assert books.balance(C) == (0, 0)


@pytest.mark.parametrize("after", ["pending", "posted", "released"])
def test_the_same_hold_again_gives_it_as_it_is_now(books: PlainBooks, after: str) -> None:
    books.do(hold())
    if after != "pending":
        books.do(post((B, 10)) if after == "posted" else ReleaseHold("h1", A))
    books.now_ms += 999
    assert books.unchanged_by(hold()).state == after


@pytest.mark.parametrize("other", [hold(account=B, amount=0), hold(amount=59), hold(amount=0), hold(expires_at_ms=1)])
def test_the_id_of_a_hold_is_used_once(books: PlainBooks, other: PlaceHold) -> None:
    books.do(hold())
    assert books.refused(other) is Why.DIFFERS
    books.do(ReleaseHold("h1", A))
    assert books.refused(other) is Why.DIFFERS


# Posting and releasing


def test_a_post_takes_its_shares_and_frees_the_rest(books: PlainBooks) -> None:
    books.do(hold(amount=60))
    posted = books.do(post((B, 30), (C, 5), (D, 1)))
    assert (posted.state, posted.posted) == (HoldState.POSTED, 36)
    assert books.balance(A) == (64, 0)
    assert [books.posted(account) for account in (B, C, D)] == [30, 5, 1]
    assert books.charges("h1") == (
        Transfer("h1:0", A, B, 30, TransferKind.CHARGE, "h1", NOON_MS),
        Transfer("h1:1", A, C, 5, TransferKind.CHARGE, "h1", NOON_MS),
        Transfer("h1:2", A, D, 1, TransferKind.CHARGE, "h1", NOON_MS),
    )
    books.check()


@pytest.mark.parametrize("amount", [1, 59, 60])
def test_a_post_takes_up_to_the_whole_hold(books: PlainBooks, amount: int) -> None:
    books.do(hold(amount=60))
    books.do(post((B, amount)))
    assert (books.balance(A), books.posted(B)) == ((100 - amount, 0), amount)


def test_a_post_without_shares_takes_nothing(books: PlainBooks) -> None:
    books.do(hold())
    assert books.do(post()).posted == 0
    assert books.balance(A) == (100, 0)
    assert books.transfers("h1") == []
    books.unchanged_by(post())


def test_one_account_may_have_several_shares(books: PlainBooks) -> None:
    books.do(hold())
    books.do(post((B, 10), (C, 1), (B, 10)))
    assert books.posted(B) == 20
    assert len(books.charges("h1")) == 3
    books.check()


BROKEN_CHAINS = [
    (post((B, 30), (C, 31)), Why.OVER_HOLD),
    (post((B, 61)), Why.OVER_HOLD),
    (post((B, 30), (C, 0)), Why.BAD_AMOUNT),
    (post((B, 30), (C, -1)), Why.BAD_AMOUNT),
    (post((B, 30), (A, 1)), Why.BAD_AMOUNT),
    (post((B, 30), ("user:full", 1)), Why.BAD_AMOUNT),
    (post((B, 1), ("user:nearly", 2), ("user:nearly", 2)), Why.BAD_AMOUNT),
    (post((B, 30), account=B), Why.BAD_AMOUNT),
    (post((C, 30), account=B), Why.NO_HOLD),
    (post((C, 30), id="h2"), Why.NO_HOLD),
]


@pytest.mark.parametrize(("chain", "why"), BROKEN_CHAINS)
def test_a_chain_is_all_or_nothing(books: PlainBooks, chain: PostHold, why: Why) -> None:
    books.put(BALANCES, Balance("user:full", AMOUNT_MAX))
    books.put(BALANCES, Balance("user:nearly", AMOUNT_MAX - 3))
    books.do(hold(amount=60))
    before = books.everything()
    assert books.refused(chain) is why
    assert books.everything() == before
    books.do(post((B, 60)))
    assert books.posted(B) == 60, "the hold is there to be posted"


def test_a_transfer_that_is_there_already_breaks_the_chain(books: PlainBooks) -> None:
    books.do(move("h1:1", amount=7))
    books.do(hold())
    assert books.refused(post((B, 30), (C, 7))) is Why.DIFFERS
    assert books.refused(post((B, 1), (B, 7))) is Why.DIFFERS
    books.check()


def test_the_same_post_again_succeeds_and_changes_nothing(books: PlainBooks) -> None:
    books.do(hold())
    posted = books.do(post((B, 30), (C, 5)))
    books.do(move("t2", B, C, 30))
    books.now_ms += 999
    assert books.unchanged_by(post((B, 30), (C, 5))) == posted


OTHER_POSTS = [
    (post((B, 30)), Why.RESOLVED),
    (post((B, 30), (C, 6)), Why.RESOLVED),
    (post((B, 35)), Why.DIFFERS),
    (post((C, 5), (B, 30)), Why.DIFFERS),
    (post((B, 29), (C, 6)), Why.DIFFERS),
    (post((B, 30), (C, 4), (C, 1)), Why.DIFFERS),
    (post(), Why.RESOLVED),
    (ReleaseHold("h1", A), Why.RESOLVED),
]


@pytest.mark.parametrize(("again", "why"), OTHER_POSTS)
def test_a_posted_hold_is_resolved(books: PlainBooks, again: Operation[Hold], why: Why) -> None:
    books.do(hold())
    books.do(post((B, 30), (C, 5)))
    assert books.refused(again) is why


def test_a_posted_hold_whose_other_shares_are_longer_is_resolved(books: PlainBooks) -> None:
    books.do(hold())
    books.do(post((B, 35)))
    assert books.refused(post((B, 34), (C, 1))) is Why.DIFFERS
    assert books.refused(post((B, 36))) is Why.RESOLVED


def test_a_released_hold_is_resolved(books: PlainBooks) -> None:
    books.do(hold())
    released = books.do(ReleaseHold("h1", A))
    assert (released.state, books.balance(A)) == (HoldState.RELEASED, (100, 0))
    assert books.unchanged_by(ReleaseHold("h1", A)) == released
    assert books.refused(post((B, 1))) is Why.RESOLVED
    assert books.refused(post()) is Why.RESOLVED
    books.check()


def test_nobody_resolves_the_hold_of_another(books: PlainBooks) -> None:
    books.do(hold())
    assert books.refused(ReleaseHold("h1", B)) is Why.NO_HOLD
    assert books.refused(ReleaseHold("h2", A)) is Why.NO_HOLD


# Refunds


@pytest.fixture
def charged(books: PlainBooks) -> PlainBooks:
    """A has 55 left, B got 30 and C 15."""
    books.do(hold())
    books.do(post((B, 30), (C, 15)))
    return books


def test_a_refund_takes_each_charge_back(charged: PlainBooks) -> None:
    assert charged.do(Refund(charged.charges("h1"))) == 45
    assert (charged.posted(A), charged.posted(B), charged.posted(C)) == (100, 0, 0)
    back = charged.find(TRANSFERS, "h1:0:refund")
    assert back == Transfer("h1:0:refund", B, A, 30, TransferKind.REFUND, "h1", NOON_MS)
    assert charged.find(TRANSFERS, "h1:0:refund:loss") is None
    assert charged.hold("h1").state is HoldState.POSTED, "the charge stays what it was"
    charged.check()


def test_a_charge_is_refunded_once(charged: PlainBooks) -> None:
    charges = charged.charges("h1")
    assert charged.do(Refund(charges[:1])) == 30
    assert charged.unchanged_by(Refund(charges[:1])) == 0
    assert charged.do(Refund(charges)) == 15, "what was left"
    assert charged.unchanged_by(Refund(charges)) == 0
    assert charged.posted(A) == 100


@pytest.mark.parametrize(("gone", "held", "taken"), [(30, 0, 0), (29, 0, 1), (10, 0, 20), (0, 30, 0), (0, 25, 5), (0, 0, 30)])
def test_what_a_payee_no_longer_has_the_network_bears(charged: PlainBooks, gone: int, held: int, taken: int) -> None:
    if gone:
        charged.do(move("t1", B, C, gone))
    charged.do(hold("h2", B, held))
    assert charged.do(Refund(charged.charges("h1")[:1])) == 30
    assert charged.posted(A) == 85
    assert charged.balance(B) == (30 - gone - taken, held)
    assert charged.posted(LOSSES) == taken - 30
    assert (charged.find(TRANSFERS, "h1:0:refund") is None) is (taken == 0)
    charged.check()
    assert charged.unchanged_by(Refund(charged.charges("h1")[:1])) == 0


def test_two_charges_of_one_payee_are_taken_from_what_he_has_once(books: PlainBooks) -> None:
    books.do(hold())
    books.do(post((B, 30), (B, 30)))
    books.do(move("t1", B, C, 20))
    assert books.do(Refund(books.charges("h1"))) == 60
    assert (books.posted(A), books.posted(B), books.posted(LOSSES)) == (100, 0, -20)
    books.check()


def test_only_charges_like_those_in_the_books_are_refunded(charged: PlainBooks) -> None:
    first, second = charged.charges("h1")
    charged.do(move("t1", A, B, 5))
    wrong = [
        replace(first, amount=31),
        replace(first, debit=C),
        replace(first, credit=C),
        replace(first, at_ms=first.at_ms + 1),
        replace(first, id="h1:7"),
        charged.find(TRANSFERS, "t1"),
    ]
    for charge in wrong:
        assert charge is not None
        assert charged.refused(Refund((second, charge))) is Why.DIFFERS


def test_a_refund_that_one_account_cannot_take_gives_nothing_back(charged: PlainBooks) -> None:
    first, second = charged.charges("h1")
    charged.put(BALANCES, Balance(A, AMOUNT_MAX - 40))
    assert charged.refused(Refund((first, second))) is Why.BAD_AMOUNT
    assert charged.do(Refund((first,))) == 30


def test_a_refund_of_nothing_is_nothing(books: PlainBooks) -> None:
    assert books.unchanged_by(Refund(())) == 0


# Emptying


def test_an_account_is_emptied_of_what_is_free(books: PlainBooks) -> None:
    books.do(hold(amount=60))
    assert books.do(Empty("e1", A, B)) == 40
    assert (books.balance(A), books.posted(B)) == ((60, 60), 40)
    assert books.find(TRANSFERS, "e1") == Transfer("e1", A, B, 40, TransferKind.ESCROW, A, NOON_MS)
    books.check()


def test_an_account_is_emptied_once_under_one_id(books: PlainBooks) -> None:
    books.do(Empty("e1", A, B))
    books.fund(A, 7)
    assert books.unchanged_by(Empty("e1", A, B)) == 100
    assert books.do(Empty("e2", A, B)) == 7


def test_nothing_moves_out_of_an_empty_account(books: PlainBooks) -> None:
    assert books.unchanged_by(Empty("e1", C, B)) == 0
    books.fund(C, 5)
    assert books.do(Empty("e1", C, B)) == 5, "an id that moved nothing was not used"


def test_an_account_is_not_emptied_into_itself(books: PlainBooks) -> None:
    books.unchanged_by(Empty("e1", A, A))


def test_an_account_is_not_emptied_past_the_bound(books: PlainBooks) -> None:
    books.put(BALANCES, Balance(B, AMOUNT_MAX))
    assert books.refused(Empty("e1", A, B)) is Why.BAD_AMOUNT


# What operations say that they read


EVERY = [move(), hold(), post((B, 1), (C, 2)), ReleaseHold("h1", A), Empty("e1", A, B)]


@pytest.mark.parametrize("operation", EVERY, ids=lambda operation: type(operation).__name__)
def test_an_operation_reads_no_more_and_no_less_than_it_names(books: PlainBooks, operation: Operation[Any]) -> None:
    if not isinstance(operation, PlaceHold):
        books.do(hold())
    named = {(kind.name, key) for kind, key in operation.reads(books.rows)}
    before = books.everything()
    books.do(operation)  # a row that was not named raises KeyError
    changed = {address for address, row in books.everything().items() if before.get(address) != row}
    assert changed and changed <= named


def test_holds_and_transfers_have_names_of_their_own(books: PlainBooks) -> None:
    books.do(move("x", amount=1))
    books.do(hold("x", amount=1))
    books.do(post((B, 1), id="x"))
    assert books.find(TRANSFERS, "x") is not None and books.find(HOLDS, "x") is not None
    books.check()
