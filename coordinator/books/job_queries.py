"""What is asked of the books about jobs. SELECTs only; ``connection`` is any reader's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sql

from coordinator.books.accounts import IslandRecord
from coordinator.books.jobs import ENDED, Job, JobState, request_id
from coordinator.books.ledger import HoldState, Transfer, TransferKind
from coordinator.books.schema import holds, islands, jobs, receipts, requests, tickets, transfers
from protocol import limits

_JOB_FIELDS = tuple(field.name for field in fields(Job))
_BLOBS = ("input", "output")
_ONE = sql.select(*(jobs.c[name] for name in _JOB_FIELDS))
LISTED = tuple(name for name in _JOB_FIELDS if name not in _BLOBS)
_LIST = sql.select(*(jobs.c[name] for name in LISTED))
_CHARGES_MAX = limits.COMPLETION_CHOICES_MAX * limits.ROUTE_STAGES_MAX + 1  # each choice pays each stage, and all the publisher
_SKEW_MS = int(limits.CLOCK_SKEW_S * 1000)
_OPEN = jobs.c.state.in_(("submitted", "assigned", "running"))  # as the partial index says it


def job_from(row: sql.Row[Any]) -> Job:
    """From the columns in LISTED, or all."""
    values = dict(row._mapping)
    return Job(**{**values, "state": JobState(values["state"])})


def job_of(connection: sql.Connection, job_id: str, account: str) -> Job | None:
    """A job of this account, with its sealed input and output."""
    row = connection.execute(_ONE.where(jobs.c.id == job_id, jobs.c.account == account)).first()
    return job_from(row) if row is not None else None


def any_job(connection: sql.Connection, job_id: str) -> Job | None:
    """A job of any account, with its sealed input and output: for who has shown otherwise that he may see it."""
    row = connection.execute(_ONE.where(jobs.c.id == job_id)).first()
    return job_from(row) if row is not None else None


def kept_until(connection: sql.Connection, job_id: str) -> int:
    """Unix milliseconds until which a job's answer is kept; 0: it is not."""
    return connection.execute(sql.select(jobs.c.result_expires_at_ms).where(jobs.c.id == job_id)).scalar_one_or_none() or 0


def job_by_fingerprint(connection: sql.Connection, account: str, fingerprint: str, since_ms: int) -> Job | None:
    """The newest job that this very request has made before."""
    recent = (jobs.c.account == account) & (jobs.c.created_at_ms >= since_ms) & (jobs.c.fingerprint == fingerprint)
    row = connection.execute(_ONE.where(recent).order_by(jobs.c.created_at_ms.desc()).limit(1)).first()
    return job_from(row) if row is not None else None


def job_by_key(connection: sql.Connection, account: str, key: str, fingerprint: str, now_ms: int) -> Job | None:
    """The job that a request of this idempotency key stands for."""
    valid = (requests.c.id == request_id(account, key)) & (requests.c.fingerprint == fingerprint) & (requests.c.expires_at_ms >= now_ms)
    row = connection.execute(_ONE.join_from(jobs, requests, jobs.c.id == requests.c.job_id).where(valid)).first()
    return job_from(row) if row is not None else None


def jobs_of(
    connection: sql.Connection, account: str, limit: int, offset: int, states: Sequence[JobState] = (), cargo: str = "", parent: str = ""
) -> tuple[list[Job], int]:
    """Newest first, without input and output; and how many there are in all. Of a run's jobs only where it is named as ``parent``."""
    wanted = (jobs.c.account == account) & (jobs.c.parent == parent)
    if states:
        wanted &= jobs.c.state.in_([state.value for state in states])
    if cargo:
        wanted &= jobs.c.cargo == cargo
    total = connection.execute(sql.select(sql.func.count()).select_from(jobs).where(wanted)).scalar_one()
    ordered = _LIST.where(wanted).order_by(jobs.c.created_at_ms.desc(), jobs.c.id).limit(limit).offset(offset)
    return [job_from(row) for row in connection.execute(ordered)], total


def charges_of(connection: sql.Connection, job_id: str) -> list[Transfer]:
    """The chains of transfers that a job was charged by."""
    names = [field.name for field in fields(Transfer)]
    ids = [*_numbered(connection, job_id, _CHARGES_MAX), *_late_charges(connection, [job_id])]
    its_own = (transfers.c.kind == TransferKind.CHARGE.value) & transfers.c.id.in_(ids)
    rows = connection.execute(sql.select(*(transfers.c[name] for name in names)).where(its_own).order_by(transfers.c.id))
    return [Transfer(**{**row._mapping, "kind": TransferKind(row.kind)}) for row in rows]


def _late_charges(connection: sql.Connection, job_ids: Collection[str]) -> dict[str, str]:
    """Charge -> job, of what Consumers paid up later on the direct path. Found by who paid, and when: such ids cannot be guessed."""
    its_own = (transfers.c.reference == tickets.c.id) & transfers.c.id.like("%.late%") & (transfers.c.kind == TransferKind.CHARGE.value)
    by_index = (transfers.c.debit == sql.literal("user:") + jobs.c.account) & (transfers.c.at_ms >= jobs.c.created_at_ms - _SKEW_MS)
    joined = jobs.join(tickets, tickets.c.job_id == jobs.c.id).join(transfers, by_index & its_own)
    chosen = sql.select(transfers.c.id, jobs.c.id.label("job_id")).select_from(joined).where(jobs.c.id.in_(job_ids), jobs.c.holder != "")
    return {row.id: row.job_id for row in connection.execute(chosen)}


