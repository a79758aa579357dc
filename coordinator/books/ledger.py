"""The ledger: double entry in integer micro-credits. Pure operations on rows (rows.py).

Theory of operation. A *transfer* moves an amount from one account to another and is never changed or deleted, so every journal sums to
zero by its form, and all balances together do too. An account's row keeps two sums: ``posted`` (credits less debits) and ``held``
(pending holds). A *hold* reserves the most that a job may cost; it resolves once: *posted*, as a chain of transfers to those who earned,
all or none, the rest of the reserve free again; or *released*. ``posted - held`` never falls below zero except on the network's own
accounts, which issue credits (TigerBeetle's two-phase transfers and ``debits_must_not_exceed_credits``, by which this is modelled).

Rules. Every id is used once: saying the same thing again under the same id changes nothing and succeeds, so whoever does not know
whether a commit went through says it again; the same id with other contents is refused. Amounts are positive integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from coordinator.books.errors import BooksRefused, Why
from coordinator.books.rows import Address, Kind, Rows
from protocol import limits
from protocol.prices import format_credits

AMOUNT_MAX = 2**60  # of a transfer, and of any balance: far above what can be issued, far below 64 bits
ISSUE = "system:issue"  # where credits come from: its balance is minus everything that was issued
LOSSES = "system:losses"  # what refunds cost beyond what can be taken back


class TransferKind(StrEnum):
    GRANT = "grant"
    REFILL = "refill"
    CHARGE = "charge"
    REFUND = "refund"
    ESCROW = "escrow"  # earnings that leave escrow for their owner
    TRANSFER = "transfer"


class HoldState(StrEnum):
    PENDING = "pending"
    POSTED = "posted"
    RELEASED = "released"


def user(name: str) -> str:
    """The ledger account of a Consumer, publisher or owner of Islands."""
    return f"user:{name}"


def escrow(peer: str) -> str:
    """Where an Island's earnings wait while nobody can be paid for it."""
    return f"escrow:{peer}"


@dataclass(frozen=True, slots=True)
class Balance:
    """One account, in micro-credits. Only an ``overdraft`` account may go below zero."""

    account: str
    posted: int = 0
    held: int = 0
    overdraft: bool = False

    @property
    def available(self) -> int:
        return self.posted - self.held


@dataclass(frozen=True, slots=True)
class Transfer:
    """``reference``: the job or whatever else it is for."""

    id: str
    debit: str
    credit: str
    amount: int
    kind: TransferKind
    reference: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Hold:
    """A reserve of ``amount`` micro-credits; ``posted`` is what was taken of it."""

    id: str
    account: str
    amount: int
    posted: int
    state: HoldState
    created_at_ms: int
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Share:
    """Who gets how much of a charge."""

    account: str
    amount: int


BALANCES = Kind("balances", Balance, "account")
TRANSFERS = Kind("transfers", Transfer, "id")
HOLDS = Kind("holds", Hold, "id")


def balance_of(rows: Rows, account: str) -> Balance:
    """An account without a row has nothing yet."""
    found = rows.get(BALANCES, account)
    return found if found is not None else Balance(account, overdraft=account.startswith("system:"))


def check_amount(amount: int, low: int = 1) -> None:
    """Raises BooksRefused(BAD_AMOUNT)."""
    if type(amount) is not int or not low <= amount <= AMOUNT_MAX:
        raise BooksRefused(Why.BAD_AMOUNT, f"an amount is {low} to {AMOUNT_MAX} micro-credits, not {amount!r:.40}")


def _need(balance: Balance, amount: int) -> None:
    if not balance.overdraft and balance.available < amount:
        free, needed = format_credits(balance.available), format_credits(amount)
        raise BooksRefused(Why.NO_CREDIT, f"the account has {free} credits free, and {needed} are needed")


def _bounded(balance: Balance) -> Balance:
    if abs(balance.posted) > AMOUNT_MAX:
        raise BooksRefused(Why.BAD_AMOUNT, f"the balance of {balance.account} would pass {AMOUNT_MAX} micro-credits")
    return balance


@dataclass(frozen=True, slots=True)
class Move:
    """One transfer at once."""

    id: str
    debit: str
    credit: str
    amount: int
    kind: TransferKind
    reference: str = ""

    def reads(self, rows: Rows) -> Iterable[Address]:
        return (TRANSFERS, self.id), (BALANCES, self.debit), (BALANCES, self.credit)

    def apply(self, rows: Rows, now_ms: int) -> Transfer:
        check_amount(self.amount)
        wanted = Transfer(self.id, self.debit, self.credit, self.amount, self.kind, self.reference, now_ms)
        known = rows.get(TRANSFERS, self.id)
        if known is not None:
            return _same_transfer(known, wanted)
        if self.debit == self.credit:
            raise BooksRefused(Why.BAD_AMOUNT, "a transfer needs two accounts")
        _need(balance_of(rows, self.debit), self.amount)
        _transfer(rows, wanted)
        return wanted


