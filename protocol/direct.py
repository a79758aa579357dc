"""The direct path: what a Consumer's bridge and an Island tell a Coordinator about jobs whose tokens it never sees.

``/archipelag/desk/1``: one long-lived stream from a bridge to a Coordinator. The bridge asks for a ticket to each job, takes the answer
straight from the Island that the ticket names, and says in the end what came of it. Requests are numbered by the bridge; answers may come
in any order. The API key travels here and nowhere else: the stream is encrypted, and no repr shows it.

``/archipelag/settle/1``: from an Island to a Coordinator. The Island hands in what it is owed for a ticket: its receipt, and the last
count that the holder signed. One ticket pays once, whoever hands it in first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from protocol import checks, limits
from protocol.ads import CargoOffer
from protocol.errors import Code
from protocol.messages import PROTOCOL_VERSION, Hello
from protocol.registry import Registry, Struct

SETTLE_PROTOCOL = f"/archipelag/settle/{PROTOCOL_VERSION}"
DESK_PROTOCOL = f"/archipelag/desk/{PROTOCOL_VERSION}"
SETTLE = Registry("settle")
DESK = Registry("desk")

SETTLE.message(1)(Hello)
DESK.message(1)(Hello)

JOB_ID_CHARS = 24
REQUEST_MAX = 2**53
_API_KEY_CHARS_MAX = 128
_BID_CHARS_MAX = 40
_JOB_ID = re.compile(rf"[0-9a-f]{{{JOB_ID_CHARS}}}\Z")
_HEADER_NUMBER_MAX = 2**31


def _request(number: int) -> None:
    checks.in_range("request", number, 1, REQUEST_MAX)


def _job_id(value: str) -> None:
    if not _JOB_ID.match(value):
        raise ValueError(f"a job id has {JOB_ID_CHARS} hex digits, not {value[:80]!r}")


def _api_key(value: str) -> None:
    """Says nothing of the key itself: errors are logged."""
    if not 0 < len(value) <= _API_KEY_CHARS_MAX or not (value.isascii() and value.isprintable()):
        raise ValueError("what was given is no API key")


# -- claims


@SETTLE.message(2)
@dataclass(frozen=True, slots=True)
class Claim:
    """Island to Coordinator: pay me for this. ``ticket``, ``receipt`` and ``count`` are envelopes; ``count`` is the holder's last, empty
    where it signed none. Answered by ClaimAnswer before the next one is said."""

    ticket: bytes
    receipt: bytes
    count: bytes

    def __post_init__(self) -> None:
        checks.at_most("ticket", self.ticket, limits.ENVELOPE_BYTES_MAX)
        checks.at_most("receipt", self.receipt, limits.ENVELOPE_BYTES_MAX)
        checks.at_most("count", self.count, limits.COUNT_BYTES_MAX)


class Verdict(StrEnum):
    """What became of a claim. ``settled``: for good, whoever claimed first. ``refused``: for good, nothing will be paid. ``later``: the
    books cannot be reached; claim again."""

    SETTLED = "settled"
    REFUSED = "refused"
    LATER = "later"


@SETTLE.message(3)
@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    """Coordinator to Island. ``paid_micros``: what this ticket paid to the Islands of its route in all."""

    ticket_hash: bytes
    verdict: Verdict
    paid_micros: int
    reason: str = ""

    def __post_init__(self) -> None:
        checks.exactly("ticket_hash", self.ticket_hash, 32)
        checks.in_range("paid_micros", self.paid_micros, 0, limits.PRICE_MICROS_MAX)
        checks.printable("reason", self.reason, limits.TEXT_CHARS_MAX)


CLAIM: Struct[Claim] = Struct(Claim, 2 * limits.ENVELOPE_BYTES_MAX + 4096)  # as an Island keeps it in a file

# -- the desk


@dataclass(frozen=True, slots=True)
class Excluded:
    """An Island that is not wanted until it says a newer ad than ``sequence``, or, with ``rest_ms``, until so long from now."""

    peer: str
    sequence: int
    rest_ms: int = 0

    def __post_init__(self) -> None:
        checks.peer_id("excluded", self.peer)
        checks.in_range("sequence", self.sequence, 0, 2**53)
        checks.in_range("rest_ms", self.rest_ms, 0, 3_600_000)


@DESK.message(2)
@dataclass(frozen=True, slots=True)
class TicketWanted:
    """Bridge to Coordinator: a ticket for one of the ``choices`` of a job, please.

    ``job_id`` is drawn by the bridge: new where the Coordinator has not heard of it, else one more choice or one more attempt of a job of
    the same account and the same holder. ``kind``: "chat", "completion", …, for the books. ``prompt_tokens`` is an estimate,
    ``output_tokens`` a bound; both are of the largest choice. ``content_hash`` and ``engine``: of the Islands that wrote the answer so far,
    empty before the first token. ``context_over``: only larger contexts are of use. ``wait_ms``: for an Island that is full. ``bid``:
    credits as decimal text, empty for the account's own. ``policy``: JSON, or empty. ``quote``: the id of one, or empty.
    """

    request: int
    api_key: str = field(repr=False)
    job_id: str
    choices: int
    kind: str
    cargo: str
    prompt_tokens: int
    output_tokens: int
    content_hash: str = ""
    engine: str = ""
    context_over: int = 0
    affinity: str = ""
    excluded: tuple[Excluded, ...] = ()
    wait_ms: int = 0
    bid: str = ""
    policy: str = ""
    quote: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        _request(self.request)
        _api_key(self.api_key)
        _job_id(self.job_id)
        checks.in_range("choices", self.choices, 1, limits.COMPLETION_CHOICES_MAX)
        checks.label("kind", self.kind, limits.NAME_CHARS_MAX)
        checks.label("cargo", self.cargo, limits.NAME_CHARS_MAX)
        checks.in_range("prompt_tokens", self.prompt_tokens, 0, 2**31)
        checks.in_range("output_tokens", self.output_tokens, 1, limits.COMPLETION_TOKENS_MAX)
        if self.content_hash:
            checks.content_hash("content_hash", self.content_hash)
        if self.engine:
            checks.label("engine", self.engine, limits.NAME_CHARS_MAX)
        checks.in_range("context_over", self.context_over, 0, 2**31)
        if self.affinity:
            checks.peer_id("affinity", self.affinity)
        checks.at_most("excluded", self.excluded, limits.DESK_ISLANDS_MAX)
        checks.in_range("wait_ms", self.wait_ms, 0, 3_600_000)
        checks.printable("bid", self.bid, _BID_CHARS_MAX)
        checks.utf8("policy", self.policy, limits.DESK_POLICY_BYTES_MAX)
        checks.printable("quote", self.quote, limits.NAME_CHARS_MAX)
        checks.in_range("priority", self.priority, 0, 100)


@dataclass(frozen=True, slots=True)
class RateStanding:
    """Where the key stands: ``remaining`` of ``limit`` requests, for ``reset_s`` seconds yet. All 0 where it has no limit."""

    limit: int = 0
    remaining: int = 0
    reset_s: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "remaining", "reset_s"):
            checks.in_range(name, getattr(self, name), 0, _HEADER_NUMBER_MAX)


@DESK.message(3)
@dataclass(frozen=True, slots=True)
class TicketGranted:
    """Coordinator to bridge. The ticket names Island, run, job and cache salt; ``addresses`` are where its driver is reached; ``sequence``,
    ``region`` and ``offer`` are those of the ad that it was chosen by (of a pipeline, the offer of all stages together);
    ``price_max_micros`` is what it may cost; ``placement``: why this Island, as JSON, or empty."""

    request: int
    ticket: bytes
    addresses: tuple[str, ...]
    sequence: int
    region: str
    offer: CargoOffer
    price_max_micros: int
    placement: str = ""
    standing: RateStanding = field(default_factory=RateStanding)

    def __post_init__(self) -> None:
        _request(self.request)
        checks.at_most("ticket", self.ticket, limits.ENVELOPE_BYTES_MAX)
        checks.at_most("addresses", self.addresses, limits.AD_ADDRESSES_MAX)
        for address in self.addresses:
            checks.printable("address", address, limits.TEXT_CHARS_MAX)
        checks.in_range("sequence", self.sequence, 0, 2**53)
        checks.in_range("price_max_micros", self.price_max_micros, 0, limits.PRICE_MICROS_MAX)
        checks.printable("region", self.region, limits.NAME_CHARS_MAX)
        checks.utf8("placement", self.placement, limits.DESK_PLACEMENT_BYTES_MAX)


@DESK.message(4)
@dataclass(frozen=True, slots=True)
class DeskRefused:
    """Coordinator to bridge: no. As the error that a client of its HTTP face would get: ``status`` of HTTP, ``kind``, ``error_code`` and
    ``param`` of OpenAI's envelope (empty for null). ``code``: where it is about placement, which a bridge may act upon; else empty."""

    request: int
    code: str
    message: str
    status: int
    kind: str
    error_code: str = ""
    param: str = ""
    retry_after_s: int = 0
    standing: RateStanding = field(default_factory=RateStanding)

    def __post_init__(self) -> None:
        _request(self.request)
        if self.code:
            Code(self.code)
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)
        checks.in_range("status", self.status, 400, 599)
        for name in ("kind", "error_code", "param"):
            checks.printable(name, getattr(self, name), limits.NAME_CHARS_MAX)
        checks.in_range("retry_after_s", self.retry_after_s, 0, 86_400)


