"""Job tickets: the Coordinator's signed word that a peer may have a job done, and the Island's guard that checks it.

The trust chain has two links. The *network key* signs a ``Delegation`` for each Coordinator's key; the Coordinator signs the ticket.
An Island pins the network at first contact and then serves any Coordinator that the network key vouches for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from protocol import checks, limits
from protocol.activations import Activations
from protocol.envelope import Label, open_envelope, peek, seal
from protocol.errors import Code, Refused, RemoteProtocolError, SignatureError
from protocol.identity import Signer
from protocol.prices import Ask, sum_of_asks
from protocol.registry import Struct
from protocol.shards import LayerRange

TICKET_VERSION = 1


def network_id_of(public_key: bytes) -> str:
    """The network's name: first 32 hex digits of the SHA-256 of its public key, so it cannot be claimed without the key."""
    return hashlib.sha256(b"archipelag-network/1\0" + public_key).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Delegation:
    """The network's key says: ``coordinator`` may issue tickets until ``expires_at_ms``."""

    network: str
    coordinator: str
    expires_at_ms: int

    def __post_init__(self) -> None:
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.peer_id("coordinator", self.coordinator)
        checks.in_range("expires_at_ms", self.expires_at_ms, 1, 2**53)


@dataclass(frozen=True, slots=True)
class TicketStage:
    """What an Island of a route computes, and what it asks for that."""

    layers: LayerRange
    ask: Ask


@dataclass(frozen=True, slots=True)
class Ticket:
    """Opens one job. ``boots`` names the run of each Island on the route; ``token_limit`` counts output tokens.

    ``stages``: one for each Island of a pipeline, whose layers follow one another from 0 on; empty where one Island does all.
    ``count_every``: tokens beyond the holder's last signed count that may leave the Island (protocol/counts.py); 0 where the holder is
    the issuer itself, which need not sign.
    """

    version: int
    network: str
    issuer: str
    holder: str
    job_id: str
    route: tuple[str, ...]
    boots: tuple[int, ...]
    cargo: str
    content_hash: str
    token_limit: int
    price_limit_micros: int
    cache_salt: bytes
    nonce: bytes
    issued_at_ms: int
    expires_at_ms: int
    stages: tuple[TicketStage, ...] = ()
    activations: Activations = Activations.F32
    count_every: int = 0

    def __post_init__(self) -> None:
        if self.version != TICKET_VERSION:
            raise ValueError(f"ticket version {self.version} is not {TICKET_VERSION}")
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.peer_id("issuer", self.issuer)
        checks.peer_id("holder", self.holder)
        checks.label("job_id", self.job_id, limits.NAME_CHARS_MAX)
        checks.in_range("route length", len(self.route), 1, limits.ROUTE_STAGES_MAX)
        for peer in self.route:
            checks.peer_id("route", peer)
        checks.unique("route", self.route)
        if len(self.boots) != len(self.route):
            raise ValueError("a ticket names one boot for each Island of its route")
        for boot in self.boots:
            checks.in_range("boot", boot, 1, 2**53)
        self._check_stages()
        checks.in_range("count_every", self.count_every, 0, limits.COMPLETION_TOKENS_MAX)
        if self.holder != self.issuer and not self.count_every:
            raise ValueError("a ticket whose holder is not its issuer says after how many tokens the holder signs")
        checks.label("cargo", self.cargo, limits.NAME_CHARS_MAX)
        checks.content_hash("content_hash", self.content_hash)
        checks.in_range("token_limit", self.token_limit, 1, limits.COMPLETION_TOKENS_MAX)
        checks.in_range("price_limit_micros", self.price_limit_micros, 0, limits.PRICE_MICROS_MAX)
        checks.exactly("cache_salt", self.cache_salt, 32)
        checks.exactly("nonce", self.nonce, limits.NONCE_BYTES)
        checks.in_range("issued_at_ms", self.issued_at_ms, 1, 2**53)
        lifetime_ms = self.expires_at_ms - self.issued_at_ms
        checks.in_range("ticket lifetime in ms", lifetime_ms, 1, limits.TICKET_LIFETIME_S * 1000)

    def _check_stages(self) -> None:
        if not self.stages and len(self.route) == 1:
            return
        if len(self.stages) != len(self.route):
            raise ValueError("a ticket for several Islands says what each of them computes")
        edges = [0, *(stage.layers.high for stage in self.stages)]
        if any(stage.layers.low != edge for stage, edge in zip(self.stages, edges, strict=False)):
            raise ValueError("the layers of a route follow one another from 0 on")

    @property
    def driver(self) -> str:
        """The Island that a job is opened with: the last of the route, which has the tokenizer and the sampler."""
        return self.route[-1]