def refunded_of(connection: sql.Connection, job_ids: Collection[str]) -> dict[str, int]:
    """Job -> micro-credits that it got back, for those of these jobs that got any."""
    its_tickets = sql.select(tickets.c.id, tickets.c.job_id).where(tickets.c.job_id.in_(job_ids))
    job_of = {f"{row.id}:0": row.job_id for row in connection.execute(its_tickets)} | {f"{job_id}:0": job_id for job_id in job_ids}
    job_of |= _late_charges(connection, job_ids)
    # a refund answers each transfer of a chain, the first one too: so most jobs are told by two keys
    given = {job_of[charge] for charge in _refunds(connection, job_of)}
    return {
        job_id: sum(_refunds(connection, (charge.id for charge in charges_of(connection, job_id))).values()) for job_id in sorted(given)
    }


def _refunds(connection: sql.Connection, charge_ids: Iterable[str]) -> dict[str, int]:
    """Charge -> what was given back of it, by its payee and by the network."""
    charge_of = {f"{charge}{end}": charge for charge in charge_ids for end in (":refund", ":refund:loss")}
    chosen = sql.select(transfers.c.id, transfers.c.amount).where(transfers.c.id.in_(charge_of.keys()))
    found: dict[str, int] = {}
    for row in connection.execute(chosen.where(transfers.c.kind == TransferKind.REFUND.value)):
        found[charge_of[row.id]] = found.get(charge_of[row.id], 0) + row.amount
    return found


def receipts_of(connection: sql.Connection, job_id: str) -> list[tuple[str, bytes, int]]:
    """Island, envelope and micro-credits paid, of each receipt."""
    chosen = sql.select(receipts.c.island, receipts.c.envelope, receipts.c.paid_micros)
    its_own = receipts.c.id.in_(_numbered(connection, job_id, limits.COMPLETION_CHOICES_MAX))
    return [(row.island, row.envelope, row.paid_micros) for row in connection.execute(chosen.where(its_own).order_by(receipts.c.id))]


def _numbered(connection: sql.Connection, job_id: str, count: int) -> list[str]:
    """Ids ``HOLD:0``, ``HOLD:1``, … for the hold of a job, and for those of its tickets where it went the direct path."""
    its_tickets = connection.execute(sql.select(tickets.c.id).where(tickets.c.job_id == job_id)).scalars()
    return [f"{hold}:{index}" for hold in (job_id, *its_tickets) for index in range(count)]


def orphaned_jobs(connection: sql.Connection, live: Mapping[str, int], limit: int) -> list[Job]:
    """Jobs that have not ended and whose owner is no live run (peer id -> boot), oldest first, without input and output; those that a
    Consumer takes himself are not among them."""
    alive = [(jobs.c.owner == peer) & (jobs.c.owner_boot == boot) for peer, boot in live.items()]
    chosen = _LIST.where(_OPEN, jobs.c.holder == "", sql.not_(sql.or_(sql.false(), *alive)))
    return [job_from(row) for row in connection.execute(chosen.order_by(jobs.c.created_at_ms).limit(limit))]


def own_jobs(connection: sql.Connection, owner: str, boot: int) -> dict[str, bool]:
    """Open jobs of one run of a Coordinator: id -> whether their account does not want them any more."""
    mine = _OPEN & (jobs.c.owner == owner) & (jobs.c.owner_boot == boot) & (jobs.c.holder == "")
    return {row.id: row.cancel_wanted for row in connection.execute(sql.select(jobs.c.id, jobs.c.cancel_wanted).where(mine))}


def open_job(connection: sql.Connection, job_id: str) -> Job | None:
    """A job that has not ended, with its sealed input."""
    row = connection.execute(_ONE.where(_OPEN, jobs.c.id == job_id)).first()
    return job_from(row) if row is not None else None


def expired_holds(connection: sql.Connection, now_ms: int, limit: int) -> list[Job]:
    """Open jobs whose hold is over: nobody has settled them, and nobody will."""
    over = (holds.c.state == HoldState.PENDING.value) & (holds.c.expires_at_ms < now_ms)
    chosen = _ONE.join_from(jobs, holds, jobs.c.id == holds.c.id).where(over, _OPEN).limit(limit)
    return [job_from(row) for row in connection.execute(chosen)]


def forget_results(connection: sql.Connection, now_ms: int) -> int:
    """Empties answers whose time is over (a write); how many."""
    over = (jobs.c.result_expires_at_ms > 0) & (jobs.c.result_expires_at_ms < now_ms) & (jobs.c.state.in_([s.value for s in ENDED]))
    emptied = sql.update(jobs).where(over).values(output=b"", input=b"", result_expires_at_ms=0)
    return connection.execute(emptied).rowcount


def forget_requests(connection: sql.Connection, now_ms: int) -> int:
    """Deletes idempotency keys whose time is over (a write); how many."""
    return connection.execute(sql.delete(requests).where(requests.c.expires_at_ms < now_ms)).rowcount


def island_records(connection: sql.Connection) -> list[IslandRecord]:
    """All Islands that the books know."""
    names = [field.name for field in fields(IslandRecord)]
    return [IslandRecord(*row) for row in connection.execute(sql.select(*(islands.c[name] for name in names)))]
