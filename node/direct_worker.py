"""Does the work of a bridge: each request is run by the Coordinator's own dispatcher, whose parts ask a Coordinator's desk.

Theory of operation. ``coordinator.dispatch.Dispatcher`` knows how an answer survives its Islands; here it gets a placer that asks the desk
for a place and a ticket, an issuer that hands that ticket on, and a port that opens the job on the Island itself. What is said and heard of
each ticket is an attempt; all of them are reported when the job has ended.

Rules. The last result is told after the Coordinator has said what the job costs, or SETTLE_WAIT_S later: when it is away the answer ends
all the same, at the receipts' price, and the report is made as soon as it can be. A report that nobody takes is given up in the end: the
Islands' own claims say the same. A request that comes again is answered from memory, for as long as a Coordinator would.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator.affinity import Affinity
from coordinator.dispatch import Dispatcher
from coordinator.http.errors import ApiError
from coordinator.jobs import ChoiceResult, Emit, Event, Replayed, Settled, collected
from coordinator.matching import Candidate, Choice, Considered, Level, Wish
from coordinator.orders import Order
from coordinator.placement import Placement
from coordinator.planning import Plan, PlannedStage
from coordinator.standing import Standing
from coordinator.statistics import Statistics
from coordinator.transcript import Transcript
from node.desk_client import DeskAway, DeskClient, given_back
from node.holder import Links, RunningJob
from node.kept_answers import KeptAnswers
from node.net.host import Host
from protocol import limits
from protocol.cargo_jobs import CargoInput
from protocol.direct import (
    Attempt,
    DeskRefused,
    Excluded,
    JobBilled,
    JobDropped,
    JobSettled,
    MendWanted,
    TicketGranted,
    TicketWanted,
)
from protocol.errors import Code, Refused, RemoteProtocolError
from protocol.messages import RouteBroken
from protocol.prices import format_credits
from protocol.tickets import Ticket, read_ticket, ticket_hash

log = logging.getLogger(__name__)

SETTLE_WAIT_S = 2.0  # for the price, before the answer's last word
REPORTS_MAX = 1000  # that wait for a Coordinator
_REPORT_PAUSE_S = 5.0
_STATUS_UNAVAILABLE = 503


@dataclass(frozen=True, slots=True)
class GrantedCandidate(Candidate):
    """An Island as the desk has chosen it, with the ticket to it."""

    ticket: bytes = b""


@dataclass(slots=True, eq=False)
class _Attempt:
    """One ticket, and the job that it opened. ``outcome``: the code that it failed with, or empty."""

    ticket: bytes
    run: RunningJob | None = None
    outcome: str = ""

    def report(self) -> Attempt:
        run = self.run
        return Attempt(self.ticket, run.receipt, run.count) if run is not None else Attempt(self.ticket, b"", b"")


@dataclass(slots=True, eq=False)
class _Job:
    """One order on its way. ``told``: an error of the desk that is the client's to hear as it is; ``spoken``: it has heard something else
    already, so it can only hear that the answer broke off."""

    order: Order
    spoken: bool = False
    attempts: dict[bytes, _Attempt] = field(default_factory=dict)  # by the ticket's hash
    placement: str = ""
    told: ApiError | None = None

    @property
    def id(self) -> str:
        return self.order.spec.job_id

    @property
    def has_begun(self) -> bool:
        """Whether some tokens are signed for; a further ticket need only allow what is still to come, as the Island will see."""
        return any(attempt.run is not None and attempt.run.count for attempt in self.attempts.values())

    def granted(self, granted: TicketGranted) -> None:
        self.attempts[ticket_hash(granted.ticket)] = _Attempt(granted.ticket)
        self.placement = self.placement or granted.placement

    def refused(self, refused: DeskRefused) -> Refused:
        """What the dispatcher raises for it. Where it is not about placement, or not what its code alone says (a bid that is too low), the
        client hears the desk's own words."""
        if not refused.code or refused.status != _STATUS_UNAVAILABLE:
            self.told = api_error(refused)
        return Refused(Code(refused.code) if refused.code else Code.NO_ISLAND, refused.message)

    def report(self) -> tuple[Attempt, ...]:
        """Attempts that brought something, those with a receipt first; as many as one message may carry."""
        found = [attempt.report() for attempt in dict.fromkeys(self.attempts.values())]
        found = sorted((one for one in found if one.receipt or one.count), key=lambda one: not one.receipt)
        size, count = 0, 0
        for one in found[: limits.DESK_ATTEMPTS_MAX]:
            size += len(one.ticket) + len(one.receipt) + len(one.count)
            if size > limits.DESK_ATTEMPTS_BYTES_MAX:
                break
            count += 1
        return tuple(found[:count])


