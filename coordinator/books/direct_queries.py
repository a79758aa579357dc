"""What is asked of the books about jobs on the direct path. SELECTs only."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import sqlalchemy as sql

from coordinator.books.direct import TicketRecord, TicketState
from coordinator.books.jobs import Job, JobState
from coordinator.books.schema import holds, jobs, tickets

_JOB = sql.select(*(jobs.c[field.name] for field in fields(Job)))
_ALL = sql.select(*(tickets.c[field.name] for field in fields(TicketRecord)))


def _record(row: sql.Row[Any]) -> TicketRecord:
    values = dict(row._mapping)
    return TicketRecord(**{**values, "state": TicketState(values["state"])})


def tickets_of(connection: sql.Connection, job_id: str, holder: str) -> list[TicketRecord]:
    """Of a job of this Consumer's peer, in the order of their issue."""
    chosen = _ALL.join_from(tickets, jobs, tickets.c.job_id == jobs.c.id).where(jobs.c.id == job_id, jobs.c.holder == holder)
    return [_record(row) for row in connection.execute(chosen.order_by(tickets.c.issued_at_ms, tickets.c.id))]


def job_of(connection: sql.Connection, job_id: str, holder: str) -> tuple[Job, list[TicketRecord]] | None:
    """A job of this Consumer's peer with its tickets, in the order of their issue."""
    row = connection.execute(_JOB.where(jobs.c.id == job_id, jobs.c.holder == holder)).first()
    return (_job(row), tickets_of(connection, job_id, holder)) if row is not None else None


def _job(row: sql.Row[Any]) -> Job:
    values = dict(row._mapping)
    return Job(**{**values, "state": JobState(values["state"])})


def ticket_of(connection: sql.Connection, ticket_id: str) -> TicketRecord | None:
    row = connection.execute(_ALL.where(tickets.c.id == ticket_id)).first()
    return _record(row) if row is not None else None


def expired_tickets(connection: sql.Connection, now_ms: int, limit: int) -> list[TicketRecord]:
    """Open ones whose hold is over: neither Consumer nor Island has come."""
    over = (tickets.c.state == TicketState.OPEN.value) & (holds.c.expires_at_ms < now_ms)
    chosen = _ALL.join_from(tickets, holds, tickets.c.id == holds.c.id).where(over).order_by(tickets.c.issued_at_ms).limit(limit)
    return [_record(row) for row in connection.execute(chosen)]


def lost_jobs(connection: sql.Connection, before_ms: int, limit: int) -> list[Job]:
    """Open ones without an open ticket, whose newest was issued before ``before_ms``: their Consumers will not say any more how they ended,
    and what their Islands have claimed is paid."""
    its_tickets = tickets.c.job_id == jobs.c.id
    standing = sql.exists().where(its_tickets, tickets.c.state == TicketState.OPEN.value)
    recent = sql.exists().where(its_tickets, tickets.c.issued_at_ms >= before_ms)
    is_open = jobs.c.state.in_(("submitted", "assigned", "running"))  # as the partial index says it
    over = is_open & (jobs.c.holder != "") & (jobs.c.created_at_ms < before_ms) & ~standing & ~recent
    return [_job(row) for row in connection.execute(_JOB.where(over).order_by(jobs.c.created_at_ms).limit(limit))]
