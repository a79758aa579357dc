"""A bridge's end of ``/archipelag/desk/1``: one stream to a Coordinator, kept for as long as the bridge lives, and questions over it.

A question that was open when the stream was lost is asked again on the next one, as all of them may be (specs/direct-path.md). One that
finds no Coordinator for ``AWAY_S`` fails with DeskAway. A question whose asker is cancelled is withdrawn; a ticket that comes for it all
the same is given back.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

import trio

from node.announce import CoordinatorFinder
from node.bookkeeper import now_ms
from node.greeting import exchange_hello
from node.net.frames import FrameStream
from node.net.host import Host
from node.outbox import Outbox
from node.trust import Pins
from protocol import limits
from protocol.direct import DESK, DESK_PROTOCOL, PlaceFreed, RateStanding, RequestWithdrawn, TicketGranted
from protocol.errors import ArchipelagError, LinkLost, RemoteProtocolError
from protocol.messages import Hello
from protocol.tickets import peek_ticket, ticket_hash

log = logging.getLogger(__name__)

AWAY_S = 5.0  # a Coordinator that restarts is back by then; a client would not wait much longer
WISHES_MAX = limits.DESK_REQUESTS_MAX // 2  # one that was withdrawn may still count at the other end
REPORTS_MAX = limits.DESK_REQUESTS_MAX // 4  # those have room of their own: an answer waits for them
_REDIAL_MAX_S = 1.0
_PROBLEM_REPEAT_S = 30.0


class DeskAway(ArchipelagError):
    """No Coordinator can be reached at the moment."""


class _Question:
    """One that waits for its answer."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answer: Any = None  # still None when the stream was lost


class _Link:
    """One stream to a Coordinator."""

    def __init__(self, stream: FrameStream) -> None:
        self.stream, self.outbox = stream, Outbox(stream, DESK)
        self.asked: dict[int, _Question] = {}

    async def run(self, heard: Callable[[Any], None]) -> None:
        """Hands answers to those who wait. Raises LinkLost, RemoteProtocolError."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.outbox.run)
            while True:
                message = await self.stream.receive()
                number = getattr(message, "request", None)
                if number is None or isinstance(message, RequestWithdrawn):
                    raise RemoteProtocolError(f"a Coordinator does not say {type(message).__name__}")
                heard(message)
                question = self.asked.pop(number, None)
                if question is not None:
                    question.answer = message
                    question.done.set()
                elif isinstance(message, TicketGranted):
                    self.outbox.send_nowait(given_back(message.ticket))

    def lose(self) -> None:
        self.outbox.lost = True
        self.stream.abort()
        for question in self.asked.values():
            question.done.set()
        self.asked.clear()


def given_back(ticket: bytes, outcome: str = "", count: bytes = b"") -> PlaceFreed:
    """The place of a ticket is free again. ``count``: the last that was signed for it."""
    return PlaceFreed(peek_ticket(ticket).job_id.partition(".")[0], ticket_hash(ticket), outcome, count)


class DeskClient:
    """Keeps the stream; ``run`` must be running. ``coordinator`` is the peer id of the Coordinator at its other end, or empty."""

    def __init__(
        self, host: Host, finder: CoordinatorFinder, pins: Pins, hello: Callable[[], Hello], rng: random.Random
    ) -> None:
        self._host, self._finder, self._pins, self._hello, self._rng = host, finder, pins, hello, rng
        self._link: _Link | None = None
        self._linked = trio.Event()
        self._last_number = 0
        self._wishes, self._reports = trio.CapacityLimiter(WISHES_MAX), trio.CapacityLimiter(REPORTS_MAX)
        self.coordinator = ""
        self.sessions_total = 0
        self.problem = ""
        self._standing = RateStanding(), 0.0  # and when it was said

    def __repr__(self) -> str:
        return f"<DeskClient to {self.coordinator or 'nobody'}, {self.sessions_total} sessions, {self._last_number} questions>"

    def standing(self) -> RateStanding:
        """What the Coordinator said last of the key's requests a minute, as of now. Any thread may ask."""
        said, at_s = self._standing
        reset_s = max(0, said.reset_s - int(time.monotonic() - at_s))
        return RateStanding(said.limit, said.remaining if reset_s else said.limit, reset_s)

    async def run(self) -> None:
        """Runs until cancelled. Redials at most about a second apart."""
        failures, told_s = 0, -_PROBLEM_REPEAT_S
        while True:
            before = self.sessions_total
            try:
                await self._session()
            except (OSError, ArchipelagError, trio.TooSlowError) as error:
                self.problem = str(error) or type(error).__name__
                if self.sessions_total > before:
                    failures, told_s = 0, -_PROBLEM_REPEAT_S
                if trio.current_time() - told_s >= _PROBLEM_REPEAT_S:
                    told_s = trio.current_time()
                    log.warning("no Coordinator at the moment (%s); trying again", self.problem)
            failures += 1
            pause_s = min(_REDIAL_MAX_S, limits.RECONNECT_MIN_S * 2 ** min(failures, 8))
            await trio.sleep(pause_s * self._rng.uniform(0.5, 1.0))

    async def _session(self) -> None:
        link = _Link(await self._open())
        try:
            self.coordinator, self.sessions_total = link.stream.remote_peer, self.sessions_total + 1
            log.info("tickets come from Coordinator %s", self.coordinator)
            self._link = link
            self._linked.set()
            await link.run(self._note)
        except* (LinkLost, RemoteProtocolError) as group:
            raise LinkLost(f"lost the Coordinator: {group.exceptions[0]}") from None
        finally:
            self.coordinator, self._link, self._linked = "", None, trio.Event()
            link.lose()

    async def _open(self) -> FrameStream:
        """Raises OSError, ArchipelagError or TooSlowError."""
        introduction, delegation = await self._finder.open()  # it finds, checks and pins; this stream is of no more use
        introduction.abort()
        peer = delegation.coordinator
        stream = await self._host.open(peer, DESK_PROTOCOL, DESK)
        try:
            self._pins.check_hello(await exchange_hello(stream, self._hello()), peer, now_ms())
        except BaseException:
            stream.abort()
            raise
        return stream

    def _note(self, message: Any) -> None:
        standing = getattr(message, "standing", None)
        if isinstance(standing, RateStanding):
            self._standing = standing, time.monotonic()

    def say_nowait(self, message: Any) -> None:
        """Something that is not answered; without a Coordinator it is dropped."""
        if self._link is not None:
            try:
                self._link.outbox.send_nowait(message)
            except LinkLost as error:
                log.debug("not said: %s", error)

    async def ask(self, make: Callable[[int], Any], is_report: bool = False) -> Any:
        """The answer to ``make(number)``, DeskRefused among them. Raises DeskAway."""
        room = self._reports if is_report else self._wishes
        while True:
            with trio.move_on_after(AWAY_S):
                await self._linked.wait()
            link = self._link
            if link is None:
                raise DeskAway(f"no Coordinator can be reached at the moment ({self.problem or 'not yet joined'})")
            async with room:
                answer = await self._ask_once(link, make)
            if answer is not None:
                return answer

    async def _ask_once(self, link: _Link, make: Callable[[int], Any]) -> Any:
        """None when the stream was lost before the answer came."""
        self._last_number = number = self._last_number + 1
        question = link.asked[number] = _Question()
        try:
            link.outbox.send_nowait(make(number))
            await question.done.wait()
        except LinkLost as error:
            log.debug("not asked: %s", error)
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            if self._link is link:
                self.say_nowait(RequestWithdrawn(number))
            raise
        finally:
            link.asked.pop(number, None)
        return question.answer
