"""A network of scripted Islands behind the Coordinator's port, and what a test needs to talk to a Coordinator in front of it."""

from __future__ import annotations

import functools
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from coordinator.affinity import Affinity
from coordinator.cache.policy import CacheConfig
from coordinator.cache.service import Embedding
from coordinator.config import CoordinatorConfig
from coordinator.dispatch import Dispatcher
from coordinator.jobs import ChoiceResult, Event, JobSpec, Text
from coordinator.keys import create_key, database_url_of
from coordinator.pipelines import Pipelines
from coordinator.placement import Placer
from coordinator.server import CoordinatorServer, open_coordinator
from coordinator.statistics import Statistics
from coordinator.tickets import TicketIssuer
from privacy.keys import NodeKey
from protocol import limits
from protocol.ads import AD_VERSION, Ad, CargoOffer, Hardware, ShardOffer
from protocol.book import Book, Entry
from protocol.cargo_jobs import CargoInput
from protocol.errors import ArchipelagError, Code, Refused
from protocol.generation import (
    GENERATION,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    Role,
    pack_tokens,
    unpack_tokens,
)
from protocol.hold import DropShard, HoldProgress, HoldShard, SetAsk, ShardHeld
from protocol.messages import JobAccepted, JobChunk, JobDone, RouteBroken, StageUse
from protocol.prices import Ask, sum_of_asks
from protocol.receipts import RECEIPT_VERSION, Ending, Receipt, sign_receipt
from protocol.shards import LayerRange, ShardManifest
from protocol.tickets import Delegation, Ticket, TicketGuard, ticket_hash
from tests.coordinator import manifests
from tests.coordinator.fake_lines import FakeLines, LinesRun

NETWORK = "0123456789abcdef0123456789abcdef"
COORDINATOR = NodeKey(bytes([9]) * 32)
HASH_A, HASH_B, HASH_BIG = "aa" * 32, "bb" * 32, "cc" * 32
WIRE_US = 500
NO_CACHE = CacheConfig(enabled=False)
COMPUTE_MS = 3  # of every job, as receipts say


def island_key(number: int) -> NodeKey:
    return NodeKey(bytes([number]) * 32)


def offer(name: str = "echo", **changes: Any) -> CargoOffer:
    plain = CargoOffer(
        name=name,
        content_hash=HASH_A,
        runtime="echo",
        engine="echo-1",
        ask=Ask(per_job=1000),
        context_tokens=100_000,
        kv_tokens_total=1_000_000,
        kv_tokens_free=1_000_000,
        slots_total=256,
        slots_free=256,
        weights_bytes=0,
        kv_bytes_per_token=0,
        compute_bytes=0,
        tokens_per_s=0.0,
    )
    return replace(plain, **changes)


def ad(peer: str, offers: tuple[CargoOffer, ...], sequence: int = 1000, **changes: Any) -> Ad:
    plain = Ad(
        version=AD_VERSION,
        network=NETWORK,
        peer=peer,
        boot=1000,
        sequence=sequence,
        expires_at_ms=sequence + 60_000,
        agent="test",
        addresses=(),
        region="",
        hardware=Hardware(1, 1, 1),
        runtimes=("echo",),
        memory_offered_bytes=0,
        default_ask=Ask(),
        offers=offers,
    )
    return replace(plain, **changes)


@dataclass
class Script:
    """How an Island behaves. ``words`` are its tokens, one id each; None: the last message's own words.

    ``fail_open``: raised instead of a connection. ``refuse``: raised before JobAccepted. ``fail_after``: number of tokens sent in this
    attempt before ``failure`` is raised; 0 is after JobAccepted. ``hang_after``: waits for ever there, or for ``until``. Each is used
    ``times`` times.
    ``complain_after``: number of tokens of this attempt before the driver of a pipeline says ``complaint``, (stage, code), so
    many times; ``complaint_boot``: of which run, 0 for the one in its route. ``receipt``: fields in which its receipt lies, past what the
    port would let through. ``names``: the stages that the driver of a pipeline says there were, where it lies.
    """

    words: tuple[str, ...] | None = None
    fail_open: Refused | None = None
    refuse: Refused | None = None
    fail_after: int | None = None
    failure: Code = Code.LINK_LOST
    hang_after: int | None = None
    complain_after: int | None = None
    complaint: tuple[int, Code] = (0, Code.LINK_LOST)
    complaint_boot: int = 0
    complaints: int = 1
    times: int = 1_000_000
    batch: int = 1
    token_s: float = 0.0
    accept_s: float = 0.0
    receipt: dict[str, Any] = field(default_factory=dict)
    names: tuple[int, ...] | None = None
    until: trio.Event | None = None
    logprobs: Callable[[list[str]], bytes] = lambda words: b""


