"""The Coordinator's half of the direct path: tickets to Consumers, and the pay for what Islands did with them (see direct_port.DirectDesk).

Theory of operation. A bridge asks for a ticket; the books open its job, reserve what the ticket may cost, and the ticket says whose peer id
may use it and how often that peer has to sign what it received. Whoever reports first settles the ticket: the Consumer, with the Island's
receipt and his own last count, or the Island, with its receipt and the last count that it was given. Either way it is paid for what was
counted and signed, by the ask that the ticket was issued at, never above its limit.

Rules. What was not signed is not paid: a receipt alone proves nothing, since the Consumer may never have got the tokens. Where a job goes
on elsewhere, its broken attempt is settled before the next ticket is granted, by the count that the bridge says with PlaceFreed; the next
ticket's limit is cut to what the bid then leaves. So the bid holds for whoever says what he got. Who says less is found out by the Island's
claim, and pays that beside his bid.

A Consumer's word alone harms no Island. An Island has failed where the Coordinator sees that it has gone too, in the middle of an answer:
it is not paid for that part, as on the Coordinator's own path, and loses karma once in each of its runs. Or where the Consumer says that
its worker died, and has paid for what came before.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from coordinator.books import direct_queries
from coordinator.books.books import Books
from coordinator.books.direct import (
    EndDirectJob,
    GrantTicket,
    OpenDirectJob,
    SettleTicket,
    ShortenHold,
    TicketRecord,
    TicketState,
    left_of,
)
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job, JobState
from coordinator.direct_due import Due, due_of, settling, unused
from coordinator.direct_keys import DirectKeys
from coordinator.direct_places import Ended, JobNotes, Notes, Place, Places, ended_of
from coordinator.direct_port import ClaimOutcome
from coordinator.exchange.bids import Bid, BidSource, Work
from coordinator.exchange.parsing import parse_bid
from coordinator.exchange.quotes import Quote, QuoteRefused
from coordinator.http.errors import ApiError, bad_request, from_books, from_quote, unavailable
from coordinator.market import MarketShell
from coordinator.matching import Candidate, Wish, explanation
from coordinator.orders import Identity
from coordinator.pipelines import Pipelines
from coordinator.placement import Placement, Placer
from coordinator.regions import Residency, parse_policy
from coordinator.tickets import TicketIssuer, count_every
from privacy.keys import cache_salt
from protocol import limits
from protocol.book import Book
from protocol.direct import (
    Attempt,
    Claim,
    JobBilled,
    JobDropped,
    JobSettled,
    MendWanted,
    Models,
    ModelsWanted,
    OfferedModel,
    PlaceFreed,
    RateStanding,
    TicketGranted,
    TicketWanted,
)
from protocol.errors import Code, RemoteProtocolError
from protocol.messages import RouteBroken
from protocol.tickets import Ticket, peek_ticket, read_ticket, ticket_hash

log = logging.getLogger(__name__)

_KIND_CHARS = 16
UNREPORTED_MS = 60_000  # so long the hold of a ticket stays of which the Consumer says nothing; then what he has pays a claim
TEND_S = 1.0  # how often places are looked through that nobody needs any more
_LOST_LOOK_S = 0.05
_LOST = frozenset({Code.LINK_LOST, Code.LEASE_LOST})


class _HasTickets(Exception):
    """The job is new to this Coordinator, and the books know it: another Coordinator, or an earlier run, has begun it."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a ticket may cost. ``left_micros``: of the job's bid."""

    bid_micros: int
    source: BidSource | str
    left_micros: int
    quote: Quote | None = None