def api_error(refused: DeskRefused) -> ApiError:
    """As a client of the Coordinator's own API would hear it."""
    headers = {"Retry-After": str(refused.retry_after_s)} if refused.retry_after_s else {}
    if refused.standing.limit:
        said = refused.standing
        headers |= {"X-RateLimit-Limit": str(said.limit), "X-RateLimit-Remaining": str(said.remaining)}
        headers["X-RateLimit-Reset"] = str(said.reset_s)
    return ApiError(
        refused.status,
        refused.message,
        code=refused.error_code or None,
        param=refused.param or None,
        kind=refused.kind,
        headers=headers,
    )


class _Places:
    """``Placing`` for one job: the desk does it."""

    waiting = 0

    def __init__(self, worker: DirectWorker, job: _Job) -> None:
        self._worker, self._job = worker, job
        self.standing = worker.standing

    async def place(self, wish: Wish, capacity_wait_s: float, island_wait_s: float) -> Placement:
        worker, job = self._worker, self._job
        try:
            answer = await worker.desk.ask(lambda number: worker.wanted(number, job.order, wish, capacity_wait_s))
        except ValueError as error:  # a name that no Cargo can have
            raise Refused(Code.UNKNOWN_CARGO, f"no Island offers the model {wish.cargo[:128]!r}") from error
        except DeskAway as error:
            raise Refused(Code.NO_ISLAND, str(error)) from error
        if isinstance(answer, DeskRefused):
            raise job.refused(answer)
        candidate = worker.candidate(answer, job, wish)
        job.granted(answer)
        return Placement(_chosen(candidate, answer), wish.tokens)

    def release(self, placement: Placement) -> None:
        candidate = _granted(placement.candidate)
        attempt = self._job.attempts[ticket_hash(candidate.ticket)]
        count = attempt.run.count if attempt.run is not None else b""
        self._worker.desk.say_nowait(given_back(candidate.ticket, attempt.outcome, count))

    def newest_sequence(self, island: str) -> int:
        """The desk knows better."""
        return 0

    def region_of(self, island: str) -> str:
        return self._worker.regions.get(island, "")


class _Issuer:
    """``Issuing``: the desk has issued already."""

    def issue(self, job_id: str, candidate: Candidate, wish: Wish, cache_salt: bytes) -> bytes:
        return _granted(candidate).ticket


class _Port:
    """``JobPort`` for one job."""

    def __init__(self, worker: DirectWorker, job: _Job) -> None:
        self._worker, self._job = worker, job

    @asynccontextmanager
    async def run_job(self, island: str, ticket: bytes, payload: bytes | CargoInput) -> AsyncIterator[RunningJob]:
        attempt = self._job.attempts[ticket_hash(ticket)]
        try:
            async with self._worker.links.run_job(island, ticket, payload) as run:
                attempt.run = run
                yield run
        except Refused as refusal:
            attempt.outcome = refusal.code
            raise


class _Mender:
    """``Mending`` for one job: the desk does it."""

    def __init__(self, worker: DirectWorker, job: _Job) -> None:
        self._worker, self._job = worker, job

    async def mend(self, candidate: Candidate, broken: RouteBroken) -> Candidate:
        job, old = self._job, _granted(candidate)

        def wanted(number: int) -> MendWanted:
            why = (broken.index, broken.boot, broken.code, broken.message)
            return MendWanted(number, job.id, ticket_hash(old.ticket), *why)

        try:
            answer = await self._worker.desk.ask(wanted)
        except DeskAway as error:
            raise Refused(Code.NO_ISLAND, str(error)) from error
        if isinstance(answer, DeskRefused):
            raise job.refused(answer)
        mended = self._worker.candidate(answer, job, None)
        # the job goes on under its first ticket: counts and receipt name that one
        job.attempts[ticket_hash(answer.ticket)] = job.attempts[ticket_hash(old.ticket)]
        return mended

    def driver_lost(self, candidate: Candidate) -> None:
        """The desk hears it by PlaceFreed."""


