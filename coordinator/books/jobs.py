"""Jobs in the books: opened with a hold, settled with a charge or without, each once. Pure operations.

Theory of operation. A job belongs to one run of one Coordinator (``owner``, ``owner_boot``). Only that run may settle it, and only while
the job has not ended: the check and the charge are one transaction, so two Coordinators that both believe to own a job cannot both bill it.
When a Coordinator is gone another takes its jobs over (``Adopt``): what can be run again is, up to ``JOB_TRIES_MAX`` times; what cannot,
fails, and its hold is released.

Rules. The charge is posted in the transaction that ends the job, before the answer's last byte leaves. Input and output are sealed before
they come here (privacy/sealed_rows.py) and are emptied when their time is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from coordinator.books.ab_units import AB_UNITS, note_job, unit_of
from coordinator.books.accounts import (
    ISLANDS,
    PUBLISHERS,
    IslandRecord,
    Refill,
    island_of,
    karma_rows,
    pay_out,
)
from coordinator.books.errors import BooksRefused, Why
from coordinator.books.ledger import HOLDS, PlaceHold, PostHold, ReleaseHold, Share, balance_of, check_amount, user
from coordinator.books.rows import Address, Kind, Operation, Rows
from protocol import limits
from protocol.prices import Ask


class JobState(StrEnum):
    """mission.md: submitted, assigned, running, then one of the last three."""

    SUBMITTED = "submitted"
    ASSIGNED = "assigned"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
_BEFORE: dict[JobState, frozenset[JobState]] = {
    # state -> those that it may follow
    JobState.ASSIGNED: frozenset({JobState.SUBMITTED, JobState.ASSIGNED, JobState.RUNNING}),
    JobState.RUNNING: frozenset({JobState.SUBMITTED, JobState.ASSIGNED, JobState.RUNNING}),
    JobState.SUBMITTED: frozenset({JobState.SUBMITTED, JobState.ASSIGNED, JobState.RUNNING}),  # requeued
    **{state: frozenset({JobState.SUBMITTED, JobState.ASSIGNED, JobState.RUNNING}) for state in ENDED},
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request. Prices in micro-credits, times in Unix milliseconds (0: not yet).

    ``bid_micros`` is held. ``ask_…`` is what the chosen Island asked when the job was placed. ``fingerprint``: of account, address and
    body, by which a retried request finds its first try. ``can_rerun``: the input is kept, and nobody waits on a connection that died.
    ``parent``: the run that it is a part of (runs.py); empty for one of its own. ``ab_…``: the A/B test, arm and unit that it counts for
    (ab_units.py). ``latency_us``, ``first_word_us``: from where its Coordinator began it, in microseconds, measured for those only.
    ``rating``: what its account thinks of the answer, -1 or 1; 0: nothing.
    """

    id: str
    account: str
    cargo: str
    kind: str
    state: JobState
    priority: int
    bid_micros: int
    bid_source: str
    owner: str
    owner_boot: int
    created_at_ms: int
    policy: str = ""
    quote_id: str = ""
    holder: str = ""  # the Consumer's peer id where it takes its tokens itself
    fingerprint: str = ""
    can_rerun: bool = False
    cancel_wanted: bool = False
    tries: int = 1
    price_micros: int = 0
    island: str = ""
    region: str = ""
    ask_per_job: int = 0
    ask_per_1k_output: int = 0
    ask_per_second: int = 0
    started_at_ms: int = 0
    finished_at_ms: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    compute_ms: int = 0
    error_code: str = ""
    error_message: str = ""
    placement: str = ""
    input: bytes = b""
    output: bytes = b""
    result_expires_at_ms: int = 0
    parent: str = ""
    ab_test: str = ""
    ab_arm: str = ""
    ab_unit: str = ""
    latency_us: int = 0
    first_word_us: int = 0
    rating: int = 0

    @property
    def ask(self) -> Ask:
        return Ask(self.ask_per_job, self.ask_per_1k_output, self.ask_per_second)

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Request:
    """An idempotency key of an account (``id`` is both), and the job that it stands for."""

    id: str
    fingerprint: str
    job_id: str
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class ReceiptRecord:
    """An Island's signed word, kept; ``paid_micros`` is what the job paid for it."""

    id: str
    job_id: str
    island: str
    envelope: bytes
    paid_micros: int
    at_ms: int


