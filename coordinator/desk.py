"""The desk: every request comes here, gets a bid, a hold and a job in the books, runs, and is paid for.

Theory of operation. ``open`` writes the job and reserves the most that it may cost; ``perform`` runs it and settles it. Where the account
is known to have many times the bid, an Island may begin before that is written (openings.py); nothing it says is told before the hold is
on disk. The last result of a job is told only after it is paid for, so the answer's last byte never leaves before the charge is on disk.
However a job ends, its hold resolves once: a success pays the Islands' receipts, as far as our own count, the ask that the job was placed
at and the limit bear them out; a Consumer who leaves a stream pays what was delivered; a failure costs nothing.

Rules. A job is settled by the run of the Coordinator that owns it, and by nobody else: where the books say that it was taken over, the
answer ends with an error instead of a second bill. A request that comes again (same idempotency key, or a client's retry of the same
bytes) is answered from what was kept, without a job of its own.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import trio

from coordinator.books import job_queries
from coordinator.books.ab_units import CACHE_SOURCE, GIVEN_UP, unit_of
from coordinator.books.books import Books
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Earned, Job, JobState, OpenJob, Outcome, Placed, RecordJob, SettleJob, StartJob
from coordinator.books.ledger import Refund
from coordinator.cache.asking import CacheAsk
from coordinator.charging import agreed_ask, earned_of, owed_for_delivered
from coordinator.dispatch import Dispatcher
from coordinator.exchange.bids import Bid, Work
from coordinator.exchange.quotes import Quote, QuoteRefused
from coordinator.exchange.rates import Clearing
from coordinator.jobs import (
    Accepted,
    CacheHit,
    ChoiceResult,
    Emit,
    Event,
    Meter,
    Replayed,
    Said,
    Settled,
    Text,
    collected,
)
from coordinator.matching import explanation
from coordinator.openings import Openings
from coordinator.orders import Identity, JobCancelled, LiveJob, Opened, Order, TakenOver
from coordinator.transcript import Transcript, replay
from privacy.sealed_rows import NONCE_BYTES, RowSealer, SealBroken
from protocol import checks, limits
from protocol.cargo_io import ImageLine, TokenLine
from protocol.errors import Refused

log = logging.getLogger(__name__)

CACHED = CACHE_SOURCE  # where the bid of a job comes from that cost nothing
HOLD_SLACK_S = 3600.0  # a hold outlives the longest job by this; then nobody will settle it any more
UNSETTLED_MAX = 10_000  # jobs that wait for the books to come back; their holds release themselves beyond that
POLL_S = 0.25  # how often a job that another Coordinator runs is looked at


class Bidding(Protocol):
    """The market, as far as the desk needs it."""

    async def bid(
        self, account: str, cargo: str, work: Work, explicit: int | None, content_hash: str = ""
    ) -> tuple[Bid, int | None]:
        """The bid of a request, for a version of a Cargo where one is named, and the least that it may be cut to where the account has
        less; None: the request says it itself."""
        ...

    async def quote(self, account: str, quote_id: str, cargo: str, work: Work) -> Quote:
        """Raises QuoteRefused for one that this job may not use."""
        ...

    def cleared(self, clearing: Clearing, account: str, island: str) -> None:
        """A job was paid."""
        ...


class Answers(Protocol):
    """The cache of answers, as far as the desk needs it."""

    def keep(self, ask: CacheAsk, job: Job, content_hash: str, transcript: Transcript) -> None:
        """A job has succeeded and is paid for. ``content_hash``: of the Cargo that answered; ``transcript``: all that it said."""
        ...


class Desk:
    """Runs on trio. ``clock_ms`` gives Unix milliseconds."""

    def __init__(
        self,
        books: Books,
        dispatcher: Dispatcher,
        market: Bidding,
        sealer: RowSealer,
        me: Identity,
        clock_ms: Callable[[], int],
        random_bytes: Callable[[int], bytes],
        job_timeout_s: float,
        retry_window_s: float,
    ) -> None:
        self.books, self._dispatcher, self._market, self._sealer = books, dispatcher, market, sealer
        self.me, self._clock_ms, self._random_bytes = me, clock_ms, random_bytes
        self._job_timeout_s, self._retry_window_s = job_timeout_s, retry_window_s
        self.live: dict[str, LiveJob] = {}
        self.openings = Openings(books)
        self.answers: Answers | None = None
        self.is_leaving = False  # we go down: what is cancelled from now on was not given up by its Consumer
        self._unsettled: deque[SettleJob] = deque()
        self.replayed = 0
        self.taken_over = 0
        self.refunded = 0

    def __repr__(self) -> str:
        return f"<Desk {len(self.live)} live, {self.replayed} replayed, {self.taken_over} taken over>"

    async def run(self, order: Order, emit: Emit) -> None:
        """A request from its bid to its last word. Raises Refused, BooksRefused or BooksUnavailable."""
        opened = await self.open(order)
        if opened.earlier is not None:
            for event in retold(opened):
                await emit(event)
            return
        await self.perform(opened, order, emit)

    async def collect(self, order: Order) -> list[Event]:
        """All events at once, for answers that are not streamed."""
        return await collected(self.run, order)

    # ---- opening

    async def open(self, order: Order, waits: bool = True) -> Opened:
        """The job with its hold; or, for a request that comes again, its first try: ended, or as it is now where nobody ``waits`` for it.

        Raises BooksRefused: the credits do not suffice, the key is in use, the quote is over.
        """
        if order.is_retry and (earlier := await self._earlier(order, waits)) is not None:
            return earlier
        try:
            quote = await self._quote(order)
        except QuoteRefused:
            if (earlier := await self._keyed(order, waits)) is not None:  # it was good when the first try named it
                return earlier
            raise
        if quote is not None:
            bid_micros, source, floor = quote.price_micros, "quote", None
        else:
            spec = order.spec
            bid, floor = await self._market.bid(order.account, spec.cargo, order.work, order.bid_micros, spec.content_hash)
            bid_micros, source = bid.micros, bid.source.value
        opening = self._opening(order, bid_micros, source, floor)
        if self._may_run_meanwhile(order, bid_micros):
            opened = self._opened(order, opening.job, quote)
            return replace(opened, opening=self.openings.put(replace(opening, floor_micros=None)))
        while True:
            job = await self.books.do(opening)
            if job.id == order.spec.job_id:
                return self._opened(order, job, quote)
            if not waits:
                return Opened(job, order.spec, earlier=())
            job = await self._ended(job)
            earlier = await self._replayed(job, order)
            if earlier is not None:
                return earlier
            if job.state is JobState.SUCCEEDED:
                raise BooksRefused(Why.REUSED, "the answer to this idempotency key is not kept any more; ask again with another key")

    def _may_run_meanwhile(self, order: Order, bid_micros: int) -> bool:
        """Whether an Island may begin while the hold is written: nobody waits for the books' word, and they will hardly say no."""
        return not (order.input or order.idempotency_key) and self.openings.covers(order.account, bid_micros)

    async def _quote(self, order: Order) -> Quote | None:
        if not order.quote_id:
            return None
        return await self._market.quote(order.account, order.quote_id, order.spec.cargo, order.work)

    def _opening(self, order: Order, bid_micros: int, source: str, floor: int | None) -> OpenJob:
        now_ms = self._clock_ms()
        spec = order.spec
        job = Job(
            id=spec.job_id,
            account=spec.account,
            cargo=spec.cargo,
            kind=order.kind,
            state=JobState.SUBMITTED,
            priority=spec.priority,
            bid_micros=bid_micros,
            bid_source=source,
            owner=self.me.owner,
            owner_boot=self.me.boot,
            created_at_ms=now_ms,
            policy=order.policy_text,
            quote_id=order.quote_id,
            fingerprint=order.fingerprint,
            can_rerun=bool(order.input),
            input=self._seal(order.input, spec.job_id) if order.input else b"",
            parent=order.parent,
            ab_test=order.arm.test if order.arm is not None else "",
            ab_arm=order.arm.variant if order.arm is not None else "",
            ab_unit=order.arm.unit if order.arm is not None else "",
        )
        hold_ms = int((self._job_timeout_s * limits.JOB_TRIES_MAX + HOLD_SLACK_S) * 1000)
        key_ms = now_ms + int(max(order.keep_s, self._retry_window_s) * 1000)
        return OpenJob(job, now_ms + hold_ms, floor, order.idempotency_key, key_ms)

    def _opened(self, order: Order, job: Job, quote: Quote | None) -> Opened:
        per_choice = job.bid_micros // len(order.spec.choices)
        spec = replace(order.spec, price_max_micros=per_choice, island=quote.island if quote is not None else "")
        return Opened(job, spec, quote)

    async def record(self, order: Order, events: Sequence[Event]) -> Job:
        """A job that needed nobody: its answer was there. It costs nothing, and is kept like any other. Gives the earlier job where the
        order's idempotency key was used before. Raises BooksRefused or BooksUnavailable."""
        transcript = Transcript()
        for event in events:
            transcript.add(event)
        results, now_ms = transcript.results, self._clock_ms()
        hit = next((event for event in events if isinstance(event, CacheHit)), None)
        output, expires_at_ms = b"", 0
        if order.keep_s > 0:
            output, expires_at_ms = self._seal(transcript.pack(), order.spec.job_id), now_ms + int(order.keep_s * 1000)
        opening = self._opening(replace(order, input=b""), 0, CACHED, None)
        job = replace(
            opening.job,
            state=JobState.SUCCEEDED,
            finished_at_ms=now_ms,
            prompt_tokens=sum(result.prompt_tokens for result in results),
            completion_tokens=sum(result.completion_tokens for result in results),
            output=output,
            result_expires_at_ms=expires_at_ms,
            placement=json.dumps({"cache_strategy": hit.strategy}) if hit is not None else "",
        )
        return await self.books.do(RecordJob(job, order.idempotency_key, opening.key_expires_at_ms))

    # ---- answering again

    async def first_try(self, order: Order, waits: bool = True) -> Opened | None:
        """What a request that comes again came to, by its bytes or its idempotency key: ended, or as it is now where nobody ``waits`` for
        it. None where there is no such job, or it came to nothing. Raises BooksRefused or BooksUnavailable."""
        if order.is_retry and (earlier := await self._earlier(order, waits)) is not None:
            return earlier
        return await self._keyed(order, waits)

    async def _earlier(self, order: Order, waits: bool) -> Opened | None:
        """What the same bytes from the same account came to a moment ago; ``waits`` for it where it is still being made."""
        for live in [live for live in self.live.values() if live.opening is not None and live.job.fingerprint == order.fingerprint]:
            await live.opening_over()
        since_ms = self._clock_ms() - int(self._retry_window_s * 1000)
        job = await self.books.ask(job_queries.job_by_fingerprint, order.account, order.fingerprint, since_ms)
        return await self._again(job, order, waits)

    async def _keyed(self, order: Order, waits: bool) -> Opened | None:
        """What a request of the same idempotency key came to."""
        if not order.idempotency_key:
            return None
        arguments = order.account, order.idempotency_key, order.fingerprint, self._clock_ms()
        return await self._again(await self.books.ask(job_queries.job_by_key, *arguments), order, waits)

    async def _again(self, job: Job | None, order: Order, waits: bool) -> Opened | None:
        if job is None or job.state in (JobState.FAILED, JobState.CANCELLED):
            return None
        if not waits:
            return Opened(job, order.spec, earlier=())
        return await self._replayed(await self._ended(job), order)

    async def _ended(self, job: Job) -> Job:
        """The job once it has ended."""
        with trio.move_on_after(self._job_timeout_s):
            while not job.ended:
                live = self.live.get(job.id)
                if live is not None:
                    await live.ended.wait()
                else:
                    await trio.sleep(POLL_S)  # another Coordinator's, or one that is about to be adopted
                again = await self.books.ask(job_queries.job_of, job.id, job.account)
                job = again if again is not None else job
        if not job.ended:
            raise BooksRefused(Why.RUNNING, "the first try of this request is still running")
        return job

    async def _replayed(self, job: Job, order: Order) -> Opened | None:
        if job.state is not JobState.SUCCEEDED:
            return None
        if not job.output:
            again = await self.books.ask(job_queries.job_of, job.id, job.account)
            job = again if again is not None else job
        events = self.kept(job)
        if events is None:
            return None
        self.replayed += 1
        return Opened(job, order.spec, earlier=tuple(events))

    def kept(self, job: Job) -> list[Event] | None:
        """The events of an answer that is kept; None where there is none, its time is over, or nothing here can read it."""
        if not job.output or job.result_expires_at_ms <= self._clock_ms():
            return None
        try:
            return replay(self.unseal(job.output, job.id), job.price_micros, job.placement)
        except (SealBroken, ValueError) as error:
            log.warning("the answer of job %s is lost: %s", job.id, error)
            return None

    # ---- running

    async def perform(self, opened: Opened, order: Order, emit: Emit) -> Job:
        """Runs a job that is in the books and settles it, however it ends. Gives the job as it ended.

        Raises what the dispatcher raised, once the hold is released; JobCancelled, TakenOver.
        """
        live = self.live[opened.job.id] = LiveJob(opened.job, opened.opening, begun_s=trio.current_time())
        try:
            with live.scope:
                return await self._perform(live, opened, order, emit)
            raise TakenOver() if live.is_lost else JobCancelled()
        finally:
            del self.live[opened.job.id]
            live.ended.set()

    async def _perform(self, live: LiveJob, opened: Opened, order: Order, emit: Emit) -> Job:
        meter, transcript, spec = Meter(), Transcript(), opened.spec
        last: list[Event] = []
        is_cached = self._is_cached(order)

        async def keep(event: Event) -> None:
            nonlocal is_cached
            order.check(event)
            if order.keep_s > 0 or isinstance(event, ChoiceResult):
                transcript.add(event)
            elif is_cached:
                is_cached = _has_room(transcript, event)
            is_last = isinstance(event, ChoiceResult) and len(transcript.results) == len(spec.choices)
            if order.delivers and not (is_last or isinstance(event, Accepted)):
                await live.wait_open()  # no word reaches the Consumer before the hold is on disk; the last one waits for the bill anyway
            if not live.first_word_s and _is_word(event):
                live.first_word_s = trio.current_time()
            if isinstance(event, ChoiceResult):
                meter.choice(event.choice).ended_s = trio.current_time()
            if order.input and (state := _entered(event, live.job.state)) is not None:
                await self._note(live, meter, state)
            if is_last:
                last.append(event)
            else:
                await emit(event)

        try:
            await self._dispatcher.run(spec, keep, meter)
        except Refused as refusal:
            await self._fail(live, meter, refusal)
            raise
        except BaseException as error:
            never_opened = live.opening is not None and isinstance(error, BooksRefused | BooksUnavailable)
            if not never_opened:  # or else there is nothing to settle
                await self._abandon(live, opened, order, meter, transcript)
            raise
        job = await self._succeed(live, opened, order, meter, transcript)
        if is_cached and self.answers is not None and order.cache is not None:
            self.answers.keep(order.cache, job, _content_hash(meter), transcript)
        for event in (Settled(job.price_micros, job.placement), *last):
            await emit(event)
        return job

    def _is_cached(self, order: Order) -> bool:
        return self.answers is not None and order.cache is not None and order.cache.writes

    async def _note(self, live: LiveJob, meter: Meter, state: JobState) -> None:
        """Jobs that others look at show where they run and how far they are; for a chat it is enough when it ends.

        One that another Coordinator has taken over ends here: its Island need not go on.
        """
        placed = _placed(meter)
        if placed is None:
            return
        try:
            live.job = await self.books.do(StartJob(live.job.id, self.me.owner, self.me.boot, placed, state))
        except BooksUnavailable as error:
            log.debug("job %s does not show its state: %s", live.job.id, error)  # it shows its end, which is what counts
        except BooksRefused as refused:
            log.warning("job %s goes on elsewhere: %s", live.job.id, refused)
            live.is_lost, self.taken_over = True, self.taken_over + 1
            live.scope.cancel()

    # ---- settling

    async def _succeed(self, live: LiveJob, opened: Opened, order: Order, meter: Meter, transcript: Transcript) -> Job:
        results, job, now_s = transcript.results, live.job, trio.current_time()
        limit = job.bid_micros // len(order.spec.choices)
        earned = [
            earned_of(result, metered, agreed_ask(metered, opened.quote), limit, now_s)
            for result in results
            for metered in [meter.choice(result.choice)]
        ]
        now_ms = self._clock_ms()
        output, expires_at_ms = b"", 0
        if order.keep_s > 0:
            output, expires_at_ms = self._seal(transcript.pack(), job.id), now_ms + int(order.keep_s * 1000)
        latency_us, first_word_us = live.times_us(now_s) if job.ab_test else (0, 0)
        outcome = Outcome(
            JobState.SUCCEEDED,
            prompt_tokens=sum(result.prompt_tokens for result in results),
            completion_tokens=sum(result.completion_tokens for result in results),
            compute_ms=sum(each.compute_ms for choice in earned for each in choice),
            output=output,
            result_expires_at_ms=expires_at_ms,
            placed=_placed(meter),
            latency_us=latency_us,
            first_word_us=first_word_us,
        )
        settled = await self._settle(live, outcome, tuple(each for choice in earned for each in choice), _failed(meter))
        for result, choice in zip(results, earned, strict=True):
            metered = meter.choice(result.choice)
            price, compute_ms = sum(each.amount for each in choice), sum(each.compute_ms for each in choice)
            ask = agreed_ask(metered, opened.quote)
            clearing = Clearing(job.cargo, now_ms, ask, price, result.completion_tokens, compute_ms)
            self._market.cleared(clearing, job.account, metered.island)
        return settled

    async def _fail(self, live: LiveJob, meter: Meter, refusal: Refused) -> None:
        outcome = Outcome(JobState.FAILED, error_code=refusal.code.value, error_message=_brief(refusal.message), placed=_placed(meter))
        await self._settle(live, outcome, (), _failed(meter))

    async def _abandon(self, live: LiveJob, opened: Opened, order: Order, meter: Meter, transcript: Transcript) -> None:
        """Nobody waits for the end: the client has gone, the account has cancelled, or we are going down.

        What can be run again and is wanted stays open when we go down; whoever comes next takes it over.
        """
        if live.is_lost or (order.input and not live.scope.cancel_called):
            log.info("job %s is left to another Coordinator", live.job.id)
            return
        with trio.CancelScope(shield=True):
            earned: list[Earned] = []
            if order.delivers or live.was_read:
                limit, now_s = live.job.bid_micros // len(order.spec.choices), trio.current_time()
                ended = {result.choice: result for result in transcript.results}
                for index, metered in meter.choices.items():
                    ask = agreed_ask(metered, opened.quote)
                    if index in ended:
                        earned += earned_of(ended[index], metered, ask, limit, now_s)
                    else:
                        earned += owed_for_delivered(metered, ask, limit, now_s)
            tokens = sum(metered.tokens for metered in meter.choices.values())
            code = "coordinator_lost" if self.is_leaving and not live.scope.cancel_called else GIVEN_UP
            outcome = Outcome(JobState.CANCELLED, completion_tokens=tokens, error_code=code, placed=_placed(meter))
            try:
                await self._settle(live, outcome, tuple(earned), _failed(meter))
            except (Refused, BooksRefused, BooksUnavailable) as error:
                log.warning("job %s was not settled: %s", live.job.id, error)

    async def _settle(self, live: LiveJob, outcome: Outcome, earned: tuple[Earned, ...], failed: tuple[str, ...]) -> Job:
        opening = live.opening
        if opening is None or not opening.waits:
            await live.wait_open()
        job, me = live.job, self.me
        settling = SettleJob(job.id, job.account, job.cargo, me.owner, me.boot, outcome, earned, failed, unit_of(job))
        try:
            if live.opening is None:
                live.job = await self.books.do(settling)
            else:
                _, live.job = await self.openings.join(live.opening, settling).wait()
                live.opening = None
        except BooksUnavailable:
            if len(self._unsettled) < UNSETTLED_MAX:
                self._unsettled.append(settling if job.can_rerun or outcome.state is not JobState.SUCCEEDED else _unpaid(settling))
            raise
        except BooksRefused as refused:
            if refused.why not in (Why.NOT_OWNER, Why.STATE):
                raise
            self.taken_over += 1
            raise TakenOver() from refused
        return live.job

    async def settle_again(self) -> None:
        """Jobs that could not be settled while the books were away. Raises BooksUnavailable when they still are."""
        while self._unsettled:
            settling = self._unsettled[0]
            try:
                await self._settle_late(settling)
            except BooksUnavailable:
                self._unsettled.rotate(-1)  # the next time begins with another one: what never can be must not keep the others
                raise
            self._unsettled.popleft()

    async def _settle_late(self, settling: SettleJob) -> None:
        try:
            await self.books.do(settling)
        except BooksRefused as refused:
            log.warning("job %s was not settled later either: %s", settling.job_id, refused)
            if refused.why is Why.STATE and settling.outcome.state is JobState.FAILED:
                await self._give_back(settling)

    async def _give_back(self, settling: SettleJob) -> None:
        """A job may be paid although its client heard that it could not be: the commit went through, and then the database was gone. Where
        its answer is kept he gets that by asking again; where not, he gets his credits."""
        job = await self.books.ask(job_queries.job_of, settling.job_id, settling.account)
        if job is None or job.output:
            return
        charges = await self.books.ask(job_queries.charges_of, job.id)
        given = await self.books.do(Refund(tuple(charges)))
        self.refunded += given > 0
        log.warning("job %s was paid, and its client was told that it failed: %d micro-credits back", job.id, given)

    @property
    def unsettled(self) -> set[str]:
        """Jobs that wait for the books to come back."""
        return {settling.job_id for settling in self._unsettled}

    @property
    def is_busy(self) -> bool:
        """Whether a job runs that should end here: all but those that can be run again and have not begun."""
        return any(not live.job.can_rerun or live.job.state is not JobState.SUBMITTED for live in self.live.values())

    def cancel(self, job_id: str) -> bool:
        """Ends a job that runs here; False where none does."""
        live = self.live.get(job_id)
        if live is None:
            return False
        live.scope.cancel()
        return True

    def note_read(self, job_id: str) -> None:
        """Words of a job that runs here have reached its account: they count, whatever becomes of the rest."""
        live = self.live.get(job_id)
        if live is not None:
            live.was_read = True

    def _seal(self, value: bytes, job_id: str) -> bytes:
        return self._sealer.seal(value, job_id, self._random_bytes(NONCE_BYTES))

    def unseal(self, value: bytes, job_id: str) -> bytes:
        """Raises SealBroken."""
        return self._sealer.open(value, job_id)


