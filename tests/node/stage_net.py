"""A ring of stages over real libp2p hosts in this process, with engines that only pretend: for tests and benchmarks of the protocol.

A pretended stage takes a fixed time for each row and computes a row as a function of all rows of its sequence so far, so that a missing,
repeated or stale one changes everything behind it. The driver is the real RouteDriver; who would be the engine is ``EchoDriver``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trio

from node.bookkeeper import now_ms
from node.jobs_served import island_hello
from node.net.frames import FrameStream
from node.net.host import Host, open_host
from node.pipeline_job import PipelineJob
from node.route_driver import RouteDriver
from node.stages_served import Neighbours, StageFacts, StageHost, StageServer
from privacy.keys import NodeKey
from protocol import limits
from protocol.activations import Activations
from protocol.errors import Code, LinkLost, Refused
from protocol.messages import Hello
from protocol.prices import Ask
from protocol.shards import LayerRange
from protocol.stage_messages import SESSION_BYTES, STAGE, STAGE_PROTOCOL, Span, StageOpen, StageOpened, StageTime
from protocol.tickets import TICKET_VERSION, Delegation, Ticket, TicketGuard, TicketStage, network_id_of, sign_ticket
from runtimes.base import StageListener

WIDTH = 16
CELLS, SLOTS = 4096, 32
NAME, CONTENT_HASH = "echo-pipeline", "ec" * 32
NETWORK_KEY, COORDINATOR, COLLEAGUE = NodeKey(b"\1" * 32), NodeKey(b"\2" * 32), NodeKey(b"\3" * 32)
NETWORK = network_id_of(NETWORK_KEY.public_key)
BOOT = 1_795_000_000_000
LISTEN = ("/ip4/127.0.0.1/tcp/0",)


async def wait_until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Returns once the condition holds. Raises trio.TooSlowError."""
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.002)


async def answer_of(stream: FrameStream) -> Any:
    """The next message. Raises LinkLost, trio.TooSlowError."""
    with trio.fail_after(5):
        return await stream.receive()


def row_of(stage: int, before: float, inputs: np.ndarray) -> tuple[float, np.ndarray]:
    """The next state of a sequence in a stage, and the row that comes out."""
    state = (before * 31.0 + float(inputs.sum()) * 7.0 + stage + 1.0) % 8191.0
    return state, np.full(WIDTH, state, np.float32)


def expected_rows(tokens: Sequence[int], stages: int) -> list[float]:
    """What comes out of the last of so many stages, a number for each position."""
    rows = [np.full(1, token, np.float32) for token in tokens]
    for stage in range(stages):
        state, out = 0.0, []
        for row in rows:
            state, made = row_of(stage, state, row)
            out.append(made)
        rows = out
    return [float(row[0]) for row in rows]


