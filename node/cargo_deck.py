"""The Cargos that an Island has on deck: each in a task of its own, so that one can be taken down while the others go on."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from node.cargo_runtimes import Grants, Runtimes, find_runtimes, open_cargo
from protocol.cargos import CargoManifest, Runtime
from runtimes.base import Loaded
from runtimes.sandbox.probe import Sandbox, probe

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class OnDeck:
    """A loaded Cargo. ``manifest`` is None for what is named without one: echo, and models. ``down``: all of it has ended."""

    name: str
    cargo: Loaded
    manifest: CargoManifest | None = None
    address: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    scope: trio.CancelScope | None = None
    down: trio.Event = field(default_factory=trio.Event)

    def take_down(self) -> None:
        """Ends it with all that runs of it."""
        if self.scope is not None:
            self.scope.cancel()


class Deck:
    """Made by ``open_deck``. ``nursery`` holds the Cargos' tasks."""

    def __init__(self, nursery: trio.Nursery, node_id: str, grants: Grants) -> None:
        self._nursery, self._node_id, self._grants = nursery, node_id, grants
        self._sandbox: Sandbox | None = None
        self._containers: Runtimes | None = None
        self.cargos: dict[str, OnDeck] = {}
        self._leaving: dict[str, OnDeck] = {}  # by address: no longer offered, but open for the jobs that still run

    def __repr__(self) -> str:
        return f"<Deck {', '.join(self.cargos) or 'empty'}>"

    async def sandbox(self) -> Sandbox:
        """What walls this machine has; found at the first question, which takes a tenth of a second."""
        if self._sandbox is None:
            self._sandbox = await trio.to_thread.run_sync(probe)
            log.info("%s", self._sandbox)
        return self._sandbox

    @property
    def known_sandbox(self) -> Sandbox | None:
        """None where nothing has asked yet."""
        return self._sandbox

    async def _runtimes_for(self, manifest: CargoManifest) -> Runtimes:
        sandbox = await self.sandbox()
        if manifest.runtime is not Runtime.CONTAINER:
            return Runtimes(sandbox, node_id=self._node_id)
        if self._containers is None:
            self._containers = await find_runtimes(self._node_id, sandbox=sandbox)
            if self._containers.why_no_container:
                log.info("no container runs here: %s", self._containers.why_no_container)
        return self._containers

    def put(self, name: str, cargo: Loaded) -> None:
        """One that is kept open elsewhere."""
        self.cargos[name] = OnDeck(name, cargo)

    async def load(self, manifest: CargoManifest, address: str, files: Mapping[str, Path]) -> OnDeck:
        """Opens a Cargo and keeps it open until it is taken down; another release of its name leaves. Raises ConfigError."""
        opened = open_cargo(manifest, address, files, await self._runtimes_for(manifest), self._grants)
        on_deck: OnDeck = await self._nursery.start(self._keep, opened, manifest, address, files)
        self.stay(on_deck)
        return on_deck

    def stay(self, on_deck: OnDeck) -> None:
        """One that is open is what its name stands for here, from now on or again."""
        self._leaving.pop(on_deck.address, None)
        before = self.cargos.get(on_deck.name)
        if before is not None and before is not on_deck:
            self.leave(before)
        self.cargos[on_deck.name] = on_deck

    def leave(self, on_deck: OnDeck) -> bool:
        """It is offered no more, and stays open until it is taken down. Whether it is open at all."""
        if self.cargos.get(on_deck.name) is on_deck:
            del self.cargos[on_deck.name]
            self._leaving[on_deck.address] = on_deck
        return self._leaving.get(on_deck.address) is on_deck

    async def _keep(
        self,
        opened: AbstractAsyncContextManager[Loaded],
        manifest: CargoManifest,
        address: str,
        files: Mapping[str, Path],
        task_status: trio.TaskStatus[OnDeck],
    ) -> None:
        down = trio.Event()
        try:
            with trio.CancelScope() as scope:
                async with opened as cargo:
                    task_status.started(OnDeck(manifest.name, cargo, manifest, address, files, scope, down))
                    await trio.sleep_forever()
        finally:
            down.set()

    def of_address(self, address: str) -> OnDeck | None:
        """The open Cargo of an address, also one that is leaving."""
        found = next((on_deck for on_deck in self.cargos.values() if on_deck.address == address), None)
        return found or self._leaving.get(address)

    def take_down(self, address: str) -> OnDeck | None:
        """The Cargo of this address, which is no longer on deck; None where there is none."""
        on_deck = self.of_address(address)
        if on_deck is not None:
            self.leave(on_deck)
            del self._leaving[address]
            on_deck.take_down()
        return on_deck


@asynccontextmanager
async def open_deck(node_id: str, grants: Grants) -> AsyncIterator[Deck]:
    """All Cargos on deck are taken down when this is left."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        yield Deck(nursery, node_id, grants)
