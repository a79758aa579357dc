"""From rows to statements: loads the rows of a group with one SELECT a table, stores what changed with one INSERT and one UPDATE."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from enum import StrEnum
from operator import attrgetter
from typing import Any, TypeVar

import sqlalchemy as sql

from coordinator.books import database
from coordinator.books.ab_units import AB_UNITS
from coordinator.books.accounts import ACCOUNTS, ISLANDS, PUBLISHERS
from coordinator.books.direct import TICKETS, TicketState
from coordinator.books.jobs import JOBS
from coordinator.books.ledger import BALANCES, HOLDS, HoldState
from coordinator.books.rows import Kind, Operation, Rows
from coordinator.books.schema import KINDS, TABLES

R = TypeVar("R")

_IN_MAX = 500  # keys of one SELECT; SQLite allows 32,766 parameters, drivers like fewer


def apply_together(connection: sql.Connection, operations: Sequence[Operation[Any]], now_ms: int) -> list[Any]:
    """Operations inside ``Database.writing``, for programs without a writer's thread. Raises BooksRefused; then nothing is stored."""
    rows = Loaded({kind.name: Stored(kind) for kind in KINDS})
    rows.read_for(connection, operations)
    results = [operation.apply(rows, now_ms) for operation in operations]
    rows.store(connection)
    return results


class Stored:
    """One table and how its rows become values and back."""

    def __init__(self, kind: Kind[Any]) -> None:
        table = TABLES[kind.name]
        self.kind = kind
        names = [field.name for field in fields(kind.row)]
        hints = typing.get_type_hints(kind.row)
        self._enums = [(index, hints[name]) for index, name in enumerate(names) if issubclass(hints[name], StrEnum)]
        self._names = names
        self._values = attrgetter(*names)
        key = table.c[kind.key]
        self._select = sql.select(*(table.c[name] for name in names)).where(key.in_(sql.bindparam("keys", expanding=True)))
        others: dict[str, Any] = {name: sql.bindparam(f"new_{name}") for name in names if name != kind.key}
        self._insert = _Many(sql.insert(table), names)
        update = sql.update(table).where(key == sql.bindparam(f"new_{kind.key}")).values(others)
        self._update = _Many(update, [f"new_{name}" for name in names])

    def load(self, connection: sql.Connection, keys: Sequence[str], rows: Rows) -> None:
        for start in range(0, len(keys), _IN_MAX):
            part = keys[start : start + _IN_MAX]
            found = {self.kind.key_of(row): row for row in map(self._read, connection.execute(self._select, {"keys": part}))}
            for key in part:
                rows.load(self.kind, key, found.get(key))

    def _read(self, values: sql.Row[Any]) -> Any:
        plain = list(values)
        for index, enum in self._enums:
            plain[index] = enum(plain[index])
        return self.kind.row(*plain)

    def _plain(self, row: Any) -> list[Any]:
        values = list(self._values(row))
        for index, _ in self._enums:
            values[index] = values[index].value
        return values

    def insert(self, connection: sql.Connection, rows: Sequence[Any]) -> None:
        self._insert.run(connection, [self._plain(row) for row in rows])

    def update(self, connection: sql.Connection, rows: Sequence[Any]) -> None:
        self._update.run(connection, [self._plain(row) for row in rows])


class _Many:
    """A statement of SQLAlchemy Core that is run with many rows, compiled once for its database: Core itself would look it up and lay
    out its parameters at every run, which takes as long as everything else together."""

    def __init__(self, statement: sql.Insert | sql.Update, names: Sequence[str]) -> None:
        self._statement, self._names = statement, list(names)
        self._dialect: object = None
        self._text = ""
        self._order: list[int] | None = None

    def _compile(self, dialect: sql.Dialect) -> None:
        keys = self._names if isinstance(self._statement, sql.Insert) else None
        compiled = self._statement.compile(dialect=dialect, column_keys=keys)
        self._text, self._dialect = str(compiled), dialect
        positions = getattr(compiled, "positiontup", None)
        self._order = [self._names.index(name) for name in positions] if positions else None

    def run(self, connection: sql.Connection, rows: Sequence[Sequence[Any]]) -> None:
        if self._dialect is not connection.dialect:
            self._compile(connection.dialect)
        order = self._order
        if order is not None:
            database.run_raw(connection, self._text, [tuple([row[index] for index in order]) for row in rows])
        else:
            database.run_raw(connection, self._text, [dict(zip(self._names, row, strict=True)) for row in rows])


