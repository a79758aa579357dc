"""The Island's end of ``/archipelag/job/1``: tickets in, tokens and receipts out.

One task a job, all owned by the stream's nursery: when the stream is lost, everything that ran for it is cancelled and its slots are
free at once. A job that fails answers with JobFailed; only a peer that breaks the protocol costs itself the stream.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import trio

from node.bookkeeper import now_ms
from node.greeting import answer_hello
from node.net.frames import FrameStream
from node.outbox import Outbox
from node.pipeline_job import PipelineJob
from node.route_driver import RouteDriver
from privacy.keys import NodeKey
from protocol import checks, limits
from protocol.errors import Code, LinkLost, Refused, RemoteProtocolError
from protocol.generation import GENERATION, FinishReason
from protocol.jobs import JobState, JobStreams, Side
from protocol.messages import (
    JOB,
    PROTOCOL_VERSION,
    Hello,
    JobAccepted,
    JobCancel,
    JobChunk,
    JobDone,
    JobFailed,
    JobOpen,
    NodeRole,
    RouteBroken,
    RouteMended,
)
from protocol.prices import Ask
from protocol.receipts import RECEIPT_VERSION, Receipt, sign_receipt
from protocol.tickets import Ticket, TicketGuard, ticket_hash
from runtimes.base import Chunk, Finished, LoadedCargo, RunRequest

log = logging.getLogger(__name__)


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

    cargo: LoadedCargo
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
    ) -> None:
        self._key, self._guard, self._network = key, guard, network
        self._terms, self._hello, self._drivers = terms, hello, drivers or NoDrivers()
        self.counts = JobCounts()
        self.draining = False
        self._idle = trio.Event()

    def __repr__(self) -> str:
        return f"<JobServer {self.counts.running} running, {self.counts.done} done>"

    async def wait_idle(self) -> None:
        """Returns when no job runs."""
        while self.counts.running:
            self._idle = trio.Event()
            await self._idle.wait()

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream. Raises LinkLost when it ends, RemoteProtocolError when the peer breaks the protocol."""
        await answer_hello(stream, self._hello)
        await _Session(self, stream).run()

    def note_end(self) -> None:
        self.counts.running -= 1
        if not self.counts.running:
            self._idle.set()

    def admit(self, message: JobOpen, sender: str) -> tuple[Ticket, Terms, RunRequest]:
        """Checks everything that can be checked before the engine is asked. Raises Refused."""
        if self.draining:
            raise Refused(Code.DRAINING, "this Island is shutting down")
        ticket = self._guard.admit(message.ticket, sender, now_ms())
        terms = self._terms.get(ticket.cargo) if len(ticket.route) == 1 else None
        if terms is None or terms.cargo.facts().content_hash != ticket.content_hash:
            terms = self._drivers.terms(ticket)
        if terms is None:
            raise Refused(Code.UNKNOWN_CARGO, f"this Island does not hold Cargo {ticket.cargo}")
        try:
            generation = GENERATION.decode(bytes(message.input))
        except RemoteProtocolError as error:
            raise Refused(Code.BAD_INPUT, str(error)) from error
        if generation.max_tokens > ticket.token_limit:
            raise Refused(
                Code.BAD_TICKET, f"the ticket allows {ticket.token_limit} tokens, not {generation.max_tokens}"
            )
        return ticket, terms, RunRequest(ticket.job_id, generation, ticket.cache_salt)

    def check_mended(self, data: bytes, sender: str) -> None:
        """Whether a ticket may mend the route of a job that runs here. Uses it up. Raises Refused(BAD_TICKET)."""
        self._guard.admit(data, sender, now_ms())

    def receipt(self, ticket_data: bytes, ticket: Ticket, ask: Ask, work: _Work) -> bytes:
        finished = work.finished
        price = ask.price(work.sent_tokens, work.compute_ms)
        receipt = Receipt(
            version=RECEIPT_VERSION,
            network=self._network,
            island=self._key.peer_id,
            job_id=ticket.job_id,
            ticket_hash=ticket_hash(ticket_data),
            content_hash=ticket.content_hash,
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            sent_tokens=work.sent_tokens,
            output_hash=work.output_hash,
            compute_ms=work.compute_ms,
            price_micros=min(price, ticket.price_limit_micros),
            finish_reason=finished.reason,
            finished_at_ms=now_ms(),
        )
        return sign_receipt(receipt, self._key)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a finished job used."""

    finished: Finished
    sent_tokens: int
    output_hash: bytes
    compute_ms: int


class _Session:
    """One stream of one holder."""

    def __init__(self, server: JobServer, stream: FrameStream) -> None:
        self._server, self._stream = server, stream
        self._outbox = Outbox(stream, JOB)
        self._streams = JobStreams(Side.ISLAND)
        self._scopes: dict[int, trio.CancelScope] = {}
        self._pipelines: dict[int, tuple[RouteDriver, PipelineJob]] = {}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.run)
            while True:
                message = await self._stream.receive()
                self._streams.receive(message)
                if isinstance(message, JobOpen):
                    scope = self._scopes[message.job] = trio.CancelScope()
                    nursery.start_soon(self._job, message, scope)
                elif isinstance(message, JobCancel) and message.job in self._scopes:
                    self._scopes[message.job].cancel()
                elif isinstance(message, RouteMended):
                    self._mend(message)

    def _mend(self, message: RouteMended) -> None:
        driver, job = self._pipelines.get(message.job, (None, None))
        if driver is None or job is None:
            return  # it has ended meanwhile
        try:
            self._server.check_mended(message.ticket, self._stream.remote_peer)
            driver.mended(driver.number_of(job), message.ticket)
        except Refused as refusal:
            job.fail(refusal)

    def _say(self, message: Any) -> None:
        self._streams.send(message)
        self._outbox.send_nowait(message)

    async def _job(self, message: JobOpen, scope: trio.CancelScope) -> None:
        counts = self._server.counts
        counts.running += 1
        failed: list[Refused] = []

        def fail(refusal: Refused) -> None:
            failed.append(refusal)
            scope.cancel()

        try:
            with scope:
                await self._run(message, fail)
            if scope.cancelled_caught and failed:
                raise failed[0]
            if scope.cancelled_caught:
                counts.cancelled += 1
                self._fail(message.job, Refused(Code.CANCELLED, "cancelled by the holder"))
        except Refused as error:
            self._fail(message.job, error)
        except LinkLost as error:
            log.debug("job %d: %s", message.job, error)  # the session's own reader ends the stream
        except Exception as error:  # a bug in one job must not end the jobs beside it; the text may hold a prompt, so only the type is told
            log.error("job %d broke: %s", message.job, type(error).__name__, exc_info=True)
            self._fail(message.job, Refused(Code.INTERNAL, "the Island broke while it worked on the job"))
        finally:
            self._scopes.pop(message.job, None)
            self._pipelines.pop(message.job, None)
            self._server.note_end()

    def _fail(self, job: int, error: Refused) -> None:
        counts = self._server.counts
        if self._streams.state(job) is JobState.OPENING:
            counts.refused += 1
        else:
            counts.failed += 1
        try:
            self._say(JobFailed(job, error.code, error.message[: limits.TEXT_CHARS_MAX]))
        except LinkLost as lost:
            log.debug("job %d failed after its stream was lost: %s", job, lost)

    async def _run(self, message: JobOpen, fail: Callable[[Refused], None]) -> None:
        server, job = self._server, message.job
        ticket, terms, request = server.admit(message, self._stream.remote_peer)
        if terms.driver is not None:
            terms.driver.check(ticket)
            pipeline = PipelineJob(message.ticket, lambda *why: self._say_broken(job, *why), fail)
            self._pipelines[job] = terms.driver, pipeline
            request = replace(request, route=pipeline)
        async with terms.cargo.run(request) as run:
            server.counts.started += 1
            server.counts.resumed_tokens += len(request.generation.resume) // 4
            self._say(JobAccepted(job, terms.cargo.facts().engine, run.prompt_tokens, run.cached_tokens))
            started_s = time.monotonic()
            async for event in run:
                if isinstance(event, Chunk):
                    step, _ = self._streams.counted(job)
                    self._say(JobChunk(job, step, event.text, event.logprobs, event.tokens))
                    server.counts.tokens += len(event.tokens) // 4
                else:
                    self._finish(message, ticket, terms, event, started_s)

    def _say_broken(self, job: int, index: int, boot: int, code: Code, text: str) -> None:
        if self._streams.state(job) is JobState.ENDED:
            return
        try:
            self._say(RouteBroken(job, index, boot, code, checks.made_printable(text)))
        except LinkLost as lost:
            log.debug("job %d: %s", job, lost)

    def _finish(self, message: JobOpen, ticket: Ticket, terms: Terms, finished: Finished, started_s: float) -> None:
        _, pipeline = self._pipelines.get(message.job, (None, None))
        sent, digest = self._streams.counted(message.job)
        compute_ms = int((time.monotonic() - started_s) * 1000)
        receipt = self._server.receipt(message.ticket, ticket, terms.ask, _Work(finished, sent, digest, compute_ms))
        self._say(
            JobDone(
                job=message.job,
                finish_reason=FinishReason(finished.reason),
                text=finished.text,
                prompt_tokens=finished.prompt_tokens,
                cached_tokens=finished.cached_tokens,
                completion_tokens=finished.completion_tokens,
                prefill_us=int(finished.prefill_s * 1e6),
                decode_us=int(finished.decode_s * 1e6),
                receipt=receipt,
                stages=pipeline.uses(int(finished.compute_s * 1e6)) if pipeline is not None else (),
                wire_us=pipeline.wire_us if pipeline is not None else 0,
            )
        )
        self._server.counts.done += 1


def island_hello(network: str, agent: str) -> Hello:
    return Hello(PROTOCOL_VERSION, NodeRole.ISLAND, network, agent)
