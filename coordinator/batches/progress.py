"""How far a batch is: each input's state, and what became of it.

Theory of operation. An input is tried in *attempts*, each a job of its own with an id that follows from the run's (``job_id_of``). What
stands here is kept in memory alone: whoever takes a batch over makes it anew from the jobs that are in the books
(``BatchProgress.of_jobs``), by the same rules that hold while it runs, and does the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from coordinator.books.jobs import Job, JobState
from coordinator.runs.board import Bell
from protocol import limits
from protocol.errors import Code

# What passes: another try may go well. Not among them: what the input or its Cargo is at fault for, and what has ended two workers.
AGAIN = frozenset(
    code.value
    for code in (Code.DRAINING, Code.LEASE_LOST, Code.CANCELLED, Code.BAD_TICKET, Code.TIMEOUT, Code.NO_CAPACITY)
)
# Where a Coordinator went away, or its database: no try of the input's.
LOST = frozenset({"coordinator_lost", "books_unavailable", "expired"})


class ItemState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({ItemState.SUCCEEDED, ItemState.FAILED, ItemState.CANCELLED})


@dataclass(slots=True)
class Item:
    """One input. ``job_id``: of the attempt that counts: the one that succeeded, else the last; empty before the first. ``island``: where
    that runs or ran, empty while it is not known. ``attempts``: begun so far, so it is the number of the next one; ``failures``: those that
    count. Times in Unix milliseconds, 0: not yet."""

    state: ItemState = ItemState.PENDING
    job_id: str = ""
    island: str = ""
    error_code: str = ""
    error_message: str = ""
    price_micros: int = 0
    started_ms: int = 0
    ended_ms: int = 0
    attempts: int = 0
    failures: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def job_id_of(run_id: str, index: int, attempt: int) -> str:
    return f"{run_id}.{index}.{attempt}"


def parts_of(run_id: str, job_id: str) -> tuple[int, int] | None:
    """Index and attempt of a job of this run; None for any other id."""
    index, _, attempt = job_id.removeprefix(f"{run_id}.").partition(".")
    if not (index.isdecimal() and attempt.isdecimal()) or job_id_of(run_id, int(index), int(attempt)) != job_id:
        return None
    return int(index), int(attempt)


class BatchProgress:
    """The items by their index, how many are in which state, and a bell that rings when something has changed. ``version`` grows with each
    change, so that who looks away meanwhile knows. ``stragglers``: how many items were sent to a second Island since it runs here."""

    def __init__(self, run_id: str, total: int) -> None:
        self.run_id = run_id
        self._items = [Item() for _ in range(total)]
        self.counts: Counter[ItemState] = Counter({ItemState.PENDING: total})
        self.bell = Bell()
        self.version = 0
        self.stragglers = 0

    def __repr__(self) -> str:
        return f"<BatchProgress {self.ended} of {len(self)} ended, {self.counts[ItemState.RUNNING]} running>"

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]

    @property
    def ended(self) -> int:
        return sum(self.counts[state] for state in ENDED)

    @property
    def is_over(self) -> bool:
        return self.ended == len(self)

    def pending(self) -> list[int]:
        return [index for index, item in enumerate(self._items) if item.state is ItemState.PENDING]

    @classmethod
    def of_jobs(cls, run_id: str, total: int, jobs: Iterable[Job]) -> BatchProgress:
        """As the books tell it. Jobs that have not ended are another Coordinator's: theirs run."""
        attempts: dict[int, list[tuple[int, Job]]] = {}
        for job in jobs:
            parts = parts_of(run_id, job.id)
            if parts is not None and parts[0] < total:
                attempts.setdefault(parts[0], []).append((parts[1], job))
        progress = cls(run_id, total)
        for index, found in attempts.items():
            found.sort(key=lambda each: each[0])
            progress._enter(index, item_of(found))
        return progress

    @classmethod
    def of_items(cls, run_id: str, items: Sequence[Item], stragglers: int) -> BatchProgress:
        progress = cls(run_id, len(items))
        for index, item in enumerate(items):
            progress._enter(index, item)
        progress.stragglers = stragglers
        return progress

    def _enter(self, index: int, item: Item) -> None:
        self.counts[self._items[index].state] -= 1
        self.counts[item.state] += 1
        self._items[index] = item

    # ---- what happens

    def begin(self, index: int, now_ms: int) -> str:
        """The next attempt of an item begins; its job's id."""
        item = self._items[index]
        job_id = job_id_of(self.run_id, index, item.attempts)
        item.attempts += 1
        if item.state is not ItemState.RUNNING:
            item.job_id, item.island, item.started_ms = job_id, "", item.started_ms or now_ms
            self._turn(item, ItemState.RUNNING)
        return job_id

    def placed(self, index: int, job_id: str, island: str) -> None:
        """An Island has taken an attempt; of two, the first one's shows."""
        item = self._items[index]
        if item.job_id == job_id and item.island != island:
            item.island = island
            self._changed()

    def go_on_with(self, index: int, job_id: str, island: str) -> None:
        """Of two attempts the other one goes on."""
        item = self._items[index]
        if item.job_id != job_id:
            item.job_id, item.island = job_id, island
            self._changed()

    def put_back(self, index: int) -> None:
        """It waits for another attempt."""
        item = self._items[index]
        item.island = ""
        self._turn(item, ItemState.PENDING)

    def succeed(self, index: int, job_id: str, island: str, price_micros: int, now_ms: int) -> None:
        item = self._items[index]
        item.job_id, item.island, item.price_micros = job_id, island, price_micros
        item.error_code = item.error_message = ""
        self._end(item, ItemState.SUCCEEDED, now_ms)

    def fail(self, index: int, code: str, message: str, now_ms: int, state: ItemState = ItemState.FAILED) -> None:
        item = self._items[index]
        item.error_code, item.error_message = code, message
        self._end(item, state, now_ms)

    def cancel_rest(self, now_ms: int) -> None:
        """Whatever has not ended never will."""
        for item in self._items:
            if not item.ended:
                self._end(item, ItemState.CANCELLED, now_ms)

    def _end(self, item: Item, state: ItemState, now_ms: int) -> None:
        item.ended_ms = now_ms
        self._turn(item, state)

    def _turn(self, item: Item, state: ItemState) -> None:
        self.counts[item.state] -= 1
        self.counts[state] += 1
        item.state = state
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self.bell.ring()


