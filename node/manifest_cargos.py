"""An Island's Cargos and the network's word on them: those that the network lists are fetched and loaded, those that it revokes are taken
down at once, with all jobs that run of them.

An Island that was given the plain name of a Cargo *follows* it: when a promotion (protocol/cargo_promotions.py) says that the name stands
for another Cargo, that one is fetched and loaded beside the one that is served, takes its place, and the old one is closed when the jobs
that run of it have ended. Whatever goes wrong on the way, the old one goes on to be served and the new one is tried again. Who was given
NAME@RELEASE or an address does not follow. Of one name an Island offers one release.
"""

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
_LEAVE_S = limits.JOB_TIMEOUT_S  # so long what runs of a Cargo that was replaced has to end; no job takes longer


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
        self._standing: dict[str, str] = {}  # what was named -> the address that is served for it
        self._given: frozenset[str] = frozenset()  # addresses of what is served whatever promotions say
        self._loading: dict[str, trio.Lock] = {}
        self._leaving: dict[str, trio.CancelScope] = {}
        self.loaded = trio.Event()
        news.on_revoked.append(self._revoked)
        news.on_early.append(self._look_again)

    def __repr__(self) -> str:
        return f"<ManifestCargos {self._deck!r}, {len(self._waiting)} waiting>"

    def begin(self, nursery: trio.Nursery) -> None:
        """Starts the tasks; what is already revoked does not get so far."""
        self._nursery = nursery
        self._given = frozenset(on_deck.address for on_deck in self._deck.cargos.values())
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
        """Loads a Cargo once the network has told of it, and follows a name. Raises ConfigError."""
        assert self._nursery is not None
        cargo = await self._told(reference)
        self._standing[reference] = cargo.address
        await self._nursery.start(self._serve, cargo)
        self._arrived(reference)
        if reference == reference.partition("@")[0] != cargo.address:
            await self._follow(reference)

    async def _serve(self, cargo: SignedCargo, task_status: trio.TaskStatus[None]) -> None:
        """Fetches and loads a Cargo, and holds its files as long as it is on deck. One that cannot be loaded, which is its publisher's
        doing, ends none of the others. Raises ConfigError."""
        log.info("fetching Cargo %s %s by %s", cargo.manifest.name, cargo.manifest.release, cargo.manifest.publisher)
        async with AsyncExitStack() as stack:
            files = await self._fetch(cargo, stack)
            try:
                on_deck = await self._load(cargo, files)
            except ConfigError as error:
                log.error("Cargo %s %s is not served: %s", cargo.manifest.name, cargo.manifest.release, error)
                on_deck = None
            task_status.started()
            if on_deck is not None:
                await self._watch(on_deck)

    async def _follow(self, name: str) -> None:
        """Serves what a name stands for, wherever promotions lead."""
        pause_s = _RETRY_MIN_S
        while True:
            wanted, served = self._goal(name), self._standing[name]
            if wanted is None or (wanted.address == served and self._deck.of_address(served) is not None):
                pause_s = _RETRY_MIN_S
                await self._news.wait_changed()
            elif not await self._move(name, wanted):
                with trio.move_on_after(pause_s):
                    await self._news.wait_changed()
                pause_s = min(2 * pause_s, _RETRY_MAX_S)

    def _goal(self, name: str) -> SignedCargo | None:
        """What a name is to be served by; None where no promotion says so, or its Cargo has still to be heard of."""
        if self._news.shelf.promotion(name) is None or self._news.shelf.awaits(name):
            return None
        return self._news.stands_for(name)

    async def _move(self, name: str, wanted: SignedCargo) -> bool:
        """Whether a Cargo is served in the place of what was served for a name; gives up as soon as the name stands for another."""
        assert self._nursery is not None
        manifest, old = wanted.manifest, self._deck.of_address(self._standing[name])
        rival = self._deck.cargos.get(manifest.name)
        if rival is not None and rival.address != wanted.address and (rival is not old or self._is_needed(rival, name)):
            log.warning("%s stands for %s %s, but this Island serves another release of that", name, manifest.name, manifest.release)
            return False
        log.info("%s stands for %s %s now", name, manifest.name, manifest.release)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up, name, wanted.address, nursery.cancel_scope)
            try:
                await self._nursery.start(self._serve, wanted)
            except ConfigError as error:
                log.error("Cargo %s %s is not fetched: %s", manifest.name, manifest.release, error)
            nursery.cancel_scope.cancel()
        if self._deck.of_address(wanted.address) is None:
            log.warning("%s %s is not here yet; %s is served as before", manifest.name, manifest.release, name)
            return False
        self._standing[name] = wanted.address
        if old is not None and not self._is_needed(old, name):
            self._nursery.start_soon(self._retire, old)
        return True

    def _is_needed(self, on_deck: OnDeck, name: str) -> bool:
        """By something else that this Island was given than a name."""
        others = {address for reference, address in self._standing.items() if reference != name}
        return on_deck.address in others | self._given

    async def _give_up(self, name: str, address: str, scope: trio.CancelScope) -> None:
        """Fetching it, once its name stands for something else."""
        while (wanted := self._goal(name)) is not None and wanted.address == address:
            await self._news.wait_changed()
        scope.cancel()

    async def _retire(self, on_deck: OnDeck) -> None:
        """Offers a Cargo no more, and closes it when what runs of it has ended."""
        if not self._deck.leave(on_deck):
            return
        self._forget(on_deck)
        self._changed()
        address = on_deck.address
        with trio.CancelScope() as scope:
            self._leaving[address] = scope
            with trio.move_on_after(_LEAVE_S):
                await self._jobs.wait_ended_of(address)
            ended = self._jobs.end_all_of(address, Refused(Code.DRAINING, f"this Island serves another release of {on_deck.name} now"))
            if ended:
                log.warning("%d jobs of Cargo %s did not end within %.0f s", ended, on_deck.name, _LEAVE_S)
            self._leaving.pop(address, None)
            self._deck.take_down(address)
            log.info("Cargo %s %s is closed", on_deck.name, on_deck.manifest.release if on_deck.manifest is not None else "")

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
        async with self._loading.setdefault(cargo.address, trio.Lock()):
            on_deck = self._deck.of_address(cargo.address)
            if on_deck is None:
                on_deck = await self._deck.load(cargo.manifest, cargo.address, files)
        self._stay(on_deck)
        self._terms[name] = Terms(on_deck.cargo, self._ask_of(name))
        if self._news.may_run(cargo.address) is not None:  # revoked while it was loaded
            self._revoked(cargo.address)
        self._changed()
        return on_deck

    def _stay(self, on_deck: OnDeck) -> None:
        """Also one that was about to be closed."""
        leaving = self._leaving.pop(on_deck.address, None)
        if leaving is not None:
            leaving.cancel()
        self._deck.stay(on_deck)

    def _forget(self, on_deck: OnDeck) -> None:
        """No job is taken for it any more, unless another release has its name already."""
        terms = self._terms.get(on_deck.name)
        if terms is not None and terms.cargo is on_deck.cargo:
            del self._terms[on_deck.name]

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
        if (cargo := self._news.stands_for(reference)) is not None:  # it was promoted to one that nobody has told us of
            return cargo
        known = f"Models are {', '.join(sorted(CATALOGUE))}; `archipelag-node cargo list --shipped` names Cargos that ship"
        raise ConfigError(
            f"{reference!r} is no model, no file and no Cargo that ships, and this network lists none of that name. {known}, and "
            "`cargo list --coordinator URL` those that are published."
        )

    def _find(self, reference: str) -> SignedCargo | None:
        """By address, name and release, or name: what that stands for, once that has been heard of."""
        name, separator, release = reference.partition("@")
        for cargo in self._news.shelf.all():
            is_meant = reference == cargo.address or (separator and (cargo.manifest.name, cargo.manifest.release) == (name, release))
            if is_meant and self._news.may_run(cargo.address) is None:
                return cargo
        return None if separator or self._news.shelf.awaits(name) else self._news.stands_for(name)

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
        self._forget(on_deck)
        self._jobs.end_all_of(address, Refused(Code.CARGO_FAILED, f"the Cargo {on_deck.name} was revoked"))
        self._changed()
