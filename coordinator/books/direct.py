"""Jobs whose tokens the Coordinator never sees: one hold for each ticket, paid by receipt and signed count. Pure operations.

Theory of operation. On the direct path a job may take several tickets (another attempt, another choice), each at its own Island and each
owed by itself, so each has a hold of its own; the job's row adds them up. A ticket is settled once, by whoever comes first: the Consumer,
who reports, or the Island, which claims. A ticket that the Consumer calls unused is freed at once; an Island that shows a count signed by
him later is paid all the same, out of what the account has then.

Rules. The bid is set when the job is opened: what its tickets have paid and what is held for its open ones never passes it, so a Consumer
who says what he got pays no more, however many Islands his answer took. One who signs for more than he says pays that beside his bid. An
Island that was gone in the middle of an answer is paid for its part of it only out of what the bid leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from coordinator.books.accounts import Refill
from coordinator.books.errors import BooksRefused, Why
from coordinator.books.jobs import (
    JOBS,
    RECEIPTS,
    Earned,
    Job,
    JobState,
    ReceiptRecord,
    Settlement,
)
from coordinator.books.ledger import (
    BALANCES,
    HOLDS,
    HoldState,
    Move,
    PlaceHold,
    PostHold,
    ReleaseHold,
    TransferKind,
    balance_of,
    user,
)
from coordinator.books.rows import Address, Kind, Rows
from protocol.prices import Ask, format_credits


class TicketState(StrEnum):
    OPEN = "open"
    PAID = "paid"
    FREED = "freed"  # without pay, on the Consumer's word or since nobody came
    BROKEN = "broken"  # its Island was gone before the answer was whole; paid late, if at all


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A ticket that was given to a Consumer. ``id``: hex of its hash, also the id of its hold. The ask is that of all stages together."""

    id: str
    job_id: str
    account: str
    cargo: str
    island: str
    ask_per_job: int
    ask_per_1k_output: int
    ask_per_second: int
    limit_micros: int
    state: TicketState
    paid_micros: int
    paid_tokens: int
    issued_at_ms: int

    @property
    def ask(self) -> Ask:
        return Ask(self.ask_per_job, self.ask_per_1k_output, self.ask_per_second)


TICKETS = Kind("tickets", TicketRecord, "id")


def left_of(job: Job, tickets: Iterable[TicketRecord]) -> int:
    """Micro-credits of a job's bid that are neither paid nor held for one of its tickets."""
    held = sum(ticket.limit_micros for ticket in tickets if ticket.state is TicketState.OPEN and ticket.job_id == job.id)
    return max(0, job.bid_micros - job.price_micros - held)


@dataclass(frozen=True, slots=True)
class OpenDirectJob:
    """The row of a job whose holds come with its tickets. Gives it as it is where it is there already."""

    job: Job

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield JOBS, self.job.id
        yield from Refill(self.job.account).reads(rows)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        """Raises BooksRefused: NO_ACCOUNT, or NO_JOB for an id that is somebody else's."""
        known = rows.get(JOBS, self.job.id)
        if known is None:
            Refill(self.job.account).apply(rows, now_ms)
            rows.put(JOBS, self.job)
            return self.job
        if (known.account, known.holder) != (self.job.account, self.job.holder):
            raise BooksRefused(Why.NO_JOB, f"there is no job {self.job.id}")
        if known.ended:
            raise BooksRefused(Why.STATE, f"job {self.job.id} is over")
        return known


