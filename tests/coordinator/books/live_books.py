"""Books on a real database, and operations by which a test stops their writer where it wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from coordinator.books.audit import audit
from coordinator.books.database import Database
from coordinator.books.errors import BooksRefused
from coordinator.books.ledger import BALANCES, Balance, Move, TransferKind, grant
from coordinator.books.rows import Address, Operation, Rows
from coordinator.books.writer import Writer
from tests.coordinator.books.shadow import COLUMNS, Tables, with_balances

WAIT_S = 30.0  # for what comes at once; a test that waits so long has failed


@contextmanager
def opened(url: str, clock_ms: Callable[[], int] | None = None) -> Iterator[Writer]:
    """A database with its writer; both are closed at the end."""
    database = Database(url)
    writer = Writer(database, clock_ms)
    try:
        yield writer
    finally:
        writer.close()
        database.close()


def tables_of(database: Database) -> Tables:
    """Everything that the shadow has too, once whoever writes has finished."""
    found: Tables = {}
    with database.writing() as connection:
        for table, columns in COLUMNS.items():
            rows = connection.exec_driver_sql(f"SELECT {', '.join(columns)} FROM {table}")
            found[table] = {row[0]: tuple(row) for row in rows}
    return with_balances(found)


def complaints(database: Database) -> list[str]:
    with database.snapshot() as connection:
        return audit(connection)


def balances_of(database: Database) -> dict[str, tuple[int, int]]:
    return {key: (row[1], row[2]) for key, row in tables_of(database)["balances"].items()}


def move(id: str, amount: int = 1, debit: str = "user:a", credit: str = "user:b") -> Move:
    return Move(id, debit, credit, amount, TransferKind.TRANSFER)


def fund(writer: Writer, account: str, micros: int) -> None:
    writer.do(grant(account, micros, f"fund:{account}"))


@dataclass(frozen=True, slots=True)
class Nothing:
    """Changes nothing; notes that its turn came."""

    name: str
    turns: list[str]

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ()

    def apply(self, rows: Rows, now_ms: int) -> str:
        self.turns.append(self.name)
        return self.name


@dataclass(slots=True)
class Gate:
    """Stops the writer inside a transaction, until it is opened."""

    reached: threading.Event = field(default_factory=threading.Event)
    open: threading.Event = field(default_factory=threading.Event)

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ()

    def apply(self, rows: Rows, now_ms: int) -> None:
        self.reached.set()
        assert self.open.wait(WAIT_S)


@dataclass(frozen=True, slots=True)
class Bug:
    """An operation that is wrong in some way."""

    where: str
    error: type[Exception] = KeyError
    row: Balance | None = None

    def reads(self, rows: Rows) -> Iterable[Address]:
        if self.where == "reads":
            raise self.error("bug")
        return ((BALANCES, self.row.account),) if self.row is not None else ()

    def apply(self, rows: Rows, now_ms: int) -> None:
        if self.where == "apply":
            raise self.error("bug")
        if self.row is not None:
            rows.put(BALANCES, self.row)


class Answers:
    """What units were told, in the order of telling."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._done = threading.Condition()
        self._waiting = 0
        self.by_name: dict[str, Any] = {}

    def submit(self, name: str, *operations: Operation[Any]) -> None:
        def tell(results: Any, error: Exception | None) -> None:
            with self._done:
                self.by_name[name] = error if error is not None else results
                self._waiting -= 1
                self._done.notify_all()

        with self._done:
            self._waiting += 1
        self._writer.submit(operations, tell)

    def all(self) -> dict[str, Any]:
        """Waits for everybody."""
        with self._done:
            assert self._done.wait_for(lambda: self._waiting == 0, WAIT_S)
        return self.by_name

    def words(self) -> dict[str, str]:
        """Of each unit: "ok", the books' reason, or the name of the error."""
        return {name: _word(answer) for name, answer in self.all().items()}


def _word(answer: Any) -> str:
    if isinstance(answer, BooksRefused):
        return answer.why.value
    return type(answer).__name__ if isinstance(answer, Exception) else "ok"


@contextmanager
def one_group(writer: Writer) -> Iterator[Answers]:
    """What is submitted inside waits, and is then written together."""
    gate, answers = Gate(), Answers(writer)
    answers.submit("gate", gate)
    assert gate.reached.wait(WAIT_S)
    try:
        yield answers
    finally:
        gate.open.set()
        answers.all()


def in_threads(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs them at once. Raises what one of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
