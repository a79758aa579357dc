"""The Coordinator's half of the direct path: tickets to Consumers, and the pay for what Islands did with them (see direct_port.DirectDesk).

Theory of operation. A bridge asks for a ticket; the books open its job, reserve what the ticket may cost, and the ticket says whose peer id
may use it and how often that peer has to sign what it received. Whoever reports first settles the ticket: the Consumer, with the Island's
receipt and his own last count, or the Island, with its receipt and the last count that it was given. Either way it is paid for what was
counted and signed, by the ask that the ticket was issued at, never above its limit.

Rules. What was not signed is not paid: a receipt alone proves nothing, since the Consumer may never have got the tokens. A place on an
Island is given back when the bridge says so, when the ticket is settled, or when the ticket has expired.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

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
)
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Earned, Job, JobState
from coordinator.desk import Identity
from coordinator.direct_keys import DirectKeys
from coordinator.direct_port import ClaimOutcome
from coordinator.exchange.bids import Work
from coordinator.exchange.parsing import parse_bid
from coordinator.exchange.quotes import Quote, QuoteRefused, charge
from coordinator.http.errors import ApiError, bad_request, from_books, from_quote, unavailable
from coordinator.market import MarketShell
from coordinator.matching import Candidate, Wish, explanation
from coordinator.pipelines import Pipelines
from coordinator.placement import Placement, Placer
from coordinator.regions import Residency, parse_policy
from coordinator.tickets import TicketIssuer
from privacy.keys import cache_salt
from protocol import limits
from protocol.counts import check_count_of_ticket, read_count
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
from protocol.errors import RemoteProtocolError
from protocol.messages import RouteBroken
from protocol.prices import Ask
from protocol.receipts import Receipt, check_receipt_of_ticket, read_receipt
from protocol.tickets import Ticket, read_ticket, ticket_hash

log = logging.getLogger(__name__)

_KIND_CHARS = 16
UNREPORTED_MS = 60_000  # so long the hold of a ticket stays of which the Consumer says nothing; then what he has pays a claim
PLACES_MAX = 20_000  # tickets of direct jobs that hold a place at once


@dataclass(slots=True)
class _Place:
    """A place that a ticket has taken. ``candidate``: its route as it is now; ``hashes``: of the ticket, and of those of mended routes."""

    placement: Placement
    candidate: Candidate
    holder: str
    job_id: str
    wish: Wish
    salt: bytes
    expires_s: float
    hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class Due:
    """What a ticket has earned, and for how many tokens."""

    earned: tuple[Earned, ...]
    tokens: int
    prompt_tokens: int
    succeeded: bool


def due_of(ticket: Ticket, ask: Ask, attempt: Attempt | Claim, now_ms: int) -> Due:
    """What is to be paid for a ticket by receipt and count, both of which may be missing.

    Raises RemoteProtocolError (SignatureError) for a receipt or a count that is forged, altered, or of another job.
    """
    hash_of_ticket = ticket_hash(attempt.ticket)
    tokens = 0
    if attempt.count:
        count = read_count(attempt.count)
        check_count_of_ticket(count, ticket, hash_of_ticket)
        tokens = count.tokens
    receipt = _receipt(ticket, attempt, hash_of_ticket)
    if receipt is None:
        elapsed_ms = max(0, now_ms - ticket.issued_at_ms)
        price = min(ask.price(tokens, elapsed_ms), ticket.price_limit_micros) if tokens else 0
        return Due(_split(ticket, ask, price, 0, b""), tokens, 0, False)
    if not attempt.count:
        return Due((), 0, receipt.prompt_tokens, False)  # nothing of it was signed, not even that there was nothing
    paid_tokens = min(tokens, receipt.sent_tokens)
    whole = paid_tokens == receipt.sent_tokens
    if not paid_tokens and not whole:
        return Due((), 0, receipt.prompt_tokens, False)
    compute_ms = min(receipt.compute_ms, max(0, now_ms - ticket.issued_at_ms))
    price = charge(ask, ticket.price_limit_micros, paid_tokens, compute_ms, receipt.price_micros)
    return Due(_split(ticket, ask, price, compute_ms, attempt.receipt), paid_tokens, receipt.prompt_tokens, whole)


def _receipt(ticket: Ticket, attempt: Attempt | Claim, hash_of_ticket: bytes) -> Receipt | None:
    if not attempt.receipt:
        return None
    receipt = read_receipt(attempt.receipt)
    if receipt.ticket_hash != hash_of_ticket:
        raise RemoteProtocolError("the receipt is for another job")
    check_receipt_of_ticket(receipt, ticket)
    return receipt


def _split(ticket: Ticket, ask: Ask, price: int, compute_ms: int, receipt: bytes) -> tuple[Earned, ...]:
    """By what the stages ask, the driver taking what rounding leaves; all to the one Island where there are no stages."""
    if not price and not receipt:
        return ()
    if not ticket.stages:
        return (Earned(ticket.driver, price, compute_ms, receipt),)
    asked = [stage.ask.price(1000, 1000) for stage in ticket.stages]
    total = sum(asked) or 1
    amounts = [price * part // total for part in asked]
    amounts[-1] += price - sum(amounts)
    driver = len(amounts) - 1
    return tuple(
        Earned(peer, amount, compute_ms // len(amounts), receipt if index == driver else b"")
        for index, (peer, amount) in enumerate(zip(ticket.route, amounts, strict=True))
    )


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
        pipelines: Pipelines | None = None,
    ) -> None:
        """``addresses(peer)``: where an Island is reached, as its ad says."""
        self._pipelines = pipelines
        self._books, self._placer, self._market, self._issuer, self._keys = books, placer, market, issuer, keys
        self._me, self._salt_secret, self._clock_ms, self._addresses = me, salt_secret, clock_ms, addresses
        self._places: dict[bytes, _Place] = {}
        self._failed: dict[str, dict[str, int]] = {}  # job -> Islands that failed it, and the ads that do not count any more
        self._known: dict[str, None] = {}  # jobs that have had a ticket: another one is no new request
        self.granted = self.settled = self.claimed = 0

    def __repr__(self) -> str:
        return f"<DirectBooks {len(self._places)} places, {self.granted} granted, {self.settled} settled, {self.claimed} claimed>"

    # ---- tickets

    async def grant(self, wanted: TicketWanted, holder: str) -> TicketGranted:
        is_new = wanted.job_id not in self._known
        key, standing = await self._keys.admit(wanted.api_key, "write", holder, counts=is_new)
        self._free_expired()
        if len(self._places) >= PLACES_MAX:
            raise ApiError(503, "too many tickets are open", code="no_capacity", kind="server_error", headers={"Retry-After": "2"})
        work = Work(wanted.prompt_tokens, wanted.output_tokens, wanted.choices, self._issuer.job_s_max)
        quote = await self._quote(key.account, wanted, work)
        bid = quote.price_micros if quote is not None else await self._bid(key.account, wanted, work)
        wish = self._wish(wanted, key.account, bid // wanted.choices, quote)
        wait_s = wanted.wait_ms / 1000
        placement = await self._placer.place(wish, wait_s, min(wait_s, limits.ISLAND_WAIT_S))
        try:
            return await self._issue(wanted, holder, key.account, wish, placement, quote, standing)
        except BaseException:
            self._placer.release(placement)
            raise

    async def _bid(self, account: str, wanted: TicketWanted, work: Work) -> int:
        try:
            explicit = parse_bid(wanted.bid) if wanted.bid else None
        except ValueError as error:
            raise bad_request(str(error), "bid_price") from None
        try:
            bid, _ = await self._market.bid(account, wanted.cargo, work, explicit)
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        return bid.micros

    async def _quote(self, account: str, wanted: TicketWanted, work: Work) -> Quote | None:
        if not wanted.quote:
            return None
        try:
            return await self._market.quote(account, wanted.quote, wanted.cargo, work)
        except QuoteRefused as refused:
            raise from_quote(refused) from None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error

    def _wish(self, wanted: TicketWanted, account: str, limit_micros: int, quote: Quote | None) -> Wish:
        now_s = trio.current_time()
        failed = self._failed.get(wanted.job_id, {})
        return Wish(
            wanted.cargo,
            wanted.prompt_tokens + wanted.output_tokens,
            wanted.affinity,
            wanted.content_hash,
            wanted.engine,
            wanted.context_over,
            {one.peer: max(one.sequence, failed.get(one.peer, 0)) for one in wanted.excluded if not one.rest_ms},
            {one.peer: now_s + one.rest_ms / 1000 for one in wanted.excluded if one.rest_ms},
            prompt_tokens=wanted.prompt_tokens,
            output_tokens=wanted.output_tokens,
            price_max_micros=limit_micros,
            policy=_policy(wanted.policy),
            priority=wanted.priority,
            account=account,
            job_s_max=self._issuer.job_s_max,
            island=quote.island if quote is not None else "",
        )

    async def _issue(
        self,
        wanted: TicketWanted,
        holder: str,
        account: str,
        wish: Wish,
        placement: Placement,
        quote: Quote | None,
        standing: RateStanding,
    ) -> TicketGranted:
        candidate, now_ms = placement.candidate, self._clock_ms()
        salt = cache_salt(self._salt_secret, account)
        # stages tell the sequences of jobs apart by the job's id, so choices of one request need ids of their own there
        several = candidate.plan is not None and wanted.choices > 1
        job_id = f"{wanted.job_id}.{secrets.token_hex(4)}" if several else wanted.job_id
        envelope = self._issuer.issue(job_id, candidate, wish, salt, holder, limits.COUNT_EVERY_TOKENS)
        ticket = read_ticket(envelope)
        ask = quote.ask if quote is not None and quote.island == candidate.island else candidate.offer.ask
        record = TicketRecord(
            id=ticket_hash(envelope).hex(),
            job_id=wanted.job_id,
            account=account,
            cargo=wanted.cargo,
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
        job = self._job(wanted, holder, account, now_ms)
        expires_at_ms = ticket.expires_at_ms + int(limits.CLAIM_LIFETIME_S * 1000)
        try:
            await self._books.do_all(OpenDirectJob(job), GrantTicket(record, expires_at_ms))
        except BooksRefused as refused:
            raise ApiError(409, refused.message, code="job_over") if refused.why is Why.STATE else from_books(refused) from None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        expires_s = trio.current_time() + limits.TICKET_LIFETIME_S
        key = bytes.fromhex(record.id)
        self._known[wanted.job_id] = None
        if len(self._known) > PLACES_MAX:
            del self._known[next(iter(self._known))]
        self._places[key] = _Place(placement, candidate, holder, job_id, wish, salt, expires_s, [key])
        self.granted += 1
        why = json.dumps(explanation(placement.choice), separators=(",", ":"))
        return self._granted(wanted.request, envelope, candidate, why, standing)

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
        place = self._places.get(wanted.ticket_hash)
        if place is None or place.holder != holder or self._pipelines is None:
            raise ApiError(404, "there is no such ticket", code="unknown_job")
        report = RouteBroken(1, wanted.index, wanted.boot, wanted.code, wanted.message)
        place.candidate = await self._pipelines.mend(place.candidate, report)
        envelope = self._issuer.issue(
            place.job_id, place.candidate, place.wish, place.salt, holder, limits.COUNT_EVERY_TOKENS
        )
        place.hashes.append(ticket_hash(envelope))
        self._places[place.hashes[-1]] = place
        return self._granted(wanted.request, envelope, place.candidate, "", RateStanding())

    def _job(self, wanted: TicketWanted, holder: str, account: str, now_ms: int) -> Job:
        return Job(
            id=wanted.job_id,
            account=account,
            cargo=wanted.cargo,
            kind=wanted.kind[:_KIND_CHARS],
            state=JobState.SUBMITTED,
            priority=wanted.priority,
            bid_micros=0,
            bid_source="explicit" if wanted.bid else "market",
            owner=self._me.owner,
            owner_boot=self._me.boot,
            created_at_ms=now_ms,
            policy=wanted.policy,
            quote_id=wanted.quote,
            holder=holder,
        )

    def freed(self, freed: PlaceFreed, holder: str) -> None:
        place = self._places.get(freed.ticket_hash)
        if place is None or place.holder != holder:
            return
        if freed.outcome:
            # taking this very job has changed the Island's room, and so made it send a newer ad than the bridge knows
            failed = self._failed.setdefault(freed.job_id, {})
            failed[place.placement.island] = self._placer.newest_sequence(place.placement.island)
            if len(self._failed) > PLACES_MAX:
                del self._failed[next(iter(self._failed))]
        self._free(freed.ticket_hash)

    def _free(self, hash_of_ticket: bytes) -> None:
        place = self._places.get(hash_of_ticket)
        if place is None:
            return
        for known in place.hashes:
            self._places.pop(known, None)
        self._placer.release(place.placement)

    def _free_expired(self) -> None:
        """Tickets expire in the order in which they were issued."""
        now_s = trio.current_time()
        while self._places:
            hash_of_ticket, place = next(iter(self._places.items()))
            if place.expires_s > now_s:
                return
            self._free(hash_of_ticket)

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
            changes = [self._reported(record, by_hash.get(record.id)) for record in records if record.state is TicketState.OPEN]
            ending = EndDirectJob(job_id, records[0].account, holder, state, code)
            job, balance = (await self._books.do_all(*changes, ending))[-1]
        except BooksRefused as refused:
            raise from_books(refused) from None
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        self.settled += 1
        self._failed.pop(job_id, None)
        self._known.pop(job_id, None)
        return JobBilled(request, job.price_micros, balance)

    def _reported(self, record: TicketRecord, attempt: Attempt | None) -> SettleTicket | ShortenHold:
        """What the Consumer's word on a ticket changes. Raises ApiError 400 where it is no honest one."""
        self._free(bytes.fromhex(record.id))
        now_ms = self._clock_ms()
        if attempt is None:
            return ShortenHold(record.id, record.account, now_ms + UNREPORTED_MS)
        try:
            due = due_of(read_ticket(attempt.ticket), record.ask, attempt, now_ms)
        except RemoteProtocolError as error:
            raise ApiError(400, f"a ticket cannot be settled: {error}", code="bad_receipt") from error
        return _settling(record, due, is_claim=False)

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
                self._free(bytes.fromhex(record.id))
                return ClaimOutcome(True, record.paid_micros)
        except RemoteProtocolError as error:
            return ClaimOutcome(False, 0, str(error)[: limits.TEXT_CHARS_MAX])
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        try:
            record = await self._books.do(_settling(record, due, is_claim=True))
        except BooksRefused as refused:
            return ClaimOutcome(False, 0, refused.message)
        except BooksUnavailable as error:
            raise unavailable(str(error)) from error
        self._free(bytes.fromhex(record.id))
        self.claimed += 1
        return ClaimOutcome(True, record.paid_micros)

    # ---- what there is

    async def models(self, wanted: ModelsWanted, holder: str) -> Models:
        _, standing = await self._keys.admit(wanted.api_key, "read", holder)
        cargos = sorted(self._placer.cargos().items())[: limits.DESK_MODELS_MAX]
        models = tuple(OfferedModel(name, since_s) for name, since_s in cargos)
        return Models(wanted.request, models, self._placer.islands(), standing)


def _settling(record: TicketRecord, due: Due, is_claim: bool) -> SettleTicket:
    return SettleTicket(
        id=record.id,
        job_id=record.job_id,
        account=record.account,
        cargo=record.cargo,
        earned=due.earned,
        tokens=due.tokens,
        prompt_tokens=due.prompt_tokens,
        succeeded=due.succeeded,
        is_claim=is_claim,
    )


def _policy(text: str) -> Residency | None:
    if not text:
        return None
    if len(text) > limits.TEXT_CHARS_MAX:
        raise bad_request(f"policy: more than {limits.TEXT_CHARS_MAX} characters", "policy")
    try:
        return parse_policy(json.loads(text))
    except ValueError as error:
        raise bad_request(f"policy: {error}", "policy") from None
