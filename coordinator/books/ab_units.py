"""What the jobs of one unit in one arm of an A/B test came to: integer sums, changed where a job is settled. Pure operations.

Theory of operation. A job of a test is counted in the transaction that ends it, so no crash can lose a count or count twice. What is added
follows from the job's own row (``Counted``), so the sums equal a recount of the jobs. Of a unit's sums the statistics need no more than
these: the observation is the unit, not the job (coordinator/abtests/statistics.py).

Rules. Jobs that succeeded count, and those that failed in a way that speaks of the version (``SAYS_NOTHING`` has the others). Those that an
Island had and their Consumer gave up on are counted apart, as abandoned: with a version that hangs they are all that is seen of it. Of all
others, and of those that another run of a Coordinator had to do again, only their unit is known. Answers from the cache are counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from coordinator.books.rows import Address, Kind, Rows
from protocol.errors import Code

# Error codes of jobs whose end says nothing about the version that was tried.
_CONSUMERS = {Code.BAD_INPUT, Code.NO_TOOLS, Code.CONTEXT_LENGTH, Code.UNSIGNED}
_ABSENT = {Code.NO_CAPACITY, Code.UNKNOWN_CARGO, Code.DRAINING, Code.BAD_TICKET}
_OURS = {Code.CANCELLED, "coordinator_lost", "books_unavailable", "expired", "bridge_lost"}
SAYS_NOTHING = frozenset(map(str, _CONSUMERS | _ABSENT | _OURS))
# The same where no Island had the job. Where one had, it broke on that one and nobody was left to try it again: so does a job end whose
# version crashes, where one Island has that version.
SAYS_NOTHING_UNPLACED = frozenset({str(Code.NO_ISLAND)})
GIVEN_UP = str(Code.CANCELLED)  # the error code of a job that was cancelled for its Consumer while it ran, and by nobody else
CACHE_SOURCE = "cache"  # the bid source of a job whose answer was kept


@dataclass(frozen=True, slots=True)
class AbUnit:
    """``jobs``: that count; ``abandoned``: beside them. ``latency_us`` and ``cost_micros``: of the jobs that succeeded; ``first_words``,
    ``speeds``, ``rated``: how many jobs the sum beside each is of."""

    id: str
    test: str
    arm: str
    unit: str
    jobs: int = 0
    succeeded: int = 0
    abandoned: int = 0
    cached: int = 0
    tokens: int = 0
    latency_us: int = 0
    first_word_us: int = 0
    first_words: int = 0
    speed_milli: int = 0
    speeds: int = 0
    cost_micros: int = 0
    ups: int = 0
    rated: int = 0


AB_UNITS = Kind("ab_units", AbUnit, "id")


class Counted(Protocol):
    """Of a job's row, what counts (jobs.Job)."""

    @property
    def ab_test(self) -> str: ...
    @property
    def ab_arm(self) -> str: ...
    @property
    def ab_unit(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def error_code(self) -> str: ...
    @property
    def island(self) -> str: ...
    @property
    def tries(self) -> int: ...
    @property
    def bid_source(self) -> str: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def latency_us(self) -> int: ...
    @property
    def first_word_us(self) -> int: ...
    @property
    def price_micros(self) -> int: ...
    @property
    def rating(self) -> int: ...


def unit_id(test: str, arm: str, unit: str) -> str:
    return f"{test}/{arm}/{unit}"


def unit_of(job: Counted) -> str:
    """The row that a job is counted in; empty where it is of no test."""
    return unit_id(job.ab_test, job.ab_arm, job.ab_unit) if job.ab_test else ""


def counts(job: Counted) -> bool:
    """Whether a job has ended in a way that says something about its arm."""
    return _is_of_one_run(job) and (job.state == "succeeded" or (job.state == "failed" and _is_versions(job)))


def is_abandoned(job: Counted) -> bool:
    """Whether an Island had the job, and its Consumer did not wait for the end."""
    return _is_of_one_run(job) and job.state == "cancelled" and job.error_code == GIVEN_UP and job.island != ""


def _is_of_one_run(job: Counted) -> bool:
    """Of a job that was taken over and done again, the times are of its last try alone."""
    return bool(job.ab_test) and job.bid_source != CACHE_SOURCE and job.tries == 1


def _is_versions(job: Counted) -> bool:
    """Whether a failure speaks of the version."""
    return job.error_code not in SAYS_NOTHING and not (job.island == "" and job.error_code in SAYS_NOTHING_UNPLACED)


def speed_milli(job: Counted) -> int:
    """Tokens per second behind the first word, in thousandths; 0 where there is nothing to measure."""
    span_us = job.latency_us - job.first_word_us
    if job.completion_tokens < 2 or job.first_word_us <= 0 or span_us <= 0:
        return 0
    return (job.completion_tokens - 1) * 1_000_000_000 // span_us


def added(unit: AbUnit, job: Counted) -> AbUnit:
    """With a job that has ended."""
    if is_abandoned(job):
        return replace(unit, abandoned=unit.abandoned + 1)
    if not counts(job):
        return unit
    unit = replace(unit, jobs=unit.jobs + 1)
    if job.state != "succeeded":
        return unit
    speed = speed_milli(job)
    unit = replace(
        unit,
        succeeded=unit.succeeded + 1,
        tokens=unit.tokens + job.completion_tokens,
        latency_us=unit.latency_us + job.latency_us,
        first_word_us=unit.first_word_us + job.first_word_us,
        first_words=unit.first_words + (job.first_word_us > 0),
        speed_milli=unit.speed_milli + speed,
        speeds=unit.speeds + (speed > 0),
        cost_micros=unit.cost_micros + job.price_micros,
    )
    return rated(unit, 0, job.rating)


def rated(unit: AbUnit, before: int, after: int) -> AbUnit:
    """A job's thumb has changed: -1 down, 1 up, 0 none."""
    return replace(
        unit,
        ups=unit.ups + (after > 0) - (before > 0),
        rated=unit.rated + (after != 0) - (before != 0),
    )


def unit_row(rows: Rows, test: str, arm: str, unit: str) -> AbUnit:
    """As it is, or as it begins."""
    id = unit_id(test, arm, unit)
    return rows.get(AB_UNITS, id) or AbUnit(id, test, arm, unit)


def note_job(rows: Rows, job: Counted) -> None:
    """Counts a job that has just ended; its unit's row was read. Of one that does not count it is still known that its unit was given the
    arm: who gives up on a slow version must not be missing where the arms' units are compared with their shares."""
    rows.put(AB_UNITS, added(unit_row(rows, job.ab_test, job.ab_arm, job.ab_unit), job))


@dataclass(frozen=True, slots=True)
class AddCached:
    """So many answers of a unit came from the cache."""

    test: str
    arm: str
    unit: str
    count: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((AB_UNITS, unit_id(self.test, self.arm, self.unit)),)

    def apply(self, rows: Rows, now_ms: int) -> None:
        unit = unit_row(rows, self.test, self.arm, self.unit)
        rows.put(AB_UNITS, replace(unit, cached=unit.cached + self.count))