_DELEGATION: Struct[Delegation] = Struct(Delegation)
_TICKET: Struct[Ticket] = Struct(Ticket)


def sign_delegation(delegation: Delegation, network_key: Signer) -> bytes:
    return seal(Label.DELEGATION, _DELEGATION.encode(delegation), network_key)


def read_delegation(data: bytes, now_ms: int) -> Delegation:
    """Raises SignatureError unless the key whose hash is the network's name signed it, RemoteProtocolError when it has expired."""
    envelope = open_envelope(Label.DELEGATION, data)
    delegation = _DELEGATION.decode(envelope.payload)
    if network_id_of(envelope.public_key) != delegation.network:
        raise SignatureError("a delegation must be signed by the network's own key")
    if delegation.expires_at_ms < now_ms:
        raise RemoteProtocolError("the Coordinator's delegation has expired; its operator has to renew it")
    if delegation.expires_at_ms > now_ms + (limits.DELEGATION_LIFETIME_S + limits.CLOCK_SKEW_S) * 1000:
        raise RemoteProtocolError("the Coordinator's delegation is for longer than the protocol allows")
    return delegation


def sign_ticket(ticket: Ticket, coordinator: Signer) -> bytes:
    return seal(Label.TICKET, _TICKET.encode(ticket), coordinator)


def read_ticket(data: bytes) -> Ticket:
    """The ticket in an envelope, for whoever holds it. Raises RemoteProtocolError; says nothing about who may use it (see TicketGuard)."""
    return _TICKET.decode(open_envelope(Label.TICKET, data).payload)


def peek_ticket(data: bytes) -> Ticket:
    """The ticket in an envelope that we have made or checked ourselves; the signature is not looked at. Raises RemoteProtocolError."""
    return _TICKET.decode(peek(data).payload)


def total_ask(ticket: Ticket) -> Ask:
    """What the stages of a route ask together; nothing where one Island does all, which knows its ask."""
    return sum_of_asks(stage.ask for stage in ticket.stages)


def ticket_hash(data: bytes) -> bytes:
    """SHA-256 of the envelope as it was sent; receipts name it."""
    return hashlib.sha256(data).digest()


