"""Rows as values: what an operation reads, and what it leaves changed.

Theory of operation. A change of the books is a frozen dataclass, an *operation*: ``reads`` names the rows that it needs, ``apply`` decides
and puts new rows. Neither touches a database. The writer (writer.py) loads the rows of many operations with a few statements, applies
them one after the other, and stores what changed with a few more, all in one transaction; the simulator and the tests apply the same
operations to rows in a dictionary.

Rules. A row is a frozen dataclass whose fields are the table's columns, known by one text key. An operation checks everything before
it puts the first row; a unit of several operations is all or nothing (``fork`` and ``adopt``). Rows are never deleted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Kind(Generic[R]):
    """One table: rows of class ``row``, told apart by the text in field ``key``."""

    name: str
    row: type[R]
    key: str

    def key_of(self, row: R) -> str:
        return str(getattr(row, self.key))

    def columns(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.row))  # type: ignore[arg-type]


Address = tuple[Kind[Any], str]


class Rows:
    """The rows that one group of operations has to do with. ``None`` stands for a row that does not exist (yet)."""

    def __init__(self, below: Rows | None = None) -> None:
        self._below = below
        self._rows: dict[tuple[str, str], tuple[Kind[Any], Any]] = {}
        self._changed: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        return f"<Rows {len(self._rows)} loaded, {len(self._changed)} changed>"

    def load(self, kind: Kind[R], key: str, row: R | None) -> None:
        """What the database has."""
        self._rows[kind.name, key] = kind, row

    def has(self, kind: Kind[R], key: str) -> bool:
        """Whether the row was loaded, or looked for in vain."""
        return (kind.name, key) in self._rows or (self._below is not None and self._below.has(kind, key))

    def get(self, kind: Kind[R], key: str) -> R | None:
        """Raises KeyError for a row that no operation named: a bug of that operation."""
        found = self._rows.get((kind.name, key))
        if found is not None:
            return found[1]  # type: ignore[no-any-return]
        if self._below is None:
            raise KeyError(f"{kind.name} {key!r} was not read")
        return self._below.get(kind, key)

    def peek(self, kind: Kind[R], key: str) -> R | None:
        """Like ``get``, and None for a row that has not been read yet."""
        return self.get(kind, key) if self.has(kind, key) else None

    def put(self, kind: Kind[R], row: R) -> None:
        address = kind.name, kind.key_of(row)
        self._rows[address] = kind, row
        self._changed.add(address)

    def fork(self) -> Rows:
        """A layer on top: what is put there is not seen here until ``adopt``."""
        return Rows(self)

    def adopt(self, fork: Rows) -> None:
        """Takes over what was put into a fork."""
        for address in fork._changed:
            self._rows[address] = fork._rows[address]
        self._changed |= fork._changed

    def items(self) -> Iterator[tuple[Kind[Any], str, Any]]:
        """Every row of this layer as it is now, read or put: kind, key, row or None."""
        for (_, key), (kind, row) in self._rows.items():
            yield kind, key, row

    def changes(self) -> Iterator[tuple[Kind[Any], Any]]:
        """Every row that was put, as it is now."""
        for address in self._changed:
            yield self._rows[address]


class Operation(Protocol[T_co]):
    """One change of the books.

    It may have a method ``news(rows) -> Iterable[Address]``: rows among those it reads that were made up just now, so that looking for
    them would be in vain. Whoever trusts that and is wrong fails to insert them, and reads them the next time.
    """

    def reads(self, rows: Rows) -> Iterable[Address]:
        """The rows that it needs. Asked again with what was loaded, for rows that only others name, until nothing new comes."""
        ...

    def apply(self, rows: Rows, now_ms: int) -> T_co:
        """Puts the changed rows and says what came of it. Raises BooksRefused, having put nothing."""
        ...


def load_plain(operations: Iterable[Operation[Any]], rows: Rows) -> None:
    """Names every missing row as absent: for books that live in a dictionary."""
    for operation in operations:
        while missing := [(kind, key) for kind, key in operation.reads(rows) if not rows.has(kind, key)]:
            for kind, key in missing:
                rows.load(kind, key, None)
