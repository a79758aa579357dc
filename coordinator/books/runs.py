"""Runs in the books: work of many jobs that goes on without its client, and in spite of its Coordinator. Pure operations.

Theory of operation. A batch or a workflow is a *run*: one row with its sealed specification, owned like a job by one run of one
Coordinator. Its jobs name it as their parent and have ids that follow from it, so whoever takes it over finds in the jobs table what is
done, and does the rest. Nothing else is written down while it runs: a job that is settled is a step that is finished.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from coordinator.books.errors import BooksRefused, Why
from coordinator.books.rows import Address, Kind, Rows


class RunKind(StrEnum):
    BATCH = "batch"
    FILE_BATCH = "file_batch"
    WORKFLOW = "workflow"


class RunState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Run:
    """One batch or workflow. Times in Unix milliseconds, 0: not yet.

    ``total``: inputs or steps; ``fingerprint``: of the request that made it; ``origin``: the run whose finished steps it takes over;
    ``spec`` and ``result``: sealed; ``expires_at_ms``: when both are emptied.
    """

    id: str
    account: str
    kind: RunKind
    name: str
    state: RunState
    owner: str
    owner_boot: int
    created_at_ms: int
    finished_at_ms: int = 0
    cancel_wanted: bool = False
    tries: int = 1
    total: int = 0
    fingerprint: str = ""
    origin: str = ""
    error_code: str = ""
    error_message: str = ""
    spec: bytes = b""
    result: bytes = b""
    expires_at_ms: int = 0

    @property
    def ended(self) -> bool:
        return self.state is not RunState.RUNNING


RUNS = Kind("runs", Run, "id")


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run begins. Gives the one that stands under its id already. Raises BooksRefused(REUSED) where another request made that."""

    run: Run

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((RUNS, self.run.id),)

    def apply(self, rows: Rows, now_ms: int) -> Run:
        known = rows.get(RUNS, self.run.id)
        if known is None:
            rows.put(RUNS, self.run)
            return self.run
        if (known.account, known.fingerprint) != (self.run.account, self.run.fingerprint):
            raise BooksRefused(Why.REUSED, "this idempotency key was used with another request")
        return known


@dataclass(frozen=True, slots=True)
class EndRun:
    """How a run ended. Saying it again gives it as it ended. Raises BooksRefused: NO_JOB, NOT_OWNER."""

    run_id: str
    owner: str
    owner_boot: int
    state: RunState
    result: bytes
    expires_at_ms: int
    error_code: str = ""
    error_message: str = ""

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((RUNS, self.run_id),)

    def apply(self, rows: Rows, now_ms: int) -> Run:
        run = _mine(rows, self.run_id, self.owner, self.owner_boot)
        if run.ended:
            return run
        run = replace(
            run,
            state=self.state,
            result=self.result,
            finished_at_ms=now_ms,
            expires_at_ms=self.expires_at_ms,
            error_code=self.error_code,
            error_message=self.error_message,
        )
        rows.put(RUNS, run)
        return run


@dataclass(frozen=True, slots=True)
class AdoptRun:
    """Another run of a Coordinator takes it over whose owner is gone. Raises BooksRefused: NO_JOB, NOT_OWNER where somebody was faster."""

    run_id: str
    from_owner: str
    from_boot: int
    owner: str
    owner_boot: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((RUNS, self.run_id),)

    def apply(self, rows: Rows, now_ms: int) -> Run:
        known = rows.get(RUNS, self.run_id)
        if known is not None and (known.owner, known.owner_boot) == (self.owner, self.owner_boot):
            return known
        run = _mine(rows, self.run_id, self.from_owner, self.from_boot)
        run = replace(run, owner=self.owner, owner_boot=self.owner_boot, tries=run.tries + 1)
        rows.put(RUNS, run)
        return run


@dataclass(frozen=True, slots=True)
class WantRunCancel:
    """Its account does not want it any more; its owner sees that and ends it. Raises BooksRefused(NO_JOB)."""

    run_id: str
    account: str

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((RUNS, self.run_id),)

    def apply(self, rows: Rows, now_ms: int) -> Run:
        run = rows.get(RUNS, self.run_id)
        if run is None or run.account != self.account:
            raise BooksRefused(Why.NO_JOB, "there is no such run")
        if not run.ended and not run.cancel_wanted:
            run = replace(run, cancel_wanted=True)
            rows.put(RUNS, run)
        return run


def _mine(rows: Rows, run_id: str, owner: str, boot: int) -> Run:
    run = rows.get(RUNS, run_id)
    if run is None:
        raise BooksRefused(Why.NO_JOB, f"there is no run {run_id}")
    if (run.owner, run.owner_boot) != (owner, boot):
        raise BooksRefused(Why.NOT_OWNER, f"run {run_id} has been taken over by another Coordinator")
    return run