def item_of(attempts: list[tuple[int, Job]]) -> Item:
    """What the books say of one input, from its attempts in their order, at least one."""
    item = Item(attempts=attempts[-1][0] + 1)
    jobs = [job for _, job in attempts]
    item.failures = sum(job.state is JobState.FAILED and job.error_code in AGAIN for job in jobs)
    succeeded = next((job for job in jobs if job.state is JobState.SUCCEEDED), None)
    running = next((job for job in jobs if not job.ended), None)
    job = succeeded or running or jobs[-1]
    item.job_id, item.island, item.price_micros = job.id, job.island, job.price_micros
    item.started_ms = jobs[0].created_at_ms
    if succeeded is not None:
        item.state, item.ended_ms = ItemState.SUCCEEDED, job.finished_at_ms
    elif running is not None:
        item.state = ItemState.RUNNING
    else:
        _judge(item, jobs)
    return item


def _judge(item: Item, jobs: list[Job]) -> None:
    """An input none of whose attempts went well: whether it is to be tried again."""
    final = next((job for job in jobs if _is_final(job)), None)
    job = final or jobs[-1]
    if final is None and may_try_again(item):
        item.island = ""
        return
    item.state = ItemState.CANCELLED if job.state is JobState.CANCELLED else ItemState.FAILED
    item.job_id, item.island, item.ended_ms = job.id, job.island, job.finished_at_ms
    item.error_code, item.error_message = job.error_code, job.error_message


def _is_final(job: Job) -> bool:
    """Whether an attempt settled what becomes of its input. A job that was cancelled by nobody's wish was left by its Coordinator."""
    if job.state is JobState.CANCELLED:
        return job.cancel_wanted
    return job.error_code not in AGAIN | LOST


def may_try_again(item: Item) -> bool:
    return item.failures < limits.BATCH_ITEM_TRIES_MAX and item.attempts < limits.BATCH_ITEM_ATTEMPTS_MAX
