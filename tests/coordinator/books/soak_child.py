"""The process that makes changes and is killed: `python -m tests.coordinator.books.soak_child SEED ACCOUNTS UNITS`.

It reads orders, a JSON object a line, and forks a child for each, so that the next try is there at once. The child writes what it does to
standard output, a JSON list a line, each line before what follows it happens:

    ["group", now_ms, fate of the one before, [[number, answer], …]]   a group is about to be committed
    ["told", number, answer]                                          a unit's thread has heard what became of it
    ["away", number]                                                  … that the database is away; it asks again
    ["dies", where]                                                   it kills itself at a write point
    ["pid", pid]                                                      first of all
    ["ended", status]                                                 last of all, from the one who forked it

The fate is "committed" or "aborted", or null for the first. Where a commit failed, PostgreSQL is asked what became of the transaction.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine.default import DefaultDialect

from coordinator.books import database
from coordinator.books.database import Database
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.rows import Address, Operation, Rows
from coordinator.books.writer import Writer
from tests.coordinator.books.book_operations import operation_of, told
from tests.coordinator.books.shadow import Answer
from tests.coordinator.books.workload import Scale, Unit, clock_of, make_units

_WRITER = "books-writer"  # the name of the writer's thread


_saying = threading.Lock()  # a pipe takes long lines in pieces


def say(*words: Any) -> None:
    line = json.dumps(words, separators=(",", ":")).encode() + b"\n"
    with _saying:
        while line:
            line = line[os.write(1, line) :]


@dataclass(frozen=True, slots=True)
class Order:
    """``numbers``: units to make again; then those from ``start`` to ``stop``. ``run`` seeds the clock.

    After so many commits of the writer (-1: from the opening of the database on) it dies at a write point: at the first one of that name
    or, where that is empty, at the one of that number, counted from 1; 0: it does not.
    """

    url: str
    numbers: list[int]
    start: int
    stop: int
    threads: int
    run: int
    die_after_commits: int
    die_at_point: int
    die_where: str


class Watch:
    """Counts write points and dies at one; tells of groups before they are committed."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._left = order.die_at_point
        self._commits = -1
        self._clock = clock_of(order.start, order.run)
        self._log: dict[int, Answer] = {}
        self._fate: str | None = None
        self._transaction: str | None = None
        self.now_ms = 0

    def clock_ms(self) -> int:
        """Called once at the beginning of each try to commit a group."""
        self._log = {}
        self.now_ms = self._clock()
        return self.now_ms

    def note(self, number: int, index: int, answer: Answer) -> None:
        """What an operation of a unit came to; a group may be applied more than once, and the last time counts."""
        if index == 0:
            self._log.pop(number, None)
        if answer[0] == "no":
            self._log[number] = answer
        else:
            self._log.setdefault(number, ["ok"]).append(answer[1])

    def opened(self) -> None:
        self._commits = 0

    def point(self, where: str) -> None:
        order = self._order
        if self._left and self._commits >= order.die_after_commits and order.die_where in ("", where):
            self._left -= 1
            if not self._left:
                say("dies", where)
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """On every database of this process from now on."""

        def before(_c: Any, _cursor: Any, statement: str, *_more: Any) -> None:
            self.point(f"before {_brief(statement)}")

        def after(_c: Any, _cursor: Any, statement: str, *_more: Any) -> None:
            self.point(f"after {_brief(statement)}")

        sql.event.listen(sql.Engine, "before_cursor_execute", before)
        sql.event.listen(sql.Engine, "after_cursor_execute", after)
        raw = database.run_raw

        def run_raw(connection: Any, text: str, rows: Any = None) -> Any:
            self.point(f"before {_brief(text)}")
            found = raw(connection, text, rows)
            self.point(f"after {_brief(text)}")
            return found

        database.run_raw = run_raw
        plain: Callable[..., None] = DefaultDialect.do_commit

        def do_commit(dialect: Any, connection: Any) -> None:
            if threading.current_thread().name == _WRITER:
                self._about_to_commit(dialect, connection)
            self.point("before COMMIT")
            plain(dialect, connection)
            if threading.current_thread().name == _WRITER:
                self._fate = "committed"
                self._commits += 1
            self.point("after COMMIT")

        DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]

    def _about_to_commit(self, dialect: Any, connection: Any) -> None:
        cursor = connection.cursor()
        is_postgres = dialect.name == "postgresql"
        transaction = _postgres_transaction(cursor) if is_postgres else None
        if is_postgres and self._fate == "unsure":
            self._fate = _postgres_fate(cursor, self._transaction, transaction)
        cursor.close()
        # From here on nothing can fail: what is said is about to be committed.
        say("group", self.now_ms, "aborted" if self._fate == "unsure" else self._fate, list(self._log.items()))
        self._fate, self._transaction = "unsure", transaction


