"""What is asked of the books about accounts: balances, keys, Islands, statements. SELECTs only; ``connection`` is any reader's.

Jobs have a module of their own (job_queries.py). Money is in micro-credits, time in Unix milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sql

from coordinator.books.accounts import EARNING_KARMA_MILLI, IslandRecord, KarmaEvent, Publisher
from coordinator.books.ledger import ISSUE, LOSSES, TransferKind, escrow, user
from coordinator.books.schema import accounts, api_keys, balances, islands, karma_events, publishers, tickets, transfers

_USER, _ESCROW = user(""), escrow("")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as lists show it. ``hint``: its first characters. ``revoked_at_ms`` may lie ahead."""

    id: int
    hint: str
    name: str
    account: str
    scopes: tuple[str, ...]
    rate_limit_per_minute: int
    created_at_ms: int
    last_used_at_ms: int | None
    revoked_at_ms: int | None

    def is_valid(self, now_ms: int) -> bool:
        return self.revoked_at_ms is None or self.revoked_at_ms > now_ms

    def state(self, now_ms: int) -> str:
        """``ending``: it was rotated out and still counts for a while."""
        if self.revoked_at_ms is None:
            return "valid"
        return "ending" if self.is_valid(now_ms) else "revoked"


_KEYS = sql.select(*(api_keys.c[field.name] for field in fields(KeyRecord)))


def _key(row: sql.Row[Any]) -> KeyRecord:
    return KeyRecord(**{**row._mapping, "scopes": tuple(row.scopes.split(","))})


def key_of(connection: sql.Connection, key_id: int) -> KeyRecord | None:
    row = connection.execute(_KEYS.where(api_keys.c.id == key_id)).first()
    return _key(row) if row is not None else None


def keys_of(connection: sql.Connection, account: str | None = None) -> list[KeyRecord]:
    """Of one account or of all, oldest first, revoked ones too."""
    chosen = _KEYS if account is None else _KEYS.where(api_keys.c.account == account)
    return [_key(row) for row in connection.execute(chosen.order_by(api_keys.c.id))]


def valid_keys(connection: sql.Connection, account: str, now_ms: int) -> int:
    """How many keys of an account may be used now."""
    valid = sql.or_(api_keys.c.revoked_at_ms.is_(None), api_keys.c.revoked_at_ms > now_ms)
    return connection.execute(sql.select(sql.func.count()).where(api_keys.c.account == account, valid)).scalar_one()


@dataclass(frozen=True, slots=True)
class AccountView:
    """An account with what belongs to it. ``escrow``, ``karma_milli`` and ``earned`` are sums over its Islands; ``earning`` counts those
    whose earnings are paid out at once."""

    name: str
    created_at_ms: int
    rate_limit_per_minute: int
    refilled_day: int
    posted: int
    held: int
    escrow: int
    islands: int
    earning: int
    karma_milli: int
    earned: int
    keys: int

    @property
    def credits(self) -> int:
        """What it may spend: posted less held."""
        return self.posted - self.held


def _scalar(column: sql.ColumnElement[Any], *where: sql.ColumnElement[bool], source: sql.FromClause | None = None) -> Any:
    chosen = sql.select(sql.func.coalesce(column, 0)).where(*where)
    return (chosen.select_from(source) if source is not None else chosen).correlate(accounts).scalar_subquery()


_OWN_BALANCE = balances.c.account == sql.literal(_USER).concat(accounts.c.name)
_OWN_ISLANDS = islands.c.account == accounts.c.name
_ESCROWED = islands.join(balances, balances.c.account == sql.literal(_ESCROW).concat(islands.c.peer))
_ACCOUNTS = sql.select(
    accounts.c.name,
    accounts.c.created_at_ms,
    accounts.c.rate_limit_per_minute,
    accounts.c.refilled_day,
    sql.func.coalesce(balances.c.posted, 0).label("posted"),
    sql.func.coalesce(balances.c.held, 0).label("held"),
    _scalar(sql.func.sum(balances.c.posted), _OWN_ISLANDS, source=_ESCROWED).label("escrow"),
    _scalar(sql.func.count(), _OWN_ISLANDS, source=islands).label("islands"),
    _scalar(sql.func.count(), _OWN_ISLANDS, islands.c.karma_milli >= EARNING_KARMA_MILLI, source=islands).label("earning"),
    _scalar(sql.func.sum(islands.c.karma_milli), _OWN_ISLANDS).label("karma_milli"),
    _scalar(sql.func.sum(islands.c.earned_micros), _OWN_ISLANDS).label("earned"),
    _scalar(sql.func.count(), api_keys.c.account == accounts.c.name, api_keys.c.revoked_at_ms.is_(None), source=api_keys).label("keys"),
).select_from(accounts.outerjoin(balances, _OWN_BALANCE))


