"""``/archipelag/cargos/1`` and the topic of the same name: how nodes tell one another which Cargos there are and which are revoked.

Theory of operation. What is passed on is a ``Notice``: the envelope of a Cargo or of a revocation, with what proves that it counts, so that
whoever gets it need not trust, or even know, whoever brought it. Anybody can make a key and sign a million Cargos; so a node takes one
from the network only with the ``Listing`` that a Coordinator of its network has signed for it, and with the ``Delegation`` by which the
network's key vouches for that Coordinator. A Coordinator's revocation comes with its delegation too. A publisher's own needs neither.

A promotion (cargo_promotions.py), which says what a name stands for, counts like a Coordinator's revocation: with its delegation.

Each notice has a *key* of 32 bytes, the same for all that say the same: a Cargo's content address, the hash of what is revoked by whose
word, the hash of what a promotion says. By these keys two nodes compare what they know (``CargosWanted``, ``CargosKnown``), a range of keys
at a time; news is pushed (``CargoNews``), and published on the topic.

Rules. A delegation counts where it holds now, or held when what it proves was signed: a kill switch must not wear off. What a neighbour
lacks is sent in the order of keys, so that whoever asks goes on behind the last one, whatever it thought of those before.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from protocol import checks, limits
from protocol.cargo_promotions import SignedPromotion, promotion_key, read_promotion
from protocol.cargos import SignedCargo, SignedRevocation, peek_revocation, read_cargo, read_revocation
from protocol.envelope import Label, open_envelope, peek, seal
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.identity import Signer
from protocol.messages import Hello
from protocol.registry import Registry, Struct, body
from protocol.tickets import Delegation, read_delegation

CARGOS_PROTOCOL = "/archipelag/cargos/1"
CARGOS = Registry("cargos")
CARGOS.message(1)(Hello)
LISTING_VERSION = 1
KEY_BYTES = 32
_REVOCATION_KEY = b"archipelag-revocation-key/1\0"


class About(StrEnum):
    """What a notice is about, in the order in which a node that comes new wants to hear it."""

    REVOCATION = "revocation"
    PROMOTION = "promotion"
    CARGO = "cargo"


@dataclass(frozen=True, slots=True)
class Listing:
    """A Coordinator says: this Cargo was published in our network."""

    version: int
    network: str
    cargo: str
    at_ms: int

    def __post_init__(self) -> None:
        if self.version != LISTING_VERSION:
            raise ValueError(f"listing version {self.version} is not {LISTING_VERSION}")
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.content_hash("cargo", self.cargo)
        checks.in_range("at_ms", self.at_ms, 1, 2**53)


@dataclass(frozen=True, slots=True)
class Notice:
    """``envelope``: of a Cargo, a promotion or a revocation. ``listing``: of a Cargo. ``delegation``: of the Coordinator that has signed
    the listing, the promotion or the revocation; empty where a publisher revokes its own."""

    about: About
    envelope: bytes
    listing: bytes = b""
    delegation: bytes = b""

    def __post_init__(self) -> None:
        checks.at_most("envelope", self.envelope, limits.ENVELOPE_BYTES_MAX)
        checks.at_most("listing", self.listing, limits.CARGO_PROOF_BYTES_MAX)
        checks.at_most("delegation", self.delegation, limits.CARGO_PROOF_BYTES_MAX)
        if self.about is not About.CARGO and self.listing:
            raise ValueError(f"a {self.about} has no listing")

    @property
    def size_bytes(self) -> int:
        return len(self.envelope) + len(self.listing) + len(self.delegation)


def _notices(name: str, notices: Sequence[Notice]) -> None:
    checks.at_most(name, notices, limits.CARGO_NOTICES_MAX)
    checks.in_range(f"bytes of {name}", sum(notice.size_bytes for notice in notices), 0, limits.CARGO_NOTICES_BYTES_MAX)


def _key(name: str, value: bytes) -> None:
    if value:
        checks.exactly(name, value, KEY_BYTES)


@CARGOS.message(2)
@dataclass(frozen=True, slots=True)
class CargosWanted:
    """Send me what you know about in the range ``after < key <= until`` and I do not. Answered by one CargosKnown.

    An empty end has no bound. The body holds the keys that the asker has in that range, ascending, one after the other.
    """

    about: About
    after: bytes = b""
    until: bytes = b""
    known: bytes = body()

    def __post_init__(self) -> None:
        _key("after", self.after)
        _key("until", self.until)
        checks.at_most("known", self.known, limits.CARGO_KEYS_MAX * KEY_BYTES)
        if len(self.known) % KEY_BYTES:
            raise ValueError("known holds whole keys")
        keys = self.keys()
        if any(left >= right for left, right in pairwise(keys)):
            raise ValueError("the known keys must ascend")

    def keys(self) -> list[bytes]:
        return [bytes(self.known[at : at + KEY_BYTES]) for at in range(0, len(self.known), KEY_BYTES)]


@CARGOS.message(3)
@dataclass(frozen=True, slots=True)
class CargosKnown:
    """The answer: notices in the order of their keys; ``more``: there are more behind the last one."""

    notices: tuple[Notice, ...]
    more: bool = False

    def __post_init__(self) -> None:
        _notices("notices", self.notices)
        if self.more and not self.notices:
            raise ValueError("an answer that goes on begins with something")


@CARGOS.message(4)
@dataclass(frozen=True, slots=True)
class CargoNews:
    """Has just been heard; said by anybody, at any time, to neighbours that have not said it."""

    notices: tuple[Notice, ...]

    def __post_init__(self) -> None:
        _notices("notices", self.notices)


CARGOS.seal()

NOTICE: Struct[Notice] = Struct(Notice)
_LISTING: Struct[Listing] = Struct(Listing)


@dataclass(frozen=True, slots=True)
class Told:
    """A notice whose signatures were checked; one of ``cargo``, ``revocation`` and ``promotion``. ``coordinator``: whose word it is, if
    one's."""

    key: bytes
    notice: Notice
    cargo: SignedCargo | None = None
    revocation: SignedRevocation | None = None
    coordinator: str = ""
    promotion: SignedPromotion | None = None


