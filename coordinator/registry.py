"""The registry of a network's Cargos: who published what, what a name stands for, what was revoked. In memory, as the database has it.

Theory of operation. All Coordinators of a database, and the operator's commands beside them, write their changes there under numbers that
only go up. Each Coordinator asks every POLL_S for what came after the last number that it has seen, so it knows the others' changes within
about a second, and its own at once. Whoever places jobs reads memory only (``manifest``, ``find``).

Runs on trio.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sqlalchemy as sql
import trio

from coordinator.books import cargos as rows
from coordinator.books.books import Books
from coordinator.books.cargos import CargoRow
from coordinator.books.errors import BooksUnavailable
from coordinator.cargo_rules import CargoState, Fault, RegistryRefused, Release, newest_of
from protocol import limits
from protocol.cargo_news import revocation_key
from protocol.cargos import (
    CargoManifest,
    SignedCargo,
    SignedRevocation,
    peek_cargo,
    peek_revocation,
    read_cargo,
    read_revocation,
    release_of,
)
from protocol.errors import RemoteProtocolError, SignatureError

log = logging.getLogger(__name__)

POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One Cargo of the registry."""

    cargo: SignedCargo
    account: str
    state: CargoState
    submitted_at_ms: int
    decided_at_ms: int
    revoked_at_ms: int

    @property
    def is_public(self) -> bool:
        """Whether others than its publisher may know of it: it was approved once."""
        return self.state in (CargoState.APPROVED, CargoState.SUSPENDED)

    @property
    def is_listed(self) -> bool:
        """Whether Islands may have it."""
        return self.state is CargoState.APPROVED and not self.revoked_at_ms


@dataclass(frozen=True, slots=True)
class KnownRevocation:
    """``delegation``: of the Coordinator that signed it; empty where the publisher did."""

    signed: SignedRevocation
    delegation: bytes


