"""Thumbs that accounts give their answers. Pure operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coordinator.books.ab_units import AB_UNITS, counts, rated, unit_of, unit_row
from coordinator.books.errors import BooksRefused, Why
from coordinator.books.jobs import JOBS, Job, JobState
from coordinator.books.rows import Address, Rows


@dataclass(frozen=True, slots=True)
class RateJob:
    """``rating``: 1 up, -1 down, 0 takes an earlier one back. Raises BooksRefused: NO_JOB, STATE for a job that has not succeeded."""

    job_id: str
    account: str
    rating: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield JOBS, self.job_id
        job = rows.peek(JOBS, self.job_id)
        if job is not None and job.ab_test:
            yield AB_UNITS, unit_of(job)

    def apply(self, rows: Rows, now_ms: int) -> Job:
        job = rows.get(JOBS, self.job_id)
        if job is None or job.account != self.account:
            raise BooksRefused(Why.NO_JOB, "there is no such job")
        if job.state is not JobState.SUCCEEDED:
            raise BooksRefused(Why.STATE, f"the job is {job.state}: only an answer that has come can be rated")
        if job.rating == self.rating:
            return job
        if counts(job):
            rows.put(AB_UNITS, rated(unit_row(rows, job.ab_test, job.ab_arm, job.ab_unit), job.rating, self.rating))
        job = replace(job, rating=self.rating)
        rows.put(JOBS, job)
        return job
