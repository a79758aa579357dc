"""The books as the Coordinator uses them: changes through the writer, questions in threads, one object to open and close."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import sqlalchemy as sql
import trio

from coordinator.books.database import Database, database_now_ms
from coordinator.books.ledger import BALANCES, user
from coordinator.books.rows import Operation
from coordinator.books.writer import Pending, TrioWriter, Writer

T = TypeVar("T")

_READERS_MAX = 4


class Ledgering(Protocol):
    """What the desk needs: one change, on disk when it returns."""

    async def do(self, operation: Operation[T]) -> T:
        """Raises BooksRefused or BooksUnavailable."""
        ...


class Books:
    """Made by ``open_books`` in trio."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self.database, self.writer = database, writer
        self._trio = TrioWriter(writer)
        self._readers = trio.CapacityLimiter(_READERS_MAX)

    def __repr__(self) -> str:
        return f"<Books {self.database!r}, {self.writer!r}>"

    async def do(self, operation: Operation[T]) -> T:
        """One change, on disk when this returns. Raises BooksRefused or BooksUnavailable."""
        return await self._trio.do(operation)

    async def do_all(self, *operations: Operation[Any]) -> list[Any]:
        """Several changes together or none. Raises BooksRefused or BooksUnavailable."""
        return await self._trio.do_all(*operations)

    def begin(self, *operations: Operation[Any]) -> Pending:
        """Several changes together or none, under way when this returns."""
        return self._trio.begin(*operations)

    def probably_has(self, account: str, micros: int) -> bool:
        """Whether an account had so much free when the books were written last; False where that is not known."""
        balance = self.writer.last_known(BALANCES, user(account))
        return balance is not None and balance.available >= micros

    async def ask(self, question: Callable[..., T], *arguments: Any) -> T:
        """``question(connection, *arguments)`` in a thread. Raises BooksUnavailable."""

        def read() -> T:
            with self.database.reading() as connection:
                return question(connection, *arguments)

        return await trio.to_thread.run_sync(read, limiter=self._readers)

    async def change(self, statement: Callable[..., T], *arguments: Any) -> T:
        """``statement(connection, *arguments)`` in a thread, in a writer's transaction: for upkeep that is not of the ledger."""

        def write() -> T:
            with self.database.writing() as connection:
                return statement(connection, *arguments)

        return await trio.to_thread.run_sync(write, limiter=self._readers)

    async def now_ms(self) -> int:
        """The clock that all Coordinators of this database share."""

        def read(connection: sql.Connection) -> int:
            return database_now_ms(connection, self.database.is_sqlite)

        return await self.ask(read)


@asynccontextmanager
async def open_books(database_url: str) -> AsyncIterator[Books]:
    """Opens and migrates the database; closes it when everything that waits is written. Raises ConfigError."""
    database = await trio.to_thread.run_sync(Database, database_url)
    writer = Writer(database)
    try:
        yield Books(database, writer)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(writer.close)
            await trio.to_thread.run_sync(database.close)