def retold(opened: Opened) -> Sequence[Event]:
    """What the first try of a request came to, and whose it was."""
    job = opened.job
    return Replayed(job.id, job.ab_test, job.ab_arm), *(opened.earlier or ())


def _unpaid(settling: SettleJob) -> SettleJob:
    """The same job as a failure: whoever asked was told that the books are away, so he does not pay."""
    outcome = replace(settling.outcome, state=JobState.FAILED, error_code="books_unavailable", output=b"", result_expires_at_ms=0)
    return replace(settling, outcome=outcome, earned=())


def _entered(event: Event, state: JobState) -> JobState | None:
    """The state that an event brings a submitted job to, if it is another."""
    if isinstance(event, Accepted) and state is JobState.SUBMITTED:
        return JobState.ASSIGNED
    if isinstance(event, Text | Said) and state is not JobState.RUNNING:
        return JobState.RUNNING
    return None


def _is_word(event: Event) -> bool:
    """Whether it is of the answer itself, not of how far it is."""
    return isinstance(event, Text) or (isinstance(event, Said) and isinstance(event.line, TokenLine | ImageLine))


def _placed(meter: Meter) -> Placed | None:
    """Where the first choice went."""
    metered = meter.choices.get(0)
    if metered is None or metered.placed is None:
        return None
    why = json.dumps(explanation(metered.placed), separators=(",", ":"))
    return Placed(metered.island, metered.region, metered.ask, why)


def _content_hash(meter: Meter) -> str:
    """Of the Cargo that gave the first choice."""
    metered = meter.choices.get(0)
    return metered.placed.candidate.offer.content_hash if metered is not None and metered.placed is not None else ""


def _has_room(transcript: Transcript, event: Event) -> bool:
    """Adds an event that only a cache would keep; False where it is more than can be kept."""
    try:
        transcript.add(event)
    except Refused:
        return False
    return True


def _failed(meter: Meter) -> tuple[str, ...]:
    return tuple(peer for metered in meter.choices.values() for peer in metered.failed)


def _brief(message: str) -> str:
    """An Island may say anything; a database takes no NUL."""
    return checks.made_printable(message)