def _same_transfer(known: Transfer, wanted: Transfer) -> Transfer:
    if replace(known, at_ms=wanted.at_ms) != wanted:
        raise BooksRefused(Why.DIFFERS, f"transfer {wanted.id} exists with other contents")
    return known


def _transfer(rows: Rows, transfer: Transfer) -> None:
    payer, payee = balance_of(rows, transfer.debit), balance_of(rows, transfer.credit)
    payer = _bounded(replace(payer, posted=payer.posted - transfer.amount))
    payee = _bounded(replace(payee, posted=payee.posted + transfer.amount))
    rows.put(BALANCES, payer)
    rows.put(BALANCES, payee)
    rows.put(TRANSFERS, transfer)


@dataclass(frozen=True, slots=True)
class PlaceHold:
    """Reserves at most ``amount``; 0 is legal, for jobs that cost nothing."""

    id: str
    account: str
    amount: int
    expires_at_ms: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        return (HOLDS, self.id), (BALANCES, self.account)

    def news(self, rows: Rows) -> Iterable[Address]:
        return ((HOLDS, self.id),)

    def apply(self, rows: Rows, now_ms: int) -> Hold:
        check_amount(self.amount, low=0)
        wanted = Hold(self.id, self.account, self.amount, 0, HoldState.PENDING, now_ms, self.expires_at_ms)
        known = rows.get(HOLDS, self.id)
        if known is not None:
            if (known.account, known.amount, known.expires_at_ms) != (wanted.account, wanted.amount, wanted.expires_at_ms):
                raise BooksRefused(Why.DIFFERS, f"hold {self.id} exists with other contents")
            return known
        balance = balance_of(rows, self.account)
        _need(balance, self.amount)
        rows.put(BALANCES, replace(balance, held=balance.held + self.amount))
        rows.put(HOLDS, wanted)
        return wanted


@dataclass(frozen=True, slots=True)
class PostHold:
    """Charges a hold: one linked chain of transfers ``ID:0``, ``ID:1``, …, one for each share, all or none."""

    id: str
    account: str
    shares: tuple[Share, ...]

    @property
    def total(self) -> int:
        return sum(share.amount for share in self.shares)

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield HOLDS, self.id
        yield BALANCES, self.account
        for share in self.shares:
            yield BALANCES, share.account
        if rows.has(HOLDS, self.id):  # it says whether they are new
            for index in range(len(self.shares)):
                yield TRANSFERS, f"{self.id}:{index}"

    def news(self, rows: Rows) -> Iterable[Address]:
        hold = rows.peek(HOLDS, self.id)
        if rows.has(HOLDS, self.id) and (hold is None or hold.state is HoldState.PENDING):  # None: placed in the same transaction
            return tuple((TRANSFERS, f"{self.id}:{index}") for index in range(len(self.shares)))
        return ()

    def apply(self, rows: Rows, now_ms: int) -> Hold:
        for share in self.shares:
            check_amount(share.amount)
            if share.account == self.account:
                raise BooksRefused(Why.BAD_AMOUNT, f"{self.account} cannot pay itself")
        hold = _hold_of(rows, self.id, self.account)
        chain = [
            Transfer(f"{self.id}:{index}", hold.account, share.account, share.amount, TransferKind.CHARGE, self.id, now_ms)
            for index, share in enumerate(self.shares)
        ]
        if hold.state is HoldState.POSTED:
            return _same_post(rows, hold, chain, self.total)
        if hold.state is HoldState.RELEASED:
            raise BooksRefused(Why.RESOLVED, f"hold {self.id} was released")
        if self.total > hold.amount:
            raise BooksRefused(Why.OVER_HOLD, f"hold {self.id} is of {hold.amount} micro-credits, {self.total} are wanted")
        if any(rows.get(TRANSFERS, transfer.id) is not None for transfer in chain):
            raise BooksRefused(Why.DIFFERS, f"a transfer that would charge hold {self.id} exists with other contents")
        posted = replace(hold, state=HoldState.POSTED, posted=self.total)
        fork = rows.fork()  # a payee's balance may be full
        _resolve(fork, posted)
        for transfer in chain:
            _transfer(fork, transfer)
        rows.adopt(fork)
        return posted