JOBS = Kind("jobs", Job, "id")
REQUESTS = Kind("requests", Request, "id")
RECEIPTS = Kind("receipts", ReceiptRecord, "id")


def request_id(account: str, key: str) -> str:
    return f"{account}/{key}"


@dataclass(frozen=True, slots=True)
class OpenJob:
    """The job with its hold, and with its idempotency key where it has one. Raises BooksRefused: NO_CREDIT, NO_ACCOUNT, REUSED, RUNNING.

    ``floor_micros``: a bid that nobody named is cut to what the account has, as long as that is at least this. Gives the job as it is
    in the books: for a key that was used before that is the earlier job, which the caller replays or waits for.
    """

    job: Job
    hold_expires_at_ms: int
    floor_micros: int | None = None
    key: str = ""
    key_expires_at_ms: int = 0

    def _hold(self, amount: int) -> PlaceHold:
        return PlaceHold(self.job.id, user(self.job.account), amount, self.hold_expires_at_ms)

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield JOBS, self.job.id
        yield from self._hold(0).reads(rows)
        yield from Refill(self.job.account).reads(rows)
        if self.key:
            yield REQUESTS, request_id(self.job.account, self.key)
            request = rows.peek(REQUESTS, request_id(self.job.account, self.key))
            if request is not None:
                yield JOBS, request.job_id

    def news(self, rows: Rows) -> Iterable[Address]:
        return (JOBS, self.job.id), (HOLDS, self.job.id)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        known = rows.get(JOBS, self.job.id)
        if known is not None:
            return known
        if (earlier := earlier_of(self.job, self.key, rows, now_ms)) is not None:
            return earlier
        fork = rows.fork()  # a refill that does not suffice is not given
        Refill(self.job.account).apply(fork, now_ms)
        job = self._afforded(balance_of(fork, user(self.job.account)).available)
        self._hold(job.bid_micros).apply(fork, now_ms)
        rows.adopt(fork)
        rows.put(JOBS, job)
        if self.key:
            id = request_id(self.job.account, self.key)
            rows.put(REQUESTS, Request(id, self.job.fingerprint, self.job.id, self.key_expires_at_ms))
        return job

    def _afforded(self, available: int) -> Job:
        job = self.job
        if self.floor_micros is not None and self.floor_micros <= available < job.bid_micros:
            return replace(job, bid_micros=available)
        return job



def earlier_of(new: Job, key: str, rows: Rows, now_ms: int) -> Job | None:
    """The job that stands for an idempotency key already. Raises BooksRefused: REUSED, RUNNING."""
    request = rows.get(REQUESTS, request_id(new.account, key)) if key else None
    if request is None or request.expires_at_ms < now_ms:
        return None
    if request.fingerprint != new.fingerprint:
        raise BooksRefused(Why.REUSED, "this idempotency key was used with another request")
    job = rows.get(JOBS, request.job_id)
    if job is None or job.state in (JobState.FAILED, JobState.CANCELLED):
        return None  # what failed may be tried again under its key
    if not job.ended and not job.can_rerun:
        raise BooksRefused(Why.RUNNING, "a request with this idempotency key is still running")
    return job


