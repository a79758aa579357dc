"""What the operator says about the cache of answers: a policy for a Cargo, before what its manifest says, and what is to be deleted.

Policies and purges are the database's, so that all Coordinators of a network keep to them: each looks for what came after the last purge
that it has seen. Writers take turns (``Database.writing``), so numbers are given in the order of the commits, and nobody misses one.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sql

from coordinator.books.cargos import promotion_of
from coordinator.books.schema import cache_policies, cache_purges, cargos
from coordinator.cargo_rules import CargoState
from protocol.cargos import CachePolicy, peek_cargo, release_of


@dataclass(frozen=True, slots=True)
class Purge:
    """Answers are deleted that ``account`` asked for, that are of ``cargo`` and that stand under ``key`` (32 bytes as hex); empty fields
    mean any. ``at_ms``: when that was said, in Unix milliseconds of the database's clock."""

    seq: int
    account: str
    cargo: str
    key: str
    at_ms: int


def policies(connection: sql.Connection) -> dict[str, CachePolicy]:
    """Cargo -> what the operator says, in the order of their names."""
    rows = connection.execute(sql.select(cache_policies).order_by(cache_policies.c.cargo))
    return {row.cargo: CachePolicy(row.enabled, row.ttl_s, row.similarity_milli, row.is_public) for row in rows}


def set_policy(connection: sql.Connection, cargo: str, policy: CachePolicy | None, now_ms: int) -> bool:
    """None: what its manifest says counts again. Whether the operator had said anything before (a write)."""
    had = connection.execute(sql.delete(cache_policies).where(cache_policies.c.cargo == cargo)).rowcount > 0
    if policy is not None:
        values = {"enabled": policy.enabled, "ttl_s": policy.ttl_s, "similarity_milli": policy.similarity_milli}
        connection.execute(sql.insert(cache_policies).values(cargo=cargo, is_public=policy.public, at_ms=now_ms, **values))
    return had


def last_purge(connection: sql.Connection) -> int:
    """The number of the newest one, where a cache that is still empty begins; 0 before the first."""
    return int(connection.execute(sql.select(sql.func.coalesce(sql.func.max(cache_purges.c.seq), 0))).scalar_one())


def purges_after(connection: sql.Connection, seq: int) -> list[Purge]:
    """Those that came after the one of this number, in order."""
    rows = connection.execute(sql.select(cache_purges).where(cache_purges.c.seq > seq).order_by(cache_purges.c.seq))
    return [Purge(row.seq, row.account, row.cargo, row.key, row.at_ms) for row in rows]


def purge(connection: sql.Connection, now_ms: int, account: str = "", cargo: str = "", key: str = "") -> int:
    """Has all Coordinators delete answers; all of them where nothing is named (a write). Gives its number."""
    made = connection.execute(sql.insert(cache_purges).values(account=account, cargo=cargo, key=key, at_ms=now_ms))
    (seq,) = made.inserted_primary_key or (0,)
    return int(seq)


def forget_purges(connection: sql.Connection, before_ms: int) -> int:
    """Those that every Coordinator has done long ago (a write); how many. The newest stays, so that no number is given twice."""
    old = (cache_purges.c.at_ms < before_ms) & (cache_purges.c.seq < last_purge(connection))
    return connection.execute(sql.delete(cache_purges).where(old)).rowcount


def published_policy(connection: sql.Connection, name: str) -> CachePolicy | None:
    """What the Cargo that a name stands for says, as far as it was published here and may run; None where none is."""
    may_run = (cargos.c.state == CargoState.APPROVED.value) & (cargos.c.revoked_at_ms == 0)
    signed = promotion_of(connection, name)
    promotion = signed.promotion if signed is not None else None
    meant = cargos.c.name == name if promotion is None else (cargos.c.name == name) | (cargos.c.address == promotion.cargo)
    rows = connection.execute(sql.select(cargos.c.address, cargos.c.envelope).where(meant, may_run))
    manifests = {row.address: peek_cargo(bytes(row.envelope)).manifest for row in rows}
    if promotion is not None and promotion.cargo in manifests:
        return manifests[promotion.cargo].cache
    top = release_of(promotion.release) if promotion is not None else None
    own = [manifest for manifest in manifests.values() if top is None or release_of(manifest.release) <= top]
    newest = max(own, key=lambda manifest: release_of(manifest.release), default=None)
    return newest.cache if newest is not None else None
