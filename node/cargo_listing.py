"""A Coordinator's registry and the network's news, kept alike: what is approved is listed for all, what was revoked anywhere is so here.

What the registry lists gets this Coordinator's ``Listing`` and goes out as a notice; so does every revocation of the registry, and the
newest promotion of each name, with the delegation of whichever Coordinator has signed it. The other way, a publisher's revocation that came
from the network goes into the registry, so that every Coordinator of the database heeds it, and those that come later. Promotions do not:
what a name stands for at a Coordinator is what its own database says, where the name's owner is known.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from coordinator.books.errors import BooksUnavailable
from coordinator.registry import Entry, KnownPromotion, KnownRevocation, Registry
from node.cargo_news import CargoNews
from protocol.cargo_news import (
    LISTING_VERSION,
    About,
    Listing,
    Notice,
    batches,
    cargo_key,
    key_of,
    revocation_key,
    sign_listing,
)
from protocol.cargos import peek_revocation
from protocol.identity import Signer

log = logging.getLogger(__name__)

_AGAIN_S = 2.0  # after the database was away


class CargoListing:
    """``delegation()``: of this Coordinator, fresh."""

    def __init__(
        self, registry: Registry, news: CargoNews, network: str, key: Signer, delegation: Callable[[], bytes], clock_ms: Callable[[], int]
    ) -> None:
        self._registry, self._news, self._network, self._key = registry, news, network, key
        self._delegation, self._clock_ms = delegation, clock_ms
        self._tried: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<CargoListing of {self._registry!r}>"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[CargoListing]:
        """While the registry's database is open."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            nursery.start_soon(self._learn)
            yield self
            nursery.cancel_scope.cancel()

    async def _tell(self) -> None:
        while True:
            untold = self._untold()
            if not untold:
                await self._registry.wait_changed()
                continue
            for part in batches(untold):
                await self._news.hear(part)
            self._tried.update(map(key_of, untold))

    def _untold(self) -> list[Notice]:
        """Revocations first, then promotions, so that nobody takes a candidate for what its name stands for. What was not taken is not
        tried again."""

        def is_new(about: About, key: bytes) -> bool:
            return key not in self._news.known[about] and key not in self._tried

        revoked = [one for one in self._registry.revocations() if is_new(About.REVOCATION, revocation_key(one.signed))]
        promoted = [one for one in self._registry.promotions() if is_new(About.PROMOTION, one.signed.key)]
        listed = [one for one in self._registry.entries() if one.is_listed and is_new(About.CARGO, cargo_key(one.cargo.address))]
        return [*map(_revocation, revoked), *map(_promotion, promoted), *map(self._listed, listed)]

    def _listed(self, entry: Entry) -> Notice:
        listing = Listing(LISTING_VERSION, self._network, entry.cargo.address, self._clock_ms())
        return Notice(About.CARGO, entry.cargo.envelope, sign_listing(listing, self._key), self._delegation())

    async def _learn(self) -> None:
        while True:
            unknown = [
                notice for key, notice in self._news.known[About.REVOCATION].all() if not self._registry.knows_revocation(key)
            ]
            if not unknown:
                await self._news.wait_changed()
            for notice in unknown:
                await self._note(notice)

    async def _note(self, notice: Notice) -> None:
        try:
            await self._registry.note_revocation(peek_revocation(notice.envelope), notice.delegation)
        except BooksUnavailable as error:
            log.warning("a revocation cannot be noted in the registry at the moment: %s", error)
            await trio.sleep(_AGAIN_S)


def _revocation(one: KnownRevocation) -> Notice:
    return Notice(About.REVOCATION, one.signed.envelope, b"", one.delegation)


def _promotion(one: KnownPromotion) -> Notice:
    return Notice(About.PROMOTION, one.signed.envelope, b"", one.delegation)
