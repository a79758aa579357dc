"""Workflows that accounts have saved, in the books: versions of a name, private or published. ``connection`` of a change is inside
``Database.writing``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import sqlalchemy as sql

from coordinator.books.schema import jobs
from coordinator.books.schema import workflow_definitions as saved
from protocol import limits


@dataclass(frozen=True, slots=True)
class SavedFlow:
    """One version of one name. ``address``: SHA-256 of the canonical definition, hex. ``body``: that definition, or its publisher's
    envelope round it; sealed as long as it is not published."""

    id: str
    account: str
    name: str
    version: int
    address: str
    is_published: bool
    at_ms: int
    body: bytes = b""


class TooManySaved(Exception):
    """The account has saved FLOW_VERSIONS_MAX versions."""


_FIELDS = tuple(field.name for field in fields(SavedFlow))
_ONE = sql.select(*(saved.c[name] for name in _FIELDS))
_LIST = sql.select(*(saved.c[name] for name in _FIELDS if name != "body"))


def flow_id(account: str, name: str, version: int) -> str:
    """``ACCOUNT/NAME@VERSION``."""
    return f"{account}/{name}@{version}"


def _flow(row: sql.Row[Any]) -> SavedFlow:
    values = dict(row._mapping)
    return SavedFlow(**{**values, "is_published": bool(values["is_published"])})


def output_bytes(connection: sql.Connection, run_id: str) -> int:
    """What is kept of all that the jobs of a run have said, sealed."""
    size = sql.select(sql.func.coalesce(sql.func.sum(sql.func.length(jobs.c.output)), 0))
    return int(connection.execute(size.where(jobs.c.parent == run_id, jobs.c.parent != "")).scalar_one())


def save_flow(
    connection: sql.Connection, account: str, name: str, address: str, body_of: Callable[[str], bytes], now_ms: int
) -> tuple[SavedFlow, bool]:
    """A new version, and True; or the newest one, and False, where that is the very same. ``body_of(id)`` seals. Raises TooManySaved."""
    versions = versions_of(connection, account, name)
    if versions and versions[0].address == address:
        return versions[0], False
    mine = sql.select(sql.func.count()).select_from(saved).where(saved.c.account == account)
    if connection.execute(mine).scalar_one() >= limits.FLOW_VERSIONS_MAX:
        raise TooManySaved
    version = versions[0].version + 1 if versions else 1
    id = flow_id(account, name, version)
    flow = SavedFlow(id, account, name, version, address, False, now_ms, body_of(id))
    connection.execute(sql.insert(saved), asdict(flow))
    return flow, True


def versions_of(connection: sql.Connection, account: str, name: str) -> list[SavedFlow]:
    """The newest first, without bodies."""
    chosen = _LIST.where(saved.c.account == account, saved.c.name == name).order_by(saved.c.version.desc())
    return [_flow(row) for row in connection.execute(chosen)]


def find_flow(connection: sql.Connection, account: str, name: str, version: int | None, only_published: bool) -> SavedFlow | None:
    """One version with its body; None as version: the newest."""
    wanted = (saved.c.account == account) & (saved.c.name == name)
    if version is not None:
        wanted &= saved.c.version == version
    if only_published:
        wanted &= saved.c.is_published
    row = connection.execute(_ONE.where(wanted).order_by(saved.c.version.desc()).limit(1)).first()
    return _flow(row) if row is not None else None


def newest_flows(connection: sql.Connection, account: str) -> list[SavedFlow]:
    """The newest version of each name, by name, without bodies."""
    chosen = _LIST.where(saved.c.account == account).order_by(saved.c.name, saved.c.version)
    return list({flow.name: flow for flow in map(_flow, connection.execute(chosen))}.values())


def published_flows(connection: sql.Connection, limit: int, offset: int) -> list[SavedFlow]:
    """Everybody's published versions, the newest first, without bodies."""
    chosen = _LIST.where(saved.c.is_published).order_by(saved.c.at_ms.desc(), saved.c.id).limit(limit).offset(offset)
    return [_flow(row) for row in connection.execute(chosen)]


def publish_flow(connection: sql.Connection, flow: SavedFlow, body: bytes) -> SavedFlow:
    """It is anybody's to see and to run from now on, for good."""
    changed = sql.update(saved).where(saved.c.id == flow.id, saved.c.is_published.is_(False))
    connection.execute(changed.values(is_published=True, body=body))
    return replace(flow, is_published=True, body=body)


def forget_flows(connection: sql.Connection, account: str, name: str) -> int:
    """Deletes the versions of a name that are not published; how many."""
    mine = sql.delete(saved).where(saved.c.account == account, saved.c.name == name, saved.c.is_published.is_(False))
    return connection.execute(mine).rowcount
