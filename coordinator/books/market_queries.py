"""What is asked of the books, and told them, about the market. ``connection`` of a change is inside ``Database.writing``."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sql

from coordinator.books.jobs import JobState
from coordinator.books.schema import bids, islands, jobs, market_snapshots, quotes
from coordinator.exchange.rates import Clearing
from protocol.prices import Ask

CLEARINGS_MAX = 20_000
HISTORY_MS = 31 * 24 * 3_600_000


def saved_bid(connection: sql.Connection, account: str, cargo: str) -> int | None:
    found = connection.execute(sql.select(bids.c.micros).where(bids.c.account == account, bids.c.cargo == cargo)).scalar()
    return int(found) if found is not None else None


def saved_bids(connection: sql.Connection, account: str) -> dict[str, int]:
    """Cargo -> micro-credits."""
    chosen = sql.select(bids.c.cargo, bids.c.micros).where(bids.c.account == account).order_by(bids.c.cargo)
    return {row.cargo: row.micros for row in connection.execute(chosen)}


def save_bid(connection: sql.Connection, account: str, cargo: str, micros: int | None, now_ms: int) -> None:
    """None forgets it."""
    connection.execute(sql.delete(bids).where(bids.c.account == account, bids.c.cargo == cargo))
    if micros is not None:
        connection.execute(sql.insert(bids), {"account": account, "cargo": cargo, "micros": micros, "set_at_ms": now_ms})


def quote_body(connection: sql.Connection, quote_id: str) -> str | None:
    return connection.execute(sql.select(quotes.c.body).where(quotes.c.id == quote_id)).scalar()


def keep_quote(connection: sql.Connection, quote_id: str, account: str, body: str, expires_at_ms: int) -> None:
    connection.execute(
        sql.insert(quotes), {"id": quote_id, "account": account, "body": body, "expires_at_ms": expires_at_ms}
    )


def forget_quotes(connection: sql.Connection, before_ms: int) -> int:
    return connection.execute(sql.delete(quotes).where(quotes.c.expires_at_ms < before_ms)).rowcount


def clearings(connection: sql.Connection, since_ms: int, but_of: str) -> dict[str, Clearing]:
    """Jobs that were paid since, by their id, in the order of time, but for those of one Coordinator and those that an account paid to its
    own Islands."""
    paid = (jobs.c.state == JobState.SUCCEEDED.value) & (jobs.c.finished_at_ms >= since_ms) & (jobs.c.owner != but_of)
    foreign = sql.or_(islands.c.account.is_(None), islands.c.account != jobs.c.account)
    chosen = (
        sql.select(
            jobs.c.cargo,
            jobs.c.finished_at_ms,
            jobs.c.ask_per_job,
            jobs.c.ask_per_1k_output,
            jobs.c.ask_per_second,
            jobs.c.price_micros,
            jobs.c.completion_tokens,
            jobs.c.compute_ms,
            jobs.c.id,
        )
        .select_from(jobs.outerjoin(islands, islands.c.peer == jobs.c.island))
        .where(paid, foreign)
        .order_by(jobs.c.finished_at_ms.desc())
        .limit(CLEARINGS_MAX)
    )
    rows = connection.execute(chosen).all()
    return {
        row.id: Clearing(row[0], row[1], Ask(row[2], row[3], row[4]), price_micros=row[5], output_tokens=row[6], compute_ms=row[7])
        for row in reversed(rows)
    }


def keep_snapshots(connection: sql.Connection, rows: Sequence[tuple[str, int, str]], now_ms: int) -> None:
    """(Cargo, end of the slot, JSON); a slot that another Coordinator has written stays as it is. Forgets what is older than a month."""
    for cargo, at_ms, body in rows:
        there = sql.select(market_snapshots.c.cargo).where(market_snapshots.c.cargo == cargo, market_snapshots.c.at_ms == at_ms)
        if connection.execute(there).first() is None:
            connection.execute(sql.insert(market_snapshots), {"cargo": cargo, "at_ms": at_ms, "body": body})
    connection.execute(sql.delete(market_snapshots).where(market_snapshots.c.at_ms < now_ms - HISTORY_MS))


def snapshots_of(connection: sql.Connection, cargo: str, since_ms: int) -> list[str]:
    """JSON of each, in the order of time."""
    wanted = (market_snapshots.c.cargo == cargo) & (market_snapshots.c.at_ms > since_ms)
    return list(connection.execute(sql.select(market_snapshots.c.body).where(wanted).order_by(market_snapshots.c.at_ms)).scalars())
