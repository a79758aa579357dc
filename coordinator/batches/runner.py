"""What a run of kind *batch* does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from coordinator.batches.progress import BatchProgress, Item, ItemState
from coordinator.batches.scheduler import BatchTerms, ItemRefused, work_through
from coordinator.batches.spec import BatchSpec, FailMode, unpack
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.runs import Run, RunState
from coordinator.exchange.bids import Work
from coordinator.http.child_orders import ChildOrders, ChildTerms
from coordinator.http.errors import ApiError
from coordinator.http.job_input import lines_asked, text_asked, wants_text, work_of
from coordinator.orders import Order
from coordinator.regions import Residency
from coordinator.runs.board import RunContext, RunResult

_UNPACKED_AT_ONCE_BYTES = 1_000_000  # more is read in a thread


class BatchRunner:
    """Runs on trio. ``slots(cargo, policy)``: of all Islands that could take a job, without those that others wait for;
    ``remember(cargo)``: it was served before, so its Islands may be on their way; ``is_there(island)``: whether it is in the book;
    ``is_live(run_id)``: whether a run runs here. ``live``: how far those are."""

    def __init__(
        self,
        orders: ChildOrders,
        slots: Callable[[str, Residency | None], int],
        remember: Callable[[str], None],
        is_there: Callable[[str], bool],
        is_live: Callable[[str], bool],
        clock_ms: Callable[[], int],
    ) -> None:
        self._orders, self._slots, self._remember, self._is_there = orders, slots, remember, is_there
        self._is_live, self._clock_ms = is_live, clock_ms
        self.live: dict[str, BatchProgress] = {}
        self.stragglers = 0

    def __repr__(self) -> str:
        return f"<BatchRunner {len(self.live)} batches, {self.stragglers} inputs sent twice>"

    async def run(self, context: RunContext) -> RunResult:
        run = context.run
        self._forget()
        progress = self.live[run.id] = BatchProgress.of_jobs(run.id, run.total, context.done.values())
        try:
            spec = await _unpacked(context.spec)
            self._remember(spec.cargo)
            terms = BatchTerms(spec.max_parallelism, spec.fail_mode is FailMode.FAIL_FAST)
            items, policy = _Inputs(run, spec, self._orders), spec.policy
            await work_through(
                context, items, terms, lambda: self._slots(spec.cargo, policy), progress, self._clock_ms, self._is_there
            )
        except (BooksUnavailable, BooksRefused):
            del self.live[run.id]
            raise
        self.stragglers += progress.stragglers
        return ended(progress, spec.fail_mode)

    async def cancelled(self, context: RunContext) -> RunResult:
        run = context.run
        progress = self.live.get(run.id) or BatchProgress.of_jobs(run.id, run.total, context.done.values())
        progress.cancel_rest(self._clock_ms())
        return RunResult(RunState.CANCELLED, kept(progress), "cancelled", "the batch was cancelled")

    def works(self, spec: BatchSpec) -> list[Work]:
        """What each input may use at most. Raises ApiError 400 for one that the Cargo cannot take."""
        writes_text, works = self._orders.writes_text(spec.cargo), []
        for given in spec.inputs:
            asked = text_asked(spec.cargo, given) if wants_text(given, writes_text) else lines_asked(given)
            works.append(work_of(asked, self._orders.job_timeout_s))
        return works

    def _forget(self) -> None:
        """Those that have ended: until the books say so themselves, they are looked at here."""
        self.live = {run_id: progress for run_id, progress in self.live.items() if self._is_live(run_id)}


class _Inputs:
    def __init__(self, run: Run, spec: BatchSpec, orders: ChildOrders) -> None:
        self._run, self._spec, self._orders = run, spec, orders
        self._terms = ChildTerms(None, spec.policy, spec.policy_text, spec.priority)

    @property
    def total(self) -> int:
        return len(self._spec.inputs)

    async def order(self, index: int, job_id: str, avoid: frozenset[str]) -> Order:
        spec, terms = self._spec, self._terms
        if spec.bids:
            terms = ChildTerms(spec.bids[index], terms.policy, terms.policy_text, terms.priority)
        try:
            return self._orders.order(self._run, job_id, spec.cargo, spec.inputs[index], terms, avoid=avoid)
        except ApiError as error:  # what the Cargo takes is known only now
            raise ItemRefused(error.code or "invalid_value", error.message) from None


async def _unpacked(spec: bytes) -> BatchSpec:
    return unpack(spec) if len(spec) < _UNPACKED_AT_ONCE_BYTES else await trio.to_thread.run_sync(unpack, spec)


def ended(progress: BatchProgress, fail_mode: FailMode) -> RunResult:
    """How a batch ends all of whose items have. Pure."""
    first = next(((index, item) for index, item in enumerate(progress) if _is_failure(item)), None)
    succeeded = progress.counts[ItemState.SUCCEEDED]
    if first is None or (succeeded and fail_mode is FailMode.BEST_EFFORT):
        return RunResult(RunState.SUCCEEDED, kept(progress))
    index, item = first
    what = "no input succeeded; the first error" if fail_mode is FailMode.BEST_EFFORT else "an input failed"
    return RunResult(RunState.FAILED, kept(progress), item.error_code, f"{what}: input {index}: {item.error_message}")


def _is_failure(item: Item) -> bool:
    """The rest of a batch that failed fast is cancelled without an error of its own."""
    return item.state is not ItemState.SUCCEEDED and bool(item.error_code)


def kept(progress: BatchProgress) -> dict[str, Any]:
    """What is kept of a batch that has ended; ``progress_of`` reads it."""
    rows = [
        [it.state.value, it.job_id, it.island, it.error_code, it.error_message, it.price_micros, it.started_ms, it.ended_ms]
        for it in progress
    ]
    return {"items": rows, "stragglers": progress.stragglers}


def progress_of(run_id: str, value: dict[str, Any]) -> BatchProgress:
    """The opposite of ``kept``."""
    items = [
        Item(ItemState(state), job_id, island, code, message, price, started, ended)
        for state, job_id, island, code, message, price, started, ended in value["items"]
    ]
    return BatchProgress.of_items(run_id, items, value["stragglers"])
