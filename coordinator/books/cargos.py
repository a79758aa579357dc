"""The registry of Cargos in the database: questions, and changes inside ``Database.writing``.

Every change gets the next number (``seq``). Writers take turns, so numbers are given in the order of the commits, and whoever asks for
what came after the last number that it saw misses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from coordinator.books.schema import (
    cargo_names,
    cargo_promotions,
    cargo_revocations,
    cargos,
    networks,
    publisher_keys,
    publisher_levels,
)
from coordinator.cargo_rules import (
    ACTIVE,
    CargoState,
    Fault,
    Known,
    NameOwner,
    PublisherLevel,
    RegistryRefused,
    Release,
    check_publishable,
    check_transition,
)
from protocol.cargo_news import revocation_key
from protocol.cargo_promotions import SignedPromotion, peek_promotion
from protocol.cargos import SignedCargo, SignedRevocation


@dataclass(frozen=True, slots=True)
class CargoRow:
    """``moves_name``: published plainly and not approved yet; once it is, its name is to stand for it."""

    address: str
    account: str
    state: CargoState
    submitted_at_ms: int
    decided_at_ms: int
    revoked_at_ms: int
    envelope: bytes
    moves_name: bool
    seq: int


@dataclass(frozen=True, slots=True)
class WordRow:
    """A revocation or a promotion, with the delegation of the Coordinator that signed it, if one did."""

    envelope: bytes
    delegation: bytes
    seq: int


@dataclass(frozen=True, slots=True)
class Changes:
    """In the order of their numbers; ``seq``: the newest change that is among them."""

    cargos: list[CargoRow]
    revocations: list[WordRow]
    promotions: list[WordRow]
    seq: int


def changes_after(connection: sql.Connection, seq: int) -> Changes:
    """Rows that have changed since the change of this number.

    Each table is asked by itself, and one transaction may write to several: what comes meanwhile is left for the next time, all of it.
    """
    last = _next_seq(connection) - 1
    rows = connection.execute(sql.select(cargos).where(_between(cargos, seq, last)).order_by(cargos.c.seq))
    revoked, promoted = (_words(connection, table, seq, last) for table in (cargo_revocations, cargo_promotions))
    return Changes([_row(row) for row in rows], revoked, promoted, max(seq, last))


def _between(table: sql.Table, seq: int, last: int) -> sql.ColumnElement[bool]:
    return (table.c.seq > seq) & (table.c.seq <= last)


def _words(connection: sql.Connection, table: sql.Table, seq: int, last: int) -> list[WordRow]:
    chosen = sql.select(table.c.envelope, table.c.delegation, table.c.seq).where(_between(table, seq, last)).order_by(table.c.seq)
    return [WordRow(bytes(row.envelope), bytes(row.delegation), row.seq) for row in connection.execute(chosen)]


def _row(row: Any) -> CargoRow:
    return CargoRow(
        row.address,
        row.account,
        CargoState(row.state),
        row.submitted_at_ms,
        row.decided_at_ms,
        row.revoked_at_ms,
        bytes(row.envelope),
        row.moves_name,
        row.seq,
    )


def cargo_row(connection: sql.Connection, address: str) -> CargoRow | None:
    row = connection.execute(sql.select(cargos).where(cargos.c.address == address)).first()
    return None if row is None else _row(row)


def addresses_of(connection: sql.Connection, name: str, release: str) -> list[str]:
    """Of a name's release; one, where it was published."""
    chosen = sql.select(cargos.c.address).where(cargos.c.name == name, cargos.c.release == release)
    return list(connection.execute(chosen).scalars())


def publisher_is_known(connection: sql.Connection, publisher: str) -> bool:
    return connection.execute(sql.select(publisher_keys.c.account).where(publisher_keys.c.publisher == publisher)).first() is not None