def _view(row: Sequence[Any]) -> AccountView:
    name, *figures = row
    return AccountView(name, *map(int, figures))  # PostgreSQL sums whole numbers as decimals


def account_view(connection: sql.Connection, name: str) -> AccountView | None:
    row = connection.execute(_ACCOUNTS.where(accounts.c.name == name)).first()
    return _view(row) if row is not None else None


def account_views(connection: sql.Connection) -> list[AccountView]:
    """All accounts, by name."""
    return [_view(row) for row in connection.execute(_ACCOUNTS.order_by(accounts.c.name))]


@dataclass(frozen=True, slots=True)
class IslandView:
    """An Island, and what waits in escrow for its owner."""

    record: IslandRecord
    escrow: int


_ISLAND_FIELDS = tuple(field.name for field in fields(IslandRecord))
_ISLANDS = sql.select(
    *(islands.c[name] for name in _ISLAND_FIELDS), sql.func.coalesce(balances.c.posted, 0).label("escrow")
).select_from(islands.outerjoin(balances, balances.c.account == sql.literal(_ESCROW).concat(islands.c.peer)))


def _island(row: Sequence[Any]) -> IslandView:
    *record, waiting = row
    return IslandView(IslandRecord(*record), waiting)


def island_view(connection: sql.Connection, peer: str) -> IslandView | None:
    row = connection.execute(_ISLANDS.where(islands.c.peer == peer)).first()
    return _island(row) if row is not None else None


