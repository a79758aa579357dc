"""Who may publish which Cargo in this network, and how far a Cargo has got. Pure.

A name belongs to the publisher's key that first published under it, and a key to the account that first used it. Where a key was revoked,
its account may go on under its names with another. Each release of a name is used once, and a name never steps back.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from protocol.cargo_promotions import Promotion
from protocol.cargos import CargoManifest, SignedCargo, release_of, unexpired
from protocol.errors import ArchipelagError, RemoteProtocolError

RELEASES_MAX = 64  # of one name that are not revoked: what nobody should run any more is to be revoked
PUBLISHERS_NAMES_MAX = 1000  # of accounts that have no limit otherwise


class CargoState(StrEnum):
    """How far a Cargo has got. A draft lies with its publisher; the registry has what was submitted."""

    DRAFT = "draft"
    SUBMITTED = "submitted"
    APPROVED = "approved"
    REJECTED = "rejected"
    SUSPENDED = "suspended"


TRANSITIONS: dict[CargoState, frozenset[CargoState]] = {
    CargoState.DRAFT: frozenset({CargoState.SUBMITTED}),
    CargoState.SUBMITTED: frozenset({CargoState.APPROVED, CargoState.REJECTED}),
    CargoState.APPROVED: frozenset({CargoState.SUSPENDED}),
    CargoState.SUSPENDED: frozenset({CargoState.APPROVED, CargoState.REJECTED}),
    CargoState.REJECTED: frozenset({CargoState.APPROVED}),
}
ACTIVE = frozenset({CargoState.SUBMITTED, CargoState.APPROVED})


class PublisherLevel(StrEnum):
    INDIVIDUAL = "individual"
    VERIFIED = "verified"
    ORGANIZATION = "organization"
    PARTNER = "partner"


NAMES_MAX = {
    # mission.md: "Individual (3 active Cargos), Verified (10)"
    PublisherLevel.INDIVIDUAL: 3,
    PublisherLevel.VERIFIED: 10,
    PublisherLevel.ORGANIZATION: PUBLISHERS_NAMES_MAX,
    PublisherLevel.PARTNER: PUBLISHERS_NAMES_MAX,
}


class Fault(StrEnum):
    """Why the registry refuses something."""

    INVALID = "invalid_cargo"
    SIGNATURE = "bad_signature"
    TOO_LARGE = "cargo_too_large"
    EXPIRED = "cargo_expired"
    REVOKED = "cargo_revoked"
    ROLLBACK = "cargo_rollback"
    CONFLICT = "cargo_conflict"
    NAME_TAKEN = "name_taken"
    KEY_TAKEN = "publisher_taken"
    TOO_MANY = "too_many_cargos"
    SOURCE = "private_source"
    REJECTED = "cargo_rejected"
    UNKNOWN = "unknown_cargo"
    STATE = "wrong_state"


class RegistryRefused(ArchipelagError):
    """Nothing has changed; the message says why, and what to do."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault, self.message = fault, message


@dataclass(frozen=True, slots=True)
class Release:
    """One row of the registry, of the same name."""

    address: str
    release: str
    state: CargoState
    expires_at_ms: int
    is_revoked: bool


@dataclass(frozen=True, slots=True)
class NameOwner:
    publisher: str
    account: str
    key_is_revoked: bool


@dataclass(frozen=True, slots=True)
class Known:
    """What the registry says about a Cargo that is offered. ``key_account``: whose key it is, empty while nobody's; ``active``: the
    account's active names; ``revoked``: why neither it nor its key may be used, empty where they may."""

    owner: NameOwner | None
    key_account: str
    level: PublisherLevel
    active: frozenset[str]
    releases: tuple[Release, ...]
    revoked: str = ""
    is_reserved: bool = False