@DESK.message(5)
@dataclass(frozen=True, slots=True)
class PlaceFreed:
    """Bridge to Coordinator: the job of this ticket has ended at its Island. ``outcome`` is empty, or the code that it failed with;
    ``count`` the last count that the bridge signed, or empty. Not answered; it keeps the count of free places right, and says what the
    ticket may still cost where the job goes on elsewhere."""

    job_id: str
    ticket_hash: bytes
    outcome: str = ""
    count: bytes = b""

    def __post_init__(self) -> None:
        _job_id(self.job_id)
        checks.at_most("count", self.count, limits.COUNT_BYTES_MAX)
        checks.exactly("ticket_hash", self.ticket_hash, 32)
        if self.outcome:
            Code(self.outcome)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One ticket of a job and what came of it: the receipt of an Island that finished, the last count that the bridge signed. Either may
    be empty."""

    ticket: bytes
    receipt: bytes
    count: bytes

    def __post_init__(self) -> None:
        checks.at_most("ticket", self.ticket, limits.ENVELOPE_BYTES_MAX)
        checks.at_most("receipt", self.receipt, limits.ENVELOPE_BYTES_MAX)
        checks.at_most("count", self.count, limits.COUNT_BYTES_MAX)


def _attempts(attempts: tuple[Attempt, ...]) -> None:
    checks.at_most("attempts", attempts, limits.DESK_ATTEMPTS_MAX)
    size = sum(len(one.ticket) + len(one.receipt) + len(one.count) for one in attempts)
    checks.in_range("bytes of attempts", size, 0, limits.DESK_ATTEMPTS_BYTES_MAX)


@DESK.message(6)
@dataclass(frozen=True, slots=True)
class JobSettled:
    """Bridge to Coordinator: the job is done; these tickets were used. Answered by JobBilled. Saying it again changes nothing."""

    request: int
    job_id: str
    attempts: tuple[Attempt, ...]

    def __post_init__(self) -> None:
        _request(self.request)
        _job_id(self.job_id)
        _attempts(self.attempts)


@DESK.message(7)
@dataclass(frozen=True, slots=True)
class JobDropped:
    """Bridge to Coordinator: the job has failed, or nobody wants it any more (``cancelled``). What was signed is paid all the same.
    Answered by JobBilled."""

    request: int
    job_id: str
    code: Code
    attempts: tuple[Attempt, ...] = ()

    def __post_init__(self) -> None:
        _request(self.request)
        _job_id(self.job_id)
        _attempts(self.attempts)


@DESK.message(8)
@dataclass(frozen=True, slots=True)
class JobBilled:
    """Coordinator to bridge: what the job has cost so far, and the account's credits after it."""

    request: int
    price_micros: int
    balance_micros: int

    def __post_init__(self) -> None:
        _request(self.request)
        checks.in_range("price_micros", self.price_micros, 0, limits.PRICE_MICROS_MAX)
        checks.in_range("balance_micros", self.balance_micros, -(2**62), 2**62)


