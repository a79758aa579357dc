"""Counts: the holder's signed word on how many tokens of a job have reached it.

Where a Consumer takes its tokens straight from an Island, nobody stands between them who could say how far they came. So the holder signs,
as the answer grows, that it has received so many tokens and what their ids hash to; the Island lets no more than ``count_every`` tokens
(the ticket's) go beyond the last signed one. Neither can lose more than that by the other's bad faith: the last count is what is paid.

A count is cumulative, so the newest says all, and names its ticket by hash, so it is worth nothing for another job. Both ends count at the
ends of chunks only: there they have seen the same bytes. ``CountGuard`` is the Island's end, ``CountSigner`` the holder's; neither does IO.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from protocol import checks, limits
from protocol.envelope import Label, open_envelope, seal
from protocol.errors import LocalProtocolError, RemoteProtocolError, SignatureError
from protocol.identity import Signer
from protocol.registry import Struct
from protocol.tickets import Ticket, ticket_hash

COUNT_VERSION = 1
EMPTY_HASH = hashlib.sha256().digest()  # of no tokens


@dataclass(frozen=True, slots=True)
class Count:
    """``output_hash``: SHA-256 of the first ``tokens`` ids that came in this job, int32 little-endian, resumed ones not included.
    ``ticket_hash``: of the ticket that opened the job, also where its route was mended since."""

    version: int
    network: str
    holder: str
    ticket_hash: bytes
    tokens: int
    output_hash: bytes

    def __post_init__(self) -> None:
        if self.version != COUNT_VERSION:
            raise ValueError(f"count version {self.version} is not {COUNT_VERSION}")
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.peer_id("holder", self.holder)
        checks.exactly("ticket_hash", self.ticket_hash, 32)
        checks.in_range("tokens", self.tokens, 0, limits.COMPLETION_TOKENS_MAX)
        checks.exactly("output_hash", self.output_hash, 32)


_COUNT: Struct[Count] = Struct(Count)


def sign_count(count: Count, holder: Signer) -> bytes:
    return seal(Label.COUNT, _COUNT.encode(count), holder)


def read_count(data: bytes) -> Count:
    """Raises SignatureError unless the holder that it names signed it."""
    envelope = open_envelope(Label.COUNT, data)
    count = _COUNT.decode(envelope.payload)
    if envelope.signer != count.holder:
        raise SignatureError(f"a count of {count.holder} was signed by {envelope.signer}")
    return count


def check_count_of_ticket(count: Count, ticket: Ticket, hash_of_ticket: bytes) -> None:
    """Raises RemoteProtocolError when a count is not of this ticket's holder, for this ticket, within its limit."""
    if count.ticket_hash != hash_of_ticket:
        raise RemoteProtocolError("the count is for another job")
    if count.holder != ticket.holder:
        raise RemoteProtocolError(f"the count comes from {count.holder}, which does not hold the ticket")
    if count.network != ticket.network:
        raise RemoteProtocolError("the count is for another network")
    if count.tokens > ticket.token_limit:
        raise RemoteProtocolError(f"the count says {count.tokens} tokens, the ticket allows {ticket.token_limit}")


class CountGuard:
    """The Island's end for one job: what has left, what of it is signed, how much more may leave.

    Remembers the digest at the end of each chunk that is not signed yet. Those are at most ``count_every``, and one for nothing sent.
    """

    def __init__(self, ticket: Ticket, envelope: bytes) -> None:
        """``envelope``: the ticket's, as it came. Raises LocalProtocolError where the holder need not sign."""
        if not ticket.count_every:
            raise LocalProtocolError("the holder of this ticket need not sign")
        self._ticket, self._hash = ticket, ticket_hash(envelope)
        self._unsigned: OrderedDict[int, bytes] = OrderedDict({0: EMPTY_HASH})
        self.sent_tokens = 0
        self.sent_hash = EMPTY_HASH
        self.signed_tokens = -1  # not even that nothing came
        self.count = b""  # the newest one, as it came

    def __repr__(self) -> str:
        return f"<CountGuard {self.sent_tokens} sent, {max(0, self.signed_tokens)} signed>"

    @property
    def room(self) -> int:
        """Tokens that may leave now."""
        return self._ticket.count_every - (self.sent_tokens - max(0, self.signed_tokens))

    @property
    def is_settled(self) -> bool:
        """The holder has signed for all that was sent."""
        return self.signed_tokens == self.sent_tokens

    def sent(self, tokens: int, digest: bytes) -> None:
        """A chunk has left: ``tokens`` and ``digest`` are of all that was sent. Raises LocalProtocolError beyond the room."""
        added = tokens - self.sent_tokens
        if not 0 < added <= self.room:
            raise LocalProtocolError(f"{added} tokens may not leave, there is room for {self.room}")
        self.sent_tokens, self.sent_hash = tokens, digest
        self._unsigned[tokens] = digest

    def hear(self, data: bytes) -> None:
        """Takes a count in. Raises RemoteProtocolError (SignatureError) for one that is forged, foreign, altered, repeated, smaller than an
        earlier one, larger than what was sent, or of other tokens."""
        count = read_count(data)
        check_count_of_ticket(count, self._ticket, self._hash)
        if count.tokens > self.sent_tokens:
            raise RemoteProtocolError(f"the count says {count.tokens} tokens, {self.sent_tokens} were sent")
        if count.tokens <= self.signed_tokens:
            raise RemoteProtocolError(f"the count says {count.tokens} tokens, {self.signed_tokens} were signed before")
        if self._unsigned.get(count.tokens) != count.output_hash:
            raise RemoteProtocolError(f"the count's hash is not that of {count.tokens} tokens, or no chunk ended there")
        self.signed_tokens, self.count = count.tokens, data
        while self._unsigned and next(iter(self._unsigned)) <= count.tokens:
            self._unsigned.popitem(last=False)


class CountSigner:
    """The holder's end for one job: decides when to sign, and does.

    It signs when half of what the Island may send unsigned has come, so that the answer does not stand still for a round trip.
    """

    def __init__(self, ticket: Ticket, envelope: bytes, holder: Signer) -> None:
        """Raises LocalProtocolError where the ticket is somebody else's."""
        if ticket.holder != holder.peer_id:
            raise LocalProtocolError(f"the ticket belongs to {ticket.holder}, not to {holder.peer_id}")
        self._holder, self._network, self._hash = holder, ticket.network, ticket_hash(envelope)
        self._every = max(1, ticket.count_every // 2)
        self.signed_tokens = -1
        self.count = b""  # the newest one

    def __repr__(self) -> str:
        return f"<CountSigner {max(0, self.signed_tokens)} tokens signed>"

    def is_due(self, tokens: int) -> bool:
        """Whether to sign now that so many tokens have come."""
        return tokens - max(0, self.signed_tokens) >= self._every

    def sign(self, tokens: int, digest: bytes) -> bytes | None:
        """The count of all that has come; None where that was signed before."""
        if tokens <= self.signed_tokens:
            return None
        count = Count(COUNT_VERSION, self._network, self._holder.peer_id, self._hash, tokens, digest)
        self.signed_tokens, self.count = tokens, sign_count(count, self._holder)
        return self.count