@dataclass(frozen=True, slots=True)
class GrantTicket:
    """Records a ticket with its hold.

    ``others``: ids of all tickets that the job has had before. Raises BooksRefused: NO_CREDIT; OVER_HOLD where the job's bid does not leave
    the ticket's limit; DIFFERS for a job that has tickets where the caller knows of none; NO_JOB, STATE.
    """

    ticket: TicketRecord
    expires_at_ms: int
    region: str = ""
    placement: str = ""
    others: tuple[str, ...] = ()

    def _hold(self) -> PlaceHold:
        return PlaceHold(self.ticket.id, user(self.ticket.account), self.ticket.limit_micros, self.expires_at_ms)

    def news(self, rows: Rows) -> Iterable[Address]:
        return (TICKETS, self.ticket.id), (HOLDS, self.ticket.id)

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield TICKETS, self.ticket.id
        yield JOBS, self.ticket.job_id
        yield from self._hold().reads(rows)
        for other in self.others:
            yield TICKETS, other

    def apply(self, rows: Rows, now_ms: int) -> TicketRecord:
        known = rows.get(TICKETS, self.ticket.id)
        if known is not None:
            return known
        job = self._checked(rows)
        self._hold().apply(rows, now_ms)
        rows.put(TICKETS, self.ticket)
        ask = self.ticket.ask
        changed = replace(
            job,
            state=JobState.RUNNING,
            island=self.ticket.island,
            region=self.region,
            placement=self.placement or job.placement,
            started_at_ms=job.started_at_ms or now_ms,
            ask_per_job=ask.per_job,
            ask_per_1k_output=ask.per_1k_output,
            ask_per_second=ask.per_second,
        )
        rows.put(JOBS, changed)
        return self.ticket

    def _checked(self, rows: Rows) -> Job:
        """The job, whose bid leaves what this ticket may cost."""
        job = rows.get(JOBS, self.ticket.job_id)
        if job is None:
            raise BooksRefused(Why.NO_JOB, f"there is no job {self.ticket.job_id}")
        if job.ended:
            raise BooksRefused(Why.STATE, f"job {job.id} is over")
        if job.started_at_ms and not self.others:
            raise BooksRefused(Why.DIFFERS, f"job {job.id} has tickets already")
        records = [rows.get(TICKETS, other) for other in self.others]
        left = left_of(job, [record for record in records if record is not None])
        if self.ticket.limit_micros > left:
            said, bid = format_credits(left), format_credits(job.bid_micros)
            raise BooksRefused(Why.OVER_HOLD, f"of the job's bid of {bid} credits {said} are left")
        return job


