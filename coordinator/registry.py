"""The registry of a network's Cargos: who published what, what a name stands for, what was revoked. In memory, as the database has it.

Theory of operation. All Coordinators of a database, and the operator's commands beside them, write their changes there under numbers that
only go up. Each Coordinator asks every POLL_S for what came after the last number that it has seen, so it knows the others' changes within
about a second, and its own at once. Whoever places jobs reads memory only (``manifest``, ``current``, ``releases``).

What a name stands for is what its newest promotion says (protocol/cargo_promotions.py), else its newest release. Once a name has a
promotion, releases that it has not stood for are candidates, and whatever moves the name is another promotion, signed in the transaction
that writes it: a release that is published plainly, when it is approved; the end of an A/B test. What an operator's command approves, which
has no Coordinator's key, the next Coordinator that notices promotes.

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
from coordinator.cargo_rules import CargoState, Fault, RegistryRefused, newest_of, runs_now, standing_of
from protocol import limits
from protocol.cargo_news import revocation_key
from protocol.cargo_promotions import PROMOTION_VERSION, Promotion, SignedPromotion, next_serial, peek_promotion
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
_FOR_EVER_MS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One Cargo of the registry."""

    cargo: SignedCargo
    account: str
    state: CargoState
    submitted_at_ms: int
    decided_at_ms: int
    revoked_at_ms: int
    moves_name: bool = False  # once it is approved

    @property
    def is_public(self) -> bool:
        """Whether others than its publisher may know of it: it was approved once."""
        return self.state in (CargoState.APPROVED, CargoState.SUSPENDED)

    @property
    def is_listed(self) -> bool:
        """Whether Islands may have it."""
        return self.state is CargoState.APPROVED and not self.revoked_at_ms

    def may_run(self, now_ms: int) -> bool:
        """Whether jobs may be given to it at this time."""
        return runs_now(self.state, self.revoked_at_ms > 0, self.cargo.manifest.expires_at_ms, now_ms)


@dataclass(frozen=True, slots=True)
class KnownRevocation:
    """``delegation``: of the Coordinator that signed it; empty where the publisher did."""

    signed: SignedRevocation
    delegation: bytes


@dataclass(frozen=True, slots=True)
class KnownPromotion:
    """``delegation``: of the Coordinator that signed it."""

    signed: SignedPromotion
    delegation: bytes


@dataclass(frozen=True, slots=True)
class _Standing:
    """What a name stands for from one time to another, both included, in Unix milliseconds: as long as nothing changes or expires."""

    releases: tuple[str, ...]
    from_ms: int
    until_ms: int