@dataclass(frozen=True, slots=True)
class RecordJob:
    """A job that has ended already and costs nothing: its answer was in the cache. Gives the earlier one of its idempotency key. Raises
    BooksRefused: REUSED, RUNNING."""

    job: Job
    key: str = ""
    key_expires_at_ms: int = 0

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield JOBS, self.job.id
        if self.key:
            yield REQUESTS, request_id(self.job.account, self.key)
            request = rows.peek(REQUESTS, request_id(self.job.account, self.key))
            if request is not None:
                yield JOBS, request.job_id

    def news(self, rows: Rows) -> Iterable[Address]:
        return ((JOBS, self.job.id),)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        known = rows.get(JOBS, self.job.id)
        if known is not None:
            return known
        if (earlier := earlier_of(self.job, self.key, rows, now_ms)) is not None:
            return earlier
        rows.put(JOBS, self.job)
        if self.key:
            id = request_id(self.job.account, self.key)
            rows.put(REQUESTS, Request(id, self.job.fingerprint, self.job.id, self.key_expires_at_ms))
        return self.job


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a job runs, and at what ask."""

    island: str
    region: str
    ask: Ask
    placement: str = ""


def _mine(rows: Rows, job_id: str, owner: str, boot: int) -> Job:
    job = rows.get(JOBS, job_id)
    if job is None:
        raise BooksRefused(Why.NO_JOB, f"there is no job {job_id}")
    if (job.owner, job.owner_boot) != (owner, boot):
        raise BooksRefused(Why.NOT_OWNER, f"job {job_id} has been taken over by another Coordinator")
    return job


def _step(job: Job, state: JobState) -> None:
    if job.state not in _BEFORE[state]:
        raise BooksRefused(Why.STATE, f"job {job.id} is {job.state} and cannot become {state}")


def _where(job: Job, placed: Placed | None) -> dict[str, Any]:
    """The columns that say where a job runs."""
    if placed is None:
        return {}
    return {
        "island": placed.island,
        "region": placed.region,
        "placement": placed.placement or job.placement,
        "ask_per_job": placed.ask.per_job,
        "ask_per_1k_output": placed.ask.per_1k_output,
        "ask_per_second": placed.ask.per_second,
    }


@dataclass(frozen=True, slots=True)
class StartJob:
    """An Island has taken the job."""

    job_id: str
    owner: str
    owner_boot: int
    placed: Placed
    state: JobState = JobState.RUNNING

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((JOBS, self.job_id),)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        job = _mine(rows, self.job_id, self.owner, self.owner_boot)
        _step(job, self.state)
        job = replace(job, **_where(job, self.placed), state=self.state, started_at_ms=job.started_at_ms or now_ms)
        rows.put(JOBS, job)
        return job


@dataclass(frozen=True, slots=True)
class Earned:
    """What one Island is owed for a job: by its receipt, or, with no receipt, by what the receiver counted."""

    island: str
    amount: int
    compute_ms: int
    receipt: bytes = b""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    state: JobState
    prompt_tokens: int = 0
    completion_tokens: int = 0
    compute_ms: int = 0
    error_code: str = ""
    error_message: str = ""
    output: bytes = b""
    result_expires_at_ms: int = 0
    placed: Placed | None = None
    latency_us: int = 0
    first_word_us: int = 0


@dataclass(frozen=True, slots=True)
class Settlement:
    """Who is paid for work, and what it does to Islands' karma. ``id``: of the hold. A part of operations, not one itself.

    ``failed``: Islands that broke on the way. ``account``: who pays; his own Islands earn no karma.
    """

    id: str
    account: str
    cargo: str
    earned: tuple[Earned, ...]
    failed: tuple[str, ...]
    succeeded: bool

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield PUBLISHERS, self.cargo
        for peer in self._peers():
            yield ISLANDS, peer
        if self.is_ready(rows):
            yield from PostHold(self.id, user(self.account), self.shares(rows)).reads(rows)
            for peer in self._peers():
                island = rows.get(ISLANDS, peer)
                if island is not None and island.account and not island.earns:
                    yield from self._pay_out(island).reads(rows)

    def check(self) -> None:
        """Raises BooksRefused(BAD_AMOUNT) for less than nothing, which would take from one to give to another."""
        for earned in self.earned:
            check_amount(earned.amount, low=0)
            check_amount(earned.compute_ms, low=0)

    def news(self, rows: Rows) -> Iterable[Address]:
        """The transfers, where the hold has still to be posted."""
        return PostHold(self.id, user(self.account), self.shares(rows)).news(rows) if self.is_ready(rows) else ()

    def is_ready(self, rows: Rows) -> bool:
        """Whether it is known who will be paid."""
        return rows.has(PUBLISHERS, self.cargo) and all(rows.has(ISLANDS, peer) for peer in self._peers())

    def _peers(self) -> dict[str, None]:
        return dict.fromkeys((*(earned.island for earned in self.earned), *self.failed))

    def _pay_out(self, island: IslandRecord) -> Operation[int]:
        return pay_out(island, island.account, f"escrow:{self.id}:{island.peer}")

    def shares(self, rows: Rows) -> tuple[Share, ...]:
        """One share for each payee: Islands, and the publisher of each charge."""
        totals: dict[str, int] = {}
        for earned in self.earned:
            for payee, amount in self._parts(rows, earned):
                totals[payee] = totals.get(payee, 0) + amount
        return tuple(Share(payee, amount) for payee, amount in totals.items())

    def paid_for(self, rows: Rows, earned: Earned) -> int:
        """Micro-credits that this charge costs the account."""
        return sum(amount for _, amount in self._parts(rows, earned))

    def _parts(self, rows: Rows, earned: Earned) -> Iterable[tuple[str, int]]:
        """Who is paid what of a charge: the publisher his part, rounded down, the Island the rest. Nobody pays himself."""
        publisher, cut = rows.get(PUBLISHERS, self.cargo), self._cut(rows, earned)
        if earned.amount > cut and not self._is_own(rows, earned):
            yield (rows.get(ISLANDS, earned.island) or IslandRecord(earned.island)).payee, earned.amount - cut
        if cut and publisher is not None and publisher.account != self.account:
            yield user(publisher.account), cut

    def _cut(self, rows: Rows, earned: Earned) -> int:
        """The publisher's part, rounded down."""
        publisher = rows.get(PUBLISHERS, self.cargo)
        return earned.amount * publisher.share_ppm // 1_000_000 if publisher is not None else 0

    def _is_own(self, rows: Rows, earned: Earned) -> bool:
        """Whether the account pays itself; its Island's escrow is its own too."""
        island = rows.get(ISLANDS, earned.island)
        return island is not None and island.account == self.account

    def note_earnings(self, rows: Rows, now_ms: int) -> None:
        """Adds to what each Island has earned in all."""
        for earned in self.earned:
            if earned.amount and not self._is_own(rows, earned):
                island = island_of(rows, earned.island, now_ms)
                rows.put(ISLANDS, replace(island, earned_micros=island.earned_micros + earned.amount - self._cut(rows, earned)))

    def karma(self, rows: Rows, now_ms: int) -> None:
        """Puts what it did to Islands' karma and earnings; pays escrow out where earning begins."""
        self.note_earnings(rows, now_ms)  # first: karma may change who is paid
        events: list[tuple[str, int | None]] = []
        if self.succeeded:
            events += [(earned.island, earned.compute_ms) for earned in self.earned]
        events += [(peer, None) for peer in self.failed]
        for index, (peer, compute_ms) in enumerate(events):
            before = island_of(rows, peer, now_ms)
            if before.account == self.account:
                continue
            after = karma_rows(rows, peer, compute_ms, self.id, now_ms, index)
            if before.account and after.earns and not before.earns:
                self._pay_out(before).apply(rows, now_ms)