@dataclass(frozen=True, slots=True)
class SettleTicket:
    """Pays a ticket, or frees it where nothing was earned. Settled before, it stays as it was and is given.

    ``tokens``: that are to be paid for. ``is_claim``: the Island comes with a count that the Consumer has signed; where that says more than
    the Consumer reported, the rest is paid too, out of what the account has; ``is_within_bid``, or for a ticket that was settled as
    ``is_broken``, only as far as the job's bid goes. ``failed``: Islands that the Coordinator believes to have failed.

    Raises BooksRefused: NO_JOB, NO_CREDIT (then).
    """

    id: str
    job_id: str
    account: str
    cargo: str
    earned: tuple[Earned, ...]
    tokens: int
    prompt_tokens: int
    succeeded: bool
    failed: tuple[str, ...] = ()
    is_claim: bool = False
    is_broken: bool = False
    is_within_bid: bool = False

    def _settlement(self, earned: tuple[Earned, ...] | None = None) -> Settlement:
        return Settlement(self.id, self.account, self.cargo, self.earned if earned is None else earned, self.failed, self.succeeded)

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield TICKETS, self.id
        yield JOBS, self.job_id
        yield HOLDS, self.id
        yield BALANCES, user(self.account)
        yield from self._settlement().reads(rows)
        for index in range(len(self.earned)):
            yield RECEIPTS, f"{self.id}:{index}"
        ticket = rows.peek(TICKETS, self.id)
        if self.is_claim and ticket is not None and self._settlement().is_ready(rows):
            for move in self._moves(rows, self._late(rows, ticket)):
                yield from move.reads(rows)

    def apply(self, rows: Rows, now_ms: int) -> TicketRecord:
        ticket, job = rows.get(TICKETS, self.id), rows.get(JOBS, self.job_id)
        if ticket is None or job is None or (ticket.account, ticket.job_id) != (self.account, self.job_id):
            raise BooksRefused(Why.NO_JOB, "this ticket was not issued here")
        self._settlement().check()
        fork = rows.fork()
        settle = self._settle_open if ticket.state is TicketState.OPEN else self._settle_late
        settled = settle(fork, ticket, job, now_ms)
        rows.adopt(fork)
        return settled

    def _settle_open(self, rows: Rows, ticket: TicketRecord, job: Job, now_ms: int) -> TicketRecord:
        shares = self._settlement().shares(rows)
        if shares:
            PostHold(self.id, user(self.account), shares).apply(rows, now_ms)
        else:
            ReleaseHold(self.id, user(self.account)).apply(rows, now_ms)
        self._settlement().karma(rows, now_ms)
        return self._note(rows, ticket, job, sum(share.amount for share in shares), now_ms)

    def _settle_late(self, rows: Rows, ticket: TicketRecord, job: Job, now_ms: int) -> TicketRecord:
        late = self._late(rows, ticket, job) if self.is_claim else ()
        moves = self._moves(rows, late)
        if not moves:
            return ticket
        wanted, payer = sum(move.amount for move in moves), balance_of(rows, user(self.account))
        if payer.available < wanted:
            raise BooksRefused(Why.NO_CREDIT, "the Consumer had reported less than he signed, and has no credits left")
        for move in moves:
            move.apply(rows, now_ms)
        if ticket.state is TicketState.FREED:
            self._settlement(late).karma(rows, now_ms)
        else:  # its karma was earned when it was settled first
            self._settlement(late).note_earnings(rows, now_ms)
        return self._note(rows, ticket, job, wanted, now_ms)

    def _note(self, rows: Rows, ticket: TicketRecord, job: Job, price: int, now_ms: int) -> TicketRecord:
        is_paid = bool(price) or self.succeeded
        state = TicketState.PAID if is_paid else TicketState.FREED
        if self.is_broken or ticket.state is TicketState.BROKEN:
            state = TicketState.BROKEN
        tokens = max(self.tokens, ticket.paid_tokens) if is_paid else ticket.paid_tokens
        changed = replace(ticket, state=state, paid_micros=ticket.paid_micros + price, paid_tokens=tokens)
        rows.put(TICKETS, changed)
        compute_ms = 0 if ticket.state is TicketState.PAID else sum(earned.compute_ms for earned in self.earned)
        rows.put(
            JOBS,
            replace(
                job,
                price_micros=job.price_micros + price,
                completion_tokens=job.completion_tokens + tokens - ticket.paid_tokens,
                prompt_tokens=max(job.prompt_tokens, self.prompt_tokens),
                compute_ms=job.compute_ms + compute_ms,
            ),
        )
        for index, earned in enumerate(self.earned):
            if earned.receipt:
                paid = self._settlement().paid_for(rows, earned)
                rows.put(RECEIPTS, ReceiptRecord(f"{self.id}:{index}", self.job_id, earned.island, earned.receipt, paid, now_ms))
        return changed

    def _late(self, rows: Rows, ticket: TicketRecord, job: Job | None = None) -> tuple[Earned, ...]:
        """What is due beyond what was paid, in the proportion of what was earned in all. Without ``job`` as if its bid were endless."""
        settlement = self._settlement()
        costs = [settlement.paid_for(rows, earned) for earned in self.earned]
        total = sum(costs)
        due = total - ticket.paid_micros
        if job is not None and (self.is_within_bid or ticket.state is TicketState.BROKEN):
            due = min(due, job.bid_micros - job.price_micros)
        if ticket.state is TicketState.OPEN or due <= 0 or self.tokens <= ticket.paid_tokens:
            return ()
        late = [replace(each, amount=due * each.amount // total) for each in self.earned]
        rest = due - sum(settlement.paid_for(rows, each) for each in late)
        last = max(index for index, cost in enumerate(costs) if cost)
        late[last] = replace(late[last], amount=late[last].amount + rest)
        return tuple(late)

    def _moves(self, rows: Rows, late: tuple[Earned, ...]) -> list[Move]:
        """Charges without a hold."""
        shares = self._settlement(late).shares(rows) if late else ()
        prefix = f"{self.id}.late{self.tokens}"
        return [
            Move(f"{prefix}:{index}", user(self.account), share.account, share.amount, TransferKind.CHARGE, self.id)
            for index, share in enumerate(shares)
        ]


@dataclass(frozen=True, slots=True)
class ShortenHold:
    """A ticket of which the Consumer says nothing: its hold stays for a little while, for the Island may have more to say."""

    id: str
    account: str
    expires_at_ms: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((HOLDS, self.id),)

    def apply(self, rows: Rows, now_ms: int) -> None:
        hold = rows.get(HOLDS, self.id)
        if hold is not None and hold.account == user(self.account) and hold.state is HoldState.PENDING:
            rows.put(HOLDS, replace(hold, expires_at_ms=min(hold.expires_at_ms, self.expires_at_ms)))


@dataclass(frozen=True, slots=True)
class EndDirectJob:
    """The Consumer says how his job ended; an empty ``holder`` is the Coordinator itself, after everything has expired."""

    job_id: str
    account: str
    holder: str
    state: JobState
    error_code: str = ""
    error_message: str = ""

    def reads(self, rows: Rows) -> Iterable[Address]:
        return (JOBS, self.job_id), (BALANCES, user(self.account))

    def apply(self, rows: Rows, now_ms: int) -> tuple[Job, int]:
        """The job, and what the account has free. Raises BooksRefused(NO_JOB)."""
        job = rows.get(JOBS, self.job_id)
        if job is None or job.account != self.account or self.holder not in ("", job.holder):
            raise BooksRefused(Why.NO_JOB, f"there is no job {self.job_id}")
        if not job.ended:
            code, text = self.error_code, self.error_message
            job = replace(job, state=self.state, finished_at_ms=now_ms, error_code=code, error_message=text)
            rows.put(JOBS, job)
        return job, balance_of(rows, user(self.account)).available