@dataclass
class Holding:
    """How an Island answers orders. ``hidden``: its ad does not show what it holds. ``shown``: changes of the shard's offer."""

    delay_s: float = 0.0
    refuse: ArchipelagError | None = None
    hidden: bool = False
    shown: dict[str, Any] = field(default_factory=dict)


@dataclass
class FakeIsland:
    """``memory``: bytes offered for shards; ``ask``: what it wants by default. ``mends``: tickets of mended routes that it got."""

    key: NodeKey
    offers: tuple[CargoOffer, ...]
    scripts: list[Script] = field(default_factory=list)
    boot: int = 1000
    memory: int = 0
    memory_used: int = 0
    ask: Ask = field(default_factory=Ask)
    holding: Holding = field(default_factory=Holding)
    shards: dict[LayerRange, ShardOffer] = field(default_factory=dict)
    orders: list[HoldShard] = field(default_factory=list)
    mends: list[Ticket] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    open_now: int = 0
    open_max: int = 0
    cancelled: int = 0
    lines: FakeLines | None = None

    def lines_receipt(self, ticket: Ticket, raw: bytes, tokens: int, output_hash: bytes) -> bytes:
        price = min(self.offers[0].ask.price(tokens, COMPUTE_MS), ticket.price_limit_micros)
        return sign_receipt(
            Receipt(
                version=RECEIPT_VERSION,
                network=NETWORK,
                island=self.peer,
                job_id=ticket.job_id,
                ticket_hash=ticket_hash(raw),
                content_hash=ticket.content_hash,
                prompt_tokens=0,
                cached_tokens=0,
                sent_tokens=tokens,
                output_hash=output_hash,
                compute_ms=COMPUTE_MS,
                price_micros=price,
                finish_reason=Ending.STOP,
                finished_at_ms=1,
            ),
            self.key,
        )

    @property
    def peer(self) -> str:
        return self.key.peer_id

    def restart(self) -> None:
        """Another run, which holds nothing."""
        self.boot += 1
        self.memory_used = 0
        self.shards, self.offers = {}, ()

    def hold(self, order: HoldShard) -> None:
        """Raises Refused when it does not fit."""
        layers, manifest = order.layers, order.manifest
        if layers in self.shards:
            return
        needed = room(layers.low, layers.high, order.cells, manifest)
        if needed > self.memory - self.memory_used:
            raise Refused(Code.NO_CAPACITY, f"layers {layers} need {needed} bytes")
        if self.holding.hidden:
            return
        self.memory_used += needed
        if len(layers) == manifest.total_layers:
            self.offers = (offer(manifest.name, content_hash=manifest.model_sha256, **self.holding.shown),)
        else:
            self.shards[layers] = replace(shard(manifest, layers, order.cells, self.ask), **self.holding.shown)

    def script(self) -> Script:
        while self.scripts and self.scripts[0].times == 0:
            self.scripts.pop(0)
        if not self.scripts:
            return Script()
        self.scripts[0].times -= 1
        return self.scripts[0]