class DirectWorker:
    """Implements coordinator.http.app.Worker. ``nursery`` owns the reports; ``api_key`` is what the desk wants to see."""

    def __init__(
        self,
        host: Host,
        links: Links,
        desk: DeskClient,
        nursery: trio.Nursery,
        api_key: str,
        affinity: Affinity,
        job_timeout_s: float = limits.JOB_TIMEOUT_S,
    ) -> None:
        self._host, self.links, self.desk, self._nursery = host, links, desk, nursery
        self._api_key, self._affinity, self._job_timeout_s = api_key, affinity, job_timeout_s
        self.statistics, self.standing = Statistics(), Standing()
        self._kept = KeptAnswers(trio.current_time)
        self.regions: dict[str, str] = {}  # of Islands that we were sent to; as many as the host remembers
        self.running = 0
        self.reports = 0  # under way

    def __repr__(self) -> str:
        return f"<DirectWorker {self.running} running, {self.reports} reports under way>"

    async def run(self, order: Order, emit: Emit) -> None:
        """Raises Refused, BooksRefused for an idempotency key that is taken, or ApiError where the desk said no to the request itself."""
        earlier = await self._kept.earlier(order)
        if earlier is not None:
            for event in (Replayed(earlier.job_id), *earlier.events()):
                await emit(event)
            return
        with self._kept.making(order) as kept:
            transcript = Transcript()

            async def tell(event: Event) -> None:
                transcript.add(event)
                await emit(event)

            price_micros = await self._work(_Job(order), tell)
            kept.succeeded(transcript.pack(), price_micros)

    async def _work(self, job: _Job, emit: Emit) -> int:
        """Runs a job to its end and gives its price in micro-credits."""
        last, choices, results = list[Event](), len(job.order.spec.choices), list[ChoiceResult]()

        async def keep(event: Event) -> None:
            job.spoken = True
            if isinstance(event, ChoiceResult):
                results.append(event)
            if len(results) == choices:
                last.append(event)
            else:
                await emit(event)

        self.running += 1
        try:
            await self._dispatcher(job).run(job.order.spec, keep)
        except Refused as refusal:
            self._drop(job, refusal.code)
            if job.told is not None and not job.spoken:
                raise job.told from refusal
            raise
        except BaseException:
            self._drop(job, Code.CANCELLED)
            raise
        finally:
            self.running -= 1
        billed = await self._settle(job)
        price_micros = billed.price_micros if billed is not None else sum(result.price_micros for result in results)
        for event in (Settled(price_micros, job.placement), *last):
            await emit(event)
        return price_micros

    async def collect(self, order: Order) -> list[Event]:
        """All events at once, for answers that are not streamed."""
        return await collected(self.run, order)

    def _dispatcher(self, job: _Job) -> Dispatcher:
        """One for each job, with parts that know it. They do what a dispatcher asks of the Coordinator's own, and no more."""
        return Dispatcher(
            _Port(self, job),
            _Places(self, job),
            _Issuer(),
            self._affinity,
            self.statistics,
            self._job_timeout_s,
            pipelines=_Mender(self, job),
        )

    # -- asking

    def wanted(self, number: int, order: Order, wish: Wish, wait_s: float) -> TicketWanted:
        """Raises ValueError for what no Coordinator would read."""
        now_s = trio.current_time()
        islands = [Excluded(peer, sequence) for peer, sequence in wish.excluded.items()]
        for peer, until_s in wish.resting.items():
            if until_s > now_s and peer not in wish.excluded:
                islands.append(Excluded(peer, 0, int((until_s - now_s) * 1000) + 1))
        return TicketWanted(
            request=number,
            api_key=self._api_key,
            job_id=order.spec.job_id,
            choices=len(order.spec.choices),
            kind=order.kind,
            cargo=wish.cargo,
            prompt_tokens=order.work.prompt_tokens,
            output_tokens=order.work.output_tokens,
            content_hash=wish.content_hash,
            engine=wish.engine,
            context_over=wish.context_over,
            affinity=wish.affinity,
            excluded=tuple(islands[-limits.DESK_ISLANDS_MAX :]),
            wait_ms=int(wait_s * 1000),
            bid="" if order.bid_micros is None else format_credits(order.bid_micros),
            policy=order.policy_text,
            quote=order.quote_id,
            priority=order.spec.priority,
        )

    def candidate(self, answer: Any, job: _Job, wish: Wish | None) -> GrantedCandidate:
        """What was granted. Raises Refused(INTERNAL) where it is not what was asked for: that Coordinator is broken."""
        try:
            if not isinstance(answer, TicketGranted):
                raise RemoteProtocolError(f"{type(answer).__name__} is no answer to a wish for a ticket")
            ticket = read_ticket(answer.ticket)
            _check(ticket, answer, job, wish, self._host.peer_id)
        except RemoteProtocolError as error:
            log.warning("the Coordinator grants what was not asked for: %s", error)
            raise Refused(Code.INTERNAL, "the Coordinator broke the protocol") from error
        if not self._host.is_connected(ticket.driver):
            self._host.remember(ticket.driver, answer.addresses)
        self.regions[ticket.driver] = answer.region
        while len(self.regions) > limits.PEERS_REMEMBERED_MAX:
            del self.regions[next(iter(self.regions))]
        return GrantedCandidate(
            island=ticket.driver,
            boot=ticket.boots[-1],
            sequence=answer.sequence,
            draining=False,
            offer=answer.offer,
            busy_slots=0,
            busy_kv=0,
            plan=_plan(ticket),
            ticket=answer.ticket,
        )

    # -- reporting

    async def _settle(self, job: _Job) -> JobBilled | None:
        """None where nobody says in time what it costs."""
        attempts = job.report()
        report = self._report(lambda number: JobSettled(number, job.id, attempts))
        with trio.move_on_after(SETTLE_WAIT_S):
            await report.done.wait()
        return report.billed

    def _drop(self, job: _Job, code: Code) -> None:
        if job.attempts:
            attempts = job.report()
            self._report(lambda number: JobDropped(number, job.id, code, attempts))

    def _report(self, make: Callable[[int], Any]) -> _Report:
        report = _Report(make)
        if self.reports < REPORTS_MAX:
            self._nursery.start_soon(self._deliver, report)
        else:
            log.warning("more than %d reports wait for the Coordinator; one is left to the Islands' claims", REPORTS_MAX)
            report.done.set()
        return report

    async def _deliver(self, report: _Report) -> None:
        self.reports += 1
        try:
            with trio.move_on_after(limits.CLAIM_LIFETIME_S):
                while not await self._try(report):
                    pass
        finally:
            self.reports -= 1
            report.done.set()

    async def _try(self, report: _Report) -> bool:
        """Whether it was taken, or will never be."""
        try:
            answer = await self.desk.ask(report.make, is_report=True)
        except DeskAway:
            await trio.sleep(_REPORT_PAUSE_S)
            return False
        if isinstance(answer, DeskRefused) and answer.retry_after_s:
            await trio.sleep(answer.retry_after_s)
            return False
        if isinstance(answer, JobBilled):
            report.billed = answer
        else:
            why = answer.message if isinstance(answer, DeskRefused) else type(answer).__name__
            log.warning("the Coordinator does not take the report of a job: %s", why)
        return True