def publish(
    connection: sql.Connection,
    cargo: SignedCargo,
    account: str,
    approve: bool,
    reserved: Iterable[str],
    now_ms: int,
    is_candidate: bool = False,
) -> tuple[CargoRow, bool]:
    """The Cargo's row, and whether it is new. Publishing it again changes nothing. Promotions are the caller's. Raises RegistryRefused."""
    known = known_about(connection, cargo, account, reserved)
    row = cargo_row(connection, cargo.address)
    if row is not None and row.account == account and not known.revoked:
        if row.state is CargoState.REJECTED:
            raise RegistryRefused(Fault.REJECTED, "the operator has rejected this Cargo; publish another release")
        return row, False
    check_publishable(cargo, account, known, now_ms)
    manifest = cargo.manifest
    if not known.key_account:
        connection.execute(sql.insert(publisher_keys), {"publisher": manifest.publisher, "account": account, "at_ms": now_ms})
    _claim_name(connection, known.owner, manifest.name, manifest.publisher, account, now_ms)
    state = CargoState.APPROVED if approve else CargoState.SUBMITTED
    values = {
        "address": cargo.address,
        "name": manifest.name,
        "release": manifest.release,
        "runtime": str(manifest.runtime),
        "publisher": manifest.publisher,
        "account": account,
        "state": str(state),
        "submitted_at_ms": now_ms,
        "decided_at_ms": now_ms if approve else 0,
        "expires_at_ms": manifest.expires_at_ms,
        "revoked_at_ms": 0,
        "envelope": cargo.envelope,
        "moves_name": not approve and not is_candidate,
        "seq": _next_seq(connection),
    }
    connection.execute(sql.insert(cargos), values)
    made = cargo_row(connection, cargo.address)
    assert made is not None
    return made, True


def _claim_name(
    connection: sql.Connection, owner: NameOwner | None, name: str, publisher: str, account: str, now_ms: int
) -> None:
    values = {"publisher": publisher, "account": account, "at_ms": now_ms}
    if owner is None:
        connection.execute(sql.insert(cargo_names), {"name": name, **values})
    elif owner.publisher != publisher:
        connection.execute(sql.update(cargo_names).where(cargo_names.c.name == name).values(**values))


def known_about(connection: sql.Connection, cargo: SignedCargo, account: str, reserved: Iterable[str]) -> Known:
    manifest = cargo.manifest
    level = connection.execute(sql.select(publisher_levels.c.level).where(publisher_levels.c.account == account)).scalar()
    key_account = connection.execute(
        sql.select(publisher_keys.c.account).where(publisher_keys.c.publisher == manifest.publisher)
    ).scalar()
    return Known(
        _owner(connection, manifest.name),
        key_account or "",
        PublisherLevel(level) if level else PublisherLevel.INDIVIDUAL,
        active_names(connection, account),
        releases_of(connection, manifest.name),
        _revoked(connection, cargo.address, manifest.publisher),
        manifest.name in reserved,
    )


def releases_of(connection: sql.Connection, name: str) -> tuple[Release, ...]:
    """All that were published under a name."""
    return tuple(
        Release(row.address, row.release, CargoState(row.state), row.expires_at_ms, row.revoked_at_ms > 0)
        for row in connection.execute(sql.select(cargos).where(cargos.c.name == name))
    )


def account_of(connection: sql.Connection, name: str) -> str:
    """Whose a name is; empty where nobody has published under it."""
    return connection.execute(sql.select(cargo_names.c.account).where(cargo_names.c.name == name)).scalar() or ""


def promotion_of(connection: sql.Connection, name: str) -> SignedPromotion | None:
    """The newest of a name."""
    envelope = connection.execute(sql.select(cargo_promotions.c.envelope).where(cargo_promotions.c.name == name)).scalar()
    return None if envelope is None else peek_promotion(bytes(envelope))


def put_promotion(connection: sql.Connection, signed: SignedPromotion, delegation: bytes) -> None:
    """In the place of the one before it."""
    promotion = signed.promotion
    values = {
        "name": promotion.name,
        "serial": promotion.serial,
        "cargo": promotion.cargo,
        "release": promotion.release,
        "origin": promotion.origin,
        "at_ms": promotion.at_ms,
        "envelope": signed.envelope,
        "delegation": delegation,
        "seq": _next_seq(connection),
    }
    connection.execute(sql.delete(cargo_promotions).where(cargo_promotions.c.name == promotion.name))
    connection.execute(sql.insert(cargo_promotions), values)


def note_moved(connection: sql.Connection, address: str) -> None:
    """What was to happen to a Cargo's name when it was approved has happened."""
    changed = {"moves_name": False, "seq": _next_seq(connection)}
    connection.execute(sql.update(cargos).where(cargos.c.address == address).values(**changed))


