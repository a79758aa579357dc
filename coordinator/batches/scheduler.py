"""Works through the inputs of a batch: as many at once as there is room for, the last ones twice where that ends it sooner.

Theory of operation. Greedy list scheduling: whenever a place is free the next input takes it, on whichever Island placement likes best;
with equal inputs no order ends sooner than that by more than one input. The *window* is what Islands that offer the Cargo can do at once,
free or busy, never more than the batch's ``max_parallelism`` and at least 1; it is looked at again all the time. When nothing is left to
begin, inputs that are slow where they are (stragglers.py) get a second job that avoids that Island. The first to give its result wins: the
other one is cancelled, and where it has come to its end in the same moment its result is refused before it is settled, so it is never paid.

Rules. An input is tried again only where what happened passes (progress.AGAIN) and never because of what it says. What costs more than the
account has waits for the holds of its siblings to be released, and fails when none is left. ``fail_fast``: the first failure cancels the
rest. Whatever ends this coroutine early cancels the jobs that run; those of ``progress`` that have ended stay as they are.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from coordinator.batches.progress import AGAIN, BatchProgress, ItemState, may_try_again
from coordinator.batches.stragglers import Underway, who_straggles
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.jobs import Accepted, ChoiceResult, Event, Settled
from coordinator.orders import JobCancelled, Order, TakenOver
from protocol import limits
from protocol.errors import ArchipelagError, Code, Refused

log = logging.getLogger(__name__)

_LOOK_S = 1.0  # how often the window is looked at anew while inputs wait
_TOOK_KEPT = 64  # times of one Island; its speed is that of the last ones
_COPIES_MAX = 2  # jobs of one input at once
_UNPAID_WINDOWS_MAX = 2  # while results are being paid, which takes the disk some ms, their Islands have the next inputs already


class ItemRefused(ArchipelagError):
    """An input that can never run, whoever asks. ``code`` and ``message`` stand as its error; the message quotes nothing of the input."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Items(Protocol):
    """The inputs of a batch, by index from 0."""

    @property
    def total(self) -> int: ...

    async def order(self, index: int, job_id: str, avoid: frozenset[str]) -> Order:
        """One input as a job with this id that does not run on the Islands ``avoid``. Called again for each attempt. Raises ItemRefused, or
        BooksUnavailable."""
        ...


class Working(Protocol):
    """What the scheduler needs of a ``RunContext``."""

    async def job(self, order: Order) -> list[Event]: ...


@dataclass(frozen=True, slots=True)
class BatchTerms:
    """``max_parallelism``: None is as many as there is room for."""

    max_parallelism: int | None = None
    fail_fast: bool = False


@dataclass(slots=True, eq=False)
class _Attempt:
    """A job of one input that runs now. ``since_s``: when its Island took it."""

    index: int
    job_id: str
    avoid: frozenset[str]
    island: str = ""
    since_s: float = 0.0
    results_due: int = 1
    has_result: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


async def work_through(
    context: Working,
    items: Items,
    terms: BatchTerms,
    capacity: Callable[[], int],
    progress: BatchProgress,
    clock_ms: Callable[[], int],
    is_there: Callable[[str], bool] = lambda island: True,
) -> None:
    """Runs what ``progress`` says is pending until all items have ended, and tells it there. Items that have ended are not touched, so
    that a batch that was begun elsewhere goes on. Afterwards ``progress.is_over``; with ``fail_fast`` the rest is cancelled.

    ``context``: the RunContext; ``capacity()``: slots of all Islands that could take these inputs, free or busy, 0 where there are none;
    ``clock_ms``: Unix milliseconds, for times that are shown; ``is_there(island)``: whether its slots count in ``capacity``: a job that
    hangs on an Island that is gone takes no place.

    Raises BooksUnavailable, BooksRefused(NOT_OWNER) where another Coordinator has the run: what ran is cancelled then.
    """
    await _Work(context, items, terms, capacity, progress, clock_ms, is_there).run()


