"""Layers that an Island holds because a Coordinator planned so: ``/archipelag/hold/1``, and their lives.

An order comes from a Coordinator of our network, names a model by hash, layers and KV cells, and must fit into the memory that the owner
offers. The shard is fetched or cut, loaded into a process of its own, advertised, and served (stages_served.py, route_driver.py) until the
Coordinator drops it or the Island ends. Orders for the same layers are one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from node.bookkeeper import now_ms
from node.cargo_runtimes import engine_walls
from node.cargo_store import PUBLIC_WEB, CargoStore, FileWanted
from node.greeting import answer_hello
from node.jobs_served import Terms
from node.net.frames import FrameStream
from node.route_driver import RouteDriver
from node.stages_served import Neighbours, StageFacts, StageHost, StageServer
from protocol import checks, limits
from protocol.ads import ShardOffer
from protocol.errors import ArchipelagError, Code, ConfigError, Refused, RemoteProtocolError
from protocol.hold import AskSet, DropShard, HoldProgress, HoldRefused, HoldShard, SetAsk, ShardHeld
from protocol.messages import Hello
from protocol.prices import Ask
from protocol.shards import LayerRange, ShardManifest
from protocol.tickets import Ticket, TicketGuard, total_ask
from runtimes.sandbox.probe import Sandbox
from runtimes.store import ModelStore, Progress
from runtimes.worker_process import Walls

if TYPE_CHECKING:
    from runtimes.gguf.shard_store import ShardStore

log = logging.getLogger(__name__)

_PROGRESS_S = 0.5
Key = tuple[str, LayerRange]


@dataclass(frozen=True, slots=True)
class HoldSettings:
    """``memory_bytes``: offered for shards, 0 where the Island takes none. ``sandbox``: what engines work in; None: nothing."""

    memory_bytes: int
    threads: int
    gpu_layers: int | None = None
    cache_dir: Path | None = None
    folders: tuple[Path, ...] = ()
    sandbox: Callable[[], Awaitable[Sandbox]] | None = None


@dataclass(eq=False)
class Held:
    """A shard on this Island. ``what``: what is being done while it loads; ``cargo``: of a last stage or a whole model."""

    manifest: ShardManifest
    layers: LayerRange
    cells: int
    bytes_needed: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    loaded: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    what: tuple[str, int, int] = ("waiting", 0, 0)
    error: Refused | None = None
    shard_hash: str = ""
    came_from: str = ""  # "peers", or as ShardFile says it
    obtain_s: float = 0.0  # to find, fetch or cut the file
    load_s: float = 0.0  # to start the process and load it
    host: StageHost | None = None
    driver: RouteDriver | None = None
    cargo: Any = None
    engine: Any = None

    def __repr__(self) -> str:
        return f"<Held layers {self.layers} of {self.manifest.name}{'' if self.loaded.is_set() else ', loading'}>"

    @property
    def key(self) -> Key:
        return self.manifest.model_sha256, self.layers

    @property
    def is_whole(self) -> bool:
        return self.manifest.is_first(self.layers) and self.manifest.is_last(self.layers)

    @property
    def is_ready(self) -> bool:
        return self.loaded.is_set() and self.error is None and self.engine is not None and self.engine.alive


class ShardHolder:
    """Serves orders. ``changed`` is called when the ad has to say something else; ``run`` must be running."""

    def __init__(
        self,
        settings: HoldSettings,
        boot: int,
        guard: TicketGuard,
        neighbours: Neighbours,
        server: StageServer,
        hello: Callable[[], Hello],
        check: Callable[[Hello, str], object],
        changed: Callable[[], int],
        ask_of: Callable[[str], Ask],
        set_ask: Callable[[str, Ask], None] | None = None,
        files: CargoStore | None = None,
    ) -> None:
        """``check`` raises unless a Hello and the peer that said it are a Coordinator of our network; ``changed`` says the ad anew and
        returns its sequence; ``set_ask(cargo, ask)`` raises Refused, and is None where the owner sets his asks here alone; ``files``
        brings them from other Islands, and gives them on."""
        self._set_ask, self._files = set_ask, files
        self._settings, self._boot, self._guard, self._neighbours, self._server = settings, boot, guard, neighbours, server
        self._hello, self._check, self._changed, self._ask_of = hello, check, changed, ask_of
        self._held: dict[Key, Held] = {}
        self._nursery: trio.Nursery | None = None
        self.orders = 0
        self.refused = 0

    def __repr__(self) -> str:
        return f"<ShardHolder of {len(self._held)} shards, {self.free_bytes} bytes free>"

    @property
    def free_bytes(self) -> int:
        return max(0, self._settings.memory_bytes - sum(held.bytes_needed for held in self._held.values()))

    def ready(self) -> Iterator[Held]:
        return (held for held in self._held.values() if held.is_ready)

    def terms(self, ticket: Ticket) -> Terms | None:
        """Implements node.jobs_served.Drivers."""
        layers = ticket.stages[-1].layers if ticket.stages else None
        for held in self.ready():
            if held.manifest.model_sha256 != ticket.content_hash or held.cargo is None:
                continue
            if held.is_whole and len(ticket.route) == 1:
                return Terms(held.cargo, self._ask_of(ticket.cargo))
            if held.driver is not None and held.layers == layers:
                return Terms(held.cargo, total_ask(ticket), held.driver)
        return None

    def whole(self) -> tuple[Terms, ...]:
        """Whole models that were ordered; they stand in the ad like any other Cargo."""
        return tuple(Terms(held.cargo, self._ask_of(held.manifest.name)) for held in self.ready() if held.is_whole)

    def offers(self) -> tuple[ShardOffer, ...]:
        found = []
        for held in self.ready():
            if held.is_whole:
                continue
            facts = held.engine.ready
            is_free = held.host.is_free if held.host is not None else held.driver is None or held.driver.is_free
            found.append(
                ShardOffer(
                    name=held.manifest.name,
                    content_hash=held.manifest.model_sha256,
                    shard_hash=held.shard_hash,
                    layers=held.layers,
                    total_layers=held.manifest.total_layers,
                    engine=facts.engine,
                    ask=self._ask_of(held.manifest.name),
                    slots=facts.slots,
                    kv_tokens_total=facts.kv_tokens,
                    weights_bytes=facts.weights_bytes,
                    kv_bytes_per_token=facts.kv_bytes_per_token,
                    compute_bytes=facts.compute_bytes,
                    process_bytes=facts.process_bytes,
                    token_us=int(1e6 / facts.tokens_per_s) if facts.tokens_per_s else 0,
                    is_free=is_free,
                )
            )
        return tuple(found[: limits.AD_SHARDS_MAX])

    def status(self) -> list[dict[str, Any]]:
        found = []
        for held in self._held.values():
            entry: dict[str, Any] = {"name": held.manifest.name, "layers": str(held.layers), "bytes_needed": held.bytes_needed}
            entry["state"] = "ready" if held.is_ready else "restarting" if held.loaded.is_set() else held.what[0]
            entry["came_from"] = held.came_from
            entry["pid"] = held.engine.worker_pid if held.engine is not None else 0
            if held.engine is not None and held.loaded.is_set() and not held.is_whole and held.error is None:
                facts = held.engine.ready
                entry |= {
                    "cells": facts.kv_tokens,
                    "weights_bytes": facts.weights_bytes,
                    "kv_bytes": facts.kv_bytes_per_token * facts.kv_tokens,
                    "compute_bytes": facts.compute_bytes,
                    "process_bytes": facts.process_bytes,
                    "restarts": held.engine.restarts,
                    "obtain_s": round(held.obtain_s, 3),
                    "load_s": round(held.load_s, 3),
                }
            if held.host is not None:
                entry["stage"] = held.host.status()
            if held.driver is not None:
                entry["driver"] = held.driver.status()
            found.append(entry)
        return found

    # -- orders

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream: one order."""
        await answer_hello(stream, self._hello, self._check)
        with trio.fail_after(limits.HELLO_TIMEOUT_S):
            order = await stream.receive()
        self.orders += 1
        try:
            if isinstance(order, DropShard):
                await self._drop(order)
                await stream.send(HoldProgress("dropped", 1, 1))
            elif isinstance(order, HoldShard):
                await self._hold(order, stream)
            elif isinstance(order, SetAsk):
                await stream.send(self._change_ask(order))
            else:
                raise RemoteProtocolError(f"{type(order).__name__} is no order")
        except Refused as refusal:
            self.refused += 1
            log.info("an order is refused: %s", refusal.message)
            await stream.send(HoldRefused(refusal.code, checks.made_printable(refusal.message)))

    def _change_ask(self, order: SetAsk) -> AskSet:
        if self._set_ask is None:
            raise Refused(Code.BAD_INPUT, "the owner of this Island sets its asks where it runs; start it with --remote-asks to allow this")
        self._set_ask(order.cargo, order.ask)
        return AskSet(self._changed())

    async def _drop(self, order: DropShard) -> None:
        held = self._held.get((order.content_hash, order.layers))
        if held is None:
            raise Refused(Code.UNKNOWN_CARGO, f"layers {order.layers} are not held here")
        held.scope.cancel()
        await held.gone.wait()  # its memory is free once that is said

    async def _hold(self, order: HoldShard, stream: FrameStream) -> None:
        held = self._find_or_begin(order)
        while not held.loaded.is_set():
            what, done, total = held.what
            await stream.send(HoldProgress(what, done, total))
            with trio.move_on_after(_PROGRESS_S):
                await held.loaded.wait()
        if held.error is not None:
            raise held.error
        await stream.send(ShardHeld(held.shard_hash, self._changed()))

    def _find_or_begin(self, order: HoldShard) -> Held:
        """Raises Refused when the order is not for us now, or does not fit."""
        if order.boot != self._boot:
            raise Refused(Code.BAD_TICKET, "the order is for an earlier run of this Island")
        if order.expires_at_ms < now_ms():
            raise Refused(Code.BAD_TICKET, "the plan has expired")
        held = self._held.get((order.manifest.model_sha256, order.layers))
        if held is not None:
            if held.scope.cancel_called:
                raise Refused(Code.DRAINING, f"layers {order.layers} are being dropped")
            if held.cells < order.cells:
                raise Refused(Code.NO_CAPACITY, f"layers {order.layers} are held with {held.cells} KV cells, not {order.cells}")
            return held
        needed = order.manifest.stage_bytes(order.layers, order.cells)
        if order.manifest.is_first(order.layers) and order.manifest.is_last(order.layers):
            needed = max(needed, self.free_bytes)  # a whole model makes cells of all that is left
        if needed > self.free_bytes:
            raise Refused(
                Code.NO_CAPACITY,
                f"layers {order.layers} of {order.manifest.name} need {needed} bytes; {self.free_bytes} of the "
                f"{self._settings.memory_bytes} offered are free",
            )
        if self._nursery is None:
            raise Refused(Code.DRAINING, "this Island is starting or ending")
        held = self._held[order.manifest.model_sha256, order.layers] = Held(order.manifest, order.layers, order.cells, needed)
        self._nursery.start_soon(self._live, held)
        return held

    def _note_change(self) -> None:
        self._changed()

    # -- the life of a shard

    async def _live(self, held: Held) -> None:
        try:
            with held.scope:
                async with AsyncExitStack() as stack:
                    await self._load(held, stack)
                    _check_size(held)
                    held.loaded.set()
                    log.info("layers %s of %s are loaded", held.layers, held.manifest.name)
                    self._changed()
                    async with trio.open_nursery() as nursery:
                        if held.driver is not None:
                            nursery.start_soon(held.driver.run)
                        while True:
                            await held.engine.wait_changed()
                            self._changed()
                            await trio.sleep(limits.AD_CHANGE_INTERVAL_S)
        except (ArchipelagError, OSError) as error:
            log.warning("layers %s of %s cannot be held: %s", held.layers, held.manifest.name, error)
            held.error = error if isinstance(error, Refused) else Refused(Code.NO_CAPACITY, str(error)[: limits.TEXT_CHARS_MAX])
        except Exception as error:  # a bug in one shard must not end what runs beside it; its text may hold a prompt
            log.error("layers %s of %s broke: %s", held.layers, held.manifest.name, type(error).__name__, exc_info=True)
            held.error = Refused(Code.INTERNAL, "the Island broke while it held the layers")
        finally:
            if not held.loaded.is_set() and held.error is None:
                held.error = Refused(Code.DRAINING, "the shard was dropped while it was being loaded")
            held.loaded.set()
            self._held.pop(held.key, None)
            self._server.hosts.pop(held.key, None)
            self._server.drivers.pop(held.key, None)
            held.gone.set()
            self._changed()

    async def _load(self, held: Held, stack: AsyncExitStack) -> None:
        from runtimes.gguf.shard_store import ShardStore, is_public

        # The manifest is a stranger's: its sources are asked by the rules for those.
        store = ShardStore(ModelStore(self._settings.cache_dir, web=PUBLIC_WEB), self._settings.folders)
        cancelled = threading.Event()

        def progress(what: str, done: int, total: int | None) -> None:
            held.what = (checks.made_printable(what, limits.NAME_CHARS_MAX), done, total or 0)

        started_s = trio.current_time()
        from_peers = "" if self._files is None else await bring_from_peers(self._files, held, store, progress)
        context = store.obtain(held.manifest, held.layers, progress, cancelled.is_set)
        try:
            file = await trio.to_thread.run_sync(context.__enter__, abandon_on_cancel=True)
        except ConfigError as error:  # without the file there is nothing to hold; this Island may have another one
            raise Refused(Code.UNKNOWN_CARGO, str(error)[: limits.TEXT_CHARS_MAX]) from error
        finally:
            cancelled.set()
        stack.push(partial(_leave, context))
        held.shard_hash, held.came_from = file.sha256, from_peers or file.came_from
        if self._files is not None and file.came_from != "folder" and is_public(held.manifest):
            stack.enter_context(self._files.shared.sharing(file.sha256))
        held.what = ("loading", 0, 0)
        obtained_s = trio.current_time()
        held.obtain_s = obtained_s - started_s
        if held.is_whole:
            await self._open_whole(held, file.path, stack)
        else:
            await self._open_stage(held, file.path, stack)
        held.load_s = trio.current_time() - obtained_s

    async def _open_whole(self, held: Held, path: Path, stack: AsyncExitStack) -> None:
        from runtimes.gguf.cargo import open_gguf_cargo

        held.engine = held.cargo = await stack.enter_async_context(
            open_gguf_cargo(
                name=held.manifest.name,
                path=path,
                content_hash=held.manifest.model_sha256,
                memory_limit_bytes=held.bytes_needed,
                threads=self._settings.threads,
                gpu_layers=self._settings.gpu_layers,
                walls=await self._walls(path),
            )
        )

    async def _walls(self, path: Path) -> Walls | None:
        sandbox = await self._settings.sandbox() if self._settings.sandbox is not None else None
        return engine_walls(sandbox, path, self._settings.gpu_layers) if sandbox is not None else None

    async def _open_stage(self, held: Held, path: Path, stack: AsyncExitStack) -> None:
        from runtimes.gguf.cargo import GgufCargo
        from runtimes.gguf.load import PIPELINE_SEQUENCES, PIPELINE_SLOTS
        from runtimes.gguf.messages import Load
        from runtimes.gguf.process import opened
        from runtimes.gguf.stage_cargo import StageCargo

        gpu_layers = self._settings.gpu_layers
        order = Load(
            name=held.manifest.name,
            path=str(path.resolve()),
            content_hash=held.manifest.model_sha256,
            memory_limit_bytes=0,
            threads=self._settings.threads,
            gpu_layers=-1 if gpu_layers is None else gpu_layers,
            context_tokens=0,
            slots=PIPELINE_SLOTS,
            layers=held.layers,
            total_layers=held.manifest.total_layers,
            cells=held.cells,
        )
        if order.is_stage:
            stage = held.engine = await stack.enter_async_context(opened(StageCargo(order, await self._walls(path))))
            ready, token_s = stage.ready, 1.0 / stage.ready.tokens_per_s
            facts = StageFacts(held.manifest.name, ready.engine, ready.width, PIPELINE_SEQUENCES, ready.kv_tokens, token_s)
            held.host = StageHost(stage, facts, held.layers, self._guard, self._neighbours)
            held.host.changed = self._note_change
            stage.listener = held.host
            self._server.hosts[held.key] = held.host
            return
        cargo = held.engine = held.cargo = await stack.enter_async_context(opened(GgufCargo(order, await self._walls(path))))
        driver = held.driver = RouteDriver(cargo, cargo.ready.width, self._neighbours)
        cargo.ring = driver
        self._server.drivers[held.key] = driver.serve_inbound


