"""The messages of the two stream protocols.

``/archipelag/job/1``: one long-lived stream between a holder of tickets and an Island; many jobs share it, told apart by ``job``, a
number that the holder counts upwards and never reuses on that stream.

``/archipelag/ads/1``: one long-lived stream between a node and a Coordinator (or any peer): introductions, ads, and catching up with
the book of somebody who was there before.

Both begin with a ``Hello`` in each direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from protocol import checks, limits
from protocol.cargo_jobs import SEED_BYTES
from protocol.errors import Code
from protocol.generation import FinishReason
from protocol.registry import Registry, body

PROTOCOL_VERSION = 1
JOB_PROTOCOL = f"/archipelag/job/{PROTOCOL_VERSION}"
ADS_PROTOCOL = f"/archipelag/ads/{PROTOCOL_VERSION}"

JOB = Registry("job")
ADS = Registry("ads")


class NodeRole(StrEnum):
    ISLAND = "island"
    COORDINATOR = "coordinator"
    CONSUMER = "consumer"


@JOB.message(1)
@ADS.message(1)
@dataclass(frozen=True, slots=True)
class Hello:
    """First message in each direction. ``delegation`` is a Coordinator's envelope from the network key, empty for others;
    ``network`` is empty while a node has not joined one."""

    version: int
    role: NodeRole
    network: str
    agent: str
    delegation: bytes = b""

    def __post_init__(self) -> None:
        checks.in_range("version", self.version, 1, 1000)
        checks.printable("network", self.network, limits.NAME_CHARS_MAX)
        checks.printable("agent", self.agent, limits.NAME_CHARS_MAX)
        checks.at_most("delegation", self.delegation, limits.ENVELOPE_BYTES_MAX)


def _job(number: int) -> None:
    checks.in_range("job", number, 1, 2**53)


@JOB.message(2)
@dataclass(frozen=True, slots=True)
class JobOpen:
    """Holder to Island: do this. The body is the Cargo's input: a GenerationRequest, answered by JobChunk; or, with a ``seed`` of 16 bytes,
    one JSON object, answered by JobLines."""

    job: int
    ticket: bytes
    seed: bytes = b""
    input: bytes = body()

    def __post_init__(self) -> None:
        _job(self.job)
        checks.at_most("ticket", self.ticket, limits.ENVELOPE_BYTES_MAX)
        if self.seed:
            checks.exactly("seed", self.seed, SEED_BYTES)
        checks.at_most("input", self.input, limits.JOB_INPUT_BYTES_MAX)


@JOB.message(3)
@dataclass(frozen=True, slots=True)
class JobAccepted:
    """Island to holder: the job has a slot. ``engine`` decides whether another Island may continue this answer."""

    job: int
    engine: str
    prompt_tokens: int
    cached_tokens: int

    def __post_init__(self) -> None:
        _job(self.job)
        checks.label("engine", self.engine, limits.NAME_CHARS_MAX)
        checks.in_range("prompt_tokens", self.prompt_tokens, 0, 2**31)
        checks.in_range("cached_tokens", self.cached_tokens, 0, self.prompt_tokens)


@JOB.message(4)
@dataclass(frozen=True, slots=True)
class JobChunk:
    """Island to holder: the next tokens. ``step`` is the index of the first of them among those sent in this job, so a frame that is
    repeated or out of order shows. The body holds int32 little-endian ids, at least one."""

    job: int
    step: int
    text: str
    logprobs: bytes = b""
    tokens: bytes = body()

    def __post_init__(self) -> None:
        _job(self.job)
        checks.in_range("step", self.step, 0, limits.COMPLETION_TOKENS_MAX)
        checks.utf8("text", self.text, limits.JOB_CHUNK_TEXT_BYTES_MAX)
        checks.at_most("logprobs", self.logprobs, limits.JOB_CHUNK_LOGPROBS_BYTES_MAX)
        if not self.tokens or len(self.tokens) % 4 or len(self.tokens) // 4 > limits.COMPLETION_TOKENS_MAX:
            raise ValueError("a chunk carries whole int32 tokens, at least one")


@dataclass(frozen=True, slots=True)
class StageUse:
    """What one stage of a route has spent on a job, in microseconds: computing, and holding its frames altogether."""

    peer: str
    compute_us: int
    held_us: int

    def __post_init__(self) -> None:
        checks.peer_id("stage", self.peer)
        checks.in_range("compute_us", self.compute_us, 0, 2**53)
        checks.in_range("held_us", self.held_us, 0, 2**53)


@JOB.message(5)
@dataclass(frozen=True, slots=True)
class JobDone:
    """Island to holder: the answer is complete. Without this message it is not, however the stream ended.

    ``stages``: of a pipeline, first stage first; ``wire_us``: what its steps spent between stages.
    """

    job: int
    finish_reason: FinishReason
    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_us: int
    decode_us: int
    receipt: bytes
    stages: tuple[StageUse, ...] = ()
    wire_us: int = 0

    def __post_init__(self) -> None:
        _job(self.job)
        checks.utf8("text", self.text, limits.JOB_CHUNK_TEXT_BYTES_MAX)
        checks.in_range("prompt_tokens", self.prompt_tokens, 0, 2**31)
        checks.in_range("cached_tokens", self.cached_tokens, 0, self.prompt_tokens)
        checks.in_range("completion_tokens", self.completion_tokens, 0, limits.COMPLETION_TOKENS_MAX)
        checks.in_range("prefill_us", self.prefill_us, 0, 2**53)
        checks.in_range("decode_us", self.decode_us, 0, 2**53)
        checks.at_most("receipt", self.receipt, limits.ENVELOPE_BYTES_MAX)
        checks.at_most("stages", self.stages, limits.ROUTE_STAGES_MAX)
        checks.in_range("wire_us", self.wire_us, 0, 2**53)


@JOB.message(6)
@dataclass(frozen=True, slots=True)
class JobFailed:
    """Island to holder: the job was refused or broke; nothing follows."""

    job: int
    code: Code
    message: str

    def __post_init__(self) -> None:
        _job(self.job)
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


@JOB.message(7)
@dataclass(frozen=True, slots=True)
class JobCancel:
    """Holder to Island: stop and free the slot. The Island still answers with JobDone or JobFailed, whichever came first."""

    job: int

    def __post_init__(self) -> None:
        _job(self.job)


@JOB.message(8)
@dataclass(frozen=True, slots=True)
class RouteBroken:
    """Driver to holder: stage ``index`` of the job's route, in the run of its Island that ``boot`` names, is gone, stands still or is too
    slow (``code``). The job waits for RouteMended; what was computed is kept."""

    job: int
    index: int
    boot: int
    code: Code
    message: str

    def __post_init__(self) -> None:
        _job(self.job)
        checks.in_range("index", self.index, 0, limits.ROUTE_STAGES_MAX - 1)
        checks.in_range("boot", self.boot, 1, 2**53)
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


@JOB.message(9)
@dataclass(frozen=True, slots=True)
class RouteMended:
    """Holder to driver: go on over the route of this ticket, which is for the same job."""

    job: int
    ticket: bytes

    def __post_init__(self) -> None:
        _job(self.job)
        checks.at_most("ticket", self.ticket, limits.ENVELOPE_BYTES_MAX)


@JOB.message(10)
@dataclass(frozen=True, slots=True)
class JobCount:
    """Holder to Island: so much of the job has come, signed (protocol/counts.py). Only where the ticket asks for it."""

    job: int
    count: bytes

    def __post_init__(self) -> None:
        _job(self.job)
        checks.at_most("count", self.count, limits.COUNT_BYTES_MAX)


@JOB.message(11)
@dataclass(frozen=True, slots=True)
class JobAlive:
    """Island to holder: the job still runs here. Said every LEASE_RENEW_S; without it, or a chunk, the holder gives the job up."""

    job: int

    def __post_init__(self) -> None:
        _job(self.job)


@JOB.message(12)
@dataclass(frozen=True, slots=True)
class JobLines:
    """Island to holder: the next lines of a Cargo's output, whole ones with their line breaks, at least one. ``step``: bytes of lines sent
    before, so a frame that is repeated or out of order shows; ``tokens``: how many of these are ``token`` lines."""

    job: int
    step: int
    tokens: int
    lines: bytes = body()

    def __post_init__(self) -> None:
        _job(self.job)
        checks.in_range("step", self.step, 0, limits.CARGO_OUTPUT_BYTES_MAX)
        checks.in_range("lines", len(self.lines), 1, limits.JOB_LINES_BYTES_MAX)
        checks.in_range("tokens", self.tokens, 0, len(self.lines))
        if bytes(self.lines[-1:]) != b"\n":
            raise ValueError("lines are whole ones")


@JOB.message(13)
@dataclass(frozen=True, slots=True)
class JobMore:
    """Holder to Island: so many bytes of lines have been taken. An Island may have sent JOB_LINES_ROOM_BYTES more than were taken, and
    finishes the frame in which it passes that."""

    job: int
    taken: int

    def __post_init__(self) -> None:
        _job(self.job)
        checks.in_range("taken", self.taken, 1, limits.CARGO_OUTPUT_BYTES_MAX)


@ADS.message(2)
@dataclass(frozen=True, slots=True)
class Announce:
    """Envelopes of ads or notices of loss, newest first. Sent by anybody who has news or was asked for them."""

    envelopes: tuple[bytes, ...]

    def __post_init__(self) -> None:
        checks.at_most("envelopes", self.envelopes, limits.BOOK_REPLY_ENVELOPES_MAX)
        for envelope in self.envelopes:
            checks.at_most("envelope", envelope, limits.ENVELOPE_BYTES_MAX)
        checks.in_range("bytes announced", sum(map(len, self.envelopes)), 0, limits.BOOK_REPLY_BYTES_MAX)


@ADS.message(3)
@dataclass(frozen=True, slots=True)
class AdAck:
    """Coordinator to Island: your ad with this sequence stands in the book, or why it does not."""

    sequence: int
    accepted: bool
    reason: str = ""

    def __post_init__(self) -> None:
        checks.in_range("sequence", self.sequence, 0, 2**53)
        checks.at_most("reason", self.reason, limits.TEXT_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class Known:
    """What the asker has of a peer: the sequence of its ad, or, with ``lost``, of the ad that a notice of loss ended."""

    peer: str
    sequence: int
    lost: bool = False

    def __post_init__(self) -> None:
        checks.peer_id("known peer", self.peer)
        checks.in_range("known sequence", self.sequence, 1, 2**53)


@ADS.message(4)
@dataclass(frozen=True, slots=True)
class BookRequest:
    """Send me what you know of the peers ``p`` with ``after < p <= until`` that is newer than this. Answered by one Announce.

    ``known`` is everything the asker has in that range, by peer id in ascending order; an empty ``until`` has no upper end.
    """

    known: tuple[Known, ...]
    after: str = ""
    until: str = ""

    def __post_init__(self) -> None:
        checks.at_most("known", self.known, limits.BOOK_REQUEST_PEERS_MAX)
        for end in (self.after, self.until):
            if end:
                checks.peer_id("end of the range", end)
        peers = [known.peer for known in self.known]
        if any(left >= right for left, right in pairwise(peers)):
            raise ValueError("the known peers must ascend")
        if peers and not (self.after < peers[0] and (not self.until or peers[-1] <= self.until)):
            raise ValueError("a known peer is outside the range")


@ADS.message(5)
@dataclass(frozen=True, slots=True)
class Coordinators:
    """Any peer to a newcomer: here are the Coordinators that I know. Addresses end in ``/p2p/PEER_ID``; what they say of themselves is
    checked by their delegation, so a liar can only waste a dial."""

    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        checks.at_most("addresses", self.addresses, limits.AD_ADDRESSES_MAX)
        for address in self.addresses:
            checks.printable("address", address, limits.TEXT_CHARS_MAX)


JOB.seal()
ADS.seal()
