"""A/B tests in the database: questions, and changes inside ``Database.writing``.

Every change of a test raises its revision and gets the next number (``seq``) of all tests, so that each Coordinator finds what is new, and
whoever decides by what it has read (``change``) changes nothing where somebody was faster.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import sqlalchemy as sql

from coordinator.abtests.plan import AbState, ArmCounts, Metric, Plan, Tally
from coordinator.abtests.plan_json import plan_from_json, plan_to_json
from coordinator.books.ab_units import CACHE_SOURCE, AbUnit, added, unit_id
from coordinator.books.jobs import ENDED
from coordinator.books.schema import ab_events, ab_tests, ab_units, jobs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AbTest:
    """Times in Unix milliseconds, 0: not yet. ``active_ms``: how long it has run, counted until ``seen_at_ms``; ``base_address``: what the
    base stood for when it was started; ``winner``: the promoted arm; ``note``: why it stands still, in words; ``reason``: in
    one (deciding.py)."""

    id: str
    account: str
    plan: Plan
    state: AbState
    revision: int = 1
    created_at_ms: int = 0
    started_at_ms: int = 0
    ended_at_ms: int = 0
    active_ms: int = 0
    seen_at_ms: int = 0
    base_address: str = ""
    winner: str = ""
    note: str = ""
    reason: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True)
class AbEvent:
    """One line of a test's audit log. ``account``: who did it; empty: the test itself. ``detail``: plain JSON."""

    at_ms: int
    kind: str
    account: str
    detail: Mapping[str, Any]


class Outrun(Exception):
    """Somebody else has changed the test meanwhile; look again."""


def _test(row: Any) -> AbTest:
    return AbTest(
        id=row.id,
        account=row.account,
        plan=plan_from_json(json.loads(row.plan)),
        state=AbState(row.state),
        revision=row.revision,
        created_at_ms=row.created_at_ms,
        started_at_ms=row.started_at_ms,
        ended_at_ms=row.ended_at_ms,
        active_ms=row.active_ms,
        seen_at_ms=row.seen_at_ms,
        base_address=row.base_address,
        winner=row.winner,
        note=row.note,
        reason=row.reason,
        seq=row.seq,
    )


def _values(test: AbTest) -> dict[str, Any]:
    return {
        "id": test.id,
        "account": test.account,
        "base_cargo": test.plan.base_cargo,
        "state": str(test.state),
        "plan": json.dumps(plan_to_json(test.plan), separators=(",", ":")),
        "revision": test.revision,
        "created_at_ms": test.created_at_ms,
        "started_at_ms": test.started_at_ms,
        "ended_at_ms": test.ended_at_ms,
        "active_ms": test.active_ms,
        "seen_at_ms": test.seen_at_ms,
        "base_address": test.base_address,
        "winner": test.winner,
        "note": test.note,
        "reason": test.reason,
        "seq": test.seq,
    }


# ---- questions


def tests_after(connection: sql.Connection, seq: int) -> tuple[list[AbTest], int]:
    """Those that have changed since the change of this number, and the number of the last change. What cannot be read here, since another
    version of this program has written it, is left out: it concerns no other test."""
    found = []
    for row in connection.execute(sql.select(ab_tests).where(ab_tests.c.seq > seq).order_by(ab_tests.c.seq)):
        seq = row.seq
        try:
            found.append(_test(row))
        except (KeyError, ValueError, TypeError) as error:
            log.error("A/B test %s cannot be read: %r", row.id, error)
    return found, seq


def test_of(connection: sql.Connection, id: str) -> AbTest | None:
    row = connection.execute(sql.select(ab_tests).where(ab_tests.c.id == id)).first()
    return None if row is None else _test(row)


def tests_of(connection: sql.Connection, account: str, limit: int, offset: int) -> tuple[list[AbTest], int]:
    """An account's, the newest first, and how many there are."""
    whose = ab_tests.c.account == account
    total = connection.execute(sql.select(sql.func.count()).where(whose)).scalar_one()
    newest = sql.select(ab_tests).where(whose).order_by(ab_tests.c.created_at_ms.desc(), ab_tests.c.id).limit(limit).offset(offset)
    return [_test(row) for row in connection.execute(newest)], int(total)


def active_on(connection: sql.Connection, base_cargo: str) -> str | None:
    """The id of the active test on a Cargo."""
    chosen = sql.select(ab_tests.c.id).where(ab_tests.c.base_cargo == base_cargo, ab_tests.c.state == str(AbState.ACTIVE))
    return connection.execute(chosen).scalar()


def events_of(connection: sql.Connection, test: str) -> list[AbEvent]:
    """Oldest first."""
    rows = connection.execute(sql.select(ab_events).where(ab_events.c.test == test).order_by(ab_events.c.id))
    return [AbEvent(row.at_ms, row.kind, row.account, json.loads(row.detail)) for row in rows]