def topic_of(network: str) -> str:
    return f"archipelag/cargos/1/{network}"


def sign_listing(listing: Listing, coordinator: Signer) -> bytes:
    return seal(Label.LISTING, _LISTING.encode(listing), coordinator)


def read_notice(notice: Notice, network: str, now_ms: int) -> Told:
    """Raises SignatureError where it is not signed by who may say it in ``network``, RemoteProtocolError where it is malformed."""
    if notice.about is About.CARGO:
        cargo = read_cargo(notice.envelope)
        return Told(cargo_key(cargo.address), notice, cargo, coordinator=_lister(notice, cargo.address, network, now_ms))
    if notice.about is About.PROMOTION:
        return _read_promotion(notice, network, now_ms)
    signed = read_revocation(notice.envelope)
    revocation, coordinator = signed.revocation, ""
    if revocation.network:
        coordinator = _vouched(notice.delegation, network, revocation.at_ms, now_ms)
        if (revocation.network, signed.signer) != (network, coordinator):
            raise SignatureError(f"{signed.signer} is no Coordinator of this network and revokes nothing here")
    elif notice.delegation:
        raise RemoteProtocolError("a publisher's own revocation has no delegation")
    return Told(revocation_key(signed), notice, None, signed, coordinator)


def _read_promotion(notice: Notice, network: str, now_ms: int) -> Told:
    signed = read_promotion(notice.envelope)
    promotion = signed.promotion
    coordinator = _vouched(notice.delegation, network, promotion.at_ms, now_ms)
    if (promotion.network, signed.signer) != (network, coordinator):
        raise SignatureError(f"{signed.signer} is no Coordinator of this network and promotes nothing here")
    if promotion.at_ms > now_ms + limits.CLOCK_SKEW_S * 1000:
        raise RemoteProtocolError("the promotion comes from the future")
    return Told(signed.key, notice, coordinator=coordinator, promotion=signed)


def _lister(notice: Notice, address: str, network: str, now_ms: int) -> str:
    envelope = open_envelope(Label.LISTING, notice.listing)
    listing = _LISTING.decode(envelope.payload)
    if (listing.cargo, listing.network) != (address, network):
        raise SignatureError("the listing is for another Cargo or another network")
    if listing.at_ms > now_ms + limits.CLOCK_SKEW_S * 1000:
        raise RemoteProtocolError("the listing comes from the future")
    if envelope.signer != _vouched(notice.delegation, network, listing.at_ms, now_ms):
        raise SignatureError("the listing was signed by somebody else than the delegation vouches for")
    return envelope.signer


def _vouched(data: bytes, network: str, signed_at_ms: int, now_ms: int) -> str:
    """The Coordinator that a delegation vouches for, now or when what it proves was signed."""
    try:
        delegation: Delegation = read_delegation(data, now_ms)
    except SignatureError:
        raise
    except RemoteProtocolError:
        delegation = read_delegation(data, min(signed_at_ms, now_ms))
    if delegation.network != network:
        raise SignatureError("the delegation is of another network")
    return delegation.coordinator


