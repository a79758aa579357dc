"""An Island's Cargos and the network's word on them: those that the network lists are fetched and loaded, those that it revokes are taken
down at once, with all jobs that run of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from node.cargo_deck import Deck, OnDeck
from node.cargo_news import CargoNews
from node.cargo_store import CargoStore
from node.jobs_served import JobServer, Terms
from protocol import limits
from protocol.cargo_shelf import Why
from protocol.cargos import SignedCargo
from protocol.errors import Code, ConfigError, Refused
from protocol.prices import Ask
from runtimes.base import Loaded
from runtimes.catalogue import CATALOGUE
from runtimes.store import ConsoleProgress
from runtimes.store.errors import FetchError

log = logging.getLogger(__name__)

_RETRY_MIN_S, _RETRY_MAX_S = 1.0, 60.0
_TOLD_S = 10.0  # what a network lists is known a second after one has joined


class ManifestCargos:
    """Of one Island. ``terms``: what is served, changed here; ``changed`` sends a new ad; ``loaded``: all named Cargos are there."""

    def __init__(
        self,
        deck: Deck,
        registered: Sequence[str],
        terms: MutableMapping[str, Terms],
        ask_of: Callable[[str], Ask],
        news: CargoNews,
        files: CargoStore,
        jobs: JobServer,
        changed: Callable[[], object],
    ) -> None:
        self._deck, self._registered, self._terms, self._ask_of = deck, registered, terms, ask_of
        self._news, self._files, self._jobs, self._changed = news, files, jobs, changed
        self._nursery: trio.Nursery | None = None
        self._waiting = set(registered)
        self.loaded = trio.Event()
        news.on_revoked.append(self._revoked)
        news.on_early.append(self._look_again)

    def __repr__(self) -> str:
        return f"<ManifestCargos {self._deck!r}, {len(self._waiting)} waiting>"

    def begin(self, nursery: trio.Nursery) -> None:
        """Starts the tasks; what is already revoked does not get so far."""
        self._nursery = nursery
        for on_deck in list(self._deck.cargos.values()):
            if on_deck.manifest is not None and self._news.may_run(on_deck.address, on_deck.manifest.publisher) is Why.REVOKED:
                self._revoked(on_deck.address)
            else:
                nursery.start_soon(self._watch, on_deck)
                nursery.start_soon(self._share, on_deck)
        for reference in self._registered:
            nursery.start_soon(self._bring, reference)
        if not self._registered:
            self.loaded.set()

    async def _watch(self, on_deck: OnDeck) -> None:
        """Rooms and speeds that change go into the ad."""
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_facts, on_deck.cargo)
                await on_deck.down.wait()
                scope.cancel()

    async def _share(self, on_deck: OnDeck) -> None:
        """Once the network lists a Cargo that lies on this disk, others may have its files; before, they are nobody's business."""
        manifest = on_deck.manifest
        if manifest is None or not manifest.files:
            return
        while self._news.may_run(on_deck.address, manifest.publisher) is not None:
            await self._news.wait_changed()
        try:
            await self._files.take_in(manifest, on_deck.files)
            async with self._files.held(manifest):
                log.info("the files of Cargo %s are given to other Islands", on_deck.name)
                await on_deck.down.wait()
        except ConfigError as error:
            log.warning("the files of Cargo %s cannot be given to others: %s", on_deck.name, error)

    async def _watch_facts(self, cargo: Loaded) -> None:
        while True:
            await cargo.wait_changed()
            self._changed()
            await trio.sleep(limits.AD_CHANGE_INTERVAL_S)

    async def _bring(self, reference: str) -> None:
        """Loads a Cargo once the network has told of it, and holds its files as long as it is on deck. One that cannot be loaded, which is
        its publisher's doing, ends none of the others. Raises ConfigError."""
        cargo = await self._told(reference)
        log.info("fetching Cargo %s %s by %s", cargo.manifest.name, cargo.manifest.release, cargo.manifest.publisher)
        async with AsyncExitStack() as stack:
            files = await self._fetch(cargo, stack)
            try:
                on_deck = await self._load(cargo, files)
            except ConfigError as error:
                log.error("Cargo %s %s is not served: %s", cargo.manifest.name, cargo.manifest.release, error)
                on_deck = None
            self._arrived(reference)
            if on_deck is not None:
                await self._watch(on_deck)

    async def _fetch(self, cargo: SignedCargo, stack: AsyncExitStack) -> Mapping[str, Path]:
        """Tried again where nobody has the files yet: whoever has them may only be on the way. Raises ConfigError."""
        pause_s = _RETRY_MIN_S
        while True:
            try:
                with ConsoleProgress() as progress:
                    return await stack.enter_async_context(self._files.held(cargo.manifest, progress))
            except FetchError as error:
                log.warning("%s; trying again in %.0f s", str(error).rstrip("."), pause_s)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MAX_S)

    async def _load(self, cargo: SignedCargo, files: Mapping[str, Path]) -> OnDeck | None:
        name = cargo.manifest.name
        if self._news.may_run(cargo.address) is not None:
            log.warning("Cargo %s may not run any more", name)
            return None
        on_deck = await self._deck.load(cargo.manifest, cargo.address, files)
        self._terms[name] = Terms(on_deck.cargo, self._ask_of(name))
        if self._news.may_run(cargo.address) is not None:  # revoked while it was loaded
            self._revoked(cargo.address)
        self._changed()
        return on_deck

    def _arrived(self, reference: str) -> None:
        self._waiting.discard(reference)
        if not self._waiting:
            self.loaded.set()

    async def _told(self, reference: str) -> SignedCargo:
        """Raises ConfigError where the network, which is asked at once by whoever joins, has not told of it in _TOLD_S."""
        with trio.move_on_after(_TOLD_S):
            while (cargo := self._find(reference)) is None:
                await self._news.wait_changed()
            return cargo
        known = f"Models are {', '.join(sorted(CATALOGUE))}; `archipelag-node cargo list --shipped` names Cargos that ship"
        raise ConfigError(
            f"{reference!r} is no model, no file and no Cargo that ships, and this network lists none of that name. {known}, and "
            "`cargo list --coordinator URL` those that are published."
        )

    def _find(self, reference: str) -> SignedCargo | None:
        """By address, name, or name and release; of a name the newest release. Two publishers of one name cannot be: the Coordinators of a
        network see to that."""
        name, _, release = reference.partition("@")
        found = [
            cargo
            for cargo in self._news.shelf.all()
            if reference == cargo.address or (cargo.manifest.name == name and release in ("", cargo.manifest.release))
        ]
        runs = [cargo for cargo in found if self._news.may_run(cargo.address) is None]
        return max(runs, key=lambda cargo: cargo.manifest.published_at_ms, default=None)

    def _look_again(self) -> None:
        """Something was revoked that the network does not list: it may be here all the same, from a file."""
        for on_deck in list(self._deck.cargos.values()):
            if on_deck.manifest is not None and self._news.may_run(on_deck.address, on_deck.manifest.publisher) is Why.REVOKED:
                self._revoked(on_deck.address)

    def _revoked(self, address: str) -> None:
        """Called by the news; must not block."""
        on_deck = self._deck.take_down(address)
        if on_deck is None:
            return
        log.warning("Cargo %s was revoked and is taken down", on_deck.name)
        self._terms.pop(on_deck.name, None)
        self._jobs.end_all_of(address, Refused(Code.CARGO_FAILED, f"the Cargo {on_deck.name} was revoked"))
        self._changed()