def islands_of(connection: sql.Connection, account: str) -> list[IslandView]:
    """Those that are paired with an account, longest known first."""
    chosen = _ISLANDS.where(islands.c.account == account).order_by(islands.c.first_seen_ms, islands.c.peer)
    return [_island(row) for row in connection.execute(chosen)]


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two lines of a list, behind the line that it names or where that would be. Lines are ordered by time, and in the
    same millisecond by ``side``, then by id."""

    at_ms: int
    side: int = 0
    id: str = ""


def _job_of(reference: sql.ColumnElement[str]) -> sql.ColumnElement[str]:
    """The job: itself, or the one that the ticket is of which stands there, where the tokens went straight to the Consumer."""
    its_job = sql.select(tickets.c.job_id).where(tickets.c.id == reference).scalar_subquery()
    return sql.func.coalesce(its_job, reference)


_EVENT_FIELDS = tuple(field.name for field in fields(KarmaEvent))


def karma_of(connection: sql.Connection, peer: str, before: Position | None, limit: int) -> list[KarmaEvent]:
    """What changed an Island's karma, newest first."""
    table = karma_events
    columns = [_job_of(table.c.job_id) if name == "job_id" else table.c[name] for name in _EVENT_FIELDS]
    chosen = sql.select(*columns).where(table.c.peer == peer)
    if before is not None:
        chosen = chosen.where(sql.tuple_(table.c.at_ms, table.c.id) < sql.tuple_(before.at_ms, before.id))
    rows = connection.execute(chosen.order_by(table.c.at_ms.desc(), table.c.id.desc()).limit(limit))
    return [KarmaEvent(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a statement. ``amount``: positive where the account got it. ``balance``: of posted credits, after this line.

    What came in stands before what went out in the same millisecond, so no balance on the way looks as if it were below zero.
    """

    id: str
    at_ms: int
    kind: str
    job: str
    amount: int
    balance: int

    @property
    def position(self) -> Position:
        return Position(self.at_ms, _IN if self.amount > 0 else _OUT, self.id)


_IN, _OUT = 0, 1
EARNING = "earning"  # what a charge is called by the one who gets it
_OF_JOBS = (TransferKind.CHARGE.value, TransferKind.REFUND.value)


def _is_up_to(side: int, at: Position) -> sql.ColumnElement[bool]:
    return sql.tuple_(transfers.c.at_ms, sql.literal(side), transfers.c.id) <= sql.tuple_(at.at_ms, at.side, at.id)


def _is_behind(side: int, at: Position) -> sql.ColumnElement[bool]:
    behind = sql.tuple_(transfers.c.at_ms, sql.literal(side), transfers.c.id) > sql.tuple_(at.at_ms, at.side, at.id)
    return behind & (transfers.c.at_ms >= at.at_ms)  # says nothing new, but an index understands it


def balance_at(connection: sql.Connection, account: str, at: Position) -> int:
    """Posted credits of an account's user after all lines up to a position."""

    def total(side: int, column: sql.Column[Any]) -> int:
        wanted = [column == user(account), _is_up_to(side, at), transfers.c.at_ms <= at.at_ms]
        return _whole(connection, sql.func.sum(transfers.c.amount), wanted)

    return total(_IN, transfers.c.credit) - total(_OUT, transfers.c.debit)


def statement_lines(
    connection: sql.Connection, account: str, after: Position, balance: int, until_ms: int, limit: int
) -> list[Line]:
    """At most ``limit`` lines behind a position and before ``until_ms``, oldest first. ``balance``: at that position."""
    table = transfers.c
    # two questions, so that each has its index; a transfer has two sides, so no line comes twice
    sides = [
        sql.select(table.id, table.at_ms, table.kind, table.reference, amount.label("amount"), sql.literal(side).label("side"))
        .where(column == user(account), _is_behind(side, after), table.at_ms < until_ms)
        .order_by(table.at_ms, table.id)
        .limit(limit)
        .subquery()
        for side, column, amount in ((_IN, table.credit, table.amount), (_OUT, table.debit, -table.amount))
    ]
    both = sql.union_all(*(sql.select(side) for side in sides)).subquery()
    wanted = sql.select(both, _job_of(both.c.reference).label("job"))
    rows = connection.execute(wanted.order_by(both.c.at_ms, both.c.side, both.c.id).limit(limit))
    lines = []
    for row in rows:
        balance += row.amount
        lines.append(_line(row, balance))
    return lines


def _line(row: sql.Row[Any], balance: int) -> Line:
    kind = EARNING if row.kind == TransferKind.CHARGE.value and row.amount > 0 else row.kind
    return Line(row.id, row.at_ms, kind, row.job if row.kind in _OF_JOBS else "", row.amount, balance)


def publishers_of(connection: sql.Connection) -> list[Publisher]:
    """Who gets a share of which Cargo's charges."""
    names = [field.name for field in fields(Publisher)]
    rows = connection.execute(sql.select(*(publishers.c[name] for name in names)).order_by(publishers.c.cargo))
    return [Publisher(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class Totals:
    """All credits, by where they are: ``issued`` is the sum of the others, less ``losses``, which refunds have cost the network."""

    issued: int
    users: int
    escrow: int
    losses: int
    held: int
    accounts: int


def totals(connection: sql.Connection) -> Totals:
    def posted(*where: sql.ColumnElement[bool]) -> int:
        return _whole(connection, sql.func.sum(balances.c.posted), where)

    issued, losses = (-posted(balances.c.account == account) for account in (ISSUE, LOSSES))
    users, waiting = (posted(balances.c.account.startswith(prefix, autoescape=True)) for prefix in (_USER, _ESCROW))
    held = _whole(connection, sql.func.sum(balances.c.held), ())
    return Totals(issued, users, waiting, losses, held, _whole(connection, sql.func.count(accounts.c.name), ()))


def _whole(connection: sql.Connection, column: sql.ColumnElement[Any], where: Sequence[sql.ColumnElement[bool]]) -> int:
    return int(connection.execute(sql.select(sql.func.coalesce(column, 0)).where(*where)).scalar_one())