async def bring_from_peers(files: CargoStore, held: Held, store: ShardStore, progress: Progress) -> str:
    """Where another Island has the shard, or else the model that it can be cut of, brings that into the cache. Says which came; empty
    where nothing did, or nothing was lacking."""
    manifest = held.manifest
    for lacking in await trio.to_thread.run_sync(store.lacking, manifest, held.layers):
        wanted = FileWanted(
            manifest.name,
            lacking.sha256,
            lacking.size_bytes,
            lacking.root,
            ".gguf",
            lacking.sources,
            frozenset({lacking.sha256}),
            joins_only=True,
        )
        with files.loadings.loading(manifest.name, manifest.model_sha256, lacking.size_bytes) as loading:
            try:
                await files.bring(wanted, loading.heard(progress, lacking.size_bytes))
            except ConfigError as error:  # then as if there were no peers; that says it once more, if it has to be said
                log.info("%s", error)
                continue
        return "peers" if lacking.sha256 == manifest.shard_hash(held.layers) or held.is_whole else "cut of a model from peers"
    return ""


def _check_size(held: Held) -> None:
    """Raises Refused where the shard takes more memory than the manifest made us count with."""
    if held.is_whole:
        return
    facts = held.engine.ready
    taken = facts.weights_bytes + facts.kv_bytes_per_token * facts.kv_tokens + facts.compute_bytes
    if taken > held.bytes_needed:
        raise Refused(Code.NO_CAPACITY, f"layers {held.layers} take {taken} bytes and the process; the manifest said {held.bytes_needed}")


def _leave(context: Any, kind: Any, error: Any, trace: Any) -> None:
    context.__exit__(kind, error, trace)