@dataclass(slots=True, eq=False)
class _Report:
    make: Callable[[int], Any]
    billed: JobBilled | None = None
    done: trio.Event = field(default_factory=trio.Event)


def _granted(candidate: Candidate) -> GrantedCandidate:
    assert isinstance(candidate, GrantedCandidate), "every candidate here comes from the desk"
    return candidate


def _check(ticket: Ticket, granted: TicketGranted, job: _Job, wish: Wish | None, holder: str) -> None:
    """Raises RemoteProtocolError."""
    if ticket.holder != holder or not ticket.count_every:
        raise RemoteProtocolError("the ticket is for another holder, or asks for no counts")
    if ticket.job_id.partition(".")[0] != job.id:
        raise RemoteProtocolError("the ticket is for another job")
    # what the name of the order stands for is the Coordinator's to say: it may be a Cargo of another name
    if ticket.content_hash != granted.offer.content_hash or ticket.cargo != granted.offer.name:
        raise RemoteProtocolError("ticket and offer differ")
    if wish is not None and not job.has_begun and ticket.token_limit < wish.output_tokens:
        raise RemoteProtocolError(f"the ticket allows {ticket.token_limit} tokens of {wish.output_tokens}")


def _plan(ticket: Ticket) -> Plan | None:
    if not ticket.stages:
        return None
    stages = tuple(
        PlannedStage(island, boot, stage.layers, stage.ask, held=True, bytes_needed=0, compute_s=0.0)
        for island, boot, stage in zip(ticket.route, ticket.boots, ticket.stages, strict=True)
    )
    return Plan(stages, cells=0, token_s=0.0, wire_s=0.0, reasons=())


def _chosen(candidate: GrantedCandidate, granted: TicketGranted) -> Choice:
    considered = Considered(candidate.island, 0.0, 0.0, 0.0, 0.0, (), Level.FAIR)
    return Choice(candidate, 0.0, (considered,), {}, 1, granted.price_max_micros)
