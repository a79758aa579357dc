"""Batches as their accounts see them: begun, looked at, watched, cancelled, and what they gave.

Theory of operation. Where a batch runs here, how far it is stands in memory (``BatchRunner.live``). Where another Coordinator of the
database has it, the same is made from its jobs in the books: what has ended is exact, what runs shows no Island. When it has ended its
result says everything, and when that is not kept any more, its jobs still do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

import trio

from coordinator.batches.progress import BatchProgress, Item, ItemState
from coordinator.batches.runner import BatchRunner, progress_of
from coordinator.batches.spec import BatchSpec, FailMode, Merge, unpack
from coordinator.books import run_queries
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job
from coordinator.books.runs import Run, RunKind
from coordinator.desk import Bidding
from coordinator.jobs import Event
from coordinator.runs.board import RunBoard
from privacy.sealed_rows import SealBroken
from protocol import limits

_HEADS_MAX = 1000
_POLL_S = 0.25  # how often the books are asked about a batch that runs elsewhere
_ENDING_POLL_S = 0.02  # and about one that has just ended here
_QUIET_S = 5.0  # one that runs here is asked about as well, in case that it is taken away


class TooManyBatches(Exception):
    """The account has so many open that it has to wait for one."""


class TooDear(Exception):
    """What all inputs may cost together, in micro-credits, is over what the client allows."""

    def __init__(self, sum_micros: int) -> None:
        super().__init__(sum_micros)
        self.sum_micros = sum_micros


class TooLarge(Exception):
    """All outputs together are too large for one answer."""


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch as it is now. ``merge`` and ``fail_mode``: None where they are not kept any more."""

    run: Run
    progress: BatchProgress
    merge: Merge | None
    fail_mode: FailMode | None


@dataclass(frozen=True, slots=True)
class Outputs:
    """``events``: of each input in order, None where there are none; ``jobs``: all jobs of the batch, for what they used and cost."""

    view: BatchView
    events: Sequence[list[Event] | None]
    jobs: Sequence[Job]
    is_expired: bool


@dataclass(frozen=True, slots=True)
class Change:
    """What a watcher hears: the items that have changed since he last heard of them, by index; all of them at first."""

    view: BatchView
    items: Sequence[tuple[int, Item]]