class Registry:
    """``auto_approve``: what is published is approved at once. ``reserved``: names that nobody may publish under. ``sign`` makes envelopes
    of promotions, ``delegation`` proves that this Coordinator may; both are called in a writer's thread."""

    def __init__(
        self,
        books: Books,
        now_ms: Callable[[], int],
        auto_approve: bool = True,
        reserved: Iterable[str] = (),
        sign: Callable[[Promotion], bytes] | None = None,
        delegation: Callable[[], bytes] = bytes,
        network: str = "",
    ) -> None:
        self._books, self._now_ms, self._auto_approve = books, now_ms, auto_approve
        self._reserved = frozenset(reserved)
        self._sign, self._delegation, self._network = sign, delegation, network
        self._entries: dict[str, Entry] = {}
        self._sorted: tuple[Entry, ...] = ()
        self._by_name: dict[str, set[str]] = {}
        self._revocations: dict[bytes, KnownRevocation] = {}
        self._promotions: dict[str, KnownPromotion] = {}
        self._standing: dict[str, _Standing] = {}  # by name, worked out once after each change
        self._due: set[str] = set()  # addresses that were approved and are to move their names
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
        """What a name stands for; an address or ``NAME@RELEASE`` whatever its state."""
        if reference in self._entries:
            return self._entries[reference]
        name, separator, release = reference.partition("@")
        if not separator:
            return self.current(name)
        held = [self._entries[address] for address in self._by_name.get(name, ())]
        return next((entry for entry in held if entry.cargo.manifest.release == release), None)

    def current(self, name: str) -> Entry | None:
        """What a name stands for now, which may be a Cargo of another name; None where none of it may run."""
        releases = self.releases(name)
        return self._entries[releases[0]] if releases else None

    def is_current(self, entry: Entry) -> bool:
        """Whether its own name stands for it."""
        current = self.current(entry.cargo.manifest.name)
        return current is not None and current.cargo.address == entry.cargo.address

    def releases(self, name: str) -> tuple[str, ...] | None:
        """Addresses to which jobs for a name may be given now, the best first: what it is promoted to, then its own releases that are no
        candidates, the newest first. None for a name that nobody has listed."""
        held, now_ms = self._by_name.get(name), self._now_ms()
        if held is None:
            return None
        known = self._standing.get(name)
        if known is None or not known.from_ms <= now_ms <= known.until_ms:
            known = self._standing[name] = self._stand(name, held, now_ms)
        return known.releases

    def _stand(self, name: str, held: Iterable[str], now_ms: int) -> _Standing:
        own = [self._entries[address] for address in held]
        known = self._promotions.get(name)
        promotion = known.signed.promotion if known is not None else None
        promoted = self._entries.get(promotion.cargo) if promotion is not None else None
        runs = [(entry.cargo.address, entry.cargo.manifest.release) for entry in own if entry.may_run(now_ms)]
        found = standing_of(runs, promotion, promoted is not None and promoted.may_run(now_ms))
        ends_ms = (entry.cargo.manifest.expires_at_ms for entry in (*own, *([promoted] if promoted is not None else [])))
        return _Standing(found, now_ms, min((end_ms for end_ms in ends_ms if end_ms >= now_ms), default=_FOR_EVER_MS))

    def name_behind(self, name: str) -> str:
        """The name of the Cargo that a name stands for: its own, unless it is promoted to a Cargo of another name that may run."""
        known = self._promotions.get(name)
        if known is None:
            return name
        entry = self._entries.get(known.signed.promotion.cargo)
        return entry.cargo.manifest.name if entry is not None and self._may_run(entry) else name

    def aliases(self) -> list[str]:
        """Names that stand for a Cargo of another one."""
        return [name for name in self._promotions if self.name_behind(name) != name]

    def may_run(self, address: str) -> bool:
        """Whether jobs may be given to the Cargo of this address now."""
        entry = self._entries.get(address)
        return entry is not None and self._may_run(entry)

    def _may_run(self, entry: Entry) -> bool:
        return entry.may_run(self._now_ms())

    def entries(self) -> tuple[Entry, ...]:
        """All, by name and release, the newest release first."""
        return self._sorted

    def revocations(self) -> list[KnownRevocation]:
        return list(self._revocations.values())

    def promotions(self) -> list[KnownPromotion]:
        """The newest of each name that has one."""
        return list(self._promotions.values())

    def promotion_of(self, name: str) -> KnownPromotion | None:
        return self._promotions.get(name)

    def knows_revocation(self, key: bytes) -> bool:
        """By its key (``cargo_news.revocation_key``)."""
        return key in self._revocations

    async def wait_changed(self) -> None:
        """Returns after the next change of anything."""
        await self._changed.wait()

    # -- changes

    async def publish(self, account: str, data: bytes, is_candidate: bool = False) -> tuple[Entry, bool]:
        """The Cargo of an envelope as it stands now, and whether it is new. ``is_candidate``: its name goes on to stand for what it stands
        for. Raises RegistryRefused, BooksUnavailable."""
        cargo = read_envelope(data)
        approve = self._auto_approve

        def write(connection: sql.Connection) -> bool:
            is_new = rows.publish(connection, cargo, account, approve, self._reserved, self._now_ms(), is_candidate)[1]
            if is_new and is_candidate:
                self._pin(connection, cargo)
            elif is_new and approve and rows.promotion_of(connection, cargo.manifest.name) is not None:
                self._issue(connection, cargo.manifest.name, cargo.address, self._stand_in(connection, cargo), "publish")
            return is_new

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

    # -- promotions

    async def promote(self, account: str, name: str, address: str, origin: str) -> SignedPromotion:
        """As ``promote_within``, of an account that owns the name and the Cargo. Raises RegistryRefused, BooksUnavailable."""

        def write(connection: sql.Connection) -> SignedPromotion:
            if rows.account_of(connection, name) not in ("", account):
                raise RegistryRefused(Fault.NAME_TAKEN, f"the name {name} belongs to another account, which alone promotes it")
            return self.promote_within(connection, name, address, origin)

        signed = await self._books.change(write)
        await self.refresh()
        return signed

    def promote_within(self, connection: sql.Connection, name: str, address: str, origin: str) -> SignedPromotion:
        """Inside a writer's transaction: from its end on ``name`` stands for the Cargo of this address, another of its releases or a Cargo
        of another name of the same account. Coordinators notice within POLL_S, this one at its next ``refresh``. Raises RegistryRefused."""
        account, row = rows.account_of(connection, name), rows.cargo_row(connection, address)
        if not account or row is None:
            what = f"name {name[:80]}" if not account else f"Cargo {address[:64]}"
            raise RegistryRefused(Fault.UNKNOWN, f"there is no {what} here; see archipelag-node cargo list")
        cargo = peek_cargo(row.envelope)
        _check_promotable(row, cargo.manifest, name, account, self._now_ms())
        return self._issue(connection, name, address, self._stand_in(connection, cargo, name), origin)

    def current_within(self, connection: sql.Connection, name: str) -> str:
        """The address that a name stands for in a transaction, as ``current`` once it is read; empty where none may run. For any thread."""
        now_ms = self._now_ms()
        own = rows.releases_of(connection, name)
        runs = [(one.address, one.release) for one in own if runs_now(one.state, one.is_revoked, one.expires_at_ms, now_ms)]
        signed = rows.promotion_of(connection, name)
        row = rows.cargo_row(connection, signed.promotion.cargo) if signed is not None else None
        promoted_runs = row is not None and _entry(row).may_run(now_ms)
        return next(iter(standing_of(runs, signed.promotion if signed is not None else None, promoted_runs)), "")

    def _stand_in(self, connection: sql.Connection, promoted: SignedCargo, name: str = "") -> str:
        """The newest of a name's own releases to which jobs may go where what it is promoted to cannot have them: what it has stood for
        until now, as far as that is older. What was rolled back, or never was more than a candidate, is above it."""
        manifest = promoted.manifest
        name = name or manifest.name
        releases = [one for one in rows.releases_of(connection, name) if one.address != promoted.address]
        found = [manifest.release] if manifest.name == name else []
        if (live := _own_release(connection, name)) is not None:
            found.append(live)
        elif (newest := newest_of(releases, self._now_ms())) is not None:
            found.append(newest.release)
        return min(found or [one.release for one in releases], key=release_of)

    def _pin(self, connection: sql.Connection, candidate: SignedCargo) -> None:
        """A candidate is out: its name goes on to stand for what it stood for. Raises RegistryRefused."""
        name = candidate.manifest.name
        if rows.promotion_of(connection, name) is not None:
            return
        before = [one for one in rows.releases_of(connection, name) if one.address != candidate.address]
        newest = newest_of(before, self._now_ms())
        if newest is None:
            told = f"{name} has no other release that runs, so there is nothing that it could go on to stand for"
            raise RegistryRefused(Fault.STATE, f"{told}; publish this one without candidate")
        self._issue(connection, name, newest.address, newest.release, "candidate")

    def _issue(self, connection: sql.Connection, name: str, address: str, release: str, origin: str) -> SignedPromotion:
        if self._sign is None:
            raise RegistryRefused(Fault.STATE, "this Coordinator has no key to sign promotions with")
        known, now_ms = rows.promotion_of(connection, name), self._now_ms()
        serial = next_serial(known.promotion.serial if known is not None else 0, now_ms)
        promotion = Promotion(PROMOTION_VERSION, self._network, name, address, release, serial, now_ms, origin)
        signed = peek_promotion(self._sign(promotion))
        rows.put_promotion(connection, signed, self._delegation())
        return signed

    def _move_names(self, connection: sql.Connection, addresses: Iterable[str]) -> None:
        """Of Cargos that were approved, unless another Coordinator has done it, or the name stands for a newer one."""
        for address in addresses:
            row = rows.cargo_row(connection, address)
            if row is None or not row.moves_name or row.state is not CargoState.APPROVED:
                continue
            rows.note_moved(connection, address)
            manifest = peek_cargo(row.envelope).manifest
            live = _own_release(connection, manifest.name)
            if live is not None and release_of(manifest.release) > release_of(live):
                self._issue(connection, manifest.name, address, live, "publish")

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
            await self._take_in()
            if self._due and self._sign is not None:
                await self._books.change(self._move_names, sorted(self._due))
                self._due.clear()
                await self._take_in()

    async def _take_in(self) -> None:
        news = await self._books.ask(_read, self._seq)
        if news.seq == self._seq:
            return
        self._seq = news.seq
        for entry in news.entries:
            self._entries[entry.cargo.address] = entry
            self._by_name.setdefault(entry.cargo.manifest.name, set()).add(entry.cargo.address)
            if entry.moves_name and entry.state is CargoState.APPROVED:
                self._due.add(entry.cargo.address)
        if news.entries:
            self._sorted = tuple(sorted(self._entries.values(), key=_order))
        for revoked in news.revocations:
            self._revocations[revocation_key(revoked.signed)] = revoked
        for promoted in news.promotions:
            self._promotions[promoted.signed.promotion.name] = promoted
        self._standing.clear()
        self._changed.set()
        self._changed = trio.Event()


