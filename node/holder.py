"""The holder's end of ``/archipelag/job/1``: one long-lived stream to each Island that works for us, shared by all our jobs there.

Implements ``coordinator.ports.IslandPort``'s ``run_job``. A link is opened by the first job and kept; when it is lost, every job on it
gets LINK_LOST at once and the next job opens a new one. A job that brings neither tokens nor a renewal of its lease for LEASE_S is
given up.

Where a ticket says so (``count_every``), the holder signs as the tokens come; the Island would stop otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from node.greeting import exchange_hello
from node.net.frames import FrameStream
from node.net.host import Host
from node.outbox import Outbox
from protocol import limits
from protocol.cargo_jobs import CargoInput
from protocol.counts import CountSigner
from protocol.errors import ArchipelagError, Code, LinkLost, LocalProtocolError, Refused, RemoteProtocolError
from protocol.identity import Signer
from protocol.jobs import JobState, JobStreams, Side
from protocol.messages import (
    JOB,
    JOB_PROTOCOL,
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
    RouteBroken,
    RouteMended,
)
from protocol.receipts import Receipt, check_receipt, read_receipt
from protocol.tickets import peek_ticket, ticket_hash

log = logging.getLogger(__name__)

_GIVE_BACK_BYTES = limits.JOB_LINES_ROOM_BYTES // 4

_Event = JobAccepted | JobChunk | JobLines | JobDone | RouteBroken


class RunningJob:
    """One job on a link; iterate it. See coordinator.ports.JobRun.

    ``receipt``: of JobDone, once it is here. ``signer``: of a job whose ticket wants counts. ``lease_until_s``: on trio's clock, from the
    moment on that the Island has accepted.
    """

    def __init__(self, number: int, ticket: bytes, link: Link, holder: Signer | None) -> None:
        self.number, self._link = number, link
        self.ticket_hash = ticket_hash(ticket)
        facts = peek_ticket(ticket)
        self.price_max_micros = facts.price_limit_micros
        self.signer: CountSigner | None = None
        if facts.count_every:
            if holder is None:
                raise LocalProtocolError("this holder has no key to sign counts with, as the ticket wants")
            self.signer = CountSigner(facts, ticket, holder)
        self.ended = False
        self.receipt = b""
        self._taken = 0
        self.lease_until_s = math.inf
        # What may wait here is bounded by the job stream's own limit on tokens, and by the room for lines, so sending never blocks the
        # link's reader.
        self.send, self._receive = trio.open_memory_channel[_Event | Refused](math.inf)

    @property
    def count(self) -> bytes:
        """The last count that was signed; empty where none was."""
        return self.signer.count if self.signer is not None else b""

    def mend(self, ticket: bytes) -> None:
        """See coordinator.ports.JobRun."""
        self._link.mend(self, ticket)

    async def __aiter__(self) -> AsyncIterator[_Event]:
        async for event in self._receive:
            if isinstance(event, Refused):
                raise event
            yield event
            if isinstance(event, JobLines):
                self._take(len(event.lines))

    def _take(self, size: int) -> None:
        """What has been dealt with makes room for more, in larger pieces."""
        self._taken += size
        if self._taken >= _GIVE_BACK_BYTES and not self.ended:
            self._link.more(self, self._taken)
            self._taken = 0


class Link:
    """The stream to one Island. ``holder`` signs counts; None for a holder that has none to sign."""

    def __init__(self, stream: FrameStream, holder: Signer | None = None) -> None:
        self.stream, self._holder = stream, holder
        self.outbox = Outbox(stream, JOB)
        self.streams = JobStreams(Side.HOLDER)
        self.jobs: dict[int, RunningJob] = {}
        self.lost = False

    def __repr__(self) -> str:
        return f"<Link to {self.stream.remote_peer}: {len(self.jobs)} jobs{', lost' if self.lost else ''}>"

    def open(self, ticket: bytes, payload: bytes | CargoInput) -> RunningJob:
        job = RunningJob(self.streams.next_number(), ticket, self, self._holder)
        if isinstance(payload, CargoInput):
            message = JobOpen(job.number, ticket, payload.seed, payload.data)
        else:
            message = JobOpen(job.number, ticket, input=payload)
        self.streams.send(message)
        self.jobs[job.number] = job
        self._say(message)
        return job

    def mend(self, job: RunningJob, ticket: bytes) -> None:
        if not job.ended:
            message = RouteMended(job.number, ticket)
            self.streams.send(message)
            self._say(message)

    def more(self, job: RunningJob, taken: int) -> None:
        """The Island may send more lines."""
        message = JobMore(job.number, taken)
        self.streams.send(message)
        self._say(message)

    def leave(self, job: RunningJob) -> None:
        """The caller wants no more of this job. What has come of it is signed for."""
        state = self.streams.state(job.number)
        if not job.ended and not self.lost and state in (JobState.OPENING, JobState.RUNNING):
            if state is JobState.RUNNING:
                self._sign(job, *self.streams.counted(job.number))
            cancel = JobCancel(job.number)
            self.streams.send(cancel)
            self._say(cancel)
        job.ended = True  # what still comes for it is counted and dropped
        job.lease_until_s = math.inf

    def _say(self, message: Any) -> None:
        try:
            self.outbox.send_nowait(message)
        except LinkLost as error:
            raise Refused(Code.LINK_LOST, str(error)) from error

    def _sign(self, job: RunningJob, tokens: int, digest: bytes) -> None:
        count = job.signer.sign(tokens, digest) if job.signer is not None else None
        if count is not None:
            message = JobCount(job.number, count)
            self.streams.send(message)
            self._say(message)

    async def read(self) -> None:
        """Hands messages to their jobs until the stream ends. Raises LinkLost or RemoteProtocolError."""
        while True:
            message = await self.stream.receive()
            try:
                self._take(message)
            except Refused as error:  # a count that cannot leave any more
                raise LinkLost(error.message) from error

    def _take(self, message: Any) -> None:
        number = getattr(message, "job", 0)
        job = self.jobs.get(number)
        counted = None
        if isinstance(message, JobDone) and job is not None:
            counted = self._check_receipt(message, job)
        self.streams.receive(message)
        if job is None:
            raise RemoteProtocolError(f"{type(message).__name__} for job {number}, which is not open here")
        if isinstance(message, JobFailed):
            self._end(job, Refused(message.code, message.message))
        elif isinstance(message, JobDone):
            job.receipt = message.receipt
            if counted is not None and not job.ended:
                self._sign(job, *counted)
            self._end(job, message)
        elif not job.ended:
            self._go_on(job, message)

    def _go_on(self, job: RunningJob, message: _Event | JobAlive) -> None:
        if not isinstance(message, RouteBroken):
            job.lease_until_s = trio.current_time() + limits.LEASE_S
        if isinstance(message, JobAlive):
            return
        if isinstance(message, JobChunk) and job.signer is not None:
            tokens, digest = self.streams.counted(job.number)
            if job.signer.is_due(tokens):
                self._sign(job, tokens, digest)
        job.send.send_nowait(message)

    async def watch_leases(self) -> None:
        """Gives up the jobs of which the Island has said nothing for LEASE_S. One that is accepted meanwhile outlasts the sleep."""
        while True:
            now_s = trio.current_time()
            for job in [job for job in self.jobs.values() if job.lease_until_s <= now_s]:
                self._give_up(job)
            await trio.sleep_until(min((now_s + limits.LEASE_S, *(job.lease_until_s for job in self.jobs.values()))))

    def _give_up(self, job: RunningJob) -> None:
        log.info("job %d brought nothing for %.0f s and is given up", job.number, limits.LEASE_S)
        job.send.send_nowait(Refused(Code.LEASE_LOST, f"the Island has said nothing of the job for {limits.LEASE_S:.0f} s"))
        job.send.close()
        try:
            self.leave(job)
        except Refused as error:
            log.debug("cancel of job %d not sent: %s", job.number, error)

    def _check_receipt(self, done: JobDone, job: RunningJob) -> tuple[int, bytes] | None:
        """What was counted here: tokens and digest."""
        if self.streams.state(job.number) not in (JobState.RUNNING, JobState.CANCELLING):
            return None  # the state table will say what is wrong
        sent, digest = self.streams.counted(job.number)
        receipt: Receipt = read_receipt(done.receipt)
        island = self.stream.remote_peer
        check_receipt(
            receipt,
            island=island,
            ticket_hash=job.ticket_hash,
            sent_tokens=sent,
            output_hash=digest,
            price_max_micros=job.price_max_micros,
        )
        return sent, digest

    def _end(self, job: RunningJob, last: JobDone | Refused) -> None:
        self.jobs.pop(job.number, None)
        if not job.ended:
            job.ended = True
            job.send.send_nowait(last)
            job.send.close()

    def lose(self, why: str) -> None:
        self.lost = True
        self.outbox.lost = True
        for job in list(self.jobs.values()):
            self._end(job, Refused(Code.LINK_LOST, f"the connection to the Island was lost: {why}"))


class Links:
    """All links of a holder. ``nursery`` owns their tasks; ``hello`` is made anew for each, since delegations are renewed; ``holder`` signs
    counts."""

    def __init__(
        self, host: Host, nursery: trio.Nursery, hello: Callable[[], Hello], holder: Signer | None = None
    ) -> None:
        self._host, self._nursery, self._hello, self._holder = host, nursery, hello, holder
        self._links: dict[str, Link] = {}
        self._opening: dict[str, trio.Lock] = {}
        self.opened_total = 0
        self.jobs_total = 0

    def __repr__(self) -> str:
        return f"<Links: {len(self._links)} open, {self.opened_total} opened, {self.jobs_total} jobs>"

    @asynccontextmanager
    async def run_job(self, island: str, ticket: bytes, payload: bytes | CargoInput) -> AsyncIterator[RunningJob]:
        """Opens a job; leaving early cancels it on the Island. Raises Refused(LINK_LOST) when the Island cannot be reached."""
        link = await self._link(island)
        job = link.open(ticket, payload)
        self.jobs_total += 1
        try:
            yield job
        finally:
            job_was_running = not job.ended
            if job_was_running:
                try:
                    link.leave(job)
                except Refused as error:
                    log.debug("cancel of job %d not sent: %s", job.number, error)

    def drop(self, island: str, why: str) -> None:
        """The host saw the connection to this Island end: fail its jobs now, not at the next write."""
        link = self._links.pop(island, None)
        if link is not None:
            link.lose(why)

    async def _link(self, island: str) -> Link:
        link = self._links.get(island)
        if link is not None and not link.lost and not link.outbox.lost:
            return link
        async with self._opening.setdefault(island, trio.Lock()):
            link = self._links.get(island)
            if link is None or link.lost or link.outbox.lost:
                link = await self._open(island)
            return link

    async def _open(self, island: str) -> Link:
        try:
            with trio.fail_after(limits.HELLO_TIMEOUT_S):
                stream = await self._host.open(island, JOB_PROTOCOL, JOB)
                await exchange_hello(stream, self._hello())
        except (ArchipelagError, OSError, trio.TooSlowError) as error:
            raise Refused(Code.LINK_LOST, f"cannot reach Island {island}: {error or 'time-out'}") from error
        link = Link(stream, self._holder)
        self._links[island] = link
        self.opened_total += 1
        self._nursery.start_soon(self._serve, island, link)
        return link

    async def _serve(self, island: str, link: Link) -> None:
        why = "closed"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.outbox.run)
                nursery.start_soon(link.read)
                nursery.start_soon(link.watch_leases)
        except* (LinkLost, RemoteProtocolError) as group:
            why = str(group.exceptions[0])
            log.info("link to Island %s ended: %s", island, why)
        finally:
            link.lose(why)
            if self._links.get(island) is link:
                del self._links[island]
            link.stream.abort()
