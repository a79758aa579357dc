"""The book of Islands: what a node knows of the network, kept by one pure ``apply(event, state)``.

Every node that listens to gossip keeps one, the Coordinator decides by its own. An ad replaces an older one of the same peer; a notice
of loss removes the peer until a *newer* ad comes, so that old ads still under way cannot bring a dead Island back, and an Island that
was called dead by mistake only has to speak. Only Coordinators' notices count (who they are is in the state too), or what this node
saw itself. Dead entries leave a tombstone for as long as their last ad could still be valid.

The state of a peer only ever grows in the order of (sequence, lost), so nodes that heard the same events in any order, once or many
times, hold the same book.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from protocol import limits
from protocol.ads import Ad, Lost

# The lost ad was made at most one skew after the loss was seen, lived its lifetime, and is believed for another skew.
_TOMBSTONE_MS = int((limits.AD_LIFETIME_S + 2 * limits.CLOCK_SKEW_S) * 1000)


@dataclass(frozen=True, slots=True)
class AdHeard:
    """A valid ad came in; ``envelope`` is kept to pass it on."""

    ad: Ad
    envelope: bytes


@dataclass(frozen=True, slots=True)
class LostHeard:
    """``witness`` says that a peer is gone; an empty witness is this node itself. ``envelope`` is kept to pass it on, and is empty for
    what a node without a Coordinator's key saw: nobody else would believe it."""

    witness: str
    lost: Lost
    envelope: bytes = b""


@dataclass(frozen=True, slots=True)
class CoordinatorTrusted:
    peer: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: forget what has expired."""


Event = AdHeard | LostHeard | CoordinatorTrusted | Tick


class Outcome(Enum):
    """What an event did, so that the shell knows whether to pass it on."""

    CHANGED = auto()
    STALE = auto()
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Entry:
    ad: Ad
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Tombstone:
    sequence: int
    until_ms: int
    envelope: bytes = b""


@dataclass(frozen=True, slots=True)
class Book:
    network: str
    entries: Mapping[str, Entry] = field(default_factory=dict)
    tombstones: Mapping[str, Tombstone] = field(default_factory=dict)
    coordinators: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<Book {self.network}: {len(self.entries)} Islands, {len(self.tombstones)} lost>"

    def ads(self) -> list[Ad]:
        return [entry.ad for entry in self.entries.values()]


def must_refute(lost: Lost, peer: str, sequence: int) -> bool:
    """Whether ``peer``, whose newest ad has this sequence, was called dead and has to say that it is not, by an ad that is newer than
    ``lost.sequence``."""
    return lost.peer == peer and lost.sequence >= sequence


def apply(event: Event, book: Book, now_ms: int) -> tuple[Book, Outcome]:
    """The book after an event. Never raises for what peers may send; reading and signatures were checked before."""
    match event:
        case AdHeard():
            return _apply_ad(event, book)
        case LostHeard():
            return _apply_lost(event, book)
        case CoordinatorTrusted(peer):
            return replace(book, coordinators=book.coordinators | {peer}), Outcome.CHANGED
        case Tick():
            return _apply_tick(book, now_ms)


def _apply_ad(event: AdHeard, book: Book) -> tuple[Book, Outcome]:
    ad = event.ad
    if ad.network != book.network:
        return book, Outcome.REFUSED
    known, grave = book.entries.get(ad.peer), book.tombstones.get(ad.peer)
    if (known and ad.sequence <= known.ad.sequence) or (grave and ad.sequence <= grave.sequence):
        return book, Outcome.STALE
    if known is None and len(book.entries) >= limits.BOOK_PEERS_MAX:
        return book, Outcome.REFUSED
    entries = {**book.entries, ad.peer: Entry(ad, event.envelope)}
    tombstones = book.tombstones
    if grave is not None:
        tombstones = {peer: stone for peer, stone in tombstones.items() if peer != ad.peer}
    return replace(book, entries=entries, tombstones=tombstones), Outcome.CHANGED


def _apply_lost(event: LostHeard, book: Book) -> tuple[Book, Outcome]:
    lost = event.lost
    if lost.network != book.network or (event.witness and event.witness not in book.coordinators):
        return book, Outcome.REFUSED
    known, grave = book.entries.get(lost.peer), book.tombstones.get(lost.peer)
    if (known and known.ad.sequence > lost.sequence) or (grave and not _supersedes(event, grave)):
        return book, Outcome.STALE
    tombstones = dict(book.tombstones)
    if grave is None and len(tombstones) >= limits.BOOK_PEERS_MAX:
        if known is None:
            return book, Outcome.REFUSED
        del tombstones[min(tombstones, key=lambda peer: tombstones[peer].until_ms)]
    tombstones[lost.peer] = Tombstone(lost.sequence, lost.seen_at_ms + _TOMBSTONE_MS, event.envelope)
    entries = {peer: entry for peer, entry in book.entries.items() if peer != lost.peer}
    return replace(book, entries=entries, tombstones=tombstones), Outcome.CHANGED


def _supersedes(event: LostHeard, grave: Tombstone) -> bool:
    """A later loss does; of the same loss, a notice that can be passed on supersedes one that cannot."""
    if event.lost.sequence != grave.sequence:
        return event.lost.sequence > grave.sequence
    return bool(event.envelope) and not grave.envelope


def _apply_tick(book: Book, now_ms: int) -> tuple[Book, Outcome]:
    grace_ms = limits.CLOCK_SKEW_S * 1000
    entries = {peer: e for peer, e in book.entries.items() if e.ad.expires_at_ms + grace_ms >= now_ms}
    tombstones = {peer: stone for peer, stone in book.tombstones.items() if stone.until_ms >= now_ms}
    if len(entries) == len(book.entries) and len(tombstones) == len(book.tombstones):
        return book, Outcome.STALE
    return replace(book, entries=entries, tombstones=tombstones), Outcome.CHANGED
