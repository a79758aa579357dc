"""Requests on their way through the desk: what was ordered, what stands in the books for it, and what runs of it now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.jobs import Job
from coordinator.cache.asking import CacheAsk
from coordinator.exchange.bids import Work
from coordinator.exchange.quotes import Quote
from coordinator.jobs import Event, JobSpec
from coordinator.openings import Opening
from protocol.errors import Code, Refused

log = logging.getLogger(__name__)


class JobCancelled(Refused):
    """Its account does not want the job any more."""

    def __init__(self) -> None:
        super().__init__(Code.CANCELLED, "the job was cancelled")


class TakenOver(Refused):
    """The books say that another Coordinator, or a later run of this one, has the job now."""

    def __init__(self) -> None:
        super().__init__(Code.CANCELLED, "another Coordinator has taken this job over; ask again")


@dataclass(frozen=True, slots=True)
class AbArm:
    """Which arm of which A/B test a request is in, and as which unit; ``variant`` is the arm's name."""

    test: str
    variant: str
    unit: str


@dataclass(frozen=True, slots=True)
class Order:
    """A request that has passed all checks. ``delivers``: its words reach the Consumer as they come, so what was delivered counts even when
    the end does not come. ``keep_s``: how long the answer is kept. ``check``: is told each event before it counts, and raises Refused for
    what is no answer to the request. ``cache``: how the cache of answers is to be asked; None: not at all. ``parent``: the run that the job
    is a part of; that run sees to it that what its Coordinator leaves is done again, under another id. ``user``: whom of its account it is
    for, as the client says it; ``arm``: of the A/B test that it counts for."""

    spec: JobSpec
    work: Work
    kind: str
    bid_micros: int | None = None
    quote_id: str = ""
    policy_text: str = ""
    delivers: bool = False
    keep_s: float = 0.0
    idempotency_key: str = ""
    fingerprint: str = ""
    is_retry: bool = False
    input: bytes = b""  # where it may be run again
    check: Callable[[Event], None] = lambda event: None
    cache: CacheAsk | None = None
    parent: str = ""
    user: str = ""
    arm: AbArm | None = None

    @property
    def account(self) -> str:
        return self.spec.account


@dataclass(frozen=True, slots=True)
class Opened:
    """A job in the books, and the spec to run it by; or, with ``earlier``, the answer of the request's first try. ``opening``: the job has
    still to come into the books."""

    job: Job
    spec: JobSpec
    quote: Quote | None = None
    earlier: tuple[Event, ...] | None = None
    opening: Opening | None = None


@dataclass(slots=True)
class LiveJob:
    """A job that this Coordinator runs now. ``opening``: until it is in the books. ``is_lost``: they say that it is another's by now.
    ``was_read``: somebody has watched its words come. ``begun_s``, ``first_word_s``: by trio's clock, 0.0: not yet."""

    job: Job
    opening: Opening | None = None
    is_lost: bool = False
    was_read: bool = False
    begun_s: float = 0.0
    first_word_s: float = 0.0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    def times_us(self, now_s: float) -> tuple[int, int]:
        """From its beginning to now, and to its first word (0: there was none), in microseconds."""
        first_us = max(1, int((self.first_word_s - self.begun_s) * 1_000_000)) if self.first_word_s else 0
        return int((now_s - self.begun_s) * 1_000_000), first_us

    async def wait_open(self) -> None:
        """Raises BooksRefused or BooksUnavailable where it has not come into the books."""
        opening = self.opening
        if opening is None:
            return
        job = await opening.wait()
        if self.opening is opening:  # or else it was settled at the same time
            self.job, self.opening = job, None

    async def opening_over(self) -> None:
        """Whatever came of it: others hear that."""
        try:
            await self.wait_open()
        except (BooksRefused, BooksUnavailable) as error:
            log.debug("job %s was not opened: %s", self.job.id, error)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which run of which Coordinator we are."""

    owner: str
    boot: int