@dataclass(frozen=True, slots=True)
class SettleJob:
    """Ends a job: pays what was earned out of its hold and gives the rest back.

    ``account`` is the job's. Saying it again after it went through gives the job as it ended. Raises BooksRefused: NOT_OWNER, STATE,
    OVER_HOLD, BAD_AMOUNT.
    """

    job_id: str
    account: str
    cargo: str
    owner: str
    owner_boot: int
    outcome: Outcome
    earned: tuple[Earned, ...] = ()
    failed: tuple[str, ...] = ()
    unit: str = ""  # of an A/B test, in whose row it is counted

    def _settlement(self) -> Settlement:
        succeeded = self.outcome.state is JobState.SUCCEEDED
        return Settlement(self.job_id, self.account, self.cargo, self.earned, self.failed, succeeded)

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield JOBS, self.job_id
        if self.unit:
            yield AB_UNITS, self.unit
        yield from ReleaseHold(self.job_id, user(self.account)).reads(rows)
        yield from self._settlement().reads(rows)

    def news(self, rows: Rows) -> Iterable[Address]:
        return self._settlement().news(rows)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        job = _mine(rows, self.job_id, self.owner, self.owner_boot)
        if job.ended and job.state is self.outcome.state:
            return job
        _step(job, self.outcome.state)
        fork = rows.fork()  # a payee's balance may be full
        job = self._settled(fork, job, now_ms)
        rows.adopt(fork)
        return job

    def _settled(self, rows: Rows, job: Job, now_ms: int) -> Job:
        settlement = self._settlement()
        settlement.check()
        shares = settlement.shares(rows)
        if shares:
            PostHold(self.job_id, user(job.account), shares).apply(rows, now_ms)
        else:
            ReleaseHold(self.job_id, user(job.account)).apply(rows, now_ms)
        settlement.karma(rows, now_ms)
        for index, earned in enumerate(self.earned):
            if earned.receipt:
                id = f"{self.job_id}:{index}"
                paid = settlement.paid_for(rows, earned)
                rows.put(RECEIPTS, ReceiptRecord(id, self.job_id, earned.island, earned.receipt, paid, now_ms))
        job = self._ended(job, sum(share.amount for share in shares), now_ms)
        rows.put(JOBS, job)
        if self.unit and self.unit == unit_of(job):
            note_job(rows, job)
        return job

    def _ended(self, job: Job, price: int, now_ms: int) -> Job:
        outcome = self.outcome
        return replace(
            job,
            **_where(job, outcome.placed),
            state=outcome.state,
            price_micros=price,
            finished_at_ms=now_ms,
            started_at_ms=job.started_at_ms or (now_ms if outcome.placed is not None else 0),
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            compute_ms=outcome.compute_ms,
            error_code=outcome.error_code,
            error_message=outcome.error_message,
            input=b"",  # nobody runs it again
            output=outcome.output,
            result_expires_at_ms=outcome.result_expires_at_ms,
            latency_us=outcome.latency_us,
            first_word_us=outcome.first_word_us,
        )


