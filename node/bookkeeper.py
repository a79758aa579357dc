"""The shell round ``protocol.book``: envelopes in, a book that others can wait on out.

It reads the clock, checks signatures (each envelope once: gossip brings it about five times), applies the event, and tells whoever
waits. What may not be believed is counted and dropped; nothing a peer sends can raise past here.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from protocol.ads import Ad, Lost, read_ad, read_lost
from protocol.book import AdHeard, Book, CoordinatorTrusted, Event, LostHeard, Outcome, Tick, apply
from protocol.errors import RemoteProtocolError, SignatureError

log = logging.getLogger(__name__)

_TICK_S = 5.0
_SEEN_MAX = 4096


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class BookStatistics:
    islands: int
    heard_total: int
    stale_total: int
    refused_total: int


class BookKeeper:
    """Keeps the book of one node."""

    def __init__(self, network: str, clock_ms: Callable[[], int] = now_ms, own_peer: str = "") -> None:
        self.book = Book(network)
        self.own_peer = own_peer
        self.refute: Callable[[], object] = lambda: None  # called when somebody says that we are gone
        self.met: Callable[[Ad], object] = lambda ad: None  # called for each ad of another that is news
        self._clock_ms = clock_ms
        self._changed = trio.Event()
        self._seen: OrderedDict[bytes, Outcome] = OrderedDict()
        self._heard = self._stale = self._refused = 0

    def __repr__(self) -> str:
        return f"<BookKeeper {self.book!r}, {self._heard} heard, {self._refused} refused>"

    def statistics(self) -> BookStatistics:
        return BookStatistics(len(self.book.entries), self._heard, self._stale, self._refused)

    async def wait_changed(self) -> None:
        """Returns after the next change."""
        await self._changed.wait()

    def trust(self, coordinator: str) -> None:
        """Believe this Coordinator's notices of loss."""
        self._apply(CoordinatorTrusted(coordinator))

    def hear(self, envelope: bytes) -> Outcome:
        """Takes in an ad or a notice of loss, whoever brought it. REFUSED means that it should not be passed on."""
        digest = hashlib.sha256(envelope).digest()
        known = self._seen.get(digest)
        if known is not None:
            return Outcome.REFUSED if known is Outcome.REFUSED else Outcome.STALE
        self._heard += 1
        try:
            event = self._read(envelope)
            outcome = self._apply(event)
            self._tell(event, outcome)
        except RemoteProtocolError as error:
            outcome = Outcome.REFUSED
            log.debug("refused gossip: %s", error)
        self._count(outcome)
        self._seen[digest] = outcome
        if len(self._seen) > _SEEN_MAX:
            self._seen.popitem(last=False)
        return outcome

    def loss_of(self, peer: str) -> Lost | None:
        """What a Coordinator that saw ``peer``'s connection end has to sign and spread; None when the book has no such peer."""
        entry = self.book.entries.get(peer)
        return None if entry is None else Lost(self.book.network, peer, entry.ad.sequence, self._clock_ms())

    async def run(self) -> None:
        """Lets entries expire; runs until cancelled."""
        while True:
            await trio.sleep(_TICK_S)
            self._apply(Tick())

    def _read(self, envelope: bytes) -> Event:
        try:
            ad: Ad = read_ad(envelope, self._clock_ms())
            return AdHeard(ad, envelope)
        except SignatureError as no_ad:
            try:
                witness, lost = read_lost(envelope, self._clock_ms())
            except SignatureError:
                raise no_ad from None
            return LostHeard(witness, lost, envelope)

    def _apply(self, event: Event) -> Outcome:
        self.book, outcome = apply(event, self.book, self._clock_ms())
        if outcome is Outcome.CHANGED:
            self._changed.set()
            self._changed = trio.Event()
        return outcome

    def _tell(self, event: Event, outcome: Outcome) -> None:
        if outcome is not Outcome.CHANGED:
            return
        if isinstance(event, LostHeard) and event.lost.peer == self.own_peer:
            self.refute()
        elif isinstance(event, AdHeard) and event.ad.peer != self.own_peer:
            self.met(event.ad)

    def _count(self, outcome: Outcome) -> None:
        self._stale += outcome is Outcome.STALE
        self._refused += outcome is Outcome.REFUSED
