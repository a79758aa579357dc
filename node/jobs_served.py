"""The Island's end of ``/archipelag/job/1``: tickets in, tokens or lines and receipts out.

One task a job, all owned by the stream's nursery: when the stream is lost, everything that ran for it is cancelled and its slots are
free at once. A job that fails answers with JobFailed; only a peer that breaks the protocol costs itself the stream.

Where the ticket asks the holder to sign for what it gets (``count_every``), no more leaves than is signed for and that much, and what the
job is worth goes to the claims (node/claims.py), however it ended. Of lines no more leaves than the holder has room for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import trio

from node.bookkeeper import now_ms
from node.greeting import answer_hello
from node.job_meter import JobMeter
from node.net.frames import FrameStream
from node.outbox import Outbox
from node.pipeline_job import PipelineJob
from node.route_driver import RouteDriver
from privacy.keys import NodeKey
from protocol import checks, limits
from protocol.cargo_io import DoneLine, Line, TokenLine, encode_line
from protocol.counts import EMPTY_HASH
from protocol.direct import Claim
from protocol.errors import Code, LinkLost, Refused, RemoteProtocolError
from protocol.generation import GENERATION, FinishReason
from protocol.jobs import JobState, JobStreams, Side
from protocol.messages import (
    JOB,
    PROTOCOL_VERSION,
    Hello,
    JobAccepted,
    JobAlive,
    JobCancel,
    JobChunk,
    JobCount,
    JobDone,
    JobFailed,
    JobLines,
    JobMore,
    JobOpen,
    NodeRole,
    RouteBroken,
    RouteMended,
)
from protocol.prices import Ask
from protocol.receipts import RECEIPT_VERSION, Ending, Receipt, sign_receipt
from protocol.tickets import Ticket, TicketGuard, ticket_hash
from runtimes.base import Chunk, Finished, LineCargo, LineRequest, Loaded, LoadedCargo, RunRequest

log = logging.getLogger(__name__)

_PROMPT_TOKENS_MAX = 2**31
_SETTLING_MAX = limits.JOBS_PER_LINK_MAX  # ended jobs of one stream that wait for their last count


@dataclass(slots=True)
class JobCounts:
    """What happened to jobs since the node started."""

    started: int = 0
    done: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    tokens: int = 0
    resumed_tokens: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a Cargo costs here. ``driver``: where it is the last stage of a pipeline, whose ask is that of all stages."""

    cargo: Loaded
    ask: Ask
    driver: RouteDriver | None = None


class Drivers(Protocol):
    """Where a JobServer finds what is not a Cargo of its own."""

    def terms(self, ticket: Ticket) -> Terms | None:
        """For a ticket of a pipeline that ends here, or of a whole model that a Coordinator ordered."""
        ...


class NoDrivers:
    """An Island that holds nothing for a Coordinator."""

    def terms(self, ticket: Ticket) -> Terms | None:
        return None


class ClaimSink(Protocol):
    """Where a JobServer puts what Consumers owe."""

    def put_nowait(self, claim: Claim, final: bool) -> None:
        """A claim, or a newer version of it; only a final one is handed in."""
        ...


class NoClaims:
    """An Island that works for Coordinators only."""

    def put_nowait(self, claim: Claim, final: bool) -> None:
        log.warning("a claim of this Island is kept nowhere")