class BatchBoard:
    """Runs on trio."""

    def __init__(
        self, runs: RunBoard, runner: BatchRunner, market: Bidding, clock_ms: Callable[[], int], retry_window_s: float
    ) -> None:
        self._runs, self._runner, self._market = runs, runner, market
        self._clock_ms, self._retry_window_s = clock_ms, retry_window_s
        self._heads: dict[str, tuple[Merge, FailMode]] = {}

    def __repr__(self) -> str:
        return f"<BatchBoard of {self._runner!r}>"

    async def submit(
        self, run_id: str, account: str, spec: BatchSpec, fingerprint: str, is_retry: bool, max_price_micros: int | None
    ) -> tuple[BatchView, bool]:
        """A batch that goes on by itself, and whether it is new. Raises TooManyBatches, TooDear, BooksRefused or BooksUnavailable."""
        if not await self._is_known(run_id, account, fingerprint, is_retry):
            if await self._runs.books.ask(run_queries.open_runs, account, RunKind.BATCH) >= limits.BATCHES_OPEN_MAX:
                raise TooManyBatches
            if max_price_micros is not None:
                spec = await self._priced(account, spec, max_price_micros)
        packed = await trio.to_thread.run_sync(spec.pack)
        run, is_new = await self._runs.submit(
            run_id, account, RunKind.BATCH, spec.cargo, len(spec.inputs), packed, fingerprint=fingerprint, is_retry=is_retry
        )
        if is_new:
            self._remember(run.id, spec)
        return await self._view(run), is_new

    async def _is_known(self, run_id: str, account: str, fingerprint: str, is_retry: bool) -> bool:
        """Whether the request has made a batch before."""
        books = self._runs.books
        if await books.ask(run_queries.run_without_spec, run_id, account) is not None:
            return True
        since_ms = self._clock_ms() - int(self._retry_window_s * 1000)
        return is_retry and await books.ask(run_queries.run_by_fingerprint, account, fingerprint, since_ms) is not None

    async def _priced(self, account: str, spec: BatchSpec, max_price_micros: int) -> BatchSpec:
        """With a bid for each input, so that what they are now is what they will be. Raises TooDear."""
        bids = spec.bids
        if not bids:
            works = self._runner.works(spec)
            bids = tuple([(await self._market.bid(account, spec.cargo, work, None))[0].micros for work in works])
        if sum(bids) > max_price_micros:
            raise TooDear(sum(bids))
        return replace(spec, bids=bids)

    async def find(self, run_id: str, account: str) -> BatchView:
        """Raises BooksRefused(NO_JOB) or BooksUnavailable."""
        return await self._view(await self._run(run_id, account))

    async def list(self, account: str, limit: int, offset: int) -> tuple[list[Run], int]:
        """Newest first, and how many there are in all."""
        return await self._runs.books.ask(run_queries.runs_of, account, RunKind.BATCH, limit, offset)

    async def cancel(self, run_id: str, account: str) -> BatchView:
        """Raises BooksRefused(NO_JOB) or BooksUnavailable."""
        await self._runs.cancel(run_id, account, RunKind.BATCH)
        return await self.find(run_id, account)

    async def outputs(self, run_id: str, account: str) -> Outputs:
        """What its inputs gave so far. Raises TooLarge, BooksRefused(NO_JOB) or BooksUnavailable."""
        view = await self.find(run_id, account)
        wanted = [item.job_id for item in view.progress if item.state is ItemState.SUCCEEDED]
        if await self._runs.books.ask(run_queries.output_bytes, wanted) > limits.BATCH_OUTPUT_BYTES_MAX:
            raise TooLarge
        found = await self._runs.outputs(wanted)
        events = [found.get(item.job_id) for item in view.progress]
        jobs = await self._runs.books.ask(run_queries.children_of, run_id)
        is_expired = bool(wanted) and not found and view.run.ended and view.run.expires_at_ms <= self._clock_ms()
        return Outputs(view, events, jobs, is_expired)

    async def watch(self, run_id: str, account: str) -> AsyncIterator[Change]:
        """Its present state, and what changes, to its end. Raises BooksRefused(NO_JOB) or BooksUnavailable before the first."""
        view = await self.find(run_id, account)
        told: list[object] = [None] * len(view.progress)
        while True:
            version = view.progress.version
            news = [(index, item) for index, item in enumerate(view.progress) if told[index] != _shown(item)]
            for index, item in news:
                told[index] = _shown(item)
            yield Change(view, news)
            if view.run.ended:
                return
            await self._news(view, version)
            view = await self._again(view)

    async def _news(self, view: BatchView, version: int) -> None:
        """Waits until something may have changed."""
        live = self._live(view.run.id)
        if live is None:
            await trio.sleep(_POLL_S)
        elif live is view.progress and live.version == version and not live.is_over:
            with trio.move_on_after(_QUIET_S):
                await live.bell.wait()
        elif live.is_over:
            await trio.sleep(_ENDING_POLL_S)

    async def _again(self, view: BatchView) -> BatchView:
        """As it is now; where the books are away, as far as is known here: whoever watches has time."""
        try:
            live = self._live(view.run.id)
            if live is not None and not live.is_over:
                return replace(view, progress=live)
            return await self.find(view.run.id, view.run.account)
        except BooksUnavailable:
            await trio.sleep(_POLL_S)
            return view

    def _live(self, run_id: str) -> BatchProgress | None:
        return self._runner.live.get(run_id) if self._runs.is_live(run_id) else None

    async def _run(self, run_id: str, account: str) -> Run:
        run = await self._runs.books.ask(run_queries.run_without_spec, run_id, account)
        if run is None or run.kind is not RunKind.BATCH:
            raise BooksRefused(Why.NO_JOB, "there is no such job")
        return run

    async def _view(self, run: Run) -> BatchView:
        merge, fail_mode = await self._head(run)
        return BatchView(run, await self._progress(run), merge, fail_mode)

    async def _progress(self, run: Run) -> BatchProgress:
        if run.ended:
            try:
                value = self._runs.result_of(run)
            except SealBroken:
                value = {}
            if value:
                return progress_of(run.id, value)
        elif (live := self._live(run.id)) is not None:
            return live
        return BatchProgress.of_jobs(run.id, run.total, await self._runs.books.ask(run_queries.children_of, run.id))

    async def _head(self, run: Run) -> tuple[Merge | None, FailMode | None]:
        known = self._heads.get(run.id)
        if known is not None:
            return known
        whole = await self._runs.books.ask(run_queries.run_of, run.id, run.account)
        try:
            data = self._runs.spec_of(whole) if whole is not None else b""
        except SealBroken:
            data = b""
        return self._remember(run.id, await trio.to_thread.run_sync(unpack, data)) if data else (None, None)

    def _remember(self, run_id: str, spec: BatchSpec) -> tuple[Merge, FailMode]:
        if len(self._heads) >= _HEADS_MAX:
            del self._heads[next(iter(self._heads))]
        self._heads[run_id] = spec.merge, spec.fail_mode
        return spec.merge, spec.fail_mode


def _shown(item: Item) -> object:
    """What of an item a watcher hears."""
    return item.state, item.job_id, item.island, item.error_code, item.price_micros
