"""What the name of a Cargo stands for: the newest *promotion* of it, signed by a Coordinator of the network.

Theory of operation. Without one a name stands for its newest release. A promotion names the Cargo, by its content address, that jobs for
the name are given to from now on: another release of the name, newer or older, or a Cargo of another name. Whoever has heard several
believes the one with the highest serial, whatever order they came in, so what is replayed moves nothing back.

Rules. Where the promoted Cargo may not run, or nobody offers it yet, the name falls back to its own releases, the newest first, but never
to one above ``release``: those are *candidates*, which only those run who ask for them by release or address. Of two promotions of the same
serial, by Coordinators that share no database, the one with the greater key counts, at every node.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from protocol import checks, limits
from protocol.cargos import check_name, release_of
from protocol.envelope import Label, open_envelope, peek, seal
from protocol.identity import Signer
from protocol.registry import Struct

PROMOTION_VERSION = 1
_PROMOTION_KEY = b"archipelag-promotion-key/1\0"


@dataclass(frozen=True, slots=True)
class Promotion:
    """``cargo``: the content address that ``name`` stands for. ``release``: the newest of the name's own releases that may stand in for it,
    which is what the name has stood for before. ``serial`` only goes up. ``origin``: what it came of, such as ``publish``, ``ab:TEST`` or
    ``rollback:TEST``."""

    version: int
    network: str
    name: str
    cargo: str
    release: str
    serial: int
    at_ms: int
    origin: str

    def __post_init__(self) -> None:
        if self.version != PROMOTION_VERSION:
            raise ValueError(f"promotion version {self.version} is not {PROMOTION_VERSION}")
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        check_name(self.name)
        checks.content_hash("cargo", self.cargo)
        release_of(self.release)
        checks.in_range("serial", self.serial, 1, limits.PROMOTION_SERIAL_MAX)
        checks.in_range("at_ms", self.at_ms, 1, 2**53)
        checks.printable("origin", self.origin, limits.PROMOTION_ORIGIN_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class SignedPromotion:
    """One whose signature was checked. ``signer`` has still to be a Coordinator of our network."""

    promotion: Promotion
    signer: str
    envelope: bytes

    @property
    def key(self) -> bytes:
        """The same for all that say the same, whoever signs it: a hash of what is signed."""
        return promotion_key(_PROMOTION.encode(self.promotion))

    @property
    def rank(self) -> tuple[int, bytes]:
        """Of two promotions of a name the one with the greater rank counts."""
        return self.promotion.serial, self.key


_PROMOTION: Struct[Promotion] = Struct(Promotion)


def promotion_key(payload: bytes) -> bytes:
    """By which notices of promotions are compared; ``payload``: of its envelope."""
    return hashlib.sha256(_PROMOTION_KEY + payload).digest()


def sign_promotion(promotion: Promotion, signer: Signer) -> bytes:
    """The envelope of a promotion."""
    return seal(Label.PROMOTION, _PROMOTION.encode(promotion), signer)


def read_promotion(data: bytes) -> SignedPromotion:
    """Raises SignatureError, RemoteProtocolError. Whether it counts is for whoever knows the network's Coordinators."""
    envelope = open_envelope(Label.PROMOTION, data)
    return SignedPromotion(_PROMOTION.decode(envelope.payload), envelope.signer, data)


def peek_promotion(data: bytes) -> SignedPromotion:
    """One whose signature was checked before. Raises RemoteProtocolError."""
    envelope = peek(data)
    return SignedPromotion(_PROMOTION.decode(envelope.payload), envelope.signer, data)


def next_serial(last: int, now_ms: int) -> int:
    """The serial of the promotion that comes after ``last`` (0: none). It is the time, in milliseconds, wherever that is later: a database
    that was restored from an old copy, or is another one of the same network, then steps back behind nobody."""
    return max(last + 1, now_ms)