@DESK.message(9)
@dataclass(frozen=True, slots=True)
class ModelsWanted:
    """Bridge to Coordinator: what is offered now? Answered by Models; shows also whether the key is good."""

    request: int
    api_key: str = field(repr=False)

    def __post_init__(self) -> None:
        _request(self.request)
        _api_key(self.api_key)


@dataclass(frozen=True, slots=True)
class OfferedModel:
    """``since_s``: Unix time since when somebody offers it."""

    name: str
    since_s: int

    def __post_init__(self) -> None:
        checks.label("name", self.name, limits.NAME_CHARS_MAX)
        checks.in_range("since_s", self.since_s, 0, 2**53)


@DESK.message(10)
@dataclass(frozen=True, slots=True)
class Models:
    request: int
    models: tuple[OfferedModel, ...]
    islands: int
    standing: RateStanding = field(default_factory=RateStanding)

    def __post_init__(self) -> None:
        _request(self.request)
        checks.at_most("models", self.models, limits.DESK_MODELS_MAX)
        checks.in_range("islands", self.islands, 0, 2**31)


@DESK.message(11)
@dataclass(frozen=True, slots=True)
class RequestWithdrawn:
    """Bridge to Coordinator: I do not want what I asked for with this number. Not answered; a ticket that is granted all the same is given
    back by PlaceFreed."""

    request: int

    def __post_init__(self) -> None:
        _request(self.request)


@DESK.message(12)
@dataclass(frozen=True, slots=True)
class MendWanted:
    """Bridge to Coordinator: the driver of the job that this ticket opened says RouteBroken. Answered by TicketGranted, with a ticket for
    the mended route, or by DeskRefused. ``ticket_hash``: of the job's newest ticket."""

    request: int
    job_id: str
    ticket_hash: bytes
    index: int
    boot: int
    code: Code
    message: str

    def __post_init__(self) -> None:
        _request(self.request)
        _job_id(self.job_id)
        checks.exactly("ticket_hash", self.ticket_hash, 32)
        checks.in_range("index", self.index, 0, limits.ROUTE_STAGES_MAX - 1)
        checks.in_range("boot", self.boot, 1, 2**53)
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


SETTLE.seal()
DESK.seal()