@dataclass(frozen=True, slots=True)
class _News:
    """What has changed, and the newest number."""

    entries: list[Entry]
    revocations: list[KnownRevocation]
    promotions: list[KnownPromotion]
    seq: int


def _read(connection: sql.Connection, seq: int) -> _News:
    found = rows.changes_after(connection, seq)
    return _News(
        [_entry(row) for row in found.cargos],
        [KnownRevocation(peek_revocation(row.envelope), row.delegation) for row in found.revocations],
        [KnownPromotion(peek_promotion(row.envelope), row.delegation) for row in found.promotions],
        found.seq,
    )


def _entry(row: CargoRow) -> Entry:
    cargo = peek_cargo(row.envelope)
    return Entry(cargo, row.account, row.state, row.submitted_at_ms, row.decided_at_ms, row.revoked_at_ms, row.moves_name)


def _own_release(connection: sql.Connection, name: str) -> str | None:
    """The one of its own that a name is promoted to, or that may stand in for a Cargo of another name; None without a promotion."""
    known = rows.promotion_of(connection, name)
    if known is None:
        return None
    row = rows.cargo_row(connection, known.promotion.cargo)
    manifest = peek_cargo(row.envelope).manifest if row is not None else None
    return manifest.release if manifest is not None and manifest.name == name else known.promotion.release


def _check_promotable(row: CargoRow, manifest: CargoManifest, name: str, account: str, now_ms: int) -> None:
    """Raises RegistryRefused."""
    what = f"{manifest.name} {manifest.release}"
    if row.account != account:
        raise RegistryRefused(Fault.NAME_TAKEN, f"{what} belongs to another account than {name}, which cannot stand for it")
    if row.revoked_at_ms:
        raise RegistryRefused(Fault.REVOKED, f"{what} was revoked; {name} cannot stand for it")
    if row.state is not CargoState.APPROVED:
        raise RegistryRefused(Fault.STATE, f"{what} is {row.state}; {name} can stand for what is approved only")
    if 0 < manifest.expires_at_ms < now_ms:
        raise RegistryRefused(Fault.EXPIRED, f"{what} has expired; {name} cannot stand for it")


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
