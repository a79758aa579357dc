"""The Coordinator's end of the direct path: the desk where bridges ask for tickets, and where Islands hand in claims.

Streams in, calls of ``coordinator.direct_port.DirectDesk`` out. The requests of a bridge run beside one another, each in a task of its
stream's nursery: when the bridge is gone, what waited for it is cancelled. Claims are answered one after the other.

Rules. At most DESK_REQUESTS_MAX requests are open on a stream; one more is a breach. A peer that shows wrong keys is answered 429 for the
rest of the minute, without a look into the books. No key, ticket or receipt is ever logged.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from coordinator.direct_port import DirectDesk
from coordinator.http.errors import ApiError, from_refusal
from coordinator.http.ratelimit import TRACKED_MAX, PerMinute
from node.greeting import answer_hello
from node.net.frames import FrameStream
from node.outbox import Outbox
from protocol import checks, limits
from protocol.direct import (
    DESK,
    Claim,
    ClaimAnswer,
    DeskRefused,
    JobDropped,
    JobSettled,
    MendWanted,
    ModelsWanted,
    PlaceFreed,
    RateStanding,
    RequestWithdrawn,
    TicketWanted,
    Verdict,
)
from protocol.errors import Code, LinkLost, Refused, RemoteProtocolError
from protocol.messages import Hello, NodeRole
from protocol.tickets import ticket_hash

log = logging.getLogger(__name__)

_UNAUTHORIZED = 401
_TOO_MANY = 429


@dataclass(slots=True)
class DirectCounts:
    """Since the node started. ``claims_later``: answered so while the books could not be reached."""

    desks_open: int = 0
    granted: int = 0
    refused: int = 0
    settled: int = 0
    dropped: int = 0
    claims: int = 0
    claims_refused: int = 0
    claims_later: int = 0


class DirectServer:
    """Serves both protocols of one Coordinator."""

    def __init__(self, desk: DirectDesk, hello: Callable[[], Hello], clock: Callable[[], float] = trio.current_time) -> None:
        self._desk, self._hello, self._clock = desk, hello, clock
        self._wrong_keys = PerMinute()
        self._barred_until_s: OrderedDict[str, float] = OrderedDict()
        self.draining = False  # no more tickets; what was granted is settled
        self.counts = DirectCounts()

    def __repr__(self) -> str:
        return f"<DirectServer {self.counts.desks_open} desks open, {self.counts.granted} granted, {self.counts.claims} claims>"

    def _only(self, role: NodeRole) -> Callable[[Hello, str], None]:
        """A check of Hello: this role, and this network or none yet. It raises RemoteProtocolError."""

        def check(theirs: Hello, sender: str) -> None:
            if theirs.role is not role:
                raise RemoteProtocolError(f"{sender} says that it is a {theirs.role}, which has nothing to say here")
            if theirs.network not in ("", self._hello().network):
                raise RemoteProtocolError(f"{sender} belongs to another network")

        return check

    # -- claims

    async def serve_settle(self, stream: FrameStream) -> None:
        """Handler of one stream of an Island; raises what ends it."""
        await answer_hello(stream, self._hello, self._only(NodeRole.ISLAND))
        while True:
            message = await stream.receive()
            if not isinstance(message, Claim):
                raise RemoteProtocolError(f"{type(message).__name__} is no claim")
            await stream.send(await self._settle(message, stream.remote_peer))

    async def _settle(self, claim: Claim, sender: str) -> ClaimAnswer:
        self.counts.claims += 1
        key = ticket_hash(claim.ticket)
        try:
            outcome = await self._desk.claim(claim, sender)
        except (ApiError, Refused) as error:
            self.counts.claims_later += 1
            return ClaimAnswer(key, Verdict.LATER, 0, checks.made_printable(str(error)))
        verdict = Verdict.SETTLED if outcome.accepted else Verdict.REFUSED
        self.counts.claims_refused += verdict is Verdict.REFUSED
        return ClaimAnswer(key, verdict, outcome.paid_micros, checks.made_printable(outcome.reason))

    # -- the desk

    async def serve_desk(self, stream: FrameStream) -> None:
        """Handler of one stream of a bridge; raises what ends it."""
        await answer_hello(stream, self._hello, self._only(NodeRole.CONSUMER))
        self.counts.desks_open += 1
        self._desk.opened(stream.remote_peer)
        try:
            await _Desk(self, stream).run()
        finally:
            self._desk.closed(stream.remote_peer)
            self.counts.desks_open -= 1

    async def answer(self, message: Any, holder: str) -> Any:
        """The answer to one request. Raises RemoteProtocolError for what is none."""
        try:
            if isinstance(message, (TicketWanted, ModelsWanted)):
                self._check_not_barred(holder)
            if isinstance(message, TicketWanted) and self.draining:
                raise Refused(Code.DRAINING, "the Coordinator is shutting down")
            return await self._ask(message, holder)
        except ApiError as error:
            self.counts.refused += 1
            if error.status == _UNAUTHORIZED:
                self._note_wrong_key(holder)
            return _refused(message.request, error)
        except Refused as error:
            self.counts.refused += 1
            return _refused(message.request, from_refusal(error), error.code)

    def _note_wrong_key(self, holder: str) -> None:
        now_s = self._clock()
        standing = self._wrong_keys.count(holder, limits.DESK_WRONG_KEYS_PER_MINUTE, now_s)
        if not standing.remaining:
            self._barred_until_s[holder] = now_s + standing.reset_s
            self._barred_until_s.move_to_end(holder)
            if len(self._barred_until_s) > TRACKED_MAX:
                self._barred_until_s.popitem(last=False)

    def _check_not_barred(self, holder: str) -> None:
        """Raises ApiError 429 for a peer that has shown too many wrong keys."""
        left_s = self._barred_until_s.get(holder, 0.0) - self._clock()
        if left_s > 0:
            wait_s = math.ceil(left_s)
            text = f"too many wrong API keys from this peer; try again in {wait_s} s"
            headers = {"Retry-After": str(wait_s)}
            raise ApiError(_TOO_MANY, text, code="rate_limit_exceeded", kind="rate_limit_error", headers=headers)

    async def _ask(self, message: Any, holder: str) -> Any:
        match message:
            case TicketWanted():
                granted = await self._desk.grant(message, holder)
                self.counts.granted += 1
                return granted
            case MendWanted():
                return await self._desk.mend(message, holder)
            case JobSettled():
                self.counts.settled += 1
                return await self._desk.settle(message, holder)
            case JobDropped():
                self.counts.dropped += 1
                return await self._desk.drop(message, holder)
            case ModelsWanted():
                return await self._desk.models(message, holder)
        raise RemoteProtocolError(f"{type(message).__name__} is not for a Coordinator to hear at its desk")

    def freed(self, message: PlaceFreed, holder: str) -> None:
        self._desk.freed(message, holder)


class _Desk:
    """One stream of one bridge."""

    def __init__(self, server: DirectServer, stream: FrameStream) -> None:
        self._server, self._stream = server, stream
        self._outbox = Outbox(stream, DESK)
        self._open: dict[int, trio.CancelScope] = {}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.run)
            while True:
                message = await self._stream.receive()
                if isinstance(message, RequestWithdrawn):
                    if (scope := self._open.get(message.request)) is not None:
                        scope.cancel()
                elif isinstance(message, PlaceFreed):
                    self._server.freed(message, self._stream.remote_peer)
                else:
                    nursery.start_soon(self._answer, message, self._opened(message))

    def _opened(self, message: Any) -> trio.CancelScope:
        """Raises RemoteProtocolError for a number that is open, or one request too many."""
        number = getattr(message, "request", None)
        if number is None or number in self._open:
            raise RemoteProtocolError(f"{type(message).__name__} is no request, or its number is in use")
        if len(self._open) >= limits.DESK_REQUESTS_MAX:
            raise RemoteProtocolError(f"more than {limits.DESK_REQUESTS_MAX} requests at once")
        scope = self._open[number] = trio.CancelScope()
        return scope

    async def _answer(self, message: Any, scope: trio.CancelScope) -> None:
        try:
            with scope:
                self._outbox.send_nowait(await self._server.answer(message, self._stream.remote_peer))
        except (LinkLost, RemoteProtocolError):
            raise  # the end of the stream
        except Exception as error:  # a bug in one request must not end the others; its text may hold anything, so only the type is told
            log.error("a request at the desk broke: %s", type(error).__name__, exc_info=True)
            broken = ApiError(500, "internal error", code="internal_error", kind="server_error")
            self._outbox.send_nowait(_refused(message.request, broken))
        finally:
            del self._open[message.request]


def _refused(request: int, error: ApiError, code: Code | None = None) -> DeskRefused:
    return DeskRefused(
        request=request,
        code=code or "",
        message=checks.made_printable(error.message),
        status=error.status,
        kind=error.kind,
        error_code=error.code or "",
        param=error.param or "",
        retry_after_s=_number(error, "Retry-After"),
        standing=RateStanding(*(_number(error, f"X-RateLimit-{name}") for name in ("Limit", "Remaining", "Reset"))),
    )


def _number(error: ApiError, header: str) -> int:
    text = error.headers.get(header, "")
    return int(text) if text.isascii() and text.isdigit() else 0