def _postgres_transaction(cursor: Any) -> str | None:
    cursor.execute("SELECT pg_current_xact_id_if_assigned()::text")
    return cursor.fetchone()[0]  # type: ignore[no-any-return]


def _postgres_fate(cursor: Any, transaction: str | None, now: str | None) -> str:
    """Of a transaction whose commit failed. None has written nothing, so that it does not matter. An id that a server took back with its
    last unwritten records is given out again, to ours, or lies ahead."""
    if transaction is None or transaction == now:
        return "aborted"
    cursor.execute("SELECT %s::xid8 >= pg_snapshot_xmax(pg_current_snapshot())", (transaction,))
    if cursor.fetchone()[0]:
        return "aborted"
    cursor.execute("SELECT pg_xact_status(%s::xid8)", (transaction,))
    return str(cursor.fetchone()[0])


def _brief(statement: str) -> str:
    words = statement.split()
    if words[0] == "SELECT" and "FROM" in words:
        return f"SELECT {words[words.index('FROM') + 1]}"
    return " ".join(words[:3])


class Noted:
    """An operation whose results are noted on the way."""

    def __init__(self, watch: Watch, number: int, index: int, operation: Operation[Any]) -> None:
        self._watch, self._number, self._index, self._operation = watch, number, index, operation
        if hasattr(operation, "news"):
            self.news = operation.news

    def reads(self, rows: Rows) -> Iterable[Address]:
        return self._operation.reads(rows)

    def apply(self, rows: Rows, now_ms: int) -> Any:
        try:
            result = told(self._operation.apply(rows, now_ms))
        except BooksRefused as refused:
            self._watch.note(self._number, self._index, ["no", refused.why.value])
            raise
        self._watch.note(self._number, self._index, ["ok", result])
        return result


def _work(units: list[Unit], order: Order) -> None:
    watch = Watch(order)
    watch.install()
    database = Database(order.url)
    watch.opened()
    writer = Writer(database, watch.clock_ms)
    numbers, lock = _numbers(order), threading.Lock()

    def submit() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            operations = [Noted(watch, number, index, operation_of(command)) for index, command in enumerate(units[number])]
            say("told", number, _answer(writer, number, operations))

    threads = [threading.Thread(target=submit) for _ in range(order.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    database.close()


def _numbers(order: Order) -> Iterator[int]:
    yield from order.numbers
    yield from range(order.start, order.stop)


def _answer(writer: Writer, number: int, operations: list[Noted]) -> Answer:
    while True:
        try:
            return ["ok", *writer.do_all(*operations)]
        except BooksRefused as refused:
            return ["no", refused.why.value]
        except BooksUnavailable:
            say("away", number)


def main() -> None:
    seed, accounts, count = map(int, sys.argv[1:])
    units = make_units(seed, Scale(accounts, count))
    for line in sys.stdin:
        order = Order(**json.loads(line))
        pid = os.fork()
        if pid == 0:
            say("pid", os.getpid())
            _work(units, order)
            os._exit(0)
        say("ended", os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