class JobServer:
    """Serves the job protocol of one Island."""

    def __init__(
        self,
        key: NodeKey,
        guard: TicketGuard,
        network: str,
        terms: Mapping[str, Terms],
        hello: Callable[[], Hello],
        drivers: Drivers | None = None,
        claims: ClaimSink | None = None,
        meet: Callable[[Hello, str], object] = lambda hello, sender: None,
    ) -> None:
        """``meet`` is told who opens a stream, and raises RemoteProtocolError for somebody who may not."""
        self._key, self._guard, self._network = key, guard, network
        self._terms, self._hello, self._drivers = terms, hello, drivers or NoDrivers()
        self._claims = claims if claims is not None else NoClaims()
        self._meet = meet
        self.counts = JobCounts()
        self.draining = False
        self.running: set[_Job] = set()
        self._idle = trio.Event()
        self._one_ended = trio.Event()

    def __repr__(self) -> str:
        return f"<JobServer {self.counts.running} running, {self.counts.done} done>"

    async def wait_idle(self) -> None:
        """Returns when no job runs."""
        while self.counts.running:
            self._idle = trio.Event()
            await self._idle.wait()

    async def wait_ended_of(self, content_hash: str) -> None:
        """Returns when no job of a Cargo runs."""
        while self._running_of(content_hash):
            await self._one_ended.wait()

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream. Raises LinkLost when it ends, RemoteProtocolError when the peer breaks the protocol."""
        await answer_hello(stream, self._hello, self._meet)
        await _Session(self, stream).run()

    def end_all_of(self, content_hash: str, why: Refused) -> int:
        """Ends the running jobs of a Cargo, and says how many they were."""
        found = self._running_of(content_hash)
        for job in found:
            job.fail(why)
        return len(found)

    def _running_of(self, content_hash: str) -> list[_Job]:
        return [job for job in self.running if job.work is not None and job.work.ticket.content_hash == content_hash]

    def note_end(self) -> None:
        self.counts.running -= 1
        self._one_ended.set()
        self._one_ended = trio.Event()
        if not self.counts.running:
            self._idle.set()

    def admit(self, message: JobOpen, sender: str) -> tuple[Ticket, Terms, RunRequest | LineRequest]:
        """Checks everything that can be checked before the engine is asked. Raises Refused."""
        if self.draining:
            raise Refused(Code.DRAINING, "this Island is shutting down")
        ticket = self._guard.admit(message.ticket, sender, now_ms())
        terms = self._terms.get(ticket.cargo) if len(ticket.route) == 1 else None
        if terms is None or terms.cargo.facts().content_hash != ticket.content_hash:
            terms = self._drivers.terms(ticket)
        if terms is None:
            raise Refused(Code.UNKNOWN_CARGO, f"this Island does not hold Cargo {ticket.cargo}")
        if message.seed:
            return ticket, terms, _line_request(message, ticket)
        try:
            generation = GENERATION.decode(bytes(message.input))
        except RemoteProtocolError as error:
            raise Refused(Code.BAD_INPUT, str(error)) from error
        tokens = generation.max_tokens - len(generation.resume) // 4  # what is there already is sent by nobody
        if tokens > ticket.token_limit:
            raise Refused(Code.BAD_TICKET, f"the ticket allows {ticket.token_limit} tokens, not {tokens}")
        return ticket, terms, RunRequest(ticket.job_id, generation, ticket.cache_salt)

    def check_mended(self, data: bytes, sender: str) -> None:
        """Whether a ticket may mend the route of a job that runs here. Uses it up. Raises Refused(BAD_TICKET)."""
        self._guard.admit(data, sender, now_ms())

    def receipt(self, work: _Work) -> bytes:
        """Over what has been sent so far."""
        ticket, sent = work.ticket, min(work.sent_tokens, work.ticket.token_limit)
        compute_ms = work.compute_ms(trio.current_time())
        receipt = Receipt(
            version=RECEIPT_VERSION,
            network=self._network,
            island=self._key.peer_id,
            job_id=ticket.job_id,
            ticket_hash=ticket_hash(work.ticket_data),
            content_hash=ticket.content_hash,
            prompt_tokens=work.prompt_tokens,
            cached_tokens=work.cached_tokens,
            sent_tokens=sent,
            output_hash=work.output_hash,
            compute_ms=compute_ms,
            price_micros=min(work.terms.ask.price(sent, compute_ms), ticket.price_limit_micros),
            finish_reason=work.ending,
            finished_at_ms=now_ms(),
        )
        return sign_receipt(receipt, self._key)

    def claim(self, work: _Work, final: bool) -> None:
        """Keeps what the holder of a ticket owes that has to sign. A job that never began is worth nothing."""
        if work.meter is not None and work.started_s is not None:
            receipt = work.receipt or self.receipt(work)
            self._claims.put_nowait(Claim(work.ticket_data, receipt, work.meter.guard.count), final)


@dataclass(slots=True, eq=False)
class _Work:
    """What a job has used so far. ``started_s``: when it was accepted. ``receipt``: as it went out with JobDone."""

    ticket_data: bytes
    ticket: Ticket
    terms: Terms
    meter: JobMeter | None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sent_tokens: int = 0
    output_hash: bytes = EMPTY_HASH
    started_s: float | None = None
    waited_s: float = 0.0
    ending: Ending = Ending.CUT
    receipt: bytes = b""

    def compute_ms(self, now_s: float) -> int:
        """Since it was accepted, but for the time that it waited for signatures, or for a holder who does not read."""
        waited_s = self.waited_s + (self.meter.waited_s if self.meter is not None else 0.0)
        return max(0, int((now_s - (self.started_s or now_s) - waited_s) * 1000))

    def sent(self, tokens: int, digest: bytes) -> None:
        """``tokens`` and ``digest`` are of all that has gone out."""
        self.sent_tokens, self.output_hash = tokens, digest
        if self.meter is not None:
            self.meter.guard.sent(tokens, digest)


@dataclass(slots=True, eq=False)
class _Job:
    """A job of a session, as long as it runs or waits for its last count. ``pipeline``: of a job over several Islands."""

    message: JobOpen
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    work: _Work | None = None
    driver: RouteDriver | None = None
    pipeline: PipelineJob | None = None
    refusal: Refused | None = None
    more: trio.Event = field(default_factory=trio.Event)  # room for lines

    def fail(self, refusal: Refused) -> None:
        """Ends it from outside."""
        self.refusal = refusal
        self.scope.cancel()


class _Session:
    """One stream of one holder."""

    def __init__(self, server: JobServer, stream: FrameStream) -> None:
        self._server, self._stream = server, stream
        self._outbox = Outbox(stream, JOB)
        self._streams = JobStreams(Side.ISLAND)
        self._jobs: dict[int, _Job] = {}
        self._settling = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.run)
            nursery.start_soon(self._renew_leases)
            while True:
                message = await self._stream.receive()
                self._streams.receive(message)
                if isinstance(message, JobOpen):
                    job = self._jobs[message.job] = _Job(message)
                    nursery.start_soon(self._serve, job)
                elif (known := self._jobs.get(message.job)) is not None:
                    self._hear(message, known)

    def _hear(self, message: Any, job: _Job) -> None:
        """Raises RemoteProtocolError: a count that is no good ends the stream."""
        if isinstance(message, JobCancel):
            job.scope.cancel()
        elif isinstance(message, RouteMended):
            self._mend(message, job)
        elif isinstance(message, JobMore):
            job.more.set()
            job.more = trio.Event()
        elif isinstance(message, JobCount) and job.work is not None:
            if job.work.meter is None:
                raise RemoteProtocolError("a count for a job whose ticket asks for none")
            job.work.meter.hear(message.count)

    def _mend(self, message: RouteMended, job: _Job) -> None:
        if job.driver is None or job.pipeline is None:
            return
        try:
            self._server.check_mended(message.ticket, self._stream.remote_peer)
            job.driver.mended(job.driver.number_of(job.pipeline), message.ticket)
        except Refused as refusal:
            job.pipeline.fail(refusal)

    async def _renew_leases(self) -> None:
        """Says of each job that it still runs, as long as its engine lives."""
        while True:
            await trio.sleep(limits.LEASE_RENEW_S)
            for number, job in list(self._jobs.items()):
                runs = self._streams.state(number) in (JobState.RUNNING, JobState.CANCELLING)
                if runs and job.work is not None and job.work.terms.cargo.alive:
                    self._say(JobAlive(number))

    def _say(self, message: Any) -> None:
        self._streams.send(message)
        self._outbox.send_nowait(message)

    async def _serve(self, job: _Job) -> None:
        """A job from its JobOpen to its claim. Raises nothing but Cancelled."""
        try:
            await self._work_on(job)
            await self._wait_settled(job)
        finally:
            self._jobs.pop(job.message.job, None)
            if job.work is not None:
                self._server.claim(job.work, final=True)

    async def _work_on(self, job: _Job) -> None:
        number, counts = job.message.job, self._server.counts
        counts.running += 1
        self._server.running.add(job)
        try:
            with job.scope:
                await self._run(job)
            if job.scope.cancelled_caught and job.refusal is not None:
                raise job.refusal
            if job.scope.cancelled_caught:
                counts.cancelled += 1
                self._fail(number, Refused(Code.CANCELLED, "cancelled by the holder"))
        except Refused as error:
            self._fail(number, error)
        except LinkLost as error:
            log.debug("job %d: %s", number, error)  # the session's own reader ends the stream
        except Exception as error:  # a bug in one job must not end the jobs beside it; the text may hold a prompt, so only the type is told
            log.error("job %d broke: %s", number, type(error).__name__, exc_info=True)
            self._fail(number, Refused(Code.INTERNAL, "the Island broke while it worked on the job"))
        finally:
            job.driver = job.pipeline = None
            self._server.running.discard(job)
            self._server.note_end()

    async def _wait_settled(self, job: _Job) -> None:
        """The holder's count of all tokens comes after JobDone; the slot is free already, and the stream goes on."""
        work = job.work
        if work is None or work.meter is None or not work.receipt or self._settling >= _SETTLING_MAX:
            return
        self._settling += 1
        try:
            if not await work.meter.wait_settled():
                signed = max(0, work.meter.guard.signed_tokens)
                log.info("a holder has signed for %d of %d tokens", signed, work.sent_tokens)
        finally:
            self._settling -= 1

    def _fail(self, job: int, error: Refused) -> None:
        counts = self._server.counts
        if self._streams.state(job) is JobState.OPENING:
            counts.refused += 1
        else:
            counts.failed += 1
        try:
            self._say(JobFailed(job, error.code, checks.made_printable(error.message)))
        except LinkLost as lost:
            log.debug("job %d failed after its stream was lost: %s", job, lost)

    async def _run(self, job: _Job) -> None:
        server, number = self._server, job.message.job
        ticket, terms, request = server.admit(job.message, self._stream.remote_peer)
        if terms.driver is not None and isinstance(request, RunRequest):
            terms.driver.check(ticket)
            job.driver = terms.driver
            job.pipeline = PipelineJob(job.message.ticket, lambda *why: self._say_broken(number, *why), job.fail)
            request = replace(request, route=job.pipeline)
        meter = JobMeter(ticket, job.message.ticket) if ticket.count_every else None
        job.work = work = _Work(job.message.ticket, ticket, terms, meter)
        if isinstance(request, LineRequest):
            await self._run_lines(job, work, request)
            return
        cargo = _writer_of_text(terms.cargo)
        async with cargo.run(request) as run:
            server.counts.started += 1
            server.counts.resumed_tokens += len(request.generation.resume) // 4
            work.prompt_tokens, work.cached_tokens = run.prompt_tokens, run.cached_tokens
            self._say(JobAccepted(number, terms.cargo.facts().engine, run.prompt_tokens, run.cached_tokens))
            work.started_s = trio.current_time()
            async for event in run:
                if isinstance(event, Finished):
                    self._finish(job, work, event)
                elif meter is None:
                    self._send(number, work, event)
                else:
                    await self._send_signed(number, work, event, meter)

    async def _run_lines(self, job: _Job, work: _Work, request: LineRequest) -> None:
        server, number, done = self._server, job.message.job, DoneLine()
        async with _writer_of_lines(work.terms.cargo).run_lines(request) as run:
            server.counts.started += 1
            self._say(JobAccepted(number, work.terms.cargo.facts().engine, 0, 0))
            work.started_s = trio.current_time()
            async for line in run:
                if isinstance(line, DoneLine):
                    done = line
                await self._send_line(job, work, line)
        usage = done.usage
        tokens = min(usage.completion_tokens, limits.COMPLETION_TOKENS_MAX) if usage is not None else work.sent_tokens
        prompt_tokens = min(usage.prompt_tokens, _PROMPT_TOKENS_MAX) if usage is not None else 0
        compute_s = work.compute_ms(trio.current_time()) / 1000
        self._finish(job, work, Finished(FinishReason.STOP, prompt_tokens, tokens, 0, decode_s=compute_s))

    async def _send_line(self, job: _Job, work: _Work, line: Line) -> None:
        """Waits until the holder has room. A Cargo that writes more meanwhile waits too."""
        number, since_s = job.message.job, trio.current_time()
        while self._streams.room(number) <= 0:
            await job.more.wait()
        work.waited_s += trio.current_time() - since_s
        data = encode_line(line)
        self._say(JobLines(number, self._streams.line_bytes(number), int(isinstance(line, TokenLine)), data))
        work.sent(*self._streams.counted(number))
        self._server.counts.tokens += isinstance(line, TokenLine)

    def _send(self, job: int, work: _Work, chunk: Chunk) -> None:
        self._say(JobChunk(job, work.sent_tokens, chunk.text, chunk.logprobs, chunk.tokens))
        work.sent(*self._streams.counted(job))
        self._server.counts.tokens += len(chunk.tokens) // 4

    async def _send_signed(self, job: int, work: _Work, chunk: Chunk, meter: JobMeter) -> None:
        """As much at a time as may leave unsigned. The text goes with the last piece: it must not run ahead of its tokens."""
        tokens = chunk.tokens
        while tokens:
            room = 4 * await meter.wait_room()
            piece, tokens = tokens[:room], tokens[room:]
            self._send(job, work, Chunk(piece, "") if tokens else Chunk(piece, chunk.text, chunk.logprobs))

    def _say_broken(self, job: int, index: int, boot: int, code: Code, text: str) -> None:
        if self._streams.state(job) is JobState.ENDED:
            return
        try:
            self._say(RouteBroken(job, index, boot, code, checks.made_printable(text)))
        except LinkLost as lost:
            log.debug("job %d: %s", job, lost)

    def _finish(self, job: _Job, work: _Work, finished: Finished) -> None:
        server, pipeline = self._server, job.pipeline
        work.ending = Ending(finished.reason)
        work.prompt_tokens, work.cached_tokens = finished.prompt_tokens, finished.cached_tokens
        work.receipt = server.receipt(work)
        server.claim(work, final=False)
        self._say(
            JobDone(
                job=job.message.job,
                finish_reason=FinishReason(finished.reason),
                text=finished.text,
                prompt_tokens=finished.prompt_tokens,
                cached_tokens=finished.cached_tokens,
                completion_tokens=finished.completion_tokens,
                prefill_us=int(finished.prefill_s * 1e6),
                decode_us=int(finished.decode_s * 1e6),
                receipt=work.receipt,
                stages=pipeline.uses(int(finished.compute_s * 1e6)) if pipeline is not None else (),
                wire_us=pipeline.wire_us if pipeline is not None else 0,
            )
        )
        server.counts.done += 1


def _line_request(message: JobOpen, ticket: Ticket) -> LineRequest:
    """Raises Refused."""
    if ticket.count_every:
        raise Refused(Code.BAD_INPUT, "jobs of lines come through a Coordinator; ask that instead of a bridge")
    if len(ticket.route) > 1:
        raise Refused(Code.BAD_INPUT, "a pipeline writes text only")
    return LineRequest(ticket.job_id, bytes(message.input), bytes(message.seed))


def _writer_of_text(cargo: Loaded) -> LoadedCargo:
    if not hasattr(cargo, "run"):  # isinstance() with a protocol takes 20 µs
        raise Refused(Code.BAD_INPUT, f"{cargo.facts().name} takes one JSON object (POST /api/v1/jobs), not messages or a prompt")
    return cast(LoadedCargo, cargo)


def _writer_of_lines(cargo: Loaded) -> LineCargo:
    if not hasattr(cargo, "run_lines"):
        raise Refused(Code.BAD_INPUT, f"{cargo.facts().name} takes messages or a prompt, and nothing else")
    return cast(LineCargo, cargo)


def island_hello(network: str, agent: str) -> Hello:
    return Hello(PROTOCOL_VERSION, NodeRole.ISLAND, network, agent)
