"""Which Cargos a node knows, and which of them may run. Pure; what time it is comes as an argument.

Theory of operation. Cargos and revocations reach a node in any order, from its Coordinator and from other Islands, more than once. What the
shelf says depends only on what it has heard, not on the order: it keeps all of it and decides when it is asked. So nodes that have heard
the same agree, and a revocation that comes before its Cargo counts.

Rules. A revoked Cargo never runs again. A publisher's word counts for its own Cargos only, a Coordinator's for all; neither can take the
place of the other's. Words about Cargos that nobody knows yet are kept in bounded numbers, the oldest forgotten first, since anybody may
say them; they come again. Of two Cargos that claim the same release the one counts that says it was published first (the smaller address
where they say the same). Releases of a name only go up, so whoever offers an old one as new is refused (``check_new``); who names an old
one by its address may still have it. What a name stands for is what its newest promotion says, else its newest release that may run
(``stands_for``).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum

from protocol import limits
from protocol.cargo_promotions import SignedPromotion
from protocol.cargos import SignedCargo, SignedRevocation, release_of, unexpired
from protocol.errors import ArchipelagError, RemoteProtocolError, SignatureError


class Why(StrEnum):
    """Why a Cargo does not run, or is not taken."""

    UNKNOWN = "unknown_cargo"
    REVOKED = "cargo_revoked"
    EXPIRED = "cargo_expired"
    ROLLBACK = "cargo_rollback"
    CONFLICT = "cargo_conflict"
    FULL = "too_many_cargos"


class Standing(StrEnum):
    """What a revocation means to a shelf."""

    COUNTS = "counts"
    EARLY = "early"  # of a publisher's Cargo that is not here: kept in case it comes
    KNOWN = "known"


class CargoRefused(ArchipelagError):
    """Nothing has changed; the message says why."""

    def __init__(self, why: Why, message: str) -> None:
        super().__init__(message)
        self.why, self.message = why, message


class CargoShelf:
    """``is_coordinator(peer)``: whether a peer is a Coordinator of our network, whose revocations count for all."""

    def __init__(self, network: str, is_coordinator: Callable[[str], bool]) -> None:
        self._network, self._is_coordinator = network, is_coordinator
        self._cargos: dict[str, SignedCargo] = {}  # by address
        self._releases: dict[tuple[str, str], dict[tuple[int, int, int], set[str]]] = {}  # publisher, name -> release -> addresses
        self._names: dict[str, set[str]] = {}  # name -> addresses, whoever has published them
        self._revoked: dict[tuple[str, str], SignedRevocation] = {}  # what, whose word (_key_of) -> the first that was heard
        self._early: OrderedDict[tuple[str, str], SignedRevocation] = OrderedDict()  # of publishers of which nothing is known here
        self._ended: set[str] = set()  # addresses that were taken away by words that count
        self._promotions: dict[str, SignedPromotion] = {}  # by name

    def __repr__(self) -> str:
        return f"<CargoShelf {len(self._cargos)} Cargos, {len(self._revoked)} revocations>"

    def add(self, cargo: SignedCargo) -> bool:
        """Whether it is new here. Raises CargoRefused: REVOKED, which no later word can change, or FULL."""
        if cargo.address in self._cargos:
            return False
        self._check_revoked(cargo)
        if len(self._cargos) >= limits.SHELF_CARGOS_MAX:
            raise CargoRefused(Why.FULL, f"this node knows {limits.SHELF_CARGOS_MAX} Cargos, the most that it keeps")
        manifest = cargo.manifest
        self._cargos[cargo.address] = cargo
        releases = self._releases.setdefault((manifest.publisher, manifest.name), {})
        releases.setdefault(release_of(manifest.release), set()).add(cargo.address)
        self._names.setdefault(manifest.name, set()).add(cargo.address)
        return True

    def judge(self, signed: SignedRevocation) -> Standing:
        """What a revocation would do here. Raises SignatureError for the word of somebody who has none, CargoRefused(FULL)."""
        revocation, key = signed.revocation, _key_of(signed)
        if revocation.network and (revocation.network != self._network or not self._is_coordinator(signed.signer)):
            raise SignatureError(f"{signed.signer} is no Coordinator of this network and revokes nothing here")
        cargo = self._cargos.get(revocation.cargo)
        if cargo is not None and not _is_hit(cargo, signed):
            raise SignatureError(f"the Cargo is {cargo.manifest.publisher}'s, not {signed.signer}'s to revoke")
        if key in self._revoked or key in self._early:
            return Standing.KNOWN
        if not revocation.network and not self.hit_by(signed):
            return Standing.EARLY
        self._need_room()
        return Standing.COUNTS

    def revoke(self, signed: SignedRevocation) -> bool:
        """Whether it is new. Raises SignatureError for the word of somebody who has none, CargoRefused(FULL)."""
        standing = self.judge(signed)
        if standing is Standing.EARLY:
            self._early[_key_of(signed)] = signed
            if len(self._early) > limits.SHELF_EARLY_MAX:
                self._early.popitem(last=False)
        elif standing is Standing.COUNTS:
            hit = self.hit_by(signed)
            self._note(signed)
            for address in hit:
                self._remove(address)
        return standing is not Standing.KNOWN

    def restore(self, signed: SignedRevocation) -> None:
        """One that counted in an earlier run, whether or not its Cargo is here now. Raises CargoRefused(FULL)."""
        self._note(signed)
        for address in self.hit_by(signed):
            self._remove(address)

    def hit_by(self, signed: SignedRevocation) -> list[str]:
        """Addresses of the Cargos here that a revocation would take away."""
        if signed.revocation.cargo:
            cargo = self._cargos.get(signed.revocation.cargo)
            return [cargo.address] if cargo is not None and _is_hit(cargo, signed) else []
        return [address for address, known in self._cargos.items() if _is_hit(known, signed)]

    def _need_room(self) -> None:
        if len(self._revoked) >= limits.SHELF_REVOCATIONS_MAX:
            raise CargoRefused(Why.FULL, "this node knows as many revocations as it keeps")

    def _note(self, signed: SignedRevocation) -> None:
        self._need_room()
        self._early.pop(_key_of(signed), None)
        self._revoked[_key_of(signed)] = signed
        if signed.revocation.cargo:
            self._ended.add(signed.revocation.cargo)

    def _remove(self, address: str) -> None:
        manifest = self._cargos.pop(address).manifest
        self._ended.add(address)
        self._names[manifest.name].discard(address)
        if not self._names[manifest.name]:
            del self._names[manifest.name]
        releases = self._releases[manifest.publisher, manifest.name]
        release = release_of(manifest.release)
        releases[release].discard(address)
        if not releases[release]:
            del releases[release]
        if not releases:
            del self._releases[manifest.publisher, manifest.name]

    def may_run(self, address: str, now_ms: int) -> SignedCargo:
        """The Cargo of this address, if it may run now. Raises CargoRefused: UNKNOWN, EXPIRED, CONFLICT."""
        cargo = self._cargos.get(address)
        if cargo is None:
            raise CargoRefused(Why.UNKNOWN, f"no Cargo with the address {address[:64]} is known here, or it was revoked")
        self._check_time(cargo, now_ms)
        if self._first_of(cargo).address != address:
            manifest = cargo.manifest
            raise CargoRefused(Why.CONFLICT, f"{manifest.name} {manifest.release} was published before with other contents")
        return cargo

    def newest(self, publisher: str, name: str, now_ms: int) -> SignedCargo | None:
        """A publisher's newest release of a name that may run, candidate or not."""
        releases = self._releases.get((publisher, name), {})
        for release in sorted(releases, reverse=True):
            cargo = self._first_of(self._cargos[next(iter(releases[release]))])
            try:
                self._check_time(cargo, now_ms)
            except CargoRefused:
                continue
            return cargo
        return None

    def check_new(self, cargo: SignedCargo, now_ms: int) -> None:
        """What a publisher offers now. Raises CargoRefused: REVOKED, EXPIRED, ROLLBACK, CONFLICT."""
        manifest = cargo.manifest
        self._check_revoked(cargo)
        self._check_time(cargo, now_ms)
        newest = self.newest(manifest.publisher, manifest.name, now_ms)
        if newest is None or newest.address == cargo.address:
            return
        if release_of(manifest.release) < release_of(newest.manifest.release):
            told = f"{manifest.name} {newest.manifest.release} is out already; {manifest.release} would be a step back: raise the release"
            raise CargoRefused(Why.ROLLBACK, told)
        if release_of(manifest.release) == release_of(newest.manifest.release):
            raise CargoRefused(Why.CONFLICT, f"{manifest.name} {manifest.release} is out with other contents; raise the release")

    def all(self) -> list[SignedCargo]:
        """Every Cargo that is not revoked, in the order of addresses."""
        return [self._cargos[address] for address in sorted(self._cargos)]

    def has(self, address: str) -> bool:
        """Whether it is here, which says nothing about its time."""
        return address in self._cargos

    def is_revoked(self, address: str, publisher: str = "") -> bool:
        """Whether a Cargo may never run again, whether or not it is here; ``publisher``: whose it is, where that is known."""
        keys = itertools.product((address, publisher), ("", publisher))
        return address in self._ended or any(key in self._revoked or key in self._early for key in keys)

    def revoking(self, cargo: SignedCargo) -> list[SignedRevocation]:
        """The words that keep a Cargo from running, as far as they count."""
        publisher = cargo.manifest.publisher
        keys = itertools.product((cargo.address, publisher), ("", publisher))
        return [self._revoked[key] for key in keys if key in self._revoked]

    def revocations(self) -> list[SignedRevocation]:
        """For whoever has not heard them."""
        return list(self._revoked.values())

    def is_newer(self, signed: SignedPromotion) -> bool:
        """Whether a promotion counts before what is known of its name."""
        known = self._promotions.get(signed.promotion.name)
        return known is None or signed.rank > known.rank

    def promote(self, signed: SignedPromotion) -> SignedPromotion | None:
        """Takes in a Coordinator's promotion that is newer; the one whose place it takes. Raises CargoRefused: ROLLBACK, FULL."""
        promotion = signed.promotion
        if not self.is_newer(signed):
            raise CargoRefused(Why.ROLLBACK, f"a newer promotion of {promotion.name} is known than serial {promotion.serial}")
        if promotion.name not in self._promotions and len(self._promotions) >= limits.SHELF_PROMOTIONS_MAX:
            raise CargoRefused(Why.FULL, "this node knows as many promotions as it keeps")
        known = self._promotions.get(promotion.name)
        self._promotions[promotion.name] = signed
        return known

    def promotion(self, name: str) -> SignedPromotion | None:
        """The newest of a name."""
        return self._promotions.get(name)

    def awaits(self, name: str) -> bool:
        """Whether a name was promoted to a Cargo that has not been heard of yet, as far as is known."""
        signed = self._promotions.get(name)
        return signed is not None and signed.promotion.cargo not in self._cargos and signed.promotion.cargo not in self._ended

    def stands_for(self, name: str, now_ms: int) -> SignedCargo | None:
        """The Cargo that a name is promoted to; where that may not run, or there is no promotion, the name's newest release that may and is
        no candidate. Two publishers of one name cannot be: the Coordinators of a network see to that."""
        signed = self._promotions.get(name)
        if signed is not None and self._runs(signed.promotion.cargo, now_ms):
            return self._cargos[signed.promotion.cargo]
        top = release_of(signed.promotion.release) if signed is not None else None
        own = [self._cargos[address] for address in self._names.get(name, ())]
        runs = [cargo for cargo in own if _is_upto(cargo, top) and self._runs(cargo.address, now_ms)]
        return max(runs, key=lambda cargo: (release_of(cargo.manifest.release), cargo.address), default=None)

    def _runs(self, address: str, now_ms: int) -> bool:
        try:
            self.may_run(address, now_ms)
        except CargoRefused:
            return False
        return True

    def _first_of(self, cargo: SignedCargo) -> SignedCargo:
        """Of all that claim its release."""
        manifest = cargo.manifest
        rivals = self._releases[manifest.publisher, manifest.name][release_of(manifest.release)]
        return min((self._cargos[address] for address in rivals), key=lambda one: (one.manifest.published_at_ms, one.address))

    def _check_revoked(self, cargo: SignedCargo) -> None:
        publisher = cargo.manifest.publisher
        for what, whose in itertools.product((cargo.address, publisher), ("", publisher)):
            signed = self._revoked.get((what, whose)) or self._early.get((what, whose))
            if signed is not None:
                if len(self._revoked) < limits.SHELF_REVOCATIONS_MAX:
                    self._note(signed)  # it is about something real now
                raise _revoked(f"{cargo.manifest.name} {cargo.manifest.release}", signed)

    @staticmethod
    def _check_time(cargo: SignedCargo, now_ms: int) -> None:
        try:
            unexpired(cargo.manifest, now_ms)
        except RemoteProtocolError as error:
            raise CargoRefused(Why.EXPIRED, str(error)) from error


def _key_of(signed: SignedRevocation) -> tuple[str, str]:
    """What it is about, an address or a publisher, and whose word it is: the network's (empty) or a publisher's."""
    revocation = signed.revocation
    return revocation.cargo or revocation.publisher, "" if revocation.network else signed.signer


def _is_upto(cargo: SignedCargo, top: tuple[int, int, int] | None) -> bool:
    return top is None or release_of(cargo.manifest.release) <= top


def _is_hit(cargo: SignedCargo, signed: SignedRevocation) -> bool:
    what, whose = _key_of(signed)
    publisher = cargo.manifest.publisher
    return what in (cargo.address, publisher) and whose in ("", publisher)


def _revoked(what: str, signed: SignedRevocation) -> CargoRefused:
    reason = signed.revocation.reason
    by = "the network" if signed.revocation.network else "its publisher"
    return CargoRefused(Why.REVOKED, f"{what} was revoked by {by}{': ' + reason if reason else ''}")