def _same_post(rows: Rows, hold: Hold, chain: list[Transfer], total: int) -> Hold:
    if hold.posted != total:
        raise BooksRefused(Why.RESOLVED, f"hold {hold.id} was posted with {hold.posted} micro-credits")
    for transfer in chain:
        known = rows.get(TRANSFERS, transfer.id)
        if known is None:
            raise BooksRefused(Why.RESOLVED, f"hold {hold.id} was posted to others")
        _same_transfer(known, transfer)
    return hold


def _hold_of(rows: Rows, id: str, account: str) -> Hold:
    hold = rows.get(HOLDS, id)
    if hold is None or hold.account != account:
        raise BooksRefused(Why.NO_HOLD, f"{account} has no hold {id}")
    return hold


def _resolve(rows: Rows, hold: Hold) -> None:
    balance = balance_of(rows, hold.account)
    rows.put(BALANCES, replace(balance, held=balance.held - hold.amount))
    rows.put(HOLDS, hold)


@dataclass(frozen=True, slots=True)
class ReleaseHold:
    """Gives a reserve back whole."""

    id: str
    account: str

    def reads(self, rows: Rows) -> Iterable[Address]:
        return (HOLDS, self.id), (BALANCES, self.account)

    def apply(self, rows: Rows, now_ms: int) -> Hold:
        hold = _hold_of(rows, self.id, self.account)
        if hold.state is HoldState.RELEASED:
            return hold
        if hold.state is HoldState.POSTED:
            raise BooksRefused(Why.RESOLVED, f"hold {self.id} was posted")
        released = replace(hold, state=HoldState.RELEASED)
        _resolve(rows, released)
        return released


@dataclass(frozen=True, slots=True)
class Refund:
    """Takes a charge back: each transfer of its chain is answered by ``ID:refund``. What a payee no longer has the network bears."""

    charges: tuple[Transfer, ...]

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield BALANCES, LOSSES
        for charge in self.charges:
            yield TRANSFERS, charge.id
            yield BALANCES, charge.debit
            yield BALANCES, charge.credit
            yield TRANSFERS, f"{charge.id}:refund"
            yield TRANSFERS, f"{charge.id}:refund:loss"

    def apply(self, rows: Rows, now_ms: int) -> int:
        """Micro-credits given back, 0 where they were before."""
        for charge in self.charges:
            if charge.kind is not TransferKind.CHARGE or rows.get(TRANSFERS, charge.id) != charge:
                raise BooksRefused(Why.DIFFERS, f"there is no charge {charge.id} like this")
        fork = rows.fork()
        given = sum(self._give_back(fork, charge, now_ms) for charge in self.charges)
        rows.adopt(fork)
        return given

    @staticmethod
    def _give_back(rows: Rows, charge: Transfer, now_ms: int) -> int:
        back, loss = f"{charge.id}:refund", f"{charge.id}:refund:loss"
        if rows.get(TRANSFERS, back) is not None or rows.get(TRANSFERS, loss) is not None:
            return 0
        payee = balance_of(rows, charge.credit)
        taken = charge.amount if payee.overdraft else max(0, min(charge.amount, payee.available))
        for id, source, amount in ((back, charge.credit, taken), (loss, LOSSES, charge.amount - taken)):
            if amount:
                _transfer(rows, Transfer(id, source, charge.debit, amount, TransferKind.REFUND, charge.reference, now_ms))
        return charge.amount


@dataclass(frozen=True, slots=True)
class Empty:
    """Moves all that an account has free to another, such as escrow to its owner. ``id`` names this one time."""

    id: str
    source: str
    target: str

    def reads(self, rows: Rows) -> Iterable[Address]:
        return (TRANSFERS, self.id), (BALANCES, self.source), (BALANCES, self.target)

    def apply(self, rows: Rows, now_ms: int) -> int:
        """Micro-credits that moved."""
        known = rows.get(TRANSFERS, self.id)
        if known is not None:
            return known.amount
        amount = balance_of(rows, self.source).available
        if amount > 0 and self.source != self.target:
            _transfer(rows, Transfer(self.id, self.source, self.target, amount, TransferKind.ESCROW, self.source, now_ms))
        return max(0, amount)


def grant(account: str, amount: int, id: str, kind: TransferKind = TransferKind.GRANT) -> Move:
    """New credits for a ledger account."""
    return Move(id, ISSUE, account, amount, kind)


SIGN_UP_MICROS = 10_000 * limits.CREDIT_MICROS
