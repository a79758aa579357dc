"""What is asked of the books about runs and their jobs. SELECTs, but for ``forget_runs``; ``connection`` is any reader's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sql

from coordinator.books.job_queries import LISTED, job_from
from coordinator.books.jobs import Job
from coordinator.books.runs import Run, RunKind, RunState
from coordinator.books.schema import jobs, runs

_FIELDS = tuple(field.name for field in fields(Run))
_BLOBS = ("spec", "result")
_ONE = sql.select(*(runs.c[name] for name in _FIELDS))
_LIST = sql.select(*(runs.c[name] for name in _FIELDS if name not in _BLOBS))
_WITHOUT_SPEC = sql.select(*(runs.c[name] for name in _FIELDS if name != "spec"))
_OPEN = runs.c.state == RunState.RUNNING.value
_CHILDREN = sql.select(*(jobs.c[name] for name in LISTED))
_WITH_OUTPUT = sql.select(*(jobs.c[name] for name in (*LISTED, "output")))
_IN_MAX = 500  # ids of one SELECT


def _run(row: sql.Row[Any]) -> Run:
    values = dict(row._mapping)
    return Run(**{**values, "kind": RunKind(values["kind"]), "state": RunState(values["state"])})


def run_of(connection: sql.Connection, run_id: str, account: str) -> Run | None:
    """A run of this account, with its sealed specification and result."""
    row = connection.execute(_ONE.where(runs.c.id == run_id, runs.c.account == account)).first()
    return _run(row) if row is not None else None


def run_without_spec(connection: sql.Connection, run_id: str, account: str) -> Run | None:
    """A run of this account, with its sealed result: for who looks often, since specifications may be large."""
    row = connection.execute(_WITHOUT_SPEC.where(runs.c.id == run_id, runs.c.account == account)).first()
    return _run(row) if row is not None else None


def open_runs(connection: sql.Connection, account: str, kind: RunKind) -> int:
    """How many of an account have not ended."""
    wanted = _OPEN & (runs.c.account == account) & (runs.c.kind == kind.value)
    return connection.execute(sql.select(sql.func.count()).select_from(runs).where(wanted)).scalar_one()


def any_run(connection: sql.Connection, run_id: str) -> Run | None:
    """A run of any account, with its sealed specification and result."""
    row = connection.execute(_ONE.where(runs.c.id == run_id)).first()
    return _run(row) if row is not None else None


def runs_of(connection: sql.Connection, account: str, kind: RunKind, limit: int, offset: int = 0) -> tuple[list[Run], int]:
    """Newest first, without specification and result; and how many there are in all."""
    wanted = (runs.c.account == account) & (runs.c.kind == kind.value)
    total = connection.execute(sql.select(sql.func.count()).select_from(runs).where(wanted)).scalar_one()
    ordered = _LIST.where(wanted).order_by(runs.c.created_at_ms.desc(), runs.c.id).limit(limit).offset(offset)
    return [_run(row) for row in connection.execute(ordered)], total


def run_by_fingerprint(connection: sql.Connection, account: str, fingerprint: str, since_ms: int) -> Run | None:
    """The newest run that this very request has made before."""
    recent = (runs.c.account == account) & (runs.c.created_at_ms >= since_ms) & (runs.c.fingerprint == fingerprint)
    row = connection.execute(_ONE.where(recent).order_by(runs.c.created_at_ms.desc()).limit(1)).first()
    return _run(row) if row is not None else None


def own_runs(connection: sql.Connection, owner: str, boot: int) -> dict[str, bool]:
    """Those that have not ended, of one run of a Coordinator: id -> whether their account does not want them any more."""
    mine = _OPEN & (runs.c.owner == owner) & (runs.c.owner_boot == boot)
    return {row.id: row.cancel_wanted for row in connection.execute(sql.select(runs.c.id, runs.c.cancel_wanted).where(mine))}


def orphaned_runs(connection: sql.Connection, live: Mapping[str, int], limit: int) -> list[Run]:
    """Those that have not ended and whose owner is no live run of a Coordinator (peer id -> boot), oldest first, without specification."""
    alive = [(runs.c.owner == peer) & (runs.c.owner_boot == boot) for peer, boot in live.items()]
    chosen = _LIST.where(_OPEN, sql.not_(sql.or_(sql.false(), *alive)))
    return [_run(row) for row in connection.execute(chosen.order_by(runs.c.created_at_ms).limit(limit))]


def children_of(connection: sql.Connection, run_id: str) -> list[Job]:
    """The jobs of a run, without input and output, in no order."""
    return [job_from(row) for row in connection.execute(_CHILDREN.where(jobs.c.parent == run_id, jobs.c.parent != ""))]


def spent_by(connection: sql.Connection, run_id: str) -> int:
    """Micro-credits that the jobs of a run have cost."""
    total = sql.select(sql.func.coalesce(sql.func.sum(jobs.c.price_micros), 0)).where(jobs.c.parent == run_id, jobs.c.parent != "")
    return int(connection.execute(total).scalar_one())


def output_bytes(connection: sql.Connection, job_ids: Sequence[str]) -> int:
    """What is kept of all these jobs' outputs together; of at most _IN_MAX jobs."""
    size = sql.select(sql.func.coalesce(sql.func.sum(sql.func.length(jobs.c.output)), 0))
    return int(connection.execute(size.where(jobs.c.id.in_(job_ids[:_IN_MAX]))).scalar_one())


def outputs_of(connection: sql.Connection, job_ids: Sequence[str], now_ms: int) -> list[Job]:
    """Those of these jobs whose output is kept, with it."""
    found: list[Job] = []
    for at in range(0, len(job_ids), _IN_MAX):
        chosen = _WITH_OUTPUT.where(jobs.c.id.in_(job_ids[at : at + _IN_MAX]), jobs.c.result_expires_at_ms > now_ms)
        found += [job_from(row) for row in connection.execute(chosen)]
    return found


def forget_runs(connection: sql.Connection, now_ms: int) -> int:
    """Empties specifications and results whose time is over (a write); how many."""
    over = (runs.c.expires_at_ms > 0) & (runs.c.expires_at_ms < now_ms) & (runs.c.state != RunState.RUNNING.value)
    return connection.execute(sql.update(runs).where(over).values(spec=b"", result=b"", expires_at_ms=0)).rowcount
