"""Usage receipts: the Island's signed word on what a job used, checked against what the receiver counted itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protocol import checks, limits
from protocol.envelope import Label, open_envelope, peek, seal
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.identity import Signer
from protocol.registry import Struct
from protocol.tickets import Ticket

RECEIPT_VERSION = 1


class Ending(StrEnum):
    """How a job ended. The first two are protocol.generation.FinishReason's; ``cut``: before its answer did, by whatever cause."""

    STOP = "stop"
    LENGTH = "length"
    CUT = "cut"


@dataclass(frozen=True, slots=True)
class Receipt:
    """``output_hash``: SHA-256 of all token ids that were sent in this job, int32 little-endian, resumed ones not included.
    ``ticket_hash``: of the ticket that opened the job, also where its route was mended since."""

    version: int
    network: str
    island: str
    job_id: str
    ticket_hash: bytes
    content_hash: str
    prompt_tokens: int
    cached_tokens: int
    sent_tokens: int
    output_hash: bytes
    compute_ms: int
    price_micros: int
    finish_reason: Ending
    finished_at_ms: int

    def __post_init__(self) -> None:
        if self.version != RECEIPT_VERSION:
            raise ValueError(f"receipt version {self.version} is not {RECEIPT_VERSION}")
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.peer_id("island", self.island)
        checks.label("job_id", self.job_id, limits.NAME_CHARS_MAX)
        checks.exactly("ticket_hash", self.ticket_hash, 32)
        checks.content_hash("content_hash", self.content_hash)
        checks.in_range("prompt_tokens", self.prompt_tokens, 0, 2**31)
        checks.in_range("cached_tokens", self.cached_tokens, 0, self.prompt_tokens)
        checks.in_range("sent_tokens", self.sent_tokens, 0, limits.COMPLETION_TOKENS_MAX)
        checks.exactly("output_hash", self.output_hash, 32)
        checks.in_range("compute_ms", self.compute_ms, 0, 2**40)
        checks.in_range("price_micros", self.price_micros, 0, limits.PRICE_MICROS_MAX)
        checks.in_range("finished_at_ms", self.finished_at_ms, 1, 2**53)


_RECEIPT: Struct[Receipt] = Struct(Receipt)


def sign_receipt(receipt: Receipt, island: Signer) -> bytes:
    return seal(Label.RECEIPT, _RECEIPT.encode(receipt), island)


def read_receipt(data: bytes) -> Receipt:
    """Raises SignatureError unless the Island that it names signed it."""
    envelope = open_envelope(Label.RECEIPT, data)
    receipt = _RECEIPT.decode(envelope.payload)
    if envelope.signer != receipt.island:
        raise SignatureError(f"a receipt of {receipt.island} was signed by {envelope.signer}")
    return receipt


def peek_receipt(data: bytes) -> Receipt:
    """The receipt in an envelope that was checked already; the signature is not looked at. Raises RemoteProtocolError."""
    return _RECEIPT.decode(peek(data).payload)


def check_receipt(
    receipt: Receipt, *, island: str, ticket_hash: bytes, sent_tokens: int, output_hash: bytes, price_max_micros: int
) -> None:
    """Raises RemoteProtocolError when the receipt differs from what the receiver saw, or costs more than the ticket allows."""
    if receipt.island != island or receipt.ticket_hash != ticket_hash:
        raise RemoteProtocolError("the receipt is for another job")
    if receipt.sent_tokens != sent_tokens or receipt.output_hash != output_hash:
        raise RemoteProtocolError(
            f"the receipt counts {receipt.sent_tokens} tokens, {sent_tokens} arrived, or their hashes differ"
        )
    if receipt.price_micros > price_max_micros:
        raise RemoteProtocolError(
            f"the receipt asks {receipt.price_micros} micro-credits, the ticket allows {price_max_micros}"
        )


def check_receipt_of_ticket(receipt: Receipt, ticket: Ticket) -> None:
    """Raises RemoteProtocolError when the receipt says something else than the ticket whose hash it names, or more than it allows."""
    if receipt.island not in ticket.route:
        raise RemoteProtocolError(f"the receipt comes from {receipt.island}, which is not on the ticket's route")
    for name in ("network", "job_id", "content_hash"):
        if getattr(receipt, name) != getattr(ticket, name):
            raise RemoteProtocolError(f"the receipt's {name} is not the ticket's")
    if receipt.sent_tokens > ticket.token_limit or receipt.price_micros > ticket.price_limit_micros:
        raise RemoteProtocolError("the receipt counts more than the ticket allows")