# metric -> the sum of a unit's values, and which of its jobs it is of
_SUMS: dict[Metric, tuple[str, ...]] = {
    Metric.LATENCY: ("latency_us", "succeeded"),
    Metric.TIME_TO_FIRST_TOKEN: ("first_word_us", "first_words"),
    Metric.SUCCESS: ("succeeded", "jobs"),
    Metric.ABANDONED: ("abandoned", "jobs", "abandoned"),
    Metric.TOKENS_PER_SECOND: ("speed_milli", "speeds"),
    Metric.COST: ("cost_micros", "succeeded"),
    Metric.THUMBS: ("ups", "rated"),
}


def counts_of(connection: sql.Connection, test: str) -> dict[str, ArmCounts]:
    """Of each arm that has any. One pass over the test's units, in the database."""
    column = ab_units.c
    columns: list[Any] = [column.arm, sql.func.count().label("units")]
    columns += [sql.func.sum(column[name]).label(name) for name in ("jobs", "succeeded", "cached", "tokens")]
    for metric, (value, *counts) in _SUMS.items():
        count = reduce(add, (column[name] for name in counts))
        total, many = sql.cast(column[value], sql.Double), sql.cast(count, sql.Double)
        columns += [
            sql.func.sum(sql.case((count > 0, 1), else_=0)).label(f"{metric}_units"),
            sql.func.sum(many).label(f"{metric}_n"),
            sql.func.sum(total).label(f"{metric}_s"),
            sql.func.sum(total * total).label(f"{metric}_ss"),
            sql.func.sum(many * many).label(f"{metric}_nn"),
            sql.func.sum(total * many).label(f"{metric}_sn"),
        ]
    rows = connection.execute(sql.select(*columns).where(column.test == test).group_by(column.arm))
    return {row["arm"]: _arm_counts(row) for row in map(dict, rows.mappings())}


def _arm_counts(row: Mapping[str, Any]) -> ArmCounts:
    tallies = {
        metric: Tally(
            int(row[f"{metric}_units"]),
            int(row[f"{metric}_n"]),
            float(row[f"{metric}_s"]),
            float(row[f"{metric}_ss"]),
            float(row[f"{metric}_nn"]),
            float(row[f"{metric}_sn"]),
        )
        for metric in _SUMS
    }
    return ArmCounts(int(row["units"]), int(row["jobs"]), int(row["succeeded"]), int(row["cached"]), int(row["tokens"]), tallies)


def recount(connection: sql.Connection, test: str) -> dict[str, AbUnit]:
    """What the counters of a test have to be by its jobs, but for answers from the cache; by the units' ids. Also of the units of which no
    job counts."""
    found: dict[str, AbUnit] = {}
    ended = jobs.c.state.in_([str(state) for state in ENDED]) & (jobs.c.bid_source != CACHE_SOURCE)
    for row in connection.execute(sql.select(jobs).where(jobs.c.ab_test == test, ended)):
        id = unit_id(row.ab_test, row.ab_arm, row.ab_unit)
        found[id] = added(found.get(id) or AbUnit(id, row.ab_test, row.ab_arm, row.ab_unit), row)
    return found


def counted(connection: sql.Connection, test: str) -> dict[str, AbUnit]:
    """The counters as they are."""
    return {row.id: AbUnit(**row._mapping) for row in connection.execute(sql.select(ab_units).where(ab_units.c.test == test))}


# ---- changes


def create(connection: sql.Connection, test: AbTest, tests_max: int) -> AbTest | None:
    """None where the account has as many tests as it may have that have not ended."""
    ended = [str(state) for state in AbState if state.ended]
    mine = sql.select(sql.func.count()).where(ab_tests.c.account == test.account, ab_tests.c.state.not_in(ended))
    if connection.execute(mine).scalar_one() >= tests_max:
        return None
    values = {**_values(test), "seq": _next_seq(connection)}
    connection.execute(sql.insert(ab_tests), values)
    made = test_of(connection, test.id)
    assert made is not None
    return made


def change(connection: sql.Connection, test: AbTest, events: Sequence[AbEvent] = ()) -> AbTest:
    """Stores a test that was read with its ``revision``. Raises Outrun where it has changed since."""
    values = {**_values(test), "revision": test.revision + 1, "seq": _next_seq(connection)}
    where = (ab_tests.c.id == test.id) & (ab_tests.c.revision == test.revision)
    if connection.execute(sql.update(ab_tests).where(where).values(**values)).rowcount != 1:
        raise Outrun
    for event in events:
        log_event(connection, test.id, event)
    made = test_of(connection, test.id)
    assert made is not None
    return made


def log_event(connection: sql.Connection, test: str, event: AbEvent) -> None:
    detail = json.dumps(dict(event.detail), separators=(",", ":"))
    values = {"test": test, "at_ms": event.at_ms, "kind": event.kind, "account": event.account, "detail": detail}
    connection.execute(sql.insert(ab_events), values)


def _next_seq(connection: sql.Connection) -> int:
    return int(connection.execute(sql.select(sql.func.coalesce(sql.func.max(ab_tests.c.seq), 0))).scalar_one()) + 1