class EchoEngine:
    """A pretended engine: ``row_s`` seconds a row. Implements runtimes.base.StageEngine; ``run`` must be running."""

    def __init__(self, stage: int, is_first: bool, row_s: float = 0.0) -> None:
        self.stage, self.is_first, self.row_s = stage, is_first, row_s
        self.listener: StageListener | None = None
        self._todo: deque[tuple[int, tuple[Span, ...], bytes]] = deque()
        self._more = trio.Event()
        self._states: dict[int, list[float]] = {}
        self.rows = 0
        self.bad_rows = 0  # so many of the next batches come out as NaN
        self.is_stopped = False
        self._life = 1
        self._is_down = False

    @property
    def waiting(self) -> int:
        """What was given and has not begun."""
        return len(self._todo)

    def end(self) -> None:
        """As if the worker process had ended: what it knew is gone, and the listener hears so."""
        self._life += 1
        self._is_down = True
        self._todo.clear()
        self._states.clear()
        if self.listener is not None:
            self.listener.engine_lost()

    def begin_again(self) -> None:
        self._is_down = False
        if self.listener is not None:
            self.listener.engine_back()

    def length(self, sequence: int) -> int:
        """Cells of a sequence, counted as the engine counts."""
        return len(self._states.get(sequence, ()))

    @property
    def cells(self) -> int:
        return sum(map(len, self._states.values()))

    def _give(self, item: tuple[int, tuple[Span, ...], bytes]) -> None:
        if not self._is_down:
            self._todo.append(item)
            self._more.set()

    def compute(self, batch: int, spans: tuple[Span, ...], kind: Activations, rows: bytes) -> None:
        self._give((batch, spans, rows))

    def copy(self, source: int, target: int, length: int) -> None:
        self._give((-1, (Span(source + 1, 0, 1), Span(target + 1, length, 1)), b""))

    def cut(self, sequence: int, length: int) -> None:
        self._give((-2, (Span(sequence + 1, length, 1),), b""))

    async def run(self) -> None:
        while True:
            while self._todo:
                await self._next()
            self._more = trio.Event()
            await self._more.wait()

    async def _next(self) -> None:
        batch, spans, data = self._todo.popleft()
        if batch == -1:
            self._states[spans[1].sequence] = self._states.get(spans[0].sequence, [])[: spans[1].position]
            return
        if batch == -2:
            del self._states.setdefault(spans[0].sequence, [])[spans[0].position :]
            return
        life = self._life
        count = sum(span.count for span in spans)
        if self.row_s:
            await trio.sleep(self.row_s * count)
        while self.is_stopped:
            await trio.sleep(0.001)
        if life != self._life:
            return
        if not np.isfinite(self._values(data)).all():
            if self.listener is not None:
                self.listener.failed(batch, Code.BAD_INPUT, "hidden states came that are no finite numbers")
            return
        out = self._rows(spans, data)
        self.rows += count
        if self.bad_rows:
            self.bad_rows -= 1
            out[:] = np.nan
        if self.listener is not None:
            self.listener.computed(batch, out.tobytes(), int(self.row_s * count * 1e6), 1)

    def _values(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, "<i4" if self.is_first else "<f4").astype(np.float32).reshape(-1, 1 if self.is_first else WIDTH)

    def _rows(self, spans: tuple[Span, ...], data: bytes) -> np.ndarray:
        values = self._values(data)
        out = np.empty((len(values), WIDTH), np.float32)
        at = 0
        for span in spans:
            states = self._states.setdefault(span.sequence, [])
            assert len(states) == span.position, "rows come in order, and none twice"
            for _ in range(span.count):
                state, out[at] = row_of(self.stage, states[-1] if states else 0.0, values[at])
                states.append(state)
                at += 1
        return out


class Watched(Neighbours):
    """Remembers whom it was asked to reach."""

    def __init__(self, host: Host, hello: Callable[[], Hello], addresses: Callable[[str], Sequence[str]]) -> None:
        super().__init__(host, hello, addresses)
        self.opened: list[str] = []

    async def open(self, peer: str, message: StageOpen) -> FrameStream:
        self.opened.append(peer)
        return await super().open(peer, message)


@dataclass(eq=False)
class Island:
    key: NodeKey
    host: Host
    guard: TicketGuard
    neighbours: Watched
    server: StageServer
    nursery: trio.Nursery
    engines: dict[LayerRange, EchoEngine] = field(default_factory=dict)
    hosts: dict[LayerRange, StageHost] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)  # who has opened a stage stream here

    @property
    def peer(self) -> str:
        return self.key.peer_id

    def hold(self, layers: LayerRange, row_s: float = 0.0) -> StageHost:
        """A pretended stage of these layers; the layer it begins with is its number."""
        engine = EchoEngine(layers.low, layers.low == 0, row_s)
        host = StageHost(engine, StageFacts(NAME, "echo/1", WIDTH, SLOTS, CELLS, row_s), layers, self.guard, self.neighbours)
        engine.listener = host
        self.nursery.start_soon(engine.run)
        self.server.hosts[CONTENT_HASH, layers] = host
        self.engines[layers], self.hosts[layers] = engine, host
        return host

    @property
    def engine(self) -> EchoEngine:
        """The only one that it holds."""
        (engine,) = self.engines.values()
        return engine

    @property
    def stage(self) -> StageHost:
        (host,) = self.hosts.values()
        return host

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.stage.status()["counts"])

    async def die(self) -> None:
        """As seen from outside: its port and its connections are gone."""
        self.nursery.cancel_scope.cancel()

    async def serve(self, stream: FrameStream) -> None:
        self.served.append(stream.remote_peer)
        await self.server.serve(stream)

    async def open(self, target: Island, message: StageOpen) -> FrameStream:
        """A stream to another Island on which this one has said what it was told to."""
        return await self.neighbours.open(target.peer, message)


def opening(ticket: bytes, index: int, epoch: int = 1, session: bytes = b"s" * SESSION_BYTES) -> StageOpen:
    return StageOpen(session, epoch, index, ticket)