@dataclass(frozen=True, slots=True)
class Adopt:
    """Another run of a Coordinator takes a job over whose owner is gone: to run it again, or to end it.

    Saying it again after it went through gives the job as it is: who has taken it must hear so, or nobody runs it.
    """

    job_id: str
    account: str
    from_owner: str
    from_boot: int
    owner: str
    owner_boot: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield JOBS, self.job_id
        job = rows.peek(JOBS, self.job_id)
        if job is not None and job.ab_test:
            yield AB_UNITS, unit_of(job)
        yield from ReleaseHold(self.job_id, user(self.account)).reads(rows)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        """The job: SUBMITTED where it is to be run again, FAILED where not. Raises BooksRefused(NOT_OWNER) when somebody was faster."""
        known = rows.get(JOBS, self.job_id)
        if known is not None and (known.owner, known.owner_boot) == (self.owner, self.owner_boot):
            return known
        job = _mine(rows, self.job_id, self.from_owner, self.from_boot)
        if job.ended:
            raise BooksRefused(Why.STATE, f"job {self.job_id} has ended")
        job = replace(job, owner=self.owner, owner_boot=self.owner_boot)
        if job.cancel_wanted:
            ended = replace(job, state=JobState.CANCELLED)
        elif not job.can_rerun or job.tries >= limits.JOB_TRIES_MAX:
            ended = replace(job, state=JobState.FAILED, error_code="coordinator_lost", error_message="its Coordinator went away")
        else:
            job = replace(job, state=JobState.SUBMITTED, tries=job.tries + 1, island="", region="")
            rows.put(JOBS, job)
            return job
        ReleaseHold(self.job_id, user(self.account)).apply(rows, now_ms)
        ended = replace(ended, finished_at_ms=now_ms, input=b"")
        rows.put(JOBS, ended)
        if ended.ab_test:
            note_job(rows, ended)
        return ended


@dataclass(frozen=True, slots=True)
class WantCancel:
    """The account does not want a job any more; its owner sees it and ends it. Gives the job, which may have ended before."""

    job_id: str
    account: str

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((JOBS, self.job_id),)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        job = rows.get(JOBS, self.job_id)
        if job is None or job.account != self.account:
            raise BooksRefused(Why.NO_JOB, f"there is no job {self.job_id}")
        if job.ended or job.cancel_wanted:
            return job
        job = replace(job, cancel_wanted=True)
        rows.put(JOBS, job)
        return job
