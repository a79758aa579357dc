"""Books in a dictionary: the operations of the real ones, without a database."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

from coordinator.books.accounts import ACCOUNTS, ISLANDS, CreateAccount, IslandRecord
from coordinator.books.errors import BooksRefused, Why
from coordinator.books.jobs import JOBS, Job, JobState
from coordinator.books.ledger import BALANCES, HOLDS, ISSUE, TRANSFERS, Balance, Hold, HoldState, Transfer, grant, user
from coordinator.books.rows import Address, Kind, Operation, Rows, load_plain
from protocol.prices import Ask

T = TypeVar("T")

NOON_MS = 20_000 * 86_400_000 + 43_200_000  # of some day
CREDIT = 1_000_000
NO_ASK = Ask()


class PlainBooks:
    """Everything that was ever put, as it is now. ``now_ms`` is for the test to move."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.now_ms = NOON_MS

    def do(self, operation: Operation[T]) -> T:
        """As the writer does it."""
        return self.do_all(operation)[0]  # type: ignore[no-any-return]

    def do_all(self, *operations: Operation[Any]) -> list[Any]:
        fork = self.rows.fork()
        results = []
        for operation in operations:
            load_plain([operation], fork)
            results.append(operation.apply(fork, self.now_ms))
        self.rows.adopt(fork)
        return results

    def refused(self, operation: Operation[Any]) -> Why:
        """Why it is refused; that it put nothing before is the rule of every operation."""
        fork = self.rows.fork()
        load_plain([operation], fork)
        try:
            result = operation.apply(fork, self.now_ms)
        except BooksRefused as refused:
            assert list(fork.changes()) == [], "refused, and something was put"
            return refused.why
        raise AssertionError(f"not refused: {result}")

    def unchanged_by(self, operation: Operation[T]) -> T:
        """Its result, when it succeeds and leaves everything as it was."""
        before = self.everything()
        result = self.do(operation)
        assert self.everything() == before
        return result

    def everything(self) -> dict[tuple[str, str], Any]:
        """All rows by table and key. Balances without a history are none."""
        return {(kind.name, kind.key_of(row)): row for kind, row in self.rows.changes()}

    def all_of(self, kind: Kind[T]) -> list[T]:
        return [row for its, row in self.rows.changes() if its is kind]

    def find(self, kind: Kind[T], key: str) -> T | None:
        return self.rows.peek(kind, key)

    def balance(self, account: str) -> tuple[int, int]:
        """Posted and held of a ledger account."""
        row = self.find(BALANCES, account) or Balance(account)
        return row.posted, row.held

    def posted(self, account: str) -> int:
        return self.balance(account)[0]

    def hold(self, id: str) -> Hold:
        return _there(self.find(HOLDS, id))

    def job(self, id: str) -> Job:
        return _there(self.find(JOBS, id))

    def island(self, peer: str) -> IslandRecord:
        return _there(self.find(ISLANDS, peer))

    def transfers(self, reference: str) -> list[tuple[str, str, int]]:
        """Debit, credit and amount of all transfers for something, by id."""
        found = sorted((t for t in self.all_of(TRANSFERS) if t.reference == reference), key=lambda t: t.id)
        return [(t.debit, t.credit, t.amount) for t in found]

    def charges(self, reference: str) -> tuple[Transfer, ...]:
        found = (t for t in self.all_of(TRANSFERS) if t.reference == reference and t.kind == "charge")
        return tuple(sorted(found, key=lambda t: int(t.id.rpartition(":")[2])))

    # What tests begin with

    def account(self, name: str, credits: int = 10_000) -> str:
        """A new account with so many credits; its ledger account."""
        self.do(CreateAccount(name, grant_micros=credits * CREDIT))
        return user(name)

    def fund(self, account: str, micros: int) -> str:
        """New credits for any ledger account."""
        self.do(grant(account, micros, f"fund:{account}:{len(self.all_of(TRANSFERS))}"))
        return account

    def put(self, kind: Kind[T], row: T) -> None:
        """A row that no operation made."""
        self.rows.put(kind, row)

    def check(self) -> None:
        """The promises of the ledger."""
        check_books(self)


def _there(row: T | None) -> T:
    assert row is not None
    return row


def check_books(books: PlainBooks) -> None:
    balances = {row.account: row for row in books.all_of(BALANCES)}
    assert sum(row.posted for row in balances.values()) == 0, "all balances together are 0"
    moved: Counter[str] = Counter()
    for transfer in books.all_of(TRANSFERS):
        assert transfer.amount > 0 and transfer.debit != transfer.credit
        moved[transfer.debit] -= transfer.amount
        moved[transfer.credit] += transfer.amount
    held: Counter[str] = Counter()
    for hold in books.all_of(HOLDS):
        held[hold.account] += hold.amount if hold.state is HoldState.PENDING else 0
        charged = sum(t.amount for t in books.charges(hold.id)) if hold.state is HoldState.POSTED else 0
        assert charged == hold.posted <= hold.amount, hold
    for account, row in balances.items():
        assert (row.posted, row.held) == (moved[account], held[account]), account
        assert row.available >= 0 or account.startswith("system:"), row
        assert row.held >= 0
    for job in books.all_of(JOBS):
        hold_ = books.hold(job.id)
        assert (hold_.state is HoldState.PENDING) is not job.ended, job.id
        assert job.price_micros == hold_.posted and hold_.account == user(job.account), job.id
    known = {row.name for row in books.all_of(ACCOUNTS)}
    assert all(island.account in known for island in books.all_of(ISLANDS) if island.account)


def addresses(operation: Operation[Any], rows: Rows) -> list[Address]:
    return list(operation.reads(rows))


def job(id: str, account: str = "ada", bid: int = 100 * CREDIT, **changes: Any) -> Job:
    """A job of run 1 of the Coordinator "c1"."""
    plain: dict[str, Any] = {
        "id": id,
        "account": account,
        "cargo": "echo",
        "kind": "chat",
        "state": JobState.SUBMITTED,
        "priority": 50,
        "bid_micros": bid,
        "bid_source": "explicit",
        "owner": "c1",
        "owner_boot": 1,
        "created_at_ms": NOON_MS,
    }
    return Job(**{**plain, **changes})


def issued(books: PlainBooks) -> int:
    return -books.posted(ISSUE)