class Registry:
    """``auto_approve``: what is published is approved at once. ``reserved``: names that nobody may publish under."""

    def __init__(self, books: Books, now_ms: Callable[[], int], auto_approve: bool = True, reserved: Iterable[str] = ()) -> None:
        self._books, self._now_ms, self._auto_approve = books, now_ms, auto_approve
        self._reserved = frozenset(reserved)
        self._entries: dict[str, Entry] = {}
        self._sorted: tuple[Entry, ...] = ()
        self._by_name: dict[str, set[str]] = {}
        self._revocations: dict[bytes, KnownRevocation] = {}
        self._seq = 0
        self._changed = trio.Event()
        self._lock = trio.Lock()

    def __repr__(self) -> str:
        return f"<Registry {len(self._entries)} Cargos, {len(self._revocations)} revocations>"

    # -- questions, of memory

    def manifest(self, reference: str) -> CargoManifest | None:
        """What a name, ``NAME@RELEASE`` or address stands for, if jobs may be given to it now."""
        entry = self.find(reference)
        return entry.cargo.manifest if entry is not None and self._may_run(entry) else None

    def find(self, reference: str) -> Entry | None:
        """A name's newest release that may run; an address or ``NAME@RELEASE`` whatever its state."""
        if reference in self._entries:
            return self._entries[reference]
        name, separator, release = reference.partition("@")
        held = [self._entries[address] for address in self._by_name.get(name, ())]
        if separator:
            return next((entry for entry in held if entry.cargo.manifest.release == release), None)
        newest = newest_of([_release(entry) for entry in held], self._now_ms())
        return None if newest is None else self._entries[newest.address]

    def releases(self, name: str) -> tuple[str, ...] | None:
        """Addresses of the releases of a name to which jobs may be given now, the newest first; None for a name that nobody has listed."""
        held = self._by_name.get(name)
        if held is None:
            return None
        runs = [entry for entry in map(self._entries.__getitem__, held) if self._may_run(entry)]
        return tuple(entry.cargo.address for entry in sorted(runs, key=_order))

    def _may_run(self, entry: Entry) -> bool:
        expires_at_ms = entry.cargo.manifest.expires_at_ms
        return entry.is_listed and not 0 < expires_at_ms < self._now_ms()

    def entries(self) -> tuple[Entry, ...]:
        """All, by name and release, the newest release first."""
        return self._sorted

    def revocations(self) -> list[KnownRevocation]:
        return list(self._revocations.values())

    def knows_revocation(self, key: bytes) -> bool:
        """By its key (``cargo_news.revocation_key``)."""
        return key in self._revocations

    async def wait_changed(self) -> None:
        """Returns after the next change of anything."""
        await self._changed.wait()

    # -- changes

    async def publish(self, account: str, data: bytes) -> tuple[Entry, bool]:
        """The Cargo of an envelope as it stands now, and whether it is new. Raises RegistryRefused, BooksUnavailable."""
        cargo = read_envelope(data)
        approve = self._auto_approve

        def write(connection: sql.Connection) -> bool:
            return rows.publish(connection, cargo, account, approve, self._reserved, self._now_ms())[1]

        is_new = await self._books.change(write)
        await self.refresh()
        return self._entries[cargo.address], is_new

    async def revoke(self, data: bytes) -> tuple[SignedRevocation, list[str]]:
        """A publisher's own word; the addresses that it takes away. Raises RegistryRefused, BooksUnavailable."""
        signed = read_own_revocation(data)
        revocation = signed.revocation

        def write(connection: sql.Connection) -> list[str]:
            row = rows.cargo_row(connection, revocation.cargo) if revocation.cargo else None
            if row is not None and read_cargo(row.envelope).manifest.publisher != signed.signer:
                raise RegistryRefused(Fault.SIGNATURE, "the Cargo is another publisher's; sign with the key that published it")
            if row is None and (revocation.cargo or not rows.publisher_is_known(connection, signed.signer)):
                what = f"Cargo {revocation.cargo}" if revocation.cargo else f"publisher {signed.signer}"
                raise RegistryRefused(Fault.UNKNOWN, f"no {what} is known here; nothing has to be revoked")
            return rows.revoke(connection, signed, b"", self._now_ms())

        hit = await self._books.change(write)
        await self.refresh()
        return signed, hit

    async def note_revocation(self, signed: SignedRevocation, delegation: bytes) -> None:
        """One that counts and has come from the network. Raises BooksUnavailable."""
        if not self.knows_revocation(revocation_key(signed)):
            await self._books.change(rows.revoke, signed, delegation, self._now_ms())
            await self.refresh()

    # -- keeping up

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once everything is read. Runs until cancelled."""
        await self.refresh()
        task_status.started()
        while True:
            await trio.sleep(POLL_S)
            try:
                await self.refresh()
            except BooksUnavailable as error:
                log.debug("the registry cannot be read at the moment: %s", error)

    async def refresh(self) -> None:
        """Takes in what has changed in the database. Raises BooksUnavailable."""
        async with self._lock:
            found, revoked, self._seq = await self._books.ask(_read, self._seq)
            for entry in found:
                self._entries[entry.cargo.address] = entry
                self._by_name.setdefault(entry.cargo.manifest.name, set()).add(entry.cargo.address)
            if found:
                self._sorted = tuple(sorted(self._entries.values(), key=_order))
            for one in revoked:
                self._revocations[revocation_key(one.signed)] = one
        if found or revoked:
            self._changed.set()
            self._changed = trio.Event()


def _read(connection: sql.Connection, seq: int) -> tuple[list[Entry], list[KnownRevocation], int]:
    """What has changed, and the newest number."""
    found, revoked = rows.changes_after(connection, seq)
    entries = [_entry(row) for row in found]
    known = [KnownRevocation(peek_revocation(row.envelope), row.delegation) for row in revoked]
    return entries, known, max([seq, *(row.seq for row in found), *(row.seq for row in revoked)])


def _entry(row: CargoRow) -> Entry:
    cargo = peek_cargo(row.envelope)
    return Entry(cargo, row.account, row.state, row.submitted_at_ms, row.decided_at_ms, row.revoked_at_ms)


def read_envelope(data: bytes) -> SignedCargo:
    """Raises RegistryRefused in words for the publisher."""
    if len(data) > limits.ENVELOPE_BYTES_MAX:
        told = f"a signed Cargo has at most {limits.ENVELOPE_BYTES_MAX} bytes; name fewer files or shorten its schemas"
        raise RegistryRefused(Fault.TOO_LARGE, told)
    try:
        return read_cargo(data)
    except SignatureError as error:
        raise RegistryRefused(Fault.SIGNATURE, f"{error}; sign the manifest again with cargo sign") from None
    except RemoteProtocolError as error:
        raise RegistryRefused(Fault.INVALID, f"{error}; build it again with cargo build") from None


def read_own_revocation(data: bytes) -> SignedRevocation:
    """Raises RegistryRefused, also for a Coordinator's word: that does not come this way."""
    if len(data) > limits.ENVELOPE_BYTES_MAX:
        raise RegistryRefused(Fault.TOO_LARGE, f"a revocation has at most {limits.ENVELOPE_BYTES_MAX} bytes")
    try:
        signed = read_revocation(data)
    except SignatureError as error:
        raise RegistryRefused(Fault.SIGNATURE, f"{error}; sign with the key that published it") from None
    except RemoteProtocolError as error:
        raise RegistryRefused(Fault.INVALID, str(error)) from None
    if signed.revocation.network:
        raise RegistryRefused(Fault.SIGNATURE, "the network's word comes from its operator: archipelag-node cargo revoke --as-operator")
    return signed


def _order(entry: Entry) -> tuple[str, tuple[int, ...], str]:
    manifest = entry.cargo.manifest
    return manifest.name, tuple(-part for part in release_of(manifest.release)), entry.cargo.address


def _release(entry: Entry) -> Release:
    manifest = entry.cargo.manifest
    return Release(entry.cargo.address, manifest.release, entry.state, manifest.expires_at_ms, entry.revoked_at_ms > 0)