def check_publishable(cargo: SignedCargo, account: str, known: Known, now_ms: int) -> None:
    """Raises RegistryRefused."""
    manifest = cargo.manifest
    if known.revoked:
        raise RegistryRefused(Fault.REVOKED, f"{manifest.name} {manifest.release} cannot be published: {known.revoked}")
    try:
        unexpired(manifest, now_ms)
    except RemoteProtocolError as error:
        raise RegistryRefused(Fault.EXPIRED, str(error)) from None
    check_sources(manifest)
    if known.key_account not in ("", account):
        told = f"the key {manifest.publisher} belongs to another account here; use that account's API key, or sign with another key"
        raise RegistryRefused(Fault.KEY_TAKEN, told)
    _check_name(manifest, account, known)
    _check_release(cargo, known, now_ms)
    if manifest.name not in known.active and len(known.active) >= NAMES_MAX[known.level]:
        told = f"a publisher of the level {known.level} has at most {NAMES_MAX[known.level]} active Cargos"
        raise RegistryRefused(Fault.TOO_MANY, f"{told}; revoke one first, or ask the operator")


def _check_name(manifest: CargoManifest, account: str, known: Known) -> None:
    owner = known.owner
    is_ours = owner is None or owner.publisher == manifest.publisher or (owner.account == account and owner.key_is_revoked)
    if known.is_reserved or not is_ours:
        raise RegistryRefused(Fault.NAME_TAKEN, f"the name {manifest.name} belongs to another publisher; choose another")


def _check_release(cargo: SignedCargo, known: Known, now_ms: int) -> None:
    manifest, release = cargo.manifest, release_of(cargo.manifest.release)
    for one in known.releases:
        if one.release == manifest.release and one.address != cargo.address:
            told = f"{manifest.name} {manifest.release} was published before with other contents; raise the release"
            raise RegistryRefused(Fault.CONFLICT, told)
    runs = [one for one in known.releases if one.state in ACTIVE and not one.is_revoked and not 0 < one.expires_at_ms < now_ms]
    newest = max(runs, key=lambda one: release_of(one.release), default=None)
    if newest is not None and release < release_of(newest.release):
        told = f"{manifest.name} {newest.release} is out already; {manifest.release} would be a step back: raise the release"
        raise RegistryRefused(Fault.ROLLBACK, told)
    if sum(not one.is_revoked for one in known.releases) >= RELEASES_MAX:
        told = f"{manifest.name} has {RELEASES_MAX} releases, the most that are kept; revoke some that nobody should run any more"
        raise RegistryRefused(Fault.TOO_MANY, told)


def check_sources(manifest: CargoManifest) -> None:
    """An address that says itself that it is not public is refused here; what a name stands for, the Island looks at when it downloads.

    Raises RegistryRefused.
    """
    for source in (source for file in manifest.files for source in file.sources if source.startswith("https:")):
        if not _is_public(source):
            raise RegistryRefused(Fault.SOURCE, f"{source[:200]} is no public address; others cannot download from there")


def _is_public(source: str) -> bool:
    try:
        host = urlsplit(source).hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".localhost", ".local", ".internal"))


def check_transition(state: CargoState, wanted: CargoState) -> None:
    """Raises RegistryRefused."""
    if wanted not in TRANSITIONS[state]:
        told = ", ".join(sorted(TRANSITIONS[state]))
        raise RegistryRefused(Fault.STATE, f"it is {state}; from there it can become {told}, not {wanted}")


def newest_of(releases: Sequence[Release], now_ms: int) -> Release | None:
    """What a name stands for: its newest approved release that may run."""
    good = [one for one in releases if runs_now(one.state, one.is_revoked, one.expires_at_ms, now_ms)]
    return max(good, key=lambda one: release_of(one.release), default=None)


def runs_now(state: CargoState, is_revoked: bool, expires_at_ms: int, now_ms: int) -> bool:
    """Whether jobs may be given to a Cargo at this time."""
    return state is CargoState.APPROVED and not is_revoked and not 0 < expires_at_ms < now_ms


def standing_of(runs: Iterable[tuple[str, str]], promotion: Promotion | None, promoted_runs: bool) -> tuple[str, ...]:
    """Addresses to which jobs for a name may be given, the best first: what it is promoted to, then its own releases that are no
    candidates, the newest first. ``runs``: address and release of those of its own that may run; ``promoted_runs``: whether the
    promoted one may, whosoever name that has."""
    own = [(release_of(release), address) for address, release in runs]
    own.sort(key=lambda one: (tuple(-part for part in one[0]), one[1]))
    if promotion is None:
        return tuple(address for _, address in own)
    top = release_of(promotion.release)
    first = (promotion.cargo,) if promoted_runs else ()
    return (*first, *(address for release, address in own if release <= top and address != promotion.cargo))
