"""Keeping to what the database says: which answers are to be deleted, and the operator's policies. One look a second."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sql

from coordinator.books import cache_rows
from coordinator.books.cache_rows import Purge
from coordinator.books.schema import cache_policies
from protocol.cargos import CachePolicy

POLL_S = 1.0
PURGES_KEPT_S = 86_400.0  # a Coordinator that has not looked for so long has lost its answers by their age, or begins anew


@dataclass(frozen=True, slots=True)
class News:
    """What has changed. ``said``: of each Cargo what the operator says, and when he said it, in Unix milliseconds."""

    purges: tuple[Purge, ...]
    seq: int
    said: dict[str, tuple[CachePolicy, int]]


def read_news(connection: sql.Connection, seq: int | None) -> News:
    """What came after the purge of this number; None: from now on, as a cache that is empty has nothing to delete."""
    times = {row.cargo: row.at_ms for row in connection.execute(sql.select(cache_policies.c.cargo, cache_policies.c.at_ms))}
    said = {cargo: (policy, times.get(cargo, 0)) for cargo, policy in cache_rows.policies(connection).items()}
    if seq is None:
        return News((), cache_rows.last_purge(connection), said)
    purges = cache_rows.purges_after(connection, seq)
    return News(tuple(purges), max([seq, *(purge.seq for purge in purges)]), said)


def order_purge(connection: sql.Connection, now_ms: int, account: str, cargo: str, key: str) -> int:
    """Has all Coordinators of the database delete answers; its number. Purges that all have done long ago go."""
    number = cache_rows.purge(connection, now_ms, account, cargo, key)
    cache_rows.forget_purges(connection, now_ms - int(PURGES_KEPT_S * 1000))
    return number