class Remembered:
    """Rows as they were when this writer committed them last: worth something as long as nobody else has written.

    Only rows that are needed again: open jobs and holds, balances, units of A/B tests, Islands; of Islands and publishers also that there
    is none.
    """

    def __init__(self, rows_max: int = 20_000) -> None:
        self._rows_max = rows_max
        self._rows: dict[tuple[str, str], Any] = {}
        self.hits = 0

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows.clear()

    def load(self, kind: Kind[Any], key: str, rows: Rows) -> bool:
        """Whether the row was known."""
        row = self._rows.get((kind.name, key), _UNKNOWN)
        if row is _UNKNOWN:
            return False
        self.hits += 1
        rows.load(kind, key, row)
        return True

    def peek(self, kind: Kind[R], key: str) -> R | None:
        """The row where it is known; any thread may ask."""
        row: R | None = self._rows.get((kind.name, key))
        return row

    def note(self, rows: Rows) -> None:
        """After the commit: what was read and what was put."""
        if len(self._rows) > self._rows_max:
            self._rows.clear()
        for kind, key, row in rows.items():
            keeps = _KEEPS.get(kind.name)
            if keeps is not None and keeps(row):
                self._rows[kind.name, key] = row
            else:
                self._rows.pop((kind.name, key), None)


_UNKNOWN = object()
_KEEPS: dict[str, Callable[[Any], bool]] = {
    ACCOUNTS.name: lambda row: row is not None,
    BALANCES.name: lambda row: row is not None,
    ISLANDS.name: lambda row: True,
    PUBLISHERS.name: lambda row: True,
    AB_UNITS.name: lambda row: row is not None,
    JOBS.name: lambda row: row is not None and not row.ended,
    HOLDS.name: lambda row: row is not None and row.state is HoldState.PENDING,
    TICKETS.name: lambda row: row is not None and row.state is TicketState.OPEN,
}


class Loaded(Rows):
    """Rows of a transaction: remembers which of them the database had.

    ``trusts_news``: rows that an operation calls new are not looked for; where one is there after all, its INSERT fails.
    """

    def __init__(self, stored: dict[str, Stored], remembered: Remembered | None = None, trusts_news: bool = False) -> None:
        super().__init__()
        self._stored, self._remembered, self._trusts_news = stored, remembered, trusts_news
        self._there: set[tuple[str, str]] = set()

    def load(self, kind: Kind[Any], key: str, row: Any) -> None:
        super().load(kind, key, row)
        if row is not None:
            self._there.add((kind.name, key))

    def read_for(self, connection: sql.Connection, operations: Iterable[Operation[Any]]) -> None:
        """Loads what the operations need, round by round."""
        pending = list(operations)
        while pending:
            wanted: dict[str, tuple[Kind[Any], dict[str, None]]] = {}
            unready = []
            for operation in pending:
                missing = [address for address in operation.reads(self) if not self.has(*address)]
                if missing:
                    unready.append(operation)
                    self._trust(operation)
                for kind, key in missing:
                    if not self.has(kind, key) and not (self._remembered is not None and self._remembered.load(kind, key, self)):
                        wanted.setdefault(kind.name, (kind, {}))[1][key] = None
            for name, (_, keys) in wanted.items():
                self._stored[name].load(connection, list(keys), self)
            pending = unready

    def _trust(self, operation: Operation[Any]) -> None:
        news = getattr(operation, "news", None)
        if self._trusts_news and news is not None:
            for kind, key in news(self):
                if not self.has(kind, key):
                    self.load(kind, key, None)

    def store(self, connection: sql.Connection) -> None:
        """Writes what was put."""
        inserts: dict[str, list[Any]] = {}
        updates: dict[str, list[Any]] = {}
        for kind, row in self.changes():
            target = updates if (kind.name, kind.key_of(row)) in self._there else inserts
            target.setdefault(kind.name, []).append(row)
        for name, rows in inserts.items():
            self._stored[name].insert(connection, rows)
        for name, rows in updates.items():
            self._stored[name].update(connection, rows)