def cargo_key(address: str) -> bytes:
    return bytes.fromhex(address)


def revocation_key(signed: SignedRevocation) -> bytes:
    """The same for all that revoke the same by the same authority, the network or a publisher."""
    revocation = signed.revocation
    what, whose = revocation.cargo or revocation.publisher, "" if revocation.network else signed.signer
    return hashlib.sha256(_REVOCATION_KEY + f"{what}\0{whose}".encode()).digest()


def key_of(notice: Notice) -> bytes:
    """Whatever it is worth: no signature is looked at. Raises RemoteProtocolError for what is malformed."""
    if notice.about is About.CARGO:
        return hashlib.sha256(peek(notice.envelope).payload).digest()
    if notice.about is About.PROMOTION:
        return promotion_key(peek(notice.envelope).payload)
    return revocation_key(peek_revocation(notice.envelope))


class Keyed:
    """Notices of one kind by their keys, in order. ``in`` asks for a key."""

    def __init__(self) -> None:
        self._notices: dict[bytes, Notice] = {}
        self._order: list[bytes] = []

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: bytes) -> bool:
        return key in self._notices

    def put(self, key: bytes, notice: Notice) -> None:
        if key not in self._notices:
            bisect.insort(self._order, key)
        self._notices[key] = notice

    def drop(self, key: bytes) -> None:
        if self._notices.pop(key, None) is not None:
            del self._order[bisect.bisect_left(self._order, key)]

    def get(self, key: bytes) -> Notice | None:
        return self._notices.get(key)

    def all(self) -> list[tuple[bytes, Notice]]:
        return [(key, self._notices[key]) for key in self._order]

    def keys_in(self, after: bytes, until: bytes) -> list[bytes]:
        """Those in ``after < key <= until``."""
        low = bisect.bisect_right(self._order, after) if after else 0
        high = bisect.bisect_right(self._order, until) if until else len(self._order)
        return self._order[low:high]

    def start(self, place: float) -> bytes:
        """Where to begin comparing: ``place`` from 0 to below 1 chooses one of the parts that all keys are compared in."""
        parts = range(0, max(1, len(self._order)), limits.CARGO_KEYS_MAX)
        at = parts[int(place * len(parts))]
        return self._order[at - 1] if at else b""


def question(about: About, keyed: Keyed, after: bytes = b"") -> CargosWanted:
    """About the next CARGO_KEYS_MAX of ours behind ``after``, and all that may lie between them."""
    keys = keyed.keys_in(after, b"")
    part = keys[: limits.CARGO_KEYS_MAX]
    return CargosWanted(about, after, part[-1] if len(part) < len(keys) else b"", b"".join(part))


def answer(asked: CargosWanted, known: Mapping[About, Keyed]) -> CargosKnown:
    """What the asker lacks, as much as fits."""
    keyed, theirs = known[asked.about], set(asked.keys())
    lacking = [key for key in keyed.keys_in(asked.after, asked.until) if key not in theirs]
    found, size = list[Notice](), 0
    for key in lacking[: limits.CARGO_NOTICES_MAX]:
        notice = keyed.get(key)
        assert notice is not None
        size += notice.size_bytes
        if size > limits.CARGO_NOTICES_BYTES_MAX:
            break
        found.append(notice)
    return CargosKnown(tuple(found), more=len(found) < len(lacking))


def batches(notices: Sequence[Notice]) -> list[tuple[Notice, ...]]:
    """Cut so that each part fits into one message."""
    parts: list[list[Notice]] = []
    size = limits.CARGO_NOTICES_BYTES_MAX + 1
    for notice in notices:
        size += notice.size_bytes
        if not parts or size > limits.CARGO_NOTICES_BYTES_MAX or len(parts[-1]) >= limits.CARGO_NOTICES_MAX:
            parts.append([])
            size = notice.size_bytes
        parts[-1].append(notice)
    return [tuple(part) for part in parts]


class Allowance:
    """How much one peer may say: a bucket that fills at ``per_s`` up to ``burst``. Pure; times in seconds, only forward."""

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._left, self._at_s = burst, now_s

    def take(self, count: float, now_s: float) -> float:
        """Takes ``count`` and gives the seconds to wait until that is paid for; 0 where it was there."""
        self._fill(now_s)
        self._left -= count
        return max(0.0, -self._left / self._per_s)

    def try_take(self, count: float, now_s: float) -> bool:
        """Takes ``count`` if it is there."""
        self._fill(now_s)
        if self._left < count:
            return False
        self._left -= count
        return True

    def _fill(self, now_s: float) -> None:
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