class _Work:
    def __init__(
        self,
        context: Working,
        items: Items,
        terms: BatchTerms,
        capacity: Callable[[], int],
        progress: BatchProgress,
        clock_ms: Callable[[], int],
        is_there: Callable[[str], bool],
    ) -> None:
        self._context, self._items, self._terms, self._capacity = context, items, terms, capacity
        self._progress, self._clock_ms, self._is_there = progress, clock_ms, is_there
        self._pending = deque(progress.pending())
        self._running: dict[int, list[_Attempt]] = {}
        self._took_s: dict[str, deque[float]] = {}
        self._copied: set[int] = set()
        self._is_poor = False  # no credit for one more; until a sibling's hold is released
        self._is_failed = terms.fail_fast and any(item.error_code and item.ended for item in progress)  # when it was begun elsewhere
        self._fatal: BooksRefused | BooksUnavailable | None = None
        self._changed = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while not (self._progress.is_over or self._is_failed or self._fatal):
                self._changed = trio.Event()
                self._start_more(nursery)
                wait_s = self._send_copies(nursery)
                with trio.move_on_after(wait_s):
                    await self._changed.wait()
            nursery.cancel_scope.cancel()
        if self._fatal is not None:
            raise self._fatal
        if self._is_failed:
            self._progress.cancel_rest(self._clock_ms())

    # ---- what begins

    def _room(self, stuck: int = 0) -> int:
        """How many more jobs may begin now. ``stuck``: of those that run, whose places will not be free in time, and may be gone."""
        attempts = [attempt for copies in self._running.values() for attempt in copies]
        most = min(limits.BATCH_RUNNING_MAX, self._terms.max_parallelism or limits.BATCH_RUNNING_MAX)
        window = min(max(1, self._capacity()) + stuck, most)
        return min(window - sum(map(self._takes_place, attempts)), _UNPAID_WINDOWS_MAX * window - len(attempts))

    def _takes_place(self, attempt: _Attempt) -> bool:
        """Not one that has only to be paid, nor one that hangs on an Island that is gone."""
        return not attempt.has_result and (not attempt.island or self._is_there(attempt.island))

    def _start_more(self, nursery: trio.Nursery) -> None:
        if self._is_poor or not self._pending:
            return
        for _ in range(min(self._room(), len(self._pending))):
            self._start(nursery, self._pending.popleft(), frozenset())

    def _send_copies(self, nursery: trio.Nursery) -> float:
        """In how many seconds to look again."""
        if self._pending or self._is_poor:
            return _LOOK_S
        now_s = trio.current_time()
        alone = [
            Underway(index, attempts[0].island, now_s - attempts[0].since_s)
            for index, attempts in self._running.items()
            if len(attempts) == 1 and attempts[0].island and not attempts[0].has_result and index not in self._copied
        ]
        due, wait_s = who_straggles(alone, self._took_s)
        room = max(0, self._room(len(due)))
        for each in due[:room]:
            self._copied.add(each.index)
            self._progress.stragglers += 1
            log.info("input %d of %s runs for %.1f s and is sent to a second Island", each.index, self._progress.run_id, each.running_s)
            self._start(nursery, each.index, frozenset({each.island}))
        return wait_s if len(due) <= room else _LOOK_S

    def _start(self, nursery: trio.Nursery, index: int, avoid: frozenset[str]) -> None:
        attempt = _Attempt(index, self._progress.begin(index, self._clock_ms()), avoid)
        self._running.setdefault(index, []).append(attempt)
        assert len(self._running[index]) <= _COPIES_MAX
        nursery.start_soon(self._attempt, attempt)

    # ---- one job

    async def _attempt(self, attempt: _Attempt) -> None:
        try:
            with attempt.scope:
                await self._try(attempt)
        finally:
            copies = [copy for copy in self._running.pop(attempt.index, ()) if copy is not attempt]
            if copies:
                self._running[attempt.index] = copies
            if attempt.scope.cancelled_caught or not self._running:
                self._is_poor = False
            self._changed.set()

    async def _try(self, attempt: _Attempt) -> None:
        try:
            order = await self._items.order(attempt.index, attempt.job_id, attempt.avoid)
            events = await self._context.job(self._watched(order, attempt))
        except ItemRefused as refused:
            self._fail(attempt, refused.code, refused.message)
        except JobCancelled as refused:
            self._cancelled(attempt, refused)
        except TakenOver as refused:
            self._fatal = BooksRefused(Why.NOT_OWNER, refused.message)
        except Refused as refused:
            self._refused(attempt, refused)
        except BooksRefused as refused:
            self._not_opened(attempt, refused)
        except BooksUnavailable as error:
            self._fatal = error
        else:
            self._succeed(attempt, events)

    def _watched(self, order: Order, attempt: _Attempt) -> Order:
        """The order with an eye on where it runs and on who is first. A second copy asks no cache: it would wait there for the first."""
        check, attempt.results_due = order.check, len(order.spec.choices)

        def watch(event: Event) -> None:
            check(event)
            if isinstance(event, Accepted):
                attempt.island, attempt.since_s = event.island, trio.current_time()
                self._progress.placed(attempt.index, attempt.job_id, event.island)
                self._changed.set()
            elif isinstance(event, ChoiceResult):
                attempt.results_due -= 1
                if not attempt.results_due:
                    self._finish(attempt)

        cache = order.cache
        if attempt.avoid and cache is not None:
            cache = replace(cache, reads=False)
        spec = replace(order.spec, group=self._progress.run_id)
        return replace(order, spec=spec, check=watch, cache=cache)

    def _finish(self, attempt: _Attempt) -> None:
        """An attempt has its result, which is not paid yet. Raises Refused where another copy was faster: then it never is."""
        if any(other.has_result for other in self._others(attempt)):
            raise Refused(Code.CANCELLED, "another Island was faster")
        attempt.has_result = True  # the others go on until it is settled: only then is it certain
        self._changed.set()

    def _others(self, attempt: _Attempt) -> list[_Attempt]:
        return [other for other in self._running[attempt.index] if other is not attempt]

    # ---- how it ends

    def _succeed(self, attempt: _Attempt, events: Sequence[Event]) -> None:
        if self._progress[attempt.index].ended:
            return
        self._is_poor = False
        if attempt.island:
            took = self._took_s.setdefault(attempt.island, deque(maxlen=_TOOK_KEPT))
            took.append(trio.current_time() - attempt.since_s)
        island = next((event.island for event in events if isinstance(event, Accepted)), "")
        price = next((event.price_micros for event in events if isinstance(event, Settled)), 0)
        self._progress.succeed(attempt.index, attempt.job_id, attempt.island or island, price, self._clock_ms())
        for other in self._others(attempt):
            other.scope.cancel()

    def _cancelled(self, attempt: _Attempt, refused: JobCancelled) -> None:
        """Its account does not want it: nor another copy of the same input."""
        self._is_poor = False
        for other in self._others(attempt):
            other.scope.cancel()
            self._running[attempt.index].remove(other)
        self._fail(attempt, refused.code.value, refused.message, ItemState.CANCELLED)

    def _refused(self, attempt: _Attempt, refused: Refused) -> None:
        """The job was in the books and failed there."""
        self._is_poor = False
        item = self._progress[attempt.index]
        if item.ended:
            return
        if refused.code.value in AGAIN:
            item.failures += 1
            if may_try_again(item) and not self._leaves_to_other(attempt):
                self._progress.put_back(attempt.index)
                self._pending.append(attempt.index)
                return
        self._fail(attempt, refused.code.value, refused.message)

    def _not_opened(self, attempt: _Attempt, refused: BooksRefused) -> None:
        """Nothing of it is in the books."""
        if refused.why is Why.NOT_OWNER:
            self._fatal = refused
            return
        siblings = sum(map(len, self._running.values())) - 1
        if refused.why is Why.NO_CREDIT and siblings and not self._others(attempt):
            self._is_poor = True
            self._progress.put_back(attempt.index)
            self._pending.appendleft(attempt.index)
            return
        self._fail(attempt, refused.why.value, refused.message)

    def _fail(self, attempt: _Attempt, code: str, message: str, state: ItemState = ItemState.FAILED) -> None:
        if self._progress[attempt.index].ended or self._leaves_to_other(attempt):
            return
        self._progress.fail(attempt.index, code, message, self._clock_ms(), state)
        self._is_failed = self._is_failed or self._terms.fail_fast

    def _leaves_to_other(self, attempt: _Attempt) -> bool:
        """Whether another copy of the input runs, which decides then."""
        others = self._others(attempt)
        for other in others:
            self._progress.go_on_with(attempt.index, other.job_id, other.island)
        return bool(others)