def _owner(connection: sql.Connection, name: str) -> NameOwner | None:
    found = connection.execute(sql.select(cargo_names).where(cargo_names.c.name == name)).first()
    if found is None:
        return None
    return NameOwner(found.publisher, found.account, bool(_revoked(connection, "", found.publisher)))


def active_names(connection: sql.Connection, account: str) -> frozenset[str]:
    chosen = sql.select(cargos.c.name).distinct().where(
        cargos.c.account == account, cargos.c.revoked_at_ms == 0, cargos.c.state.in_([str(state) for state in sorted(ACTIVE)])
    )
    return frozenset(connection.execute(chosen).scalars())


def _revoked(connection: sql.Connection, address: str, publisher: str) -> str:
    """Why neither a Cargo nor its publisher's key may be used; empty where they may. No address: only the key."""
    table = cargo_revocations
    whole_key = (table.c.cargo == "") & (table.c.publisher == publisher)
    what = whole_key | (table.c.cargo == address) if address else whole_key
    found = connection.execute(sql.select(table.c.cargo, table.c.network).where(what)).first()
    if found is None:
        return ""
    return f"{'it' if found.cargo else 'its key'} was revoked by {'the network' if found.network else 'its publisher'}"


def set_state(connection: sql.Connection, address: str, wanted: CargoState, now_ms: int) -> CargoRow:
    """Raises RegistryRefused."""
    row = _need(connection, address)
    if row.state is not wanted:
        check_transition(row.state, wanted)
        changed = {"state": str(wanted), "decided_at_ms": now_ms, "seq": _next_seq(connection)}
        connection.execute(sql.update(cargos).where(cargos.c.address == address).values(**changed))
    return _need(connection, address)


def _need(connection: sql.Connection, address: str) -> CargoRow:
    row = cargo_row(connection, address)
    if row is None:
        raise RegistryRefused(Fault.UNKNOWN, f"there is no Cargo {address[:64]} here; see archipelag-node cargo list")
    return row


def network_of(connection: sql.Connection) -> str:
    """Whose books these are; empty while nobody's."""
    return connection.execute(sql.select(networks.c.id)).scalar() or ""


def set_level(connection: sql.Connection, account: str, level: PublisherLevel) -> None:
    connection.execute(sql.delete(publisher_levels).where(publisher_levels.c.account == account))
    connection.execute(sql.insert(publisher_levels), {"account": account, "level": str(level)})


def revoke(connection: sql.Connection, signed: SignedRevocation, delegation: bytes, now_ms: int) -> list[str]:
    """Addresses that it takes away now. Whoever calls has checked that the word counts. Saying it again changes nothing."""
    revocation, key = signed.revocation, revocation_key(signed).hex()
    known = connection.execute(sql.select(cargo_revocations.c.id).where(cargo_revocations.c.id == key)).first()
    if known is None:
        values = {
            "id": key,
            "cargo": revocation.cargo,
            "publisher": revocation.publisher,
            "network": revocation.network,
            "envelope": signed.envelope,
            "delegation": delegation,
            "at_ms": now_ms,
            "seq": _next_seq(connection),
        }
        connection.execute(sql.insert(cargo_revocations), values)
    what = cargos.c.address == revocation.cargo if revocation.cargo else cargos.c.publisher == revocation.publisher
    whose = what & (cargos.c.revoked_at_ms == 0)
    if not revocation.network:
        whose = whose & (cargos.c.publisher == signed.signer)
    hit = list(connection.execute(sql.select(cargos.c.address).where(whose).order_by(cargos.c.address)).scalars())
    for address in hit:
        changed = {"revoked_at_ms": now_ms, "seq": _next_seq(connection)}
        connection.execute(sql.update(cargos).where(cargos.c.address == address).values(**changed))
    return hit


def _next_seq(connection: sql.Connection) -> int:
    tables = (cargos, cargo_revocations, cargo_promotions)
    newest = sql.select(*(sql.select(sql.func.max(table.c.seq)).scalar_subquery() for table in tables))
    return max(last or 0 for last in connection.execute(newest).one()) + 1