class TicketGuard:
    """Decides whether an Island may start a job, and remembers used nonces until their tickets expire.

    Bounded: when ``NONCES_REMEMBERED_MAX`` live nonces are known, new tickets are refused as no_capacity rather than an old one forgotten.
    """

    def __init__(self, peer: str, boot: int, network: str) -> None:
        self._peer, self._boot, self._network = peer, boot, network
        self._issuers: dict[str, int] = {}
        self._nonces: OrderedDict[bytes, int] = OrderedDict()
        self._uses: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()  # of stages: nonce -> expiry, use
        self.admitted = 0
        self.refused = 0

    def __repr__(self) -> str:
        return f"<TicketGuard {self.admitted} admitted, {self.refused} refused, {len(self._nonces)} nonces>"

    def trust(self, delegation: Delegation) -> None:
        """Accept tickets of this Coordinator. Raises SignatureError when it belongs to another network."""
        if delegation.network != self._network:
            raise SignatureError(f"that Coordinator belongs to network {delegation.network}, not {self._network}")
        self._issuers[delegation.coordinator] = delegation.expires_at_ms

    def admit(self, data: bytes, sender: str, now_ms: int) -> Ticket:
        """The ticket, which is now used up. Raises Refused(BAD_TICKET) with the reason; ``sender`` is the peer on the link."""
        try:
            ticket = self._check(data, sender, now_ms)
        except (RemoteProtocolError, Refused) as error:
            self.refused += 1
            if isinstance(error, Refused):
                raise
            raise Refused(Code.BAD_TICKET, str(error)) from error
        self._nonces[ticket.nonce] = ticket.expires_at_ms
        self.admitted += 1
        return ticket

    def _check(self, data: bytes, sender: str, now_ms: int) -> Ticket:
        ticket = self._check_route(data, now_ms)
        if ticket.holder != sender:
            raise RemoteProtocolError("the ticket belongs to another peer")
        if ticket.stages and ticket.driver != self._peer:
            raise RemoteProtocolError("the ticket opens its job on the last Island of its route")
        self._forget(now_ms)
        if ticket.nonce in self._nonces:
            raise RemoteProtocolError("the ticket was used before")
        if len(self._nonces) >= limits.NONCES_REMEMBERED_MAX:
            raise Refused(Code.NO_CAPACITY, "this Island remembers too many tickets at the moment")
        return ticket

    def _check_route(self, data: bytes, now_ms: int) -> Ticket:
        envelope = open_envelope(Label.TICKET, data)
        ticket = _TICKET.decode(envelope.payload)
        if envelope.signer != ticket.issuer:
            raise RemoteProtocolError("the ticket was signed by somebody else than its issuer")
        if self._issuers.get(ticket.issuer, 0) < now_ms:
            raise RemoteProtocolError("the ticket's issuer is no Coordinator of this network")
        if ticket.network != self._network:
            raise RemoteProtocolError("the ticket is for another network")
        if self._peer not in ticket.route:
            raise RemoteProtocolError("the ticket is for another Island")
        if ticket.boots[ticket.route.index(self._peer)] != self._boot:
            raise RemoteProtocolError("the ticket is for an earlier run of this Island")
        if ticket.expires_at_ms < now_ms:
            raise RemoteProtocolError("the ticket has expired")
        if ticket.issued_at_ms > now_ms + limits.CLOCK_SKEW_S * 1000:
            raise RemoteProtocolError("the ticket comes from the future")
        return ticket

    def check_stage(self, data: bytes, index: int, sender: str, now_ms: int) -> Ticket:
        """The ticket of a pipeline, in which this Island is stage ``index`` and ``sender`` the one before it. Does not use it up.

        Raises Refused(BAD_TICKET): no stage may be used to reach a peer that the Coordinator did not name.
        """
        try:
            ticket = self._check_route(data, now_ms)
            if not ticket.stages or index >= len(ticket.route) or ticket.route[index] != self._peer:
                raise RemoteProtocolError(f"the ticket does not make this Island stage {index}")
            if ticket.route[index - 1] != sender:  # before the first comes the driver, the last of the ring
                raise RemoteProtocolError("the ticket names another Island as the stage before")
        except RemoteProtocolError as error:
            self.refused += 1
            raise Refused(Code.BAD_TICKET, str(error)) from error
        return ticket

    def use_stage(self, data: bytes, index: int, sender: str, use: bytes, now_ms: int) -> Ticket:
        """Like ``check_stage``, and uses it up for ``use`` (a sequence of a session), which may be said again after a loss."""
        ticket = self.check_stage(data, index, sender, now_ms)
        while self._uses and next(iter(self._uses.values()))[0] < now_ms - limits.CLOCK_SKEW_S * 1000:
            self._uses.popitem(last=False)
        _, known = self._uses.get(ticket.nonce, (0, use))
        if known != use:
            self.refused += 1
            raise Refused(Code.BAD_TICKET, "the ticket was used before")
        if ticket.nonce not in self._uses and len(self._uses) >= limits.NONCES_REMEMBERED_MAX:
            raise Refused(Code.NO_CAPACITY, "this Island remembers too many tickets at the moment")
        self._uses[ticket.nonce] = ticket.expires_at_ms, use
        return ticket

    def _forget(self, now_ms: int) -> None:
        """Tickets come roughly in the order of their expiry, so looking at the oldest few is enough. Nonces outlive their tickets by
        CLOCK_SKEW_S: a clock that is set back must not make an old ticket new."""
        while self._nonces and next(iter(self._nonces.values())) < now_ms - limits.CLOCK_SKEW_S * 1000:
            self._nonces.popitem(last=False)