class EchoDriver:
    """In place of the last stage's engine: ``step`` sends rows and waits until they have come round."""

    def __init__(self, island: Island, layers: LayerRange) -> None:
        self.driver = RouteDriver(self, WIDTH, island.neighbours)
        island.server.drivers[CONTENT_HASH, layers] = self.driver.serve_inbound
        island.nursery.start_soon(self.driver.run)
        self._island = island
        self._steps = 0
        self._waiting: dict[int, trio.Event] = {}
        self._came: dict[int, np.ndarray] = {}
        self._sequences = 0
        self.broken: list[tuple[int, Code, str]] = []
        self.broken_of: dict[int, list[int]] = {}  # job -> the indices that it was told
        self.failed: list[Refused] = []
        self.on_broken = trio.Event()

    def arrived(self, step: int, times: tuple[StageTime, ...], kind: Activations, rows: bytes) -> None:
        came = np.frombuffer(rows, "<f4").reshape(-1, WIDTH)
        if not np.isfinite(came).all():
            self.driver.refused(step, Code.BAD_INPUT, "hidden states came that are no finite numbers")
            return
        self._came[step] = came
        self._waiting[step].set()

    def begin(self, number: int, ticket: bytes, declared: int = 512, keep: int = 0, source: int = 0, shared: int = 0) -> int:
        """A job and its sequence; returns the sequence."""

        def broken(index: int, boot: int, code: Code, message: str) -> None:
            self.broken.append((index, code, message))
            self.broken_of.setdefault(number, []).append(index)
            self.on_broken.set()

        self.driver.job_began(number, PipelineJob(ticket, broken, self.failed.append))
        self._sequences += 1
        self.driver.open_sequence(self._sequences, number, declared, keep, source, shared)
        return self._sequences

    def over(self, number: int, *sequences: int) -> None:
        """A job has ended; as the engine of a last stage says it."""
        self.driver.job_over(number)
        self.driver.end_sequences(sequences)

    @property
    def steps_waiting(self) -> int:
        return len(self._waiting)

    def step_nowait(self, nursery: trio.Nursery, *parts: tuple[int, int, Sequence[int]]) -> list[float]:
        """Like ``step``; the list is filled when the rows have come."""
        rows: list[float] = []

        step = self._launch(parts)

        async def wait() -> None:
            rows.extend(float(row[0]) for row in await self._wait(step))

        nursery.start_soon(wait)
        return rows

    async def values(self, *parts: tuple[int, int, Sequence[int]]) -> list[float]:
        """Like ``step``: the first number of each row."""
        return [float(row[0]) for row in await self.step(*parts)]

    async def step(self, *parts: tuple[int, int, Sequence[int]]) -> np.ndarray:
        """Parts: sequence, position, token ids. Returns the rows that came round, (n, WIDTH)."""
        return await self._wait(self._launch(parts))

    def _launch(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> int:
        self._steps += 1
        step = self._steps
        self._waiting[step] = trio.Event()
        spans = tuple(Span(sequence, position, len(tokens)) for sequence, position, tokens in parts)
        data = np.concatenate([np.array(tokens, "<i4") for _, _, tokens in parts]).tobytes()
        self.driver.launch(step, spans, data)
        return step

    async def _wait(self, step: int) -> np.ndarray:
        await self._waiting[step].wait()
        del self._waiting[step]
        return self._came.pop(step)


class FakeStage:
    """In place of an Island's stage or driver: opens the rest of the route, then says only what a test makes it say."""

    def __init__(self, island: Island, following: Island | None = None) -> None:
        self.island, self._following = island, following
        self.heard: list[object] = []
        self.opened = trio.Event()
        self.links: list[tuple[FrameStream, FrameStream | None]] = []
        self.lost = 0
        island.host.set_handler(STAGE_PROTOCOL, STAGE, self.serve)

    @property
    def up(self) -> FrameStream:
        return self.links[-1][0]

    @property
    def down(self) -> FrameStream:
        down = self.links[-1][1]
        assert down is not None
        return down

    async def serve(self, stream: FrameStream) -> None:
        self.island.served.append(stream.remote_peer)
        assert isinstance(await stream.receive(), Hello)
        await stream.send(island_hello(NETWORK, "test"))
        message = await stream.receive()
        assert isinstance(message, StageOpen)
        down = None
        if self._following is not None:
            down = await self.island.open(self._following, StageOpen(message.session, message.epoch, message.index + 1, message.ticket))
            assert isinstance(await down.receive(), StageOpened)
        await stream.send(StageOpened(("echo/1",) if down is not None else ()))
        self.links.append((stream, down))
        self.opened.set()
        await self._listen(stream)

    async def _listen(self, stream: FrameStream) -> None:
        try:
            while True:
                self.heard.append(await stream.receive())
        except LinkLost:
            self.lost += 1

    def all(self, kind: type[Any]) -> list[Any]:
        """What was heard of one kind."""
        return [message for message in self.heard if isinstance(message, kind)]


@dataclass(eq=False)
class StageNet:
    """Islands by number. ``proxies``: (from, to) -> address to dial in place of the Island's own."""

    nursery: trio.Nursery
    islands: list[Island] = field(default_factory=list)
    proxies: dict[tuple[str, str], str] = field(default_factory=dict)
    jobs: int = 0

    async def island(self) -> Island:
        key = NodeKey((100 + len(self.islands)).to_bytes(32, "big"))
        ready = trio.Event()
        made: list[Island] = []

        async def live() -> None:
            async with open_host(key.seed, LISTEN) as host, trio.open_nursery() as nursery:
                guard = TicketGuard(key.peer_id, BOOT, NETWORK)
                guard.trust(Delegation(NETWORK, COORDINATOR.peer_id, 2**52))
                guard.trust(Delegation(NETWORK, COLLEAGUE.peer_id, 2**52))

                def hello() -> object:
                    return island_hello(NETWORK, "test")

                neighbours = Watched(host, hello, lambda peer: self._addresses(key.peer_id, peer))  # type: ignore[arg-type]
                server = StageServer(guard, hello)  # type: ignore[arg-type]
                island = Island(key, host, guard, neighbours, server, nursery)
                host.set_handler(STAGE_PROTOCOL, STAGE, island.serve)
                made.append(island)
                ready.set()
                await trio.sleep_forever()

        self.nursery.start_soon(live)
        await ready.wait()
        self.islands.append(made[0])
        return made[0]

    def _addresses(self, sender: str, peer: str) -> list[str]:
        if (sender, peer) in self.proxies:
            return [self.proxies[sender, peer]]
        return next((island.host.addresses() for island in self.islands if island.peer == peer), [])

    def ticket(
        self, route: Sequence[Island], job: str = "", layers: Sequence[LayerRange] = (), signer: NodeKey = COORDINATOR, **changes: object
    ) -> bytes:
        """For a job over these Islands, one layer each unless said."""
        self.jobs += 1
        now = now_ms()
        ranges = list(layers) or [LayerRange(n, n + 1) for n in range(len(route))]
        fields: dict[str, object] = dict(
            version=TICKET_VERSION,
            network=NETWORK,
            issuer=signer.peer_id,
            holder=COORDINATOR.peer_id,
            job_id=job or f"job-{self.jobs}",
            route=tuple(island.peer for island in route),
            boots=(BOOT,) * len(route),
            cargo=NAME,
            content_hash=CONTENT_HASH,
            token_limit=512,
            price_limit_micros=1000,
            cache_salt=bytes(32),
            nonce=self.jobs.to_bytes(limits.NONCE_BYTES, "big"),
            issued_at_ms=now,
            expires_at_ms=now + 120_000,
            stages=tuple(TicketStage(each, Ask(per_job=10)) for each in ranges),
        )
        fields |= changes
        if fields["issuer"] != fields["holder"]:
            fields.setdefault("count_every", 8)
        return sign_ticket(Ticket(**fields), signer)  # type: ignore[arg-type]

    async def ring(self, stages: int, row_s: float = 0.0) -> tuple[list[Island], EchoDriver]:
        """Islands that hold one layer each; the last one drives."""
        route = [await self.island() for _ in range(stages)]
        for number, island in enumerate(route[:-1]):
            island.hold(LayerRange(number, number + 1), row_s)
        return route, EchoDriver(route[-1], LayerRange(stages - 1, stages))


@asynccontextmanager
async def open_stage_net() -> AsyncIterator[StageNet]:
    async with trio.open_nursery() as nursery:
        net = StageNet(nursery)
        try:
            yield net
        finally:
            nursery.cancel_scope.cancel()
