"""What a ticket has earned, by what the Island receipted and the Consumer signed. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.books.direct import SettleTicket, TicketRecord
from coordinator.books.jobs import Earned
from coordinator.exchange.quotes import charge
from protocol.counts import check_count_of_ticket, read_count
from protocol.direct import Attempt, Claim
from protocol.errors import RemoteProtocolError
from protocol.prices import Ask
from protocol.receipts import Receipt, check_receipt_of_ticket, read_receipt
from protocol.tickets import Ticket, ticket_hash


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
    tokens = counted_tokens(ticket, hash_of_ticket, attempt.count)
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


def counted_tokens(ticket: Ticket, hash_of_ticket: bytes, envelope: bytes) -> int:
    """What a count says, 0 where there is none. Raises RemoteProtocolError for one that is forged, or of another job."""
    if not envelope:
        return 0
    count = read_count(envelope)
    check_count_of_ticket(count, ticket, hash_of_ticket)
    return count.tokens


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


def settling(
    record: TicketRecord, due: Due, is_claim: bool, failed: tuple[str, ...] = (), is_broken: bool = False
) -> SettleTicket:
    """The change of the books that pays it."""
    return SettleTicket(
        id=record.id,
        job_id=record.job_id,
        account=record.account,
        cargo=record.cargo,
        earned=due.earned,
        tokens=due.tokens,
        prompt_tokens=due.prompt_tokens,
        succeeded=due.succeeded,
        failed=failed,
        is_claim=is_claim,
        is_broken=is_broken,
    )


def unused(record: TicketRecord) -> SettleTicket:
    """Nothing came of it, as its holder says; an Island that has a count of his is paid all the same."""
    return settling(record, Due((), 0, 0, False), is_claim=False)
