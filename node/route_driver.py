"""The driver of a pipeline: sends the engine's steps round the ring of stages, and mends the ring when it breaks.

Implements runtimes.base.RingPort for the engine of a route's last stage. It keeps of each sequence the token ids that it has sent, and of
each step its rows until they have come round, so that everything which a loss may have swallowed can be said again; stages that have it
already compute nothing twice (protocol/stages.py).

A route is DOWN (nobody needs it), OPENING, UP, or BROKEN. Broken, each of its jobs asks its holder for another route (RouteBroken) and
goes on over that one once its ticket has come (``mended``). A job that ends meanwhile leaves rows in steps that are under way: they are
filled with zeros, and the engine forgets what it computes from them.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

import trio

from node.net.frames import FrameStream
from node.outbox import Outbox
from node.pipeline_job import PipelineJob
from node.route_health import RouteHealth, Suspect
from node.stages_served import Neighbours, _ignore_loss, _now_us
from protocol import limits
from protocol.activations import TOKEN_BYTES, Activations
from protocol.errors import Code, LinkLost, Refused, RemoteProtocolError
from protocol.kept_rows import KeptRows, fill_frames
from protocol.stage_messages import (
    SESSION_BYTES,
    STAGE,
    RowsWanted,
    SequenceEnd,
    SequenceOpen,
    Span,
    StageFault,
    StageOpen,
    StageOpened,
    StageProbe,
    StageReport,
    StageRows,
    StageTime,
)
from protocol.tickets import Ticket
from runtimes.base import JobRoute

log = logging.getLogger(__name__)

_WATCH_S = 0.25
_LAP_LEARN = 0.1
_ARRIVED_KEPT = 64  # steps that the engine may yet find useless


class DriverEngine(Protocol):
    """The engine of the last stage."""

    def arrived(self, step: int, times: tuple[StageTime, ...], kind: Activations, rows: bytes) -> None: ...


class RouteState(Enum):
    DOWN = auto()
    OPENING = auto()
    UP = auto()
    BROKEN = auto()


@dataclass(slots=True, eq=False)
class _Sequence:
    job: int
    declared: int
    keep: int
    source: int
    shared: int
    tokens: KeptRows
    is_open: bool = False  # said on this opening of the route
    is_dead: bool = False  # its job is over, but steps with rows of it are under way


@dataclass(slots=True, eq=False)
class _Flight:
    step: int
    spans: tuple[Span, ...]
    rows: bytes
    sent_us: int = 0  # 0: not on this opening of the route
    live: tuple[Span, ...] = ()  # what was sent


@dataclass(slots=True)
class DriverCounts:
    """What happened, for tests and status."""

    steps_sent: int = 0
    steps_again: int = 0  # of those, after a loss
    steps_arrived: int = 0
    steps_repeated: int = 0  # that had come before
    rows_sent: int = 0
    rows_sent_again: int = 0  # token ids that the first stage asked for
    openings: int = 0
    breaks: int = 0
    probes: int = 0
    refused: int = 0


class RouteDriver:
    """One for each loaded last stage. ``run`` must be running."""

    def __init__(
        self, engine: DriverEngine, width: int, neighbours: Neighbours, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._engine, self._width, self._neighbours, self._clock = engine, width, neighbours, clock
        self._session = secrets.token_bytes(SESSION_BYTES)
        self._epoch = 0
        self._ticket: Ticket | None = None
        self._data = b""
        self._jobs: dict[int, PipelineJob] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._flights: dict[int, _Flight] = {}
        self._arrived: dict[int, _Flight] = {}
        self._complained: set[int] = set()  # jobs whose holders have been told, and have not answered
        self._ended: list[int] = []  # sequences whose end has not been said
        self._out: Outbox | None = None
        self._inbound: trio.Event = trio.Event()
        self._inbound_scope: trio.CancelScope | None = None
        self._scope: trio.CancelScope | None = None
        self._wake = trio.Event()
        self._lap_s = 0.0
        self._health = RouteHealth()
        self._suspect: tuple[int, int, Code, str] = (0, 1, Code.LINK_LOST, "")  # index, boot, what and why
        self.engines: tuple[str, ...] = ()
        self.state = RouteState.DOWN
        self.counts = DriverCounts()
        self.last_break = ""
        self.break_s = self.mended_s = 0.0

    def __repr__(self) -> str:
        return f"<RouteDriver {self.state.name}, {len(self._jobs)} jobs, {len(self._flights)} steps under way>"

    @property
    def route(self) -> tuple[str, ...]:
        return self._ticket.route if self._ticket is not None else ()

    @property
    def is_free(self) -> bool:
        return not self._jobs

    def check(self, ticket: Ticket) -> None:
        """Raises Refused(NO_CAPACITY) while jobs of another route are running here: one engine drives one ring."""
        if self._jobs and self.state is not RouteState.BROKEN and not self._is_for_this(ticket):
            raise Refused(Code.NO_CAPACITY, "this Island drives another route at the moment")

    def status(self) -> dict[str, Any]:
        counts = {name: getattr(self.counts, name) for name in DriverCounts.__slots__}
        laps = {peer: round(self._health.decode_us(peer) / 1000, 3) for peer in self.route[:-1]}
        return {
            "state": self.state.name.lower(),
            "route": list(self.route),
            "engines": list(self.engines),
            "layers": [str(stage.layers) for stage in self._ticket.stages] if self._ticket is not None else [],
            "lap_ms": round(self._lap_s * 1e3, 3),
            "compute_ms": laps,
            "last_break": self.last_break,
            "last_mend_s": round(self.mended_s - self.break_s, 3) if self.counts.breaks and self.mended_s > self.break_s else None,
            "counts": counts,
        }

    # -- what the engine says

    def job_began(self, job: int, route: JobRoute) -> None:
        if not isinstance(route, PipelineJob):
            raise TypeError("a pipeline's job needs its ticket")
        self._jobs[job] = route
        if self.state is RouteState.DOWN or not self._is_for_this(route.ticket):
            self._reopen(route)
        elif self.state is RouteState.BROKEN:
            self._complain(job)

    def job_over(self, job: int) -> None:
        self._jobs.pop(job, None)
        self._complained.discard(job)
        for entry in self._sequences.values():
            is_held = any(self._holds(flight, entry) for flight in self._flights.values())
            if entry.job == job and (is_held or not entry.is_open):  # nobody will open it for steps that the engine may yet launch
                entry.is_dead = True
        self._go_on_without()
        if not self._jobs and self.state is RouteState.BROKEN and not self._flights:
            self.state = RouteState.DOWN

    def _holds(self, flight: _Flight, entry: _Sequence) -> bool:
        return any(self._sequences.get(span.sequence) is entry for span in flight.spans)

    def open_sequence(self, sequence: int, job: int, declared: int, keep: int, source: int, shared: int) -> None:
        parent = self._sequences.get(source)
        kept = KeptRows(TOKEN_BYTES, parent.tokens if parent is not None else None, shared if parent is not None else 0)
        self._sequences[sequence] = _Sequence(job, declared, keep, source, shared, kept)
        self._say_open(sequence)

    def end_sequences(self, sequences: tuple[int, ...]) -> None:
        self._ended += [number for number in sequences if self._sequences.pop(number, None) is not None]
        self._say_ended()
        self._go_on_without()

    def _go_on_without(self) -> None:
        """Somebody has left: steps that waited for the opening of his sequences wait no longer."""
        if self.state is RouteState.UP:
            self._resume()
        else:
            self._complete_dead()

    def _say_ended(self) -> None:
        """What has ended while the route was not open is said when it is again: survivors may still hold it."""
        if self.state is RouteState.UP and self._ended:
            for at in range(0, len(self._ended), limits.ARRAY_ENTRIES_MAX):
                self._say(SequenceEnd(tuple(self._ended[at : at + limits.ARRAY_ENTRIES_MAX])))
            self._ended.clear()

    def launch(self, step: int, spans: tuple[Span, ...], rows: bytes) -> None:
        at = 0
        for span in spans:
            end = at + span.count * TOKEN_BYTES
            self._sequences[span.sequence].tokens.put(span.position, rows[at:end])
            at = end
        flight = self._flights[step] = _Flight(step, spans, rows)
        self._send(flight)
        if not flight.sent_us:
            self._complete_dead()

    def refused(self, step: int, code: Code, message: str) -> None:
        self.counts.refused += 1
        flight = self._arrived.pop(step, None)
        if flight is not None:
            flight.sent_us = 0
            self._flights[step] = flight
        self._broke(len(self.route) - 2, code, message)

    def engine_lost(self) -> None:
        """Its jobs have failed; what the stages hold of them is for whoever goes on with them."""
        self._jobs.clear()
        self._complained.clear()
        self._sequences.clear()
        self._flights.clear()
        self._arrived.clear()
        self._ended.clear()
        self._session, self._epoch = secrets.token_bytes(SESSION_BYTES), 0
        self._close(RouteState.DOWN)

    # -- what the holders say

    def mended(self, job: int, ticket: bytes) -> None:
        """A holder's answer to RouteBroken, checked by the caller. Raises Refused(BAD_TICKET)."""
        entry = self._jobs.get(job)
        if entry is None:
            return
        entry.mend(ticket)
        self._complained.discard(job)
        if self.state in (RouteState.BROKEN, RouteState.DOWN) or not self._is_for_this(entry.ticket):
            self._reopen(entry)
        elif self.state is RouteState.UP:
            self._resume()

    def _is_for_this(self, ticket: Ticket) -> bool:
        """Whether a job's ticket is for the route as it is open now; an Island that came back is another run of it."""
        ours = self._ticket
        return ours is not None and (ticket.route, ticket.boots) == (ours.route, ours.boots)

    def number_of(self, job: PipelineJob) -> int:
        """The engine's number of a job; 0 where it has none any more."""
        return next((number for number, entry in self._jobs.items() if entry is job), 0)

    # -- the ring

    async def run(self) -> None:
        """Keeps the route open while it is wanted; until cancelled."""
        while True:
            if self.state is not RouteState.OPENING:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            with trio.CancelScope() as self._scope:
                await self._live()
            self._out = None

    def _reopen(self, job: PipelineJob) -> None:
        self._ticket, self._data = job.ticket, job.data
        self._epoch += 1
        self._inbound = trio.Event()
        self._close(RouteState.OPENING)
        for number, other in list(self._jobs.items()):
            if not self._is_for_this(other.ticket):
                self._complain(number)  # its holder may not know yet that the route is another one

    def _close(self, state: RouteState) -> None:
        self.state = state
        self._health.forget()
        for entry in self._sequences.values():
            entry.is_open = False
        for flight in self._flights.values():
            flight.sent_us = 0
        for scope in (self._scope, self._inbound_scope):
            if scope is not None:
                scope.cancel()
        self._wake.set()

    def _broke(self, index: int, code: Code, message: str) -> None:
        """A stage is at fault: the route stays closed until a holder sends a mended one."""
        if self.state not in (RouteState.OPENING, RouteState.UP):
            return
        self.counts.breaks += 1
        self.break_s = self._clock()
        self.last_break = f"stage {index} ({self._name(index)}): {code}: {message}"
        log.warning("the route broke at %s", self.last_break)
        self._suspect = (index, self._boot(index), code, message[: limits.TEXT_CHARS_MAX])
        self._close(RouteState.BROKEN if self._jobs or self._flights else RouteState.DOWN)
        self._complained.clear()
        for number in list(self._jobs):
            self._complain(number)
        self._complete_dead()

    async def _live(self) -> None:
        """One opening of the route, to its end."""
        ticket = self._ticket
        assert ticket is not None, "a route is opened with a ticket"
        self.counts.openings += 1
        epoch = self._epoch
        try:
            stream = await self._neighbours.open(ticket.route[0], StageOpen(self._session, epoch, 0, self._data))
        except Refused as refusal:
            self._broke(0, refusal.code, refusal.message)
            return
        try:
            async with trio.open_nursery() as nursery:
                out = Outbox(stream, STAGE)
                opened = trio.Event()
                nursery.start_soon(_ignore_loss, out.run)
                nursery.start_soon(self._read_back, stream, opened)
                with trio.move_on_after(limits.ROUTE_OPEN_S) as patience:
                    await opened.wait()
                    await self._inbound.wait()
                if patience.cancelled_caught:
                    index = 0 if not opened.is_set() else len(ticket.route) - 2
                    self._broke(index, Code.TIMEOUT, f"the route was not open after {limits.ROUTE_OPEN_S:g} s")
                    return
                self._out, self.state, self.mended_s = out, RouteState.UP, self._clock()
                log.info("the route over %d stages is open", len(ticket.route))
                self._resume()
                nursery.start_soon(self._watch)
                await trio.sleep_forever()
        finally:
            stream.abort()

    async def serve_inbound(self, stream: FrameStream, message: StageOpen, ticket: Ticket) -> None:
        """The link from the stage before this one."""
        is_ours = (message.session, message.epoch) == (self._session, self._epoch) and self.state is RouteState.OPENING
        if not is_ours or self._ticket is None or ticket.route != self.route or self._inbound.is_set():
            await stream.send(StageFault(message.index, 0, Code.BAD_TICKET, "this driver has not asked for that"))
            return
        await stream.send(StageOpened(()))
        epoch = self._epoch
        self._inbound.set()
        before = len(ticket.route) - 2
        with trio.CancelScope() as self._inbound_scope:  # of this opening only
            try:
                while True:
                    self._take(await stream.receive(), before)
            except (LinkLost, RemoteProtocolError) as error:
                code = Code.LINK_LOST if isinstance(error, LinkLost) else Code.BAD_INPUT
                await self._let_others_speak(epoch)
                if (message.session, message.epoch) == (self._session, self._epoch):
                    self._broke(before, code, f"{error}")
            finally:
                stream.abort()

    async def _let_others_speak(self, epoch: int) -> None:
        """The first to notice a death is the neighbour of the dead; its word may come a moment after the links that it closed."""
        with trio.move_on_after(_LAST_WORDS_S):
            while epoch == self._epoch and self.state is RouteState.UP:
                await trio.sleep(_LAST_WORDS_S / 10)

    def _take(self, message: object, before: int) -> None:
        if isinstance(message, StageRows):
            if not message.fill:
                self._arrive(message)
        elif isinstance(message, StageFault):
            self._hear_fault(message, 0)
        elif isinstance(message, SequenceOpen | SequenceEnd | StageProbe):
            pass  # they have been round; the driver said them
        else:
            raise RemoteProtocolError(f"{type(message).__name__} does not come from stage {before}")

    async def _read_back(self, stream: FrameStream, opened: trio.Event) -> None:
        epoch = self._epoch
        try:
            while True:
                message = await stream.receive()
                if isinstance(message, StageOpened):
                    self.engines = message.engines
                    opened.set()
                elif isinstance(message, RowsWanted):
                    self._send_again(message)
                elif isinstance(message, StageReport):
                    self._health.hear(message)
                elif isinstance(message, StageFault):
                    self._hear_fault(message, len(self.route) - 2)
                else:
                    raise RemoteProtocolError(f"{type(message).__name__} does not come back from a stage")
        except (LinkLost, RemoteProtocolError) as error:
            if epoch == self._epoch:
                self._broke(0, Code.LINK_LOST, f"{error}")

    def _complain(self, number: int) -> None:
        """Tells a job's holder, once, that the job needs another route."""
        if number not in self._complained:
            self._complained.add(number)
            self._jobs[number].broken(*self._suspect)

    def _boot(self, index: int) -> int:
        boots = self._ticket.boots if self._ticket is not None else ()
        return boots[index] if 0 <= index < len(boots) else 1

    def _name(self, index: int) -> str:
        return self.route[index] if 0 <= index < len(self.route) else "no such stage"

    def _hear_fault(self, fault: StageFault, beside: int) -> None:
        """``beside``: the stage that would have lost this driver, which lives."""
        if fault.index >= len(self.route):
            raise RemoteProtocolError(f"a fault of stage {fault.index}, which the route does not have")
        if not fault.sequence:
            is_link = fault.index == len(self.route) - 1 and fault.code is Code.LINK_LOST
            self._broke(beside if is_link else fault.index, fault.code, fault.message)
            return
        entry = self._sequences.get(fault.sequence)
        job = self._jobs.get(entry.job) if entry is not None else None
        if entry is None or entry.is_dead:
            return
        entry.is_dead = True
        self._complete_dead()
        if job is not None:
            job.fail(Refused(fault.code, f"stage {fault.index} ({self._name(fault.index)}): {fault.message}"))

    # -- steps

    def _say(self, message: object) -> None:
        if self._out is not None and not self._out.lost:
            try:
                self._out.send_nowait(message)
            except LinkLost as error:
                log.debug("not said: %s", error)  # the link's reader notices

    def _say_open(self, number: int) -> None:
        entry = self._sequences[number]
        job = self._jobs.get(entry.job)
        if self.state is not RouteState.UP or entry.is_open or entry.is_dead or job is None or not self._is_for_this(job.ticket):
            return
        entry.is_open = True
        self._say(SequenceOpen(number, entry.declared, entry.keep, entry.source, entry.shared, job.data))

    def _resume(self) -> None:
        """Says everything that the stages may not know."""
        self._say_ended()
        for number in sorted(self._sequences):
            self._say_open(number)
        for step in sorted(self._flights):
            flight = self._flights[step]
            if not flight.sent_us:
                self.counts.steps_again += self._epoch > 1
                self._send(flight)
        self._complete_dead()

    def _send(self, flight: _Flight) -> None:
        if self.state is not RouteState.UP:
            return
        live = [span for span in flight.spans if not self._is_dead(span)]
        if not live or not all(self._sequences[span.sequence].is_open for span in live):
            return
        flight.live, flight.sent_us = tuple(live), _now_us()
        rows = flight.rows if len(live) == len(flight.spans) else _parts(flight, live, TOKEN_BYTES, flight.rows)
        self.counts.steps_sent += 1
        self.counts.rows_sent += sum(span.count for span in live)
        self._say(StageRows(flight.step, flight.live, rows=rows))

    def _is_dead(self, span: Span) -> bool:
        entry = self._sequences.get(span.sequence)
        return entry is None or entry.is_dead

    def _send_again(self, wanted: RowsWanted) -> None:
        entry = self._sequences.get(wanted.sequence)
        if entry is None or entry.is_dead:
            return
        high = min(wanted.high, len(entry.tokens))
        for frame in fill_frames(wanted.sequence, wanted.low, high, entry.tokens):
            self.counts.rows_sent_again += frame.count
            self._say(frame)

    def _arrive(self, message: StageRows) -> None:
        flight = self._flights.get(message.step)
        if flight is None or not flight.sent_us:
            self.counts.steps_repeated += 1
            return
        row_bytes = self._activations.row_bytes(self._width)
        if len(message.rows) != message.count * row_bytes:
            raise RemoteProtocolError(f"{message.count} hidden states of {row_bytes} bytes do not make {len(message.rows)} bytes")
        if not set(message.spans) <= set(flight.live):
            raise RemoteProtocolError(f"step {message.step} came round with other rows than were sent")
        lap_us = _now_us() - flight.sent_us
        rows = message.rows
        if message.spans != flight.spans:
            self._give_up(span for span in flight.spans if span not in message.spans)
            rows = _parts(_Flight(0, message.spans, b""), flight.spans, row_bytes, message.rows)
        del self._flights[message.step]
        self._arrived[message.step] = flight
        while len(self._arrived) > _ARRIVED_KEPT:
            del self._arrived[next(iter(self._arrived))]
        self.counts.steps_arrived += 1
        self._note(flight, message.times, lap_us)
        self._engine.arrived(message.step, message.times, self._activations, rows)

    def _give_up(self, missing: Iterable[Span]) -> None:
        """Rows that a stage has left out are of jobs that it refused; its word about that takes the other way round and may come later."""
        for span in missing:
            entry = self._sequences.get(span.sequence)
            if entry is not None and not entry.is_dead:
                entry.is_dead = True
                if (job := self._jobs.get(entry.job)) is not None:
                    job.fail(Refused(Code.NO_CAPACITY, "a stage of the route has refused the job"))

    @property
    def _activations(self) -> Activations:
        return self._ticket.activations if self._ticket is not None else Activations.F32

    def _note(self, flight: _Flight, times: tuple[StageTime, ...], lap_us: int) -> None:
        lap_s = lap_us / 1e6
        self._lap_s = lap_s if not self._lap_s else self._lap_s + _LAP_LEARN * (lap_s - self._lap_s)
        for number in {self._sequences[span.sequence].job for span in flight.spans if span.sequence in self._sequences}:
            if (job := self._jobs.get(number)) is not None:
                job.note(times, lap_us)
        if all(span.count == 1 for span in flight.spans):
            for index, (peer, time) in enumerate(zip(self.route, times, strict=False)):
                if self._health.note(peer, time.compute_us, len(flight.spans)):
                    self._broke(index, Code.NO_CAPACITY, f"it takes {limits.STAGE_SLOW_FACTOR:g} times as long as it did")
                    return

    def _complete_dead(self) -> None:
        """Steps in which nobody has a part any more are over."""
        for step, flight in list(self._flights.items()):
            if all(self._is_dead(span) for span in flight.spans):
                del self._flights[step]
                count = sum(span.count for span in flight.spans)
                kind = self._activations
                self._engine.arrived(step, (), kind, bytes(count * kind.row_bytes(self._width)))

    async def _watch(self) -> None:
        """Asks how the stages do when a step is away for unusually long."""
        while True:
            await trio.sleep(_WATCH_S)
            oldest_us = min((flight.sent_us for flight in self._flights.values() if flight.sent_us), default=0)
            age_s = (_now_us() - oldest_us) / 1e6 if oldest_us else 0.0
            verdict = self._health.look(age_s, self._lap_s, self._clock(), self.route)
            if isinstance(verdict, Suspect):
                self._broke(verdict.index, Code.TIMEOUT, verdict.message)
                return
            if verdict:
                self.counts.probes += 1
                self._say(StageProbe(verdict))


_LAST_WORDS_S = 0.3


def _parts(flight: _Flight, wanted: Iterable[Span], row_bytes: int, rows: bytes) -> bytes:
    """Rows of the wanted spans out of a flight's; zeros for those that it does not have."""
    places, at = {}, 0
    for span in flight.spans:
        places[span] = at
        at += span.count * row_bytes
    parts = []
    for span in wanted:
        start = places.get(span, -1)
        parts.append(rows[start : start + span.count * row_bytes] if start >= 0 else bytes(span.count * row_bytes))
    return b"".join(parts)
