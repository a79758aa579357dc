"""Openings of jobs that need not be in the books at once, because nothing has reached the Consumer yet.

Theory of operation. A short chat ends some milliseconds after it began. Where its account is known to have many times the bid, its opening
may wait so long and is written together with its settlement, in one change: half the work, and the hold is resolved where it is placed.
Whoever is about to tell the Consumer anything waits for the opening first, which sends it on its way; so does ``run`` when it is
``LATEST_S`` old, so that other Coordinators and the account see what takes longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import trio

from coordinator.books.jobs import Job, OpenJob
from coordinator.books.writer import Pending

LATEST_S = 0.05
COVERED_TIMES = 8  # an account that has so many times a bid, beside what is not yet written, is trusted so long


class Beginning(Protocol):
    """What openings need of the books."""

    def begin(self, *operations: Any) -> Pending: ...

    def probably_has(self, account: str, micros: int) -> bool: ...


class Opening:
    """One that waits, is on its way, or was taken by whoever writes it together with something else."""

    def __init__(self, operation: OpenJob, begin: Callable[[OpenJob], Pending]) -> None:
        self.operation = operation
        self._begin = begin
        self._pending: Pending | None = None

    @property
    def waits(self) -> bool:
        return self._pending is None

    def send(self) -> Pending:
        """On its way from now on, if it was not before."""
        if self._pending is None:
            self._pending = self._begin(self.operation)
        return self._pending

    def send_with(self, pending: Pending) -> None:
        """It is the first change of these."""
        self._pending = pending

    async def wait(self) -> Job:
        """The job, once it is in the books. Raises BooksRefused or BooksUnavailable."""
        job: Job = (await self.send().wait())[0]
        return job


class Openings:
    """Runs on trio."""

    def __init__(self, books: Beginning) -> None:
        self._books = books
        self._waiting: dict[str, tuple[Opening, float]] = {}  # job id -> opening, since when
        self._micros: Counter[str] = Counter()  # account -> bids of what waits
        self._some = trio.Event()
        self.joined = 0  # that were written with their settlement

    def __repr__(self) -> str:
        return f"<Openings {len(self._waiting)} waiting, {self.joined} joined>"

    def covers(self, account: str, bid_micros: int) -> bool:
        """Whether the books will hardly say no."""
        return self._books.probably_has(account, COVERED_TIMES * bid_micros + self._micros[account])

    def put(self, operation: OpenJob) -> Opening:
        """To be written soon."""
        job = operation.job
        opening = Opening(operation, self._send)
        self._waiting[job.id] = opening, trio.current_time()
        self._micros[job.account] += job.bid_micros
        self._some.set()
        return opening

    def join(self, opening: Opening, *operations: Any) -> Pending:
        """Writes one that waits together with other changes, or none of them; its job is the first result."""
        self._forget(opening.operation)
        pending = self._books.begin(opening.operation, *operations)
        opening.send_with(pending)
        self.joined += 1
        return pending

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sends what has waited for ``LATEST_S``; all that waits at the end."""
        task_status.started()
        try:
            while True:
                await self._some.wait()
                await trio.sleep(LATEST_S / 2)
                self._send_since(trio.current_time() - LATEST_S / 2)
                if not self._waiting:
                    self._some = trio.Event()
        finally:
            self._send_since(trio.current_time())

    def _send_since(self, since_s: float) -> None:
        for opening in [opening for opening, put_s in self._waiting.values() if put_s <= since_s]:
            opening.send()

    def _send(self, operation: OpenJob) -> Pending:
        self._forget(operation)
        return self._books.begin(operation)

    def _forget(self, operation: OpenJob) -> None:
        job = operation.job
        del self._waiting[job.id]
        self._micros[job.account] -= job.bid_micros
        if not self._micros[job.account]:
            del self._micros[job.account]
