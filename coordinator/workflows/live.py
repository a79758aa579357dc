"""One run of a workflow under way: gives the state table what is known, begins what is ready, and says what came of it.

Theory of operation. The state table (state.py) says what may begin; this shell evaluates templates, has jobs run, and tells the table.
What a job of this run has come to before, here or at a Coordinator that has gone, stands in the books under an id that follows from the
task: so a task that is about to begin is looked up there first, and one that succeeded is never run again.

Rules. A task that ended with its Coordinator (LOST, or cancelled though the run is not) is done again under the next attempt, and does not
count as a try. Where the books cannot be used no more tasks begin, those that run may end for ``FLOW_LEAVE_S``, and the run is left: upkeep
begins it again from what the books say then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import trio

from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job, JobState
from coordinator.books.runs import Run
from coordinator.cache.asking import CacheUse
from coordinator.exchange.bids import Bid, Work
from coordinator.http.child_orders import ChildOrders, ChildTerms
from coordinator.http.errors import ApiError
from coordinator.http.job_events import output_json
from coordinator.job_board import said_in
from coordinator.jobs import ChoiceResult, Event, Settled
from coordinator.orders import JobCancelled, Order, TakenOver
from coordinator.regions import parse_policy
from coordinator.runs.board import Bell, RunContext
from coordinator.workflows.definition import CacheMode, Definition, Step
from coordinator.workflows.errors import FlowError
from coordinator.workflows.inputs import input_of, plan_of
from coordinator.workflows.run_spec import RunSpec, job_id, task_of
from coordinator.workflows.state import FlowState, Task, TaskKind
from coordinator.workflows.values import Renders
from protocol import limits
from protocol.errors import Code, Refused
from protocol.prices import format_credits

LOST = frozenset({"coordinator_lost", "books_unavailable", "expired"})  # how jobs fail without their own doing
_FOR_GOOD = frozenset({Code.BAD_INPUT, Code.NO_TOOLS, Code.CONTEXT_LENGTH})  # another try would come to the same
_CACHE = {
    CacheMode.USE: CacheUse(is_exact=True),
    CacheMode.REFRESH: CacheUse(reads=False),
    CacheMode.OFF: CacheUse(reads=False, writes=False),
}
_TIMEOUT_SLACK = 0.95  # a job that was ended after so much of its step's time was ended for that

TIMEOUT, CANCELLED, BAD_VALUE, OVER_PRICE, OUTPUT_GONE = "timeout", "cancelled", "bad_value", "over_max_price", "output_expired"

Bids = Callable[[str, str, Work, int | None], Awaitable[tuple[Bid, int | None]]]


class OutputGone(Exception):
    """A step has been done, and what it said is not kept any more."""

    def __init__(self, step: str) -> None:
        super().__init__(step)
        self.step = step


@dataclass(frozen=True, slots=True)
class Tools:
    """What runs need of the Coordinator. ``bids(account, cargo, work, explicit)`` gives the bid of a job and the least that it may be cut
    to; ``remember(cargo)``: it was offered before, so a job for it waits; ``clock_ms`` gives Unix milliseconds."""

    orders: ChildOrders
    renders: Renders
    bids: Bids
    remember: Callable[[str], None]
    clock_ms: Callable[[], int]


@dataclass(slots=True)
class Track:
    """A step as far as watchers care. Times in Unix milliseconds, 0: not yet."""

    started_at_ms: int = 0
    ended_at_ms: int = 0
    price_micros: int = 0
    attempts: int = 0

    def note(self, job: Job) -> None:
        """What the books say of one of its jobs."""
        self.started_at_ms = min(self.started_at_ms or job.created_at_ms, job.created_at_ms)
        self.ended_at_ms = max(self.ended_at_ms, job.finished_at_ms)
        self.price_micros += job.price_micros
        self.attempts += 1


def output_of_job(events: Sequence[Event]) -> dict[str, Any]:
    """What templates see of a job: the same from its events as they come and as they are kept."""
    results = [event for event in events if isinstance(event, ChoiceResult)]
    price = sum(event.price_micros for event in events if isinstance(event, Settled))
    prompt, completion = sum(result.prompt_tokens for result in results), sum(result.completion_tokens for result in results)
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "credits_used": format_credits(price),
    }
    return output_json(said_in(events), usage)


class LiveFlow:
    """Runs on trio. ``jobs``: those of the run that are in the books; ``outputs``: of those that succeeded, by their ids."""

    def __init__(
        self, run: Run, spec: RunSpec, definition: Definition, tools: Tools, jobs: Mapping[str, Job], outputs: Mapping[str, Any]
    ) -> None:
        self.run, self.spec, self.definition, self._tools, self._outputs = run, spec, definition, tools, outputs
        self.state = FlowState(definition, spec.input, run.id, run.name)
        self.bell = Bell()
        self.tracks = {step.key: Track() for step in definition.steps}
        self._known: dict[tuple[str, int], dict[int, Job]] = {}
        for job in jobs.values():
            task = task_of(run.id, job.id)
            if task is not None and task.step in self.tracks:
                self._known.setdefault((task.step, task.index), {})[task.attempt] = job
                self.tracks[task.step].note(job)
        policy = parse_policy(json.loads(spec.policy)) if spec.policy else None
        self._terms = ChildTerms(spec.bid_micros, policy, spec.policy, spec.priority)
        self._spent = sum(job.price_micros for job in jobs.values())
        self._reserved = 0
        self._busy = 0
        self._trouble: BooksRefused | BooksUnavailable | None = None
        self._context: RunContext | None = None

    def __repr__(self) -> str:
        return f"<LiveFlow {self.run.id}: {self.state!r}>"

    # ---- what is known already

    async def replay(self) -> None:
        """Gives the table all outcomes that are in the books. Raises OutputGone. What is open there counts as running."""
        for (step, _), jobs in self._known.items():
            if any(job.state is JobState.SUCCEEDED and job.id not in self._outputs for job in jobs.values()):
                raise OutputGone(step)
        known_steps = {step for step, _ in self._known} | set(self.spec.taken)
        if not known_steps:
            return
        behind = {step.key: not known_steps.isdisjoint(self.definition.affected(step.key)) for step in self.definition.steps}
        seen: set[Task] = set()
        while tasks := [task for task in self.state.ready(trio.current_time(), is_replay=True) if task not in seen]:
            for task in tasks:
                seen.add(task)
                if not self._settle_known(task) and behind[task.step]:
                    await self._settle_unknown(task)

    def _settle_known(self, task: Task) -> bool:
        """Begins and ends a task whose outcome is known; False where it is not."""
        if task.kind is TaskKind.PLAN:
            return False
        taken = self.spec.taken.get(task.step, {})
        if task.index in taken:
            self.state.begun(task)
            self.state.succeeded(task, taken[task.index])
            return True
        jobs = self._known.get((task.step, task.index))
        if jobs is None or task.attempt > max(jobs):
            return False
        self.state.begun(task)
        job = jobs.get(task.attempt)
        if job is None:
            self.state.lost(task)  # it failed before it had a job; a later attempt has one
        elif job.ended:
            self._settle_job(task, job)
        return True

    def _settle_job(self, task: Task, job: Job) -> None:
        ended_s = trio.current_time() - (self._tools.clock_ms() - job.finished_at_ms) / 1000
        if job.state is JobState.SUCCEEDED:
            self.state.succeeded(task, self._outputs[job.id])
        elif job.state is JobState.FAILED and job.error_code not in LOST:
            self.state.failed(task, job.error_code, job.error_message, job.error_code not in _FOR_GOOD, ended_s)
        elif _was_timed_out(self.state.step_of(task), job):
            self._fail_timeout(task, ended_s)
        else:
            self.state.lost(task)

    async def _settle_unknown(self, task: Task) -> None:
        """What has no job and is in the way of what has: a plan, an item that was skipped or could not be made."""
        step = self.state.step_of(task)
        try:
            if task.kind is TaskKind.RUN:
                given = await input_of(step, self.state.variables(task), self._tools.renders)
                if given is None:
                    self.state.begun(task)
                    self.state.skipped(task)
                return
            plan = await plan_of(step, self.state.variables(task), self._tools.renders)
            self.state.begun(task)
            self.state.expanded(task, plan.items) if plan.runs else self.state.skipped(task)
        except FlowError as error:
            if not error.is_transient:
                self.state.begun(task)
                self._fail(task, error)

    # ---- running

    async def drive(self, context: RunContext) -> None:
        """Until nothing is left to do. Raises BooksRefused or BooksUnavailable: somebody begins the run again, or has it already."""
        self._context = context
        async with trio.open_nursery() as nursery:
            while not (self.state.ended or self.state.stopping or self._trouble is not None):
                self._begin(nursery)
                wake_s = self.state.next_wake_s() if self._busy < limits.FLOW_PARALLEL_MAX else None
                if not (self.state.ended or self.state.stopping):
                    with trio.move_on_at(math.inf if wake_s is None else wake_s):
                        await self.bell.wait()
            if isinstance(self._trouble, BooksUnavailable):
                with trio.move_on_after(limits.FLOW_LEAVE_S):
                    while self._busy:
                        await self.bell.wait()
            nursery.cancel_scope.cancel()
        if self._trouble is not None:
            raise self._trouble

    def _begin(self, nursery: trio.Nursery) -> None:
        again = True
        while again and self._busy < limits.FLOW_PARALLEL_MAX:
            again = False
            for task in self.state.ready(trio.current_time(), limits.FLOW_PARALLEL_MAX - self._busy):
                if self._settle_known(task):
                    again = True
                    continue
                self.state.begun(task)
                self._busy += 1
                if task.kind is TaskKind.RUN:
                    self._note_begun(task)
                nursery.start_soon(self._work, task)

    def _note_begun(self, task: Task) -> None:
        track = self.tracks[task.step]
        track.started_at_ms = track.started_at_ms or self._tools.clock_ms()
        track.attempts += 1

    async def _work(self, task: Task) -> None:
        is_told = False
        try:
            await (self._plan(task) if task.kind is TaskKind.PLAN else self._run(task))
            is_told = True
        except (BooksRefused, BooksUnavailable) as error:
            self._trouble, is_told = error, True
        finally:
            if not is_told:  # it was cancelled
                if not self.state.stopping:
                    self.state.cancel()  # the account wants it
                self.state.cancelled(task)
            self._busy -= 1
            self.tracks[task.step].ended_at_ms = self._tools.clock_ms()
            self.bell.ring()

    async def _plan(self, task: Task) -> None:
        try:
            plan = await plan_of(self.state.step_of(task), self.state.variables(task), self._tools.renders)
        except FlowError as error:
            self._fail(task, error)
            return
        if plan.runs:
            self.state.expanded(task, plan.items)
        else:
            self.state.skipped(task)

    async def _run(self, task: Task) -> None:
        """One try at one item, from its templates to its output. Raises BooksRefused, BooksUnavailable."""
        step = self.state.step_of(task)
        try:
            given = await input_of(step, self.state.variables(task), self._tools.renders)
        except FlowError as error:
            self._fail(task, error)
            return
        if given is None:
            self.state.skipped(task)
            return
        try:
            order = self._order(task, step, given)
        except ApiError as error:
            self.state.failed(task, error.code or BAD_VALUE, error.message, False)
            return
        if self.spec.max_price_micros is None:
            await self._job(task, step, order)
        elif (limited := await self._limited(order, self.spec.max_price_micros)) is None:
            self.state.failed(task, OVER_PRICE, f"the run may cost {format_credits(self.spec.max_price_micros)} credits", False)
        else:
            await self._job(task, step, limited)

    def _order(self, task: Task, step: Step, given: dict[str, Any]) -> Order:
        terms = self._terms if step.bid_micros is None else replace(self._terms, bid_micros=step.bid_micros)
        return self._tools.orders.order(self.run, job_id(self.run.id, task), step.cargo, given, terms, _CACHE[step.cache])

    async def _limited(self, order: Order, most: int) -> Order | None:
        """With a bid that fits into what the whole run may still cost; None where none does. Raises BooksUnavailable."""
        bid, floor = await self._tools.bids(order.account, order.spec.cargo, order.work, order.bid_micros)
        left = most - self._spent - self._reserved
        if left < (bid.micros if floor is None else floor):
            return None
        return replace(order, bid_micros=min(bid.micros, left))

    async def _job(self, task: Task, step: Step, order: Order) -> None:
        assert self._context is not None
        reserved = order.bid_micros or 0
        self._reserved += reserved
        events: Sequence[Event] | None = None
        try:
            with trio.move_on_after(math.inf if step.timeout_s is None else step.timeout_s) as scope:
                events = await self._context.job(order)
            if scope.cancelled_caught:  # it may have been paid for at the very end, and counts then
                events = (await self._context.outputs([order.spec.job_id])).get(order.spec.job_id)
        except TakenOver as lost:
            raise BooksRefused(Why.NOT_OWNER, f"run {self.run.id} is another Coordinator's") from lost
        except JobCancelled as refusal:
            self.state.failed(task, CANCELLED, refusal.message, False)
            return
        except Refused as refusal:
            self.state.failed(task, refusal.code.value, refusal.message, refusal.code not in _FOR_GOOD, trio.current_time())
            return
        except BooksRefused as refused:
            if refused.why is Why.NOT_OWNER:
                raise
            self.state.failed(task, refused.why.value, refused.message, refused.why is Why.NO_CREDIT, trio.current_time())
            return
        finally:
            self._reserved -= reserved
        if events is None:
            self._fail_timeout(task, trio.current_time())
            return
        price = sum(event.price_micros for event in events if isinstance(event, Settled))
        self._spent += price
        self.tracks[task.step].price_micros += price
        self.state.succeeded(task, output_of_job(events))

    # ---- failing

    def _fail(self, task: Task, error: FlowError) -> None:
        self.state.failed(task, BAD_VALUE, str(error), error.is_transient, trio.current_time())

    def _fail_timeout(self, task: Task, now_s: float) -> None:
        text = f"it took longer than the {self.state.step_of(task).timeout_s:g} s of its step"
        self.state.failed(task, TIMEOUT, text, True, now_s)


def _was_timed_out(step: Step, job: Job) -> bool:
    """Jobs that are ended for their step's time stand in the books as cancelled."""
    if step.timeout_s is None or job.state is not JobState.CANCELLED:
        return False
    return job.finished_at_ms - job.created_at_ms >= _TIMEOUT_SLACK * step.timeout_s * 1000