class DirectBooks:
    """``coordinator.direct_port.DirectDesk`` over the books. Runs on trio."""

    def __init__(
        self,
        books: Books,
        placer: Placer,
        market: MarketShell,
        issuer: TicketIssuer,
        keys: DirectKeys,
        me: Identity,
        salt_secret: bytes,
        clock_ms: Callable[[], int],
        addresses: Callable[[str], tuple[str, ...]],
        book: Callable[[], Book],
        pipelines: Pipelines | None = None,
    ) -> None:
        """``addresses(peer)``: where an Island is reached, as its ad says. ``book()``: which Islands are there now."""
        self._pipelines = pipelines
        self._books, self._placer, self._market, self._issuer, self._keys = books, placer, market, issuer, keys
        self._me, self._salt_secret, self._clock_ms, self._addresses, self._book = me, salt_secret, clock_ms, addresses, book
        self._places, self._notes = Places(placer), Notes()
        self._blamed: dict[str, int] = {}  # Island -> its run that has failed, which it can do once by going
        self._paces: dict[tuple[str, str], float] = {}  # Island and Cargo -> tokens a second of its last receipt
        self.granted = self.settled = self.claimed = 0

    def __repr__(self) -> str:
        return f"<DirectBooks {self._places!r}, {self.granted} granted, {self.settled} settled, {self.claimed} claimed>"

    async def run(self) -> None:
        """Frees places that nobody needs any more. Runs until cancelled."""
        while True:
            await trio.sleep(TEND_S)
            self._places.tend(trio.current_time())

    # ---- tickets

    async def grant(self, wanted: TicketWanted, holder: str) -> TicketGranted:
        known = self._notes.get(holder, wanted.job_id)
        key, standing = await self._keys.admit(wanted.api_key, "write", holder, counts=known is None or known.is_beyond)
        notes = self._notes.of(holder, wanted.job_id, wanted.choices)
        notes.asked += 1
        self._places.tend(trio.current_time())
        self._places.check_room(key.account)
        try:
            return await self._grant(wanted, holder, key.account, notes, standing)
        except _HasTickets:
            notes.granted += 1
            return await self._grant(wanted, holder, key.account, notes, standing)

    async def _grant(
        self, wanted: TicketWanted, holder: str, account: str, notes: JobNotes, standing: RateStanding
    ) -> TicketGranted:
        terms = await self._terms(wanted, holder, account, notes)
        wish = self._wish(wanted, account, terms, notes)
        wait_s = wanted.wait_ms / 1000
        placement = await self._placer.place(wish, wait_s, min(wait_s, limits.ISLAND_WAIT_S))
        try:
            async with notes.lock:
                return await self._issue(wanted, holder, wish, placement, terms, notes, standing)
        except BaseException:
            self._placer.release(placement)
            raise

    async def _terms(self, wanted: TicketWanted, holder: str, account: str, notes: JobNotes) -> _Terms:
        """By the job's row, where it has one: a bid is made once, and a quote that was good then is."""
        found = await self._settled_so_far(wanted, holder, account, notes) if notes.granted else None
        if found is not None:
            job, records = found
            quote = await self._promised(job)
            return _Terms(job.bid_micros, job.bid_source, left_of(job, records), quote)
        work = Work(wanted.prompt_tokens, wanted.output_tokens, wanted.choices, self._issuer.job_s_max)
        quote = await self._quote(account, wanted, work)
        if quote is not None:
            return _Terms(quote.price_micros, "quote", quote.price_micros, quote)
        bid = await self._bid(account, wanted, work)
        return _Terms(bid.micros, bid.source, bid.micros)

    async def _promised(self, job: Job) -> Quote | None:
        try:
            return await self._market.promised(job.quote_id) if job.quote_id else None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error

    async def _settled_so_far(
        self, wanted: TicketWanted, holder: str, account: str, notes: JobNotes
    ) -> tuple[Job, list[TicketRecord]] | None:
        """The job, once those of its tickets are settled that are over; None where the books do not know it."""
        found = await self._look(wanted.job_id, holder)
        if found is None:
            return None
        job, records = found
        if job.account != account:
            raise from_books(BooksRefused(Why.NO_JOB, f"there is no job {job.id}"))
        changes = await self._over(records, notes)
        if not changes:
            return found
        try:
            await self._books.do_all(*changes)
        except BooksRefused as refused:
            raise from_books(refused) from None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        for change in changes:
            self._places.forget(bytes.fromhex(change.id))
        return await self._look(wanted.job_id, holder)

    async def _look(self, job_id: str, holder: str) -> tuple[Job, list[TicketRecord]] | None:
        try:
            return await self._books.ask(direct_queries.job_of, job_id, holder)
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error

    async def _over(self, records: Sequence[TicketRecord], notes: JobNotes) -> list[SettleTicket]:
        """What settles those open tickets that are in nobody's use: whoever asks for another one has as many in use as there are other
        choices, at most. Those that he has not heard of, since the stream was lost with the answer, are freed with the oldest."""
        standing = [record for record in records if record.state is TicketState.OPEN]
        told = {record.id: notes.ended[record.id] for record in standing if record.id in notes.ended}
        whole = [id for id, ended in told.items() if ended.count and not ended.outcome]
        changes = [
            await self._broken_off(record, told[record.id]) if told[record.id].count else unused(record)
            for record in standing
            if record.id in told and record.id not in whole
        ]
        silent = [record for record in standing if record.id not in told]
        others = max(0, notes.choices - 1 - len(whole))
        return changes + [unused(record) for record in silent[: max(0, len(silent) - others)]]

    async def _broken_off(self, record: TicketRecord, ended: Ended) -> SettleTicket:
        """What settles a ticket whose answer broke off behind some tokens."""
        ticket = peek_ticket(ended.ticket)
        if await self._is_gone(ticket, ended):
            failed = () if self._blamed.get(ticket.driver) == ticket.boots[-1] else (ticket.driver,)
            self._blame(ticket)
            return settling(record, Due((), 0, 0, False), is_claim=False, failed=failed, is_broken=True)
        due = due_of(ticket, record.ask, Attempt(ended.ticket, b"", ended.count), self._clock_ms())
        is_paid = any(earned.amount for earned in due.earned)
        if ended.outcome != Code.WORKER_DIED or not is_paid:
            return settling(record, due, is_claim=False)
        self._placer.standing.failed(ticket.driver, trio.current_time())
        return settling(record, due, is_claim=False, failed=(ticket.driver,))

    async def _is_gone(self, ticket: Ticket, ended: Ended) -> bool:
        """Whether we see ourselves what the Consumer says: that the Island has left in the middle of an answer. Of a pipeline the other
        stages may have done their part."""
        if ended.outcome not in _LOST or not ended.tokens or ticket.stages:
            return False
        with trio.move_on_after(limits.DESK_LOST_WAIT_S):
            while self._runs(ticket):
                await trio.sleep(_LOST_LOOK_S)
        return not self._runs(ticket)

    def _runs(self, ticket: Ticket) -> bool:
        entry = self._book().entries.get(ticket.driver)
        return entry is not None and entry.ad.boot == ticket.boots[-1]

    def _blame(self, ticket: Ticket) -> None:
        self._placer.standing.failed(ticket.driver, trio.current_time())
        self._blamed.pop(ticket.driver, None)
        self._blamed[ticket.driver] = ticket.boots[-1]
        if len(self._blamed) > limits.BOOK_PEERS_MAX:
            del self._blamed[next(iter(self._blamed))]

    async def _bid(self, account: str, wanted: TicketWanted, work: Work) -> Bid:
        try:
            explicit = parse_bid(wanted.bid) if wanted.bid else None
        except ValueError as error:
            raise bad_request(str(error), "bid_price") from None
        try:
            bid, _ = await self._market.bid(account, wanted.cargo, work, explicit)
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        return bid

    async def _quote(self, account: str, wanted: TicketWanted, work: Work) -> Quote | None:
        if not wanted.quote:
            return None
        try:
            return await self._market.quote(account, wanted.quote, wanted.cargo, work)
        except QuoteRefused as refused:
            raise from_quote(refused) from None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error

    def _wish(self, wanted: TicketWanted, account: str, terms: _Terms, notes: JobNotes) -> Wish:
        now_s, failed = trio.current_time(), notes.failed
        delivered = min(notes.delivered_tokens, wanted.output_tokens - 1)  # nobody sends them again
        return Wish(
            wanted.cargo,
            wanted.prompt_tokens + wanted.output_tokens,
            wanted.affinity,
            wanted.content_hash,
            wanted.engine,
            wanted.context_over,
            {one.peer: max(one.sequence, failed.get(one.peer, 0)) for one in wanted.excluded if not one.rest_ms},
            {one.peer: now_s + one.rest_ms / 1000 for one in wanted.excluded if one.rest_ms},
            prompt_tokens=wanted.prompt_tokens + delivered,
            output_tokens=wanted.output_tokens - delivered,
            price_max_micros=min(terms.bid_micros // wanted.choices, terms.left_micros),
            policy=_policy(wanted.policy),
            priority=wanted.priority,
            account=account,
            job_s_max=self._issuer.job_s_max,
            island=terms.quote.island if terms.quote is not None else "",
        )

    def _count_every(self, candidate: Candidate) -> int:
        """By the fastest that the Island says of itself, in its ad or its last receipt: what is risked is its own."""
        offer = candidate.offer
        return count_every(max(offer.tokens_per_s, self._paces.get((candidate.island, offer.name), 0.0)))

    async def _issue(
        self,
        wanted: TicketWanted,
        holder: str,
        wish: Wish,
        placement: Placement,
        terms: _Terms,
        notes: JobNotes,
        standing: RateStanding,
    ) -> TicketGranted:
        candidate, account = placement.candidate, wish.account
        salt = cache_salt(self._salt_secret, account)
        # stages tell the sequences of jobs apart by the job's id, so choices of one request need ids of their own there
        several = candidate.plan is not None and wanted.choices > 1
        job_id = f"{wanted.job_id}.{secrets.token_hex(4)}" if several else wanted.job_id
        envelope = self._issuer.issue(job_id, candidate, wish, salt, holder, self._count_every(candidate))
        record = _record(envelope, wanted, account, candidate, terms.quote, self._clock_ms())
        why = json.dumps(explanation(placement.choice), separators=(",", ":"))
        await self._write(self._job(wanted, holder, account, terms, record.issued_at_ms), record, why, notes)
        key = bytes.fromhex(record.id)
        notes.granted += 1
        self.granted += 1
        expires_s = trio.current_time() + limits.TICKET_LIFETIME_S
        self._places.add(Place(placement, candidate, envelope, holder, account, job_id, wish, salt, expires_s, [key]))
        return self._granted(wanted.request, envelope, candidate, why, standing)

    async def _write(self, job: Job, record: TicketRecord, why: str, notes: JobNotes) -> None:
        """The ticket, and the job where it is the first. Raises ApiError, _HasTickets."""
        found = await self._look(job.id, job.holder) if notes.granted else None
        others = tuple(other.id for other in found[1]) if found is not None else ()
        region = self._placer.region_of(record.island)
        granting = GrantTicket(record, _ends_ms(record), region, why, others)
        try:
            await self._books.do_all(OpenDirectJob(job), granting)
        except BooksRefused as refused:
            if refused.why is Why.DIFFERS and not notes.granted:
                raise _HasTickets from None
            raise _not_granted(refused) from None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error

    def _granted(
        self, request: int, envelope: bytes, candidate: Candidate, why: str, standing: RateStanding
    ) -> TicketGranted:
        ticket = read_ticket(envelope)
        return TicketGranted(
            request=request,
            ticket=envelope,
            addresses=self._addresses(ticket.driver),
            sequence=candidate.sequence,
            region=self._placer.region_of(candidate.island),
            offer=candidate.offer,
            price_max_micros=ticket.price_limit_micros,
            placement=why,
            standing=standing,
        )

    async def mend(self, wanted: MendWanted, holder: str) -> TicketGranted:
        """The receipt and the counts go on naming the first ticket, so the mended route needs no hold of its own."""
        place = self._places.get(wanted.ticket_hash, holder)
        if place is None or self._pipelines is None:
            raise ApiError(404, "there is no such ticket", code="unknown_job")
        report = RouteBroken(1, wanted.index, wanted.boot, wanted.code, wanted.message)
        place.candidate = await self._pipelines.mend(place.candidate, report)
        every = self._count_every(place.candidate)
        envelope = self._issuer.issue(place.job_id, place.candidate, place.wish, place.salt, holder, every)
        self._places.mended(place, ticket_hash(envelope))
        return self._granted(wanted.request, envelope, place.candidate, "", RateStanding())

    def _job(self, wanted: TicketWanted, holder: str, account: str, terms: _Terms, now_ms: int) -> Job:
        return Job(
            id=wanted.job_id,
            account=account,
            cargo=wanted.cargo,
            kind=wanted.kind[:_KIND_CHARS],
            state=JobState.SUBMITTED,
            priority=wanted.priority,
            bid_micros=terms.bid_micros,
            bid_source=str(terms.source),
            owner=self._me.owner,
            owner_boot=self._me.boot,
            created_at_ms=now_ms,
            policy=wanted.policy,
            quote_id=wanted.quote,
            holder=holder,
        )

    def opened(self, holder: str) -> None:
        self._places.opened(holder)

    def closed(self, holder: str) -> None:
        self._places.closed(holder, trio.current_time())

    def freed(self, freed: PlaceFreed, holder: str) -> None:
        place = self._places.get(freed.ticket_hash, holder)
        if place is None:
            return
        notes = self._notes.of(holder, place.job_id.partition(".")[0], 1)
        key = place.hashes[0]
        if key.hex() not in notes.ended:  # whoever says it twice has said it once
            notes.ended[key.hex()] = ended_of(place.ticket, key, freed)
        if freed.outcome:
            # taking this very job has changed the Island's room, and so made it send a newer ad than the bridge knows
            notes.failed[place.placement.island] = self._placer.newest_sequence(place.placement.island)
        self._places.free(place)

    # ---- settling

    async def settle(self, settled: JobSettled, holder: str) -> JobBilled:
        return await self._end(settled.request, settled.job_id, settled.attempts, holder, JobState.SUCCEEDED, "")

    async def drop(self, dropped: JobDropped, holder: str) -> JobBilled:
        state = JobState.CANCELLED if dropped.code.value == "cancelled" else JobState.FAILED
        return await self._end(dropped.request, dropped.job_id, dropped.attempts, holder, state, dropped.code.value)

    async def _end(
        self, request: int, job_id: str, attempts: tuple[Attempt, ...], holder: str, state: JobState, code: str
    ) -> JobBilled:
        try:
            records = await self._books.ask(direct_queries.tickets_of, job_id, holder)
            if not records:
                raise ApiError(404, f"there is no job {job_id}", code="unknown_job")
            by_hash = {ticket_hash(attempt.ticket).hex(): attempt for attempt in attempts}
            notes = self._notes.get(holder, job_id)
            told = notes.ended if notes is not None else {}
            standing = [record for record in records if record.state is TicketState.OPEN]
            changes = [await self._last_word(record, by_hash.get(record.id), told.get(record.id)) for record in standing]
            ending = EndDirectJob(job_id, records[0].account, holder, state, code)
            job, balance = (await self._books.do_all(*changes, ending))[-1]
            if await self._pay_freed(records, by_hash):
                job, balance = await self._books.do(ending)
        except BooksRefused as refused:
            raise from_books(refused) from None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        self.settled += 1
        self._notes.forget(holder, job_id)
        return JobBilled(request, job.price_micros, balance)

    async def _pay_freed(self, records: Sequence[TicketRecord], attempts: Mapping[str, Attempt]) -> int:
        """Tickets that were freed for want of a word, and are reported all the same: paid out of what the bid leaves. How many."""
        paid = 0
        for record in records:
            attempt = attempts.get(record.id)
            if record.state is TicketState.FREED and attempt is not None and attempt.count:
                late = self._reported(record, attempt)
                assert isinstance(late, SettleTicket)
                try:
                    await self._books.do(replace(late, is_claim=True, is_within_bid=True))
                    paid += 1
                except BooksRefused as refused:
                    log.info("a reported ticket is left to its Island's claim: %s", refused)
        return paid

    async def _last_word(
        self, record: TicketRecord, attempt: Attempt | None, ended: Ended | None
    ) -> SettleTicket | ShortenHold:
        """What the Consumer's word on a ticket changes. Raises ApiError 400 where it is no honest one."""
        self._places.forget(bytes.fromhex(record.id))
        if ended is not None and ended.outcome and ended.count and not (attempt is not None and attempt.receipt):
            return await self._broken_off(record, ended)
        return self._reported(record, attempt)

    def _reported(self, record: TicketRecord, attempt: Attempt | None) -> SettleTicket | ShortenHold:
        now_ms = self._clock_ms()
        if attempt is None:
            return ShortenHold(record.id, record.account, now_ms + UNREPORTED_MS)
        try:
            due = due_of(read_ticket(attempt.ticket), record.ask, attempt, now_ms)
        except RemoteProtocolError as error:
            raise ApiError(400, f"a ticket cannot be settled: {error}", code="bad_receipt") from error
        if due.succeeded:
            self._placer.standing.served(record.island, record.cargo, due.tokens, 0, trio.current_time())
            self._note_pace(record, due)
        return settling(record, due, is_claim=False)

    def _note_pace(self, record: TicketRecord, due: Due) -> None:
        self._paces.pop((record.island, record.cargo), None)
        self._paces[record.island, record.cargo] = due.tokens * 1000 / max(1, sum(each.compute_ms for each in due.earned))
        if len(self._paces) > limits.BOOK_PEERS_MAX:
            del self._paces[next(iter(self._paces))]

    async def claim(self, claim: Claim, sender: str) -> ClaimOutcome:
        try:
            ticket = read_ticket(claim.ticket)
            if sender not in ticket.route:
                raise RemoteProtocolError("the ticket does not name this Island")
            record = await self._books.ask(direct_queries.ticket_of, ticket_hash(claim.ticket).hex())
            if record is None:
                return ClaimOutcome(False, 0, "this ticket was not issued by a Coordinator of these books")
            due = due_of(ticket, record.ask, claim, self._clock_ms())
            if record.state is TicketState.PAID and due.tokens <= record.paid_tokens:
                self._places.forget(bytes.fromhex(record.id))
                return ClaimOutcome(True, record.paid_micros)
        except RemoteProtocolError as error:
            return ClaimOutcome(False, 0, str(error)[: limits.TEXT_CHARS_MAX])
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        try:
            record = await self._books.do(settling(record, due, is_claim=True))
        except BooksRefused as refused:
            return ClaimOutcome(False, 0, refused.message)
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        self._places.forget(bytes.fromhex(record.id))
        self.claimed += 1
        return ClaimOutcome(True, record.paid_micros)

    # ---- what there is

    async def models(self, wanted: ModelsWanted, holder: str) -> Models:
        _, standing = await self._keys.admit(wanted.api_key, "read", holder)
        cargos = sorted(self._placer.cargos().items())[: limits.DESK_MODELS_MAX]
        models = tuple(OfferedModel(name, since_s) for name, since_s in cargos)
        return Models(wanted.request, models, self._placer.islands(), standing)


def _record(
    envelope: bytes, wanted: TicketWanted, account: str, candidate: Candidate, quote: Quote | None, now_ms: int
) -> TicketRecord:
    ticket = read_ticket(envelope)
    ask = quote.ask if quote is not None and quote.island == candidate.island else candidate.offer.ask
    return TicketRecord(
        id=ticket_hash(envelope).hex(),
        job_id=wanted.job_id,
        account=account,
        cargo=ticket.cargo,  # the one that runs, where the name of the job stands for another
        island=candidate.island,
        ask_per_job=ask.per_job,
        ask_per_1k_output=ask.per_1k_output,
        ask_per_second=ask.per_second,
        limit_micros=ticket.price_limit_micros,
        state=TicketState.OPEN,
        paid_micros=0,
        paid_tokens=0,
        issued_at_ms=now_ms,
    )


def _ends_ms(record: TicketRecord) -> int:
    """Until then it is paid, and held for."""
    return record.issued_at_ms + int((limits.TICKET_LIFETIME_S + limits.CLAIM_LIFETIME_S) * 1000)


def _not_granted(refused: BooksRefused) -> ApiError:
    if refused.why is Why.STATE:
        return ApiError(409, refused.message, code="job_over")
    if refused.why is Why.OVER_HOLD:
        return ApiError(402, refused.message, code="bid_too_low", param="bid_price", kind="insufficient_quota")
    return from_books(refused)


def _policy(text: str) -> Residency | None:
    if not text:
        return None
    if len(text) > limits.TEXT_CHARS_MAX:
        raise bad_request(f"policy: more than {limits.TEXT_CHARS_MAX} characters", "policy")
    try:
        return parse_policy(json.loads(text))
    except ValueError as error:
        raise bad_request(f"policy: {error}", "policy") from None