class FakePort:
    """An IslandPort without a network, of the Coordinator with this key. Tickets are checked as an Island would."""

    def __init__(self, *islands: FakeIsland, key: NodeKey = COORDINATOR) -> None:
        self.holder = key.peer_id
        self.islands = {island.peer: island for island in islands}
        self._guards: dict[tuple[str, int], TicketGuard] = {}
        self._book = Book(NETWORK)
        self._changed = trio.Event()
        self._sequence = 1000
        self.drops: list[tuple[str, LayerRange]] = []
        for island in islands:
            self.advertise(island)

    def book(self) -> Book:
        return self._book

    async def wait_book_changed(self) -> None:
        await self._changed.wait()

    async def drop_shard(self, island: str, order: DropShard) -> None:
        self.drops.append((island, order.layers))
        it = self.islands[island]
        dropped = it.shards.pop(order.layers, None)
        if dropped is not None:
            it.memory_used -= room(order.layers.low, order.layers.high, dropped.kv_tokens_total)
        self.advertise(it)

    async def set_ask(self, island: str, order: SetAsk) -> None:
        it = self.islands[island]
        if not any(offer.name == order.cargo for offer in it.offers):
            raise Refused(Code.UNKNOWN_CARGO, f"this Island does not hold Cargo {order.cargo}")
        it.offers = tuple(replace(o, ask=order.ask) if o.name == order.cargo else o for o in it.offers)
        self.advertise(it)

    async def hold_shard(self, island: str, order: HoldShard, progress: Callable[[HoldProgress], None]) -> ShardHeld:
        it = self.islands[island]
        it.orders.append(order)
        await trio.lowlevel.checkpoint()
        if island not in self._book.entries:
            raise Refused(Code.LINK_LOST, "no connection")
        if it.holding.refuse is not None:
            raise it.holding.refuse
        progress(HoldProgress("loading", 1, 2))
        boot = it.boot
        await trio.sleep(it.holding.delay_s)
        if boot != order.boot:
            raise Refused(Code.BAD_TICKET, "the order is for an earlier run of this Island")
        if boot != it.boot:
            raise Refused(Code.LINK_LOST, "the Island has restarted")
        it.hold(order)
        self.advertise(it)
        return ShardHeld(shard_hash(order.manifest, order.layers), self._sequence)

    def guard(self, island: FakeIsland) -> TicketGuard:
        """Of the Island's present run."""
        key = island.peer, island.boot
        if key not in self._guards:
            self._guards[key] = TicketGuard(*key, NETWORK)
            self._guards[key].trust(Delegation(NETWORK, self.holder, 2**52))
        return self._guards[key]

    def advertise(self, island: FakeIsland, **changes: Any) -> None:
        """A newer ad of an Island, which may be new."""
        self._sequence += 1
        self.islands[island.peer] = island
        facts: dict[str, Any] = {
            "boot": island.boot,
            "shards": tuple(island.shards.values()),
            "memory_offered_bytes": island.memory,
            "memory_free_bytes": island.memory - island.memory_used,
            "default_ask": island.ask,
        }
        made = ad(island.peer, island.offers, max(self._sequence, island.boot), **{**facts, **changes})
        self._put({**self._book.entries, island.peer: Entry(made, b"")})

    def ask_of(self, island: FakeIsland, ticket: Ticket) -> Ask:
        """What a job costs: of all stages together where there are some."""
        if ticket.stages:
            return sum_of_asks(stage.ask for stage in ticket.stages)
        return next((it.ask for it in island.offers if it.name == ticket.cargo), Ask())

    def broken_stage(self, ticket: bytes, route: Ticket) -> int | None:
        """The first stage that would not serve a ticket: its Island is away, is another run, or does not hold the layers."""
        for index, (peer, stage) in enumerate(zip(route.route, route.stages, strict=True)):
            it = self.islands[peer]
            if peer not in self._book.entries or stage.layers not in it.shards:
                return index
            try:
                self.guard(it).check_stage(ticket, index, route.route[index - 1], time.time_ns() // 1_000_000)
            except Refused:
                return index
        return None

    def is_there(self, island: FakeIsland) -> bool:
        return island.peer in self._book.entries

    def lose(self, island: FakeIsland) -> None:
        self._put({peer: entry for peer, entry in self._book.entries.items() if peer != island.peer})

    def _put(self, entries: dict[str, Entry]) -> None:
        self._book = replace(self._book, entries=entries)
        self._changed.set()
        self._changed = trio.Event()

    @asynccontextmanager
    async def run_job(self, island: str, ticket: bytes, payload: bytes | CargoInput) -> AsyncIterator[_Run | LinesRun]:
        it = self.islands[island]
        script = it.script() if isinstance(payload, bytes) else Script()
        if script.fail_open is not None:
            raise script.fail_open
        if not self.is_there(it):
            raise Refused(Code.LINK_LOST, "no connection")
        admitted = self.guard(it).admit(ticket, self.holder, time.time_ns() // 1_000_000)
        if admitted.stages and admitted.stages[-1].layers not in it.shards:
            raise Refused(Code.UNKNOWN_CARGO, "these layers are not held here")
        run: _Run | LinesRun
        if isinstance(payload, CargoInput):
            assert it.lines is not None, "this Island's Cargo writes text"
            run = LinesRun(it.lines.next(payload), functools.partial(it.lines_receipt, admitted, ticket))
        else:
            request = GENERATION.decode(payload)
            it.requests.append(request)
            run = _Run(self, it, script, request, admitted, ticket)
        it.tickets.append(admitted)
        it.open_now += 1
        it.open_max = max(it.open_max, it.open_now)
        try:
            yield run
        except trio.Cancelled:
            it.cancelled += 1
            raise
        finally:
            it.open_now -= 1


class _Run:
    def __init__(
        self, port: FakePort, island: FakeIsland, script: Script, request: GenerationRequest, ticket: Ticket, raw: bytes
    ) -> None:
        self._port, self._island, self._script, self._request = port, island, script, request
        self._ticket, self._raw = ticket, raw  # of the job
        self._route, self._route_raw = ticket, raw  # of the route as it is now
        self._passed: list[str] = []  # Islands that were in the route
        self._ask = port.ask_of(island, ticket)  # as it is when the job begins
        self._mended = trio.Event()
        self._complaints = 0

    def mend(self, ticket: bytes) -> None:
        """Checked as a driver does."""
        newer = self._port.guard(self._island).admit(ticket, self._port.holder, time.time_ns() // 1_000_000)
        for name in ("job_id", "cargo", "content_hash", "driver", "holder", "activations", "cache_salt", "token_limit"):
            assert getattr(newer, name) == getattr(self._route, name), f"a mended route has another {name}"
        assert newer.nonce != self._route.nonce
        self._passed += [peer for peer in self._route.route if peer not in newer.route]
        self._route, self._route_raw = newer, ticket
        self._island.mends.append(newer)
        self._mended.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        script, request = self._script, self._request
        if script.refuse is not None:
            raise script.refuse
        await trio.sleep(script.accept_s)
        words = list(script.words) if script.words is not None else words_of(request)
        reason = FinishReason.LENGTH if len(words) > request.max_tokens else FinishReason.STOP
        words = words[: request.max_tokens]
        prompt_tokens = sum(len(m.content.split()) for m in request.messages) + len(request.prompt.split())
        yield JobAccepted(1, self._engine(), prompt_tokens, 0)
        start = len(request.resume) // 4
        assert unpack_tokens(request.resume) == [1000 + i for i in range(start)], "an answer goes on behind its own ids"
        sent, step = 0, start
        while step < len(words):
            while (broken := self._broken(sent)) is not None:
                self._mended = trio.Event()
                self._island.broken.append(broken.index)
                yield broken
                await self._mended.wait()
            await self._stop_here(sent)
            batch = words[step : step + script.batch]
            await trio.sleep(script.token_s)
            if not self._port.is_there(self._island):
                raise Refused(Code.LINK_LOST, "the Island has left")
            raw = pack_tokens([1000 + step + i for i in range(len(batch))])
            text = "".join(batch)
            yield JobChunk(1, sent, text, script.logprobs(batch) if request.top_logprobs >= 0 else b"", raw)
            sent += len(batch)
            step += len(batch)
        await self._stop_here(sent)
        receipt = self._receipt(prompt_tokens, start, sent, reason)
        uses = self._uses()
        yield JobDone(1, reason, "", prompt_tokens, 0, step, 1000, 2000, receipt, uses, WIRE_US if uses else 0)

    def _engine(self) -> str:
        if self._ticket.stages:
            return self._island.shards[self._ticket.stages[-1].layers].engine
        return self._island.offers[0].engine

    def _broken(self, sent: int) -> RouteBroken | None:
        if not self._route.stages:
            return None
        index = self._port.broken_stage(self._route_raw, self._route)
        if index is not None and self._route.route[index] != self._island.peer:
            return RouteBroken(1, index, self._route.boots[index], Code.LINK_LOST, "it is gone")
        if self._script.complain_after == sent and self._complaints < self._script.complaints:
            self._complaints += 1
            stage, code = self._script.complaint
            boot = self._script.complaint_boot or dict(enumerate(self._route.boots)).get(stage, 1)
            return RouteBroken(1, stage, boot, code, "as the script says")
        return None

    def _uses(self) -> tuple[StageUse, ...]:
        if not self._route.stages:
            return ()
        if self._script.names is not None:
            return tuple(StageUse(self._route.route[stage], 1000, 2000) for stage in self._script.names)
        passed = [StageUse(peer, 10, 20) for peer in self._passed]
        return (*passed, *(StageUse(peer, 1000 * n, 2000 * n) for n, peer in enumerate(self._route.route, 1)))

    async def _stop_here(self, sent: int) -> None:
        if self._script.fail_after == sent:
            raise Refused(self._script.failure, "as the script says")
        if self._script.hang_after == sent:
            await (self._script.until.wait() if self._script.until is not None else trio.sleep_forever())

    def _receipt(self, prompt_tokens: int, start: int, sent: int, reason: FinishReason) -> bytes:
        tokens = pack_tokens([1000 + start + i for i in range(sent)])
        plain = Receipt(
            version=RECEIPT_VERSION,
            network=NETWORK,
            island=self._island.peer,
            job_id=self._ticket.job_id,
            ticket_hash=ticket_hash(self._raw),
            content_hash=self._ticket.content_hash,
            prompt_tokens=prompt_tokens,
            cached_tokens=0,
            sent_tokens=sent,
            output_hash=hashlib.sha256(tokens).digest(),
            compute_ms=COMPUTE_MS,
            price_micros=min(self._ask.price(sent, COMPUTE_MS), self._ticket.price_limit_micros),
            finish_reason=Ending(reason),
            finished_at_ms=1,
        )
        return sign_receipt(replace(plain, **self._script.receipt), self._island.key)


def words_of(request: GenerationRequest) -> list[str]:
    """What an echo says: one token a word, each but the first with its space."""
    text = request.messages[-1].content if request.messages else request.prompt
    words = text.split()
    return [word if index == 0 else " " + word for index, word in enumerate(words)]


def island(number: int = 1, *scripts: Script, **changes: Any) -> FakeIsland:
    return FakeIsland(island_key(number), (offer(**changes),), list(scripts))


def model(layers: int = 12, **changes: Any) -> ShardManifest:
    """The manifest of a model of layers of 100 MB."""
    plain = {"model_sha256": HASH_BIG, "width": 64, "layer_bytes": (100_000_000,) * layers, "kv_bytes": (1000,) * layers}
    return manifests.model(layers, **{**plain, **changes})


BIG = model()


def room(low: int, high: int, cells: int = 4096, manifest: ShardManifest = BIG) -> int:
    """Memory of a stage."""
    return manifest.stage_bytes(LayerRange(low, high), cells)


def shard_hash(manifest: ShardManifest, layers: LayerRange) -> str:
    return manifest.shard_hash(layers) or hashlib.sha256(str(layers).encode()).hexdigest()


def shard(manifest: ShardManifest, layers: LayerRange, cells: int = 4096, ask: Ask | None = None) -> ShardOffer:
    return ShardOffer(
        name=manifest.name,
        content_hash=manifest.model_sha256,
        shard_hash=shard_hash(manifest, layers),
        layers=layers,
        total_layers=manifest.total_layers,
        engine="stage-1",
        ask=ask or Ask(),
        slots=8,
        kv_tokens_total=cells,
        weights_bytes=manifest.weights_bytes(layers),
        kv_bytes_per_token=manifest.kv_bytes_per_token(layers),
        compute_bytes=manifest.measured_compute_bytes(layers),
        process_bytes=60_000_000,
        token_us=0,
        is_free=True,
    )


def roomy(number: int, layers: int = 8, **changes: Any) -> FakeIsland:
    """An Island that offers memory for so many layers of BIG, wherever they are, and asks for its number in micro-credits."""
    memory = max(room(0, layers), room(12 - layers, 12)) + 1000
    return FakeIsland(island_key(number), (), **{"memory": memory, "ask": Ask(per_job=number), **changes})


def ask_big(text: str = "one two three four five six", **changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"messages": (ChatMessage(Role.USER, text),), "max_tokens": 64, **changes})


def big_job(*choices: GenerationRequest, job_id: str = "job-1") -> JobSpec:
    return JobSpec(job_id, "big", bytes(32), choices or (ask_big(),))


@dataclass
class Pool:
    """A Coordinator's inner parts over Islands that hold shards on order."""

    port: FakePort
    placer: Placer
    pipelines: Pipelines
    dispatcher: Dispatcher

    @property
    def statistics(self) -> Statistics:
        return self.dispatcher.statistics

    @property
    def stages(self) -> list[FakeIsland]:
        """Islands of the pipeline as it is now, first stage first."""
        (status,) = self.pipelines.status()
        return [self.port.islands[stage["island"]] for stage in status["stages"]]

    @property
    def spares(self) -> list[FakeIsland]:
        return [it for it in self.port.islands.values() if it not in self.stages]

    async def run(self, job: JobSpec | None = None) -> Done:
        done = Done()
        await self.dispatcher.run(job or big_job(), done.keep)
        return done


@dataclass
class Done:
    events: list[Event] = field(default_factory=list)

    async def keep(self, event: Event) -> None:
        self.events.append(event)

    def text(self, choice: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Text) and e.choice == choice)

    def result(self, choice: int = 0) -> ChoiceResult:
        return next(e for e in self.events if isinstance(e, ChoiceResult) and e.choice == choice)


@asynccontextmanager
async def pool(*islands: FakeIsland, manifest: ShardManifest = BIG, timeout_s: float = 600.0) -> AsyncIterator[Pool]:
    port = FakePort(*islands)
    pipelines = Pipelines({manifest.name: manifest}, port, time.time)
    placer = Placer(port.book, random.Random(1), pipelines=pipelines)
    pipelines.on_change = placer.book_changed
    issuer = TicketIssuer(COORDINATOR, NETWORK, limits.JOB_TIMEOUT_S, time.time, random.Random(2).randbytes)
    dispatcher = Dispatcher(port, placer, issuer, Affinity(bytes(16)), Statistics(), timeout_s, pipelines=pipelines)

    async def watch() -> None:
        while True:
            await port.wait_book_changed()
            placer.book_changed()

    async with trio.open_nursery() as nursery:
        await nursery.start(pipelines.run)
        nursery.start_soon(watch)
        yield Pool(port, placer, pipelines, dispatcher)
        assert dispatcher.running == placer.open_jobs == placer.waiting == 0
        nursery.cancel_scope.cancel()


@dataclass
class Running:
    """A Coordinator that serves, and a key for it."""

    server: CoordinatorServer
    port: FakePort
    key: str
    database_url: str

    @property
    def url(self) -> str:
        return self.server.url


@asynccontextmanager
async def coordinator(
    folder: Path,
    *islands: FakeIsland,
    manifests: dict[str, ShardManifest] | None = None,
    embedding: Embedding | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Without a cache of answers unless the settings have one, since most tests count the jobs of equal questions."""
    folder.mkdir(exist_ok=True)
    url = database_url_of(folder)
    key = create_key(url)
    port = FakePort(*islands)
    config = CoordinatorConfig(database_url=url, **{"cache": NO_CACHE, **settings})
    well_known = {"peer_id": "x"}
    async with open_coordinator(
        config, port, COORDINATOR, NETWORK, bytes(32), lambda: well_known, manifests, embedding=embedding
    ) as server:
        yield Running(server, port, key, url)
