"""``/archipelag/stage/1`` on an Island that holds layers: rows come from the stage before, results are pushed to the next one.

``StageServer`` is the door: it checks the ticket in the first frame and hands the stream to the ``StageHost`` of the layers that the
ticket names, or to the driver where the route ends here. A StageHost is the shell round protocol.stages.StageMachine: streams on both
sides, the engine below. It reaches no peer but the next one of the ticket's route.

When a link is lost, the stage says on the other side who is suspected, ends its own links, and keeps what it computed for a while: the
driver opens the route anew, mended where it was broken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import trio

from node.bookkeeper import now_ms
from node.greeting import answer_hello, exchange_hello
from node.net.frames import FrameStream
from node.net.host import Host
from node.outbox import Outbox
from protocol import checks, limits
from protocol.activations import TOKEN_BYTES, Activations
from protocol.errors import ArchipelagError, Code, LinkLost, Refused, RemoteProtocolError
from protocol.messages import Hello
from protocol.shards import LayerRange
from protocol.stage_messages import (
    STAGE,
    STAGE_PROTOCOL,
    RowsWanted,
    SequenceEnd,
    SequenceOpen,
    StageFault,
    StageOpen,
    StageOpened,
    StageProbe,
    StageReport,
    StageRows,
)
from protocol.stages import Action, Back, Compute, Copy, Cut, Forward, StageMachine
from protocol.tickets import Ticket, TicketGuard
from runtimes.base import StageEngine

log = logging.getLogger(__name__)

Key = tuple[str, LayerRange]  # the model's hash, and which of its layers
Inbound = Callable[[FrameStream, StageOpen, Ticket], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class StageFacts:
    """What a shell needs to know of an engine. ``slots``: sequences; ``cells``: positions; ``token_s``: of one decoded token."""

    name: str
    engine: str
    width: int
    slots: int
    cells: int
    token_s: float


class Neighbours:
    """Opens streams to the next stage."""

    def __init__(self, host: Host, hello: Callable[[], Hello], addresses: Callable[[str], Sequence[str]]) -> None:
        self._host, self._hello, self._addresses = host, hello, addresses

    async def open(self, peer: str, message: StageOpen) -> FrameStream:
        """A stream on which the stage has been asked to open. Raises Refused(LINK_LOST)."""
        try:
            with trio.fail_after(limits.HELLO_TIMEOUT_S):
                if not self._host.is_connected(peer):
                    self._host.remember(peer, self._addresses(peer))
                stream = await self._host.open(peer, STAGE_PROTOCOL, STAGE)
                try:
                    await exchange_hello(stream, self._hello())
                    await stream.send(message)
                except BaseException:
                    stream.abort()
                    raise
        except (ArchipelagError, OSError, trio.TooSlowError) as error:
            raise Refused(Code.LINK_LOST, f"cannot reach Island {peer}: {error or 'time-out'}") from error
        return stream


class StageServer:
    """The door of an Island's stages. ``hosts`` and ``drivers`` change as shards are loaded and dropped."""

    def __init__(self, guard: TicketGuard, hello: Callable[[], Hello]) -> None:
        self._guard, self._hello = guard, hello
        self.hosts: dict[Key, StageHost] = {}
        self.drivers: dict[Key, Inbound] = {}

    def __repr__(self) -> str:
        return f"<StageServer of {len(self.hosts)} stages and {len(self.drivers)} drivers>"

    async def wait_idle(self) -> None:
        """Returns when no stage here has a part in a running job."""
        while any(host.is_working for host in self.hosts.values()):
            await trio.sleep(_IDLE_POLL_S)

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream. Raises LinkLost when it ends, RemoteProtocolError when the peer breaks the protocol."""
        await answer_hello(stream, self._hello)
        with trio.fail_after(limits.HELLO_TIMEOUT_S):
            message = await stream.receive()
        if not isinstance(message, StageOpen):
            raise RemoteProtocolError("the second message of a stage stream is a StageOpen")
        try:
            ticket = self._guard.check_stage(message.ticket, message.index, stream.remote_peer, now_ms())
            serve = self._find(message, ticket)
        except Refused as refusal:
            log.info("stage %d for %s refused: %s", message.index, stream.remote_peer, refusal.message)
            await stream.send(fault_of(message.index, refusal.code, refusal.message))
            return
        await serve(stream, message, ticket)

    def _find(self, message: StageOpen, ticket: Ticket) -> Inbound:
        layers = ticket.stages[message.index].layers
        key = (ticket.content_hash, layers)
        if message.index == len(ticket.route) - 1:
            found = self.drivers.get(key)
        else:
            host = self.hosts.get(key)
            found = host.serve if host is not None else None
        if found is None:
            raise Refused(Code.UNKNOWN_CARGO, f"this Island does not hold layers {layers} of {ticket.cargo}")
        return found


@dataclass(eq=False)
class _Session:
    """What a driver has on this stage. ``epoch`` and the links are of its newest opening."""

    number: bytes
    machine: StageMachine
    batches_before: int = 0  # what the engine was given before this machine; it may still answer
    epoch: int = 0
    index: int = 0
    ticket: Ticket | None = None
    up: Outbox | None = None
    down: Outbox | None = None
    scope: trio.CancelScope | None = None

    @property
    def before(self) -> int:
        """Index of the stage before this one; before the first comes the driver."""
        return (self.index or (len(self.ticket.route) if self.ticket is not None else 1)) - 1

    @property
    def activations(self) -> Activations:
        return self.ticket.activations if self.ticket is not None else Activations.F32


class StageHost:
    """One range of layers. Implements runtimes.base.StageListener."""

    def __init__(
        self, engine: StageEngine, facts: StageFacts, layers: LayerRange, guard: TicketGuard, neighbours: Neighbours, alive: bool = True
    ) -> None:
        self._engine, self.facts, self._layers = engine, facts, layers
        self._guard, self._neighbours = guard, neighbours
        self._session: _Session | None = None
        self._is_alive = alive
        self._returned = trio.Event()
        self._began_us = 0
        self._batches_given = 0
        self.batches = 0
        self.shared_batches = 0  # of those, computed together with another one
        self.sessions_total = 0
        self.changed: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<StageHost layers {self._layers} of {self.facts.name}, {'busy' if self._session else 'free'}>"

    @property
    def is_free(self) -> bool:
        """Whether another plan may have it: an idle route stays open, and gives way to a newer one."""
        return not self.is_working

    @property
    def is_working(self) -> bool:
        """Whether jobs run over this stage."""
        session = self._session
        return session is not None and session.up is not None and bool(session.machine.positions())

    def status(self) -> dict[str, Any]:
        """Counts for people and tests."""
        session = self._session
        counts = asdict(session.machine.counts) if session is not None else {}
        route = session.ticket.route if session is not None and session.ticket is not None else ()
        return {
            "name": self.facts.name,
            "layers": str(self._layers),
            "token_ms": round(self.facts.token_s * 1e3, 3),
            "route": list(route),
            "index": session.index if session is not None and session.up is not None else None,
            "batches": self.batches,
            "shared_batches": self.shared_batches,
            "sessions": self.sessions_total,
            "kept_bytes": session.machine.kept_bytes if session is not None else 0,
            "counts": counts,
        }

    # -- links

    async def serve(self, stream: FrameStream, message: StageOpen, ticket: Ticket) -> None:
        """One link from the stage before, and with it one to the next. Raises LinkLost, RemoteProtocolError."""
        try:
            session = self._enter(message, ticket)
        except Refused as refusal:
            await stream.send(fault_of(message.index, refusal.code, refusal.message))
            return
        with trio.CancelScope() as scope:
            session.scope = scope
            try:
                await self._link(session, stream, message)
            except LinkLost as error:
                log.info("stage %d of %s: the link was lost while it was opened: %s", message.index, self.facts.name, error)
            finally:
                session.up = session.down = None
                stream.abort()
        if session.scope is scope:
            await self._wait_return(session, message.epoch)

    def _enter(self, message: StageOpen, ticket: Ticket) -> _Session:
        """The session of this opening, free of older links. Raises Refused where another driver is at work."""
        session = self._session
        if session is not None and session.number == message.session:
            if message.epoch <= session.epoch:
                raise Refused(Code.BAD_TICKET, f"opening {message.epoch} comes after opening {session.epoch}")
            self._leave(session)
        elif session is not None:
            if session.up is not None and not _supersedes(ticket, session.ticket):
                raise Refused(Code.NO_CAPACITY, f"another pipeline uses layers {self._layers} of {ticket.cargo} here")
            self._leave(session)
            session.machine.orphan()
            session.number = message.session
            if session.activations is not ticket.activations:
                self._do(session, session.machine.forget_orphans())  # what is kept travels in another encoding
                session.machine, session.batches_before = self._machine(message, ticket), self._batches_given
        else:
            session = self._session = _Session(message.session, self._machine(message, ticket), self._batches_given)
            self.sessions_total += 1
            self.changed()
        session.epoch, session.index, session.ticket = message.epoch, message.index, ticket
        return session

    def _machine(self, message: StageOpen, ticket: Ticket) -> StageMachine:
        row_in = TOKEN_BYTES if message.index == 0 else ticket.activations.row_bytes(self.facts.width)
        machine = StageMachine(row_in, ticket.activations.row_bytes(self.facts.width), self.facts.slots, self.facts.cells)
        if not self._is_alive:
            machine.engine_lost()
        return machine

    def _leave(self, session: _Session) -> None:
        self._returned.set()
        self._returned = trio.Event()
        if session.scope is not None:
            session.scope.cancel()

    async def _wait_return(self, session: _Session, epoch: int) -> None:
        """Without links: what was computed is kept for a driver that comes back, or another one that goes on with its jobs."""
        with trio.move_on_after(limits.STAGE_ORPHAN_S) as patience:
            await self._returned.wait()
        if patience.cancelled_caught and self._session is session and session.epoch == epoch and session.up is None:
            self._session = None
            session.machine.orphan()
            self._do(session, session.machine.forget_orphans())
            self.changed()

    async def _link(self, session: _Session, stream: FrameStream, message: StageOpen) -> None:
        ticket = session.ticket
        assert ticket is not None, "the session was entered with one"
        following = StageOpen(message.session, message.epoch, message.index + 1, message.ticket)
        stages = len(ticket.route)
        patience_s = limits.ROUTE_OPEN_S * (stages - following.index) / stages  # who waits for a silent one tells before others give up
        try:
            down, engines = await self._open_next(ticket.route[following.index], following, patience_s)
        except Refused as refusal:
            await stream.send(fault_of(following.index, refusal.code, refusal.message))
            return
        except _Passed as passed:
            await stream.send(passed.fault)
            return
        try:
            await stream.send(StageOpened((self.facts.engine, *engines)))
            await self._run_links(session, stream, down)
        finally:
            down.abort()

    async def _open_next(self, peer: str, message: StageOpen, patience_s: float) -> tuple[FrameStream, tuple[str, ...]]:
        """The stream to the next stage, once that and all behind it are open. Raises Refused, _Passed with what they said."""
        with trio.move_on_after(patience_s):
            down = await self._neighbours.open(peer, message)
            try:
                answer = await down.receive()
                if isinstance(answer, StageFault):
                    raise _Passed(answer)
                if not isinstance(answer, StageOpened):
                    raise Refused(Code.LINK_LOST, f"Island {peer} answered an opening with {type(answer).__name__}")
                return down, answer.engines
            except (LinkLost, RemoteProtocolError) as error:
                down.abort()
                raise Refused(Code.LINK_LOST, f"Island {peer} did not open its stage: {error}") from error
            except BaseException:
                down.abort()
                raise
        raise Refused(Code.LINK_LOST, f"Island {peer} did not open its stage within {patience_s:g} s")

    async def _run_links(self, session: _Session, stream: FrameStream, down_stream: FrameStream) -> None:
        up, down = session.up, session.down = Outbox(stream, STAGE), Outbox(down_stream, STAGE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ignore_loss, up.run)
            nursery.start_soon(_ignore_loss, down.run)
            session.machine.downstream_changed()
            self._do(session, session.machine.upstream_changed())
            say, faults = trio.open_memory_channel[tuple[Outbox, StageFault]](4)

            async def watch(read: Callable[[], Awaitable[None]], index: int, other: Outbox) -> None:
                try:
                    await read()
                except (LinkLost, RemoteProtocolError, Refused) as error:
                    code = Code.LINK_LOST if isinstance(error, LinkLost) else Code.BAD_INPUT
                    await say.send((other, fault_of(index, code, str(error))))

            nursery.start_soon(watch, lambda: self._read_up(session, stream), session.before, down)
            nursery.start_soon(watch, lambda: self._read_down(session, down_stream), session.index + 1, up)
            other, message = await faults.receive()
            log.info("stage %d of %s: %s", session.index, self.facts.name, message.message)
            try:
                other.send_nowait(message)
                with trio.move_on_after(_LAST_WORDS_S):
                    await other.wait_sent()
            except LinkLost:
                log.debug("both links of stage %d are lost", session.index)
            nursery.cancel_scope.cancel()

    async def _read_up(self, session: _Session, stream: FrameStream) -> None:
        machine = session.machine
        while True:
            message = await stream.receive()
            if isinstance(message, StageRows):
                self._do(session, machine.rows(message, _now_us()))
            elif isinstance(message, SequenceOpen):
                self._open_sequence(session, message, stream.remote_peer)
            elif isinstance(message, SequenceEnd):
                self._do(session, machine.end(message.sequences))
                self._tell(session.down, message)
            elif isinstance(message, StageProbe):
                self._tell(session.up, self._report(session, message.probe))
                self._tell(session.down, message)
            elif isinstance(message, StageFault):
                self._tell(session.down, message)
            else:
                raise RemoteProtocolError(f"{type(message).__name__} does not come from the stage before")

    async def _read_down(self, session: _Session, stream: FrameStream) -> None:
        while True:
            message = await stream.receive()
            if isinstance(message, RowsWanted):
                self._do(session, session.machine.wanted(message))
            elif isinstance(message, StageReport | StageFault):
                self._tell(session.up, message)
            else:
                raise RemoteProtocolError(f"{type(message).__name__} does not come from the next stage")

    def _open_sequence(self, session: _Session, message: SequenceOpen, sender: str) -> None:
        use = session.number + message.sequence.to_bytes(8, "big")
        try:
            ticket = self._guard.use_stage(message.ticket, session.index, sender, use, now_ms())
            if session.ticket is None or _what_runs(ticket) != _what_runs(session.ticket):
                raise Refused(Code.BAD_TICKET, "the job's ticket is for another route")
            self._do(session, session.machine.open(message, f"{ticket.issuer}/{ticket.job_id}"))
        except Refused as refusal:
            session.machine.refuse(message.sequence)
            self._tell(session.up, fault_of(session.index, refusal.code, refusal.message, message.sequence))

    def _report(self, session: _Session, probe: int) -> StageReport:
        busy_us = _now_us() - self._began_us if self._began_us else 0
        return StageReport(probe, session.index, self.batches, session.machine.waiting, busy_us)

    @staticmethod
    def _tell(link: Outbox | None, message: object) -> None:
        """Says it, where there is somebody to hear it: a lost link has its own reader, which notices."""
        if link is not None and not link.lost:
            try:
                link.send_nowait(message)
            except LinkLost as error:
                log.debug("not said: %s", error)

    # -- the engine

    def _do(self, session: _Session, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Compute(batch, spans, rows):
                    if not self._began_us:
                        self._began_us = _now_us()
                    self._batches_given = session.batches_before + batch
                    self._engine.compute(self._batches_given, spans, session.activations, rows)
                case Forward(message):
                    self._tell(session.down, message)
                case Back(wanted):
                    self._tell(session.up, wanted)
                case Copy(source, target, length):
                    self._engine.copy(source, target, length)
                case Cut(sequence, length):
                    self._engine.cut(sequence, length)

    def computed(self, batch: int, rows: bytes, compute_us: int, together: int) -> None:
        self.batches += 1
        self.shared_batches += together > 1
        session = self._session
        self._began_us = 0
        if session is not None and batch > session.batches_before:  # else of a session that is over
            self._do(session, session.machine.computed(batch - session.batches_before, rows, compute_us, _now_us()))
            self._began_us = _now_us() if session.machine.computing else 0

    def failed(self, batch: int, code: Code, message: str) -> None:
        """The rows of a batch were no good, or there was no room for them."""
        session = self._session
        self._began_us = 0
        if session is None or session.ticket is None or batch <= session.batches_before:
            return
        if code is Code.BAD_INPUT:
            fault = fault_of(session.before, code, message)
        else:
            fault = fault_of(session.index, Code.INTERNAL, message)
        self._tell(session.down, fault)
        self._tell(session.up, fault)
        self._do(session, session.machine.drop(batch - session.batches_before))
        self._began_us = _now_us() if session.machine.computing else 0

    def engine_lost(self) -> None:
        self._is_alive, self._began_us = False, 0
        session = self._session
        if session is not None:
            log.warning("the engine of layers %s of %s ended; it is started anew", self._layers, self.facts.name)
            for number in session.machine.engine_lost():
                text = f"the job ended the engine of layers {self._layers} twice"
                self._tell(session.up, fault_of(session.index, Code.WORKER_DIED, text, number))
        self.changed()

    def engine_back(self) -> None:
        self._is_alive = True
        session = self._session
        if session is not None:
            self._do(session, session.machine.engine_back())
        self.changed()


_LAST_WORDS_S = 1.0
_IDLE_POLL_S = 0.1


class _Passed(Exception):
    """A fault that a later stage has told; it goes on to the driver as it is."""

    def __init__(self, fault: StageFault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def fault_of(index: int, code: Code, message: str, sequence: int = 0) -> StageFault:
    """A fault whose text may stand on the wire, whatever library it comes from."""
    return StageFault(index, sequence, code, checks.made_printable(message))


def _what_runs(ticket: Ticket) -> tuple[object, ...]:
    """What the jobs of a route have in common; what they cost may differ."""
    return ticket.route, [stage.layers for stage in ticket.stages], ticket.content_hash, ticket.activations


def _supersedes(ticket: Ticket, older: Ticket | None) -> bool:
    """Whether a plan takes the place of one that is at work: there is one pipeline of these layers, and the newest word counts."""
    return older is None or (ticket.issuer == older.issuer and ticket.issued_at_ms >= older.issued_at_ms)


async def _ignore_loss(run: Callable[[], Awaitable[None]]) -> None:
    """The writer of a link; its reader is the one that tells of a loss."""
    try:
        await run()
    except LinkLost as error:
        log.debug("a writer ended: %s", error)


def _now_us() -> int:
    return time.monotonic_ns() // 1000
