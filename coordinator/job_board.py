"""Jobs that nobody waits for on a connection: submitted, run in the background, looked at whenever somebody asks.

Theory of operation. The Coordinator that accepts a job runs it. What it says is kept in a *feed* that any number of watchers read from its
beginning, so a watcher who comes late or loses his connection misses nothing. Another Coordinator of the same database does not have the
feed; it watches the job's row and tells state and end. So does this one where a feed breaks off: the job was taken over, or it could not be
settled yet. A job that is tried anew is submitted again, and its words come again from the first.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import trio

from coordinator.books import job_queries
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import ENDED, Job, JobState, WantCancel
from coordinator.desk import POLL_S, Desk
from coordinator.exchange.quotes import Quote
from coordinator.jobs import Accepted, Assigned, CacheHit, ChoiceResult, Emit, Event, Said, Text
from coordinator.orders import JobCancelled, Opened, Order, TakenOver
from protocol.cargo_io import DoneLine, ImageLine
from protocol.errors import ArchipelagError, Refused

log = logging.getLogger(__name__)

T = TypeVar("T")

_OPENED_AT_ONCE_MAX = 2  # kept answers with pictures: opening one takes 0.2 s and three times its size at worst


@dataclass(frozen=True, slots=True)
class StateChange:
    """The job has entered a state; with an error where it failed."""

    state: JobState
    error_code: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """What a Cargo that gives lines has said at its end."""

    done: DoneLine


JobEvent = StateChange | Text | Said | Output | CacheHit | Assigned


class Cache(Protocol):
    """Answers that are kept, in front of the desk."""

    async def look(self, order: Order) -> list[Event] | None:
        """The answer that is kept for a job that is being submitted. Raises BooksUnavailable or BooksRefused."""
        ...

    async def run(self, order: Order, emit: Emit) -> None:
        """As Desk.run."""
        ...


class Router(Protocol):
    """Chooses the version of a Cargo that a request gets."""

    async def assign(self, order: Order) -> Order: ...

    def note_cached(self, order: Order) -> None:
        """The answer of an order that was assigned came from the cache."""
        ...

    async def run(self, order: Order, emit: Emit) -> None:
        """As Desk.run, for an order that was not assigned yet."""
        ...


@dataclass(slots=True)
class Feed:
    """Everything that a running job has said in one try; wakes whoever waits for more."""

    tries: int
    events: list[JobEvent] = field(default_factory=list)
    state: JobState = JobState.SUBMITTED
    ended: bool = False
    _more: trio.Event = field(default_factory=trio.Event)

    def say(self, event: JobEvent) -> None:
        self.events.append(event)
        if isinstance(event, StateChange):
            self.state = event.state
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = trio.Event()

    async def read(self) -> AsyncIterator[JobEvent]:
        """From the beginning to the end."""
        seen = 0
        while True:
            more = self._more
            while seen < len(self.events):
                yield self.events[seen]
                seen += 1
            if self.ended:
                return
            if seen == len(self.events) and not more.is_set():
                await more.wait()


def said_in(events: Iterable[Event]) -> list[Text | Said | Output]:
    """What a job has said, of all that happened."""
    said: list[Text | Said | Output] = []
    for event in events:
        if isinstance(event, Text | Said):
            said.append(event)
        elif isinstance(event, ChoiceResult) and event.done is not None:
            said.append(Output(event.done))
    return said


class JobBoard:
    """Runs on trio; ``run`` owns the background tasks."""

    def __init__(
        self, desk: Desk, restore: Callable[[Job, bytes], Order], cache: Cache | None = None, router: Router | None = None
    ) -> None:
        """``restore(job, input)`` makes the order of a job again that another run of a Coordinator had accepted; ``cache``: in front of the
        desk; ``router``: in front of both, it chooses versions."""
        self._desk, self._restore, self._cache, self._router = desk, restore, cache, router
        self._feeds: dict[str, Feed] = {}
        self._nursery: trio.Nursery | None = None
        self._opening = trio.CapacityLimiter(_OPENED_AT_ONCE_MAX)

    def __repr__(self) -> str:
        return f"<JobBoard {len(self._feeds)} running>"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # a change of the books that is on its way still ends: nothing begins behind it

    async def submit(self, order: Order) -> Job:
        """Accepts a job, which then runs by itself. Gives the earlier one, as it is now, where its idempotency key was used before.

        Raises BooksRefused or BooksUnavailable.
        """
        if self._router is not None:
            order = await self._router.assign(order)
        if self._cache is not None and (events := await self._cache.look(order)) is not None:
            job = await self._desk.record(order, events)
            if self._router is not None and job.id == order.spec.job_id:  # or another one of the same key was quicker
                self._router.note_cached(order)
            return job
        opened = await self._desk.open(order, waits=False)
        if opened.earlier is None:
            self._start(opened, order)
        return opened.job

    async def run_now(self, order: Order, send: Callable[[JobEvent], Awaitable[None]]) -> None:
        """A job whose account waits for it, told as it comes. Raises what Desk.run raises."""
        state = JobState.SUBMITTED

        async def emit(event: Event) -> None:
            nonlocal state
            if isinstance(event, Accepted) and state is JobState.SUBMITTED:
                state = JobState.ASSIGNED
                await send(StateChange(state))
            elif isinstance(event, Text | Said):
                if state is not JobState.RUNNING:
                    state = JobState.RUNNING
                    await send(StateChange(state))
                await send(event)
            elif isinstance(event, ChoiceResult) and event.done is not None:
                if state is not JobState.RUNNING:
                    await send(StateChange(JobState.RUNNING))
                await send(Output(event.done))
            elif isinstance(event, CacheHit | Assigned):
                await send(event)

        await (self._router or self._cache or self._desk).run(order, emit)
        await send(StateChange(JobState.SUCCEEDED))

    def resume(self, job: Job, quote: Quote | None = None) -> bool:
        """Runs a job again that we have taken over, by the quote that it was opened with; False where that cannot be."""
        try:
            order = self._restore(job, self._desk.unseal(job.input, job.id))
        except (ArchipelagError, ValueError) as error:
            log.warning("job %s cannot be run again: %s", job.id, error)
            return False
        per_choice = job.bid_micros // len(order.spec.choices)
        island = quote.island if quote is not None else ""
        self._start(Opened(job, replace(order.spec, price_max_micros=per_choice, island=island), quote), order)
        return True

    def _start(self, opened: Opened, order: Order) -> None:
        if self._nursery is None:
            return  # we go down; whoever comes next takes it up
        feed = self._feeds[opened.job.id] = Feed(opened.job.tries, [StateChange(JobState.SUBMITTED)])
        self._nursery.start_soon(self._work, opened, order, feed)

    async def _work(self, opened: Opened, order: Order, feed: Feed) -> None:
        async def emit(event: Event) -> None:
            if isinstance(event, Accepted) and feed.state is JobState.SUBMITTED:
                feed.say(StateChange(JobState.ASSIGNED))
            elif isinstance(event, Text | Said):
                if feed.state is not JobState.RUNNING:
                    feed.say(StateChange(JobState.RUNNING))
                feed.say(event)
            elif isinstance(event, ChoiceResult) and event.done is not None:
                feed.say(Output(event.done))

        try:
            job = await self._desk.perform(opened, order, emit)
            feed.say(StateChange(job.state))
        except JobCancelled as refusal:
            feed.say(StateChange(JobState.CANCELLED, refusal.code.value, refusal.message))
        except TakenOver:
            log.info("job %s goes on elsewhere", opened.job.id)
        except Refused as refusal:
            feed.say(StateChange(JobState.FAILED, refusal.code.value, refusal.message))
        except (BooksRefused, BooksUnavailable) as error:
            # the row stays open; upkeep takes it up again when the books can be written
            log.warning("job %s was not settled: %s", opened.job.id, error)
        except Exception as error:  # a bug ends this try of this job, and nobody else's
            trace = "".join(traceback.format_tb(error.__traceback__))  # no message: a foreign error's may quote the input
            log.error("job %s: %s\n%s", opened.job.id, type(error).__name__, trace)
        finally:
            feed.end()
            del self._feeds[opened.job.id]

    async def watch(self, job_id: str, account: str) -> AsyncIterator[JobEvent]:
        """What a job says, from its beginning to its end. Raises BooksRefused(NO_JOB)."""
        job = await self.find(job_id, account)
        feed = self._feeds.get(job_id)
        state, tries = None, job.tries
        if feed is not None:
            async for event in feed.read():
                if isinstance(event, Text | Said):
                    self._desk.note_read(job_id)
                yield event
            if feed.state in ENDED:
                return
            state, tries = feed.state, feed.tries
            job = await self._again(replace(job, state=state, tries=tries))
        while True:
            if job.tries != tries and state is not JobState.SUBMITTED:
                state = JobState.SUBMITTED
                yield StateChange(state)
            tries = job.tries
            if job.ended:
                break
            if job.state is not state:
                state = job.state
                yield StateChange(state)
            await trio.sleep(POLL_S)
            job = await self._again(job)
        if feed is None or job.tries != feed.tries:
            for event in said_in(self._desk.kept(job) or ()):
                yield event
        yield StateChange(job.state, job.error_code, job.error_message)

    async def _again(self, job: Job) -> Job:
        """As it is now, or as it was where the books are away: whoever watches has time."""
        try:
            return await self.find(job.id, job.account)
        except BooksUnavailable as error:
            log.debug("job %s cannot be looked at: %s", job.id, error)
            return job

    async def find(self, job_id: str, account: str) -> Job:
        """Raises BooksRefused(NO_JOB)."""
        job = await self._desk.books.ask(job_queries.job_of, job_id, account)
        if job is None:
            raise BooksRefused(Why.NO_JOB, "there is no such job")
        return job

    async def ask(self, question: Callable[..., T], *arguments: Any) -> T:
        """A question to the books. Raises BooksUnavailable."""
        return await self._desk.books.ask(question, *arguments)

    async def answer(self, job: Job) -> list[Text | Said | Output] | None:
        """All of the kept answer; None where none is kept."""
        events = self._desk.kept(job)
        return said_in(events) if events is not None else None

    async def kept_until(self, job_id: str) -> int:
        """Unix milliseconds until which a job's answer is kept; 0: it is not. Raises BooksUnavailable."""
        return await self._desk.books.ask(job_queries.kept_until, job_id)

    async def kept_image(self, job_id: str, index: int) -> ImageLine | None:
        """A picture of a kept answer, whosever it is. Raises BooksUnavailable."""
        job = await self._desk.books.ask(job_queries.any_job, job_id)
        if job is None or not job.output:
            return None
        events = await trio.to_thread.run_sync(self._desk.kept, job, limiter=self._opening)
        images = [event.line for event in events or () if isinstance(event, Said) and isinstance(event.line, ImageLine)]
        return images[index] if index < len(images) else None

    async def cancel(self, job_id: str, account: str) -> Job:
        """Ends a job, here or at the Coordinator that runs it; gives it as it is then.

        Raises BooksRefused: NO_JOB; NOT_OWNER for one whose tokens do not come through here.
        """
        job = await self.find(job_id, account)
        if job.holder and not job.ended:
            raise BooksRefused(Why.NOT_OWNER, "its bridge runs this job; cancel it there")
        job = await self._desk.books.do(WantCancel(job_id, account))
        live = self._desk.live.get(job_id)
        if live is not None:
            self._desk.cancel(job_id)
            await live.ended.wait()
            job = await self.find(job_id, account)
        return job
