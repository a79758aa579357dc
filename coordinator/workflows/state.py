"""A run of a workflow as a state table: outcomes go in, tasks come out. Pure; definition.py says what the states mean.

Theory of operation. Each step becomes *tasks*. A step with ``when`` or ``for_each`` first has one PLAN task: evaluate them, and say
``expanded`` or ``skipped``. Then comes a RUN task for each item (one where the step does not fan out): make its input, run its job, and say
``succeeded``, ``failed`` or, where the item's own ``when`` is false, ``skipped``. A task that is ready stays so until it has ``begun``, and
must then get exactly one outcome. Each attempt is a task of its own; attempts count up from 1 and are part of jobs' ids.

        ready ──begun──> running ──succeeded / skipped──> over
          ^                 ├──failed──> waiting (backoff), or over
          └─────────────────┴──lost───┘  (its Coordinator went away; the next attempt is ready at once, and no failure is counted)

Rules. No task begins before all that its step needs has ended. None begins twice, and none of an item that is over. What a run comes to
depends on its outcomes alone and not on their order, so a run is rebuilt by giving a new table the outcomes that are known
(``ready(…, is_replay=True)``). Chance is a function of run, step, item and attempt.

Each outcome costs time in proportion to what it changes; ``ready`` to what it returns.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from coordinator.workflows.definition import Definition, FailMode, OnFailure, Step
from protocol.errors import LocalProtocolError

TOO_MANY_ITEMS = "too_many_items"


class StepState(StrEnum):
    """PENDING: not all that it needs has ended, or nothing of it has begun. BLOCKED: it needs a step that failed. CANCELLED: the run
    ended before it did."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    BLOCKED = "blocked"
    CANCELLED = "cancelled"


class FlowEnd(StrEnum):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskKind(StrEnum):
    PLAN = "plan"
    RUN = "run"


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt at one thing. ``index``: of the item, 0 where the step does not fan out."""

    kind: TaskKind
    step: str
    index: int = 0
    attempt: int = 1

    @property
    def suffix(self) -> str:
        """What a job's id has after the run's: ``key.index.attempt``."""
        return f"{self.step}.{self.index}.{self.attempt}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a step or an item failed; the message quotes no prompt and no output."""

    code: str
    message: str

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One item of a step. ``attempts``: that have begun; ``output``: what its job gave, None where it has not succeeded."""

    state: StepState
    output: Any = None
    error: Failure | None = None
    attempts: int = 0

    def to_json(self) -> dict[str, Any]:
        error = self.error and self.error.to_json()
        return {"state": str(self.state), "output": self.output, "error": error, "attempts": self.attempts}


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step as it stands. ``items``: one each, in their order; of a step that does not fan out at most one."""

    key: str
    state: StepState
    fans_out: bool
    items: tuple[ItemResult, ...] = ()
    error: Failure | None = None

    @property
    def output(self) -> Any:
        """None of a step that fans out."""
        return self.items[0].output if self.items and not self.fans_out else None

    @property
    def outputs(self) -> list[Any]:
        return [item.output for item in self.items]

    def to_json(self) -> dict[str, Any]:
        """For those who look at a run: with ``items`` where it fans out."""
        shown = {"key": self.key, "state": str(self.state), "output": self.output, "error": self.error and self.error.to_json()}
        if self.fans_out:
            return shown | {"outputs": self.outputs, "items": [item.to_json() for item in self.items]}
        return shown | {"attempts": self.items[0].attempts if self.items else 0}


@dataclass(frozen=True, slots=True)
class FlowResult:
    """How a run ended. ``partial``: it did not succeed, and some of its steps did. ``error``: that of the first step, in the order of the
    definition, that failed; None where none did."""

    state: FlowEnd
    partial: bool
    steps: tuple[StepResult, ...]
    error: Failure | None = None
    failed_step: str = ""


@dataclass(slots=True)
class _Item:
    state: StepState = StepState.PENDING
    failures: int = 0
    attempts: int = 0
    output: Any = None
    error: Failure | None = None

@dataclass(slots=True)
class _Stage:
    """A step under way. ``waits_for``: needs that have not ended; ``open_items``: items that are not over; ``values``: of for_each."""

    step: Step
    waits_for: int
    state: StepState = StepState.PENDING
    plan: _Item = field(default_factory=_Item)
    items: list[_Item] = field(default_factory=list)
    open_items: int = 0
    values: Sequence[Any] = ()
    error: Failure | None = None
    view: dict[str, Any] | None = None


_OVER = frozenset({StepState.SUCCEEDED, StepState.FAILED, StepState.SKIPPED, StepState.BLOCKED, StepState.CANCELLED})
_PASSES = frozenset({StepState.SUCCEEDED, StepState.SKIPPED})


class FlowState:
    """One run. ``run_input``: plain JSON, the variable ``input``. Outcomes for tasks that are not running raise LocalProtocolError."""

    def __init__(self, definition: Definition, run_input: Any, run_id: str = "", run_name: str = "") -> None:
        self.definition, self._run_id = definition, run_id
        self._base: dict[str, Any] = {"input": run_input, "run": {"id": run_id, "name": run_name}}
        self._stages = {step.key: _Stage(step, len(step.needs)) for step in definition.steps}
        self._open_stages = len(self._stages)
        self._ready: dict[Task, None] = {}
        self._running: set[Task] = set()
        self._resting: list[tuple[float, int, Task]] = []  # a heap by when they may begin
        self._count = itertools.count()
        self._has_failed = False  # so that the run stops
        self._is_cancelled = False
        for stage in self._stages.values():
            if not stage.waits_for:
                self._offer(stage)

    def __repr__(self) -> str:
        what = f"{len(self._ready)} ready, {len(self._running)} running, {len(self._resting)} resting"
        return f"<FlowState {self._run_id}: {self._open_stages} of {len(self._stages)} steps open, {what}>"

    # ---- what is to be done

    def ready(self, now_s: float, limit: int | None = None, *, is_replay: bool = False) -> list[Task]:
        """Tasks that may begin now, the longest ready first, at most ``limit``; again and again until they have begun. None once the run
        stops.

        ``is_replay``: also what rests, and goes on resting, and what a run that stops would not begin any more. For rebuilding only: of
        these, begin those whose outcome is known.
        """
        if is_replay:
            return list(itertools.islice([*self._ready, *(task for _, _, task in sorted(self._resting))], limit))
        while self._resting and self._resting[0][0] <= now_s:
            self._ready[heapq.heappop(self._resting)[2]] = None
        if self.stopping:
            return []
        return list(itertools.islice(self._ready, limit))

    def next_wake_s(self) -> float | None:
        """When the next task that rests may begin; None: nothing rests, or the run stops."""
        return self._resting[0][0] if self._resting and not self.stopping else None

    @property
    def running(self) -> frozenset[Task]:
        return frozenset(self._running)

    @property
    def stopping(self) -> bool:
        """The run fails or is cancelled: whoever drives it cancels what runs and says ``cancelled``, or what came of it."""
        return self._has_failed or self._is_cancelled

    @property
    def ended(self) -> bool:
        return not self._running and (self.stopping or self._open_stages == 0)

    def step_of(self, task: Task) -> Step:
        return self._stages[task.step].step

    def variables(self, task: Task) -> dict[str, Any]:
        """What the task's templates see (definition.py)."""
        stage = self._stages[task.step]
        found = self._base | {key: self._view(self._stages[key]) for key in stage.step.needs}
        if task.kind is TaskKind.RUN and stage.step.fans_out:
            found |= {"item": stage.values[task.index], "index": task.index}
        return found

    def final_variables(self) -> dict[str, Any]:
        """What the template of the run's output sees; once it has ended."""
        return self._base | {key: self._view(stage) for key, stage in self._stages.items()}

    # ---- what happens

    def begun(self, task: Task) -> None:
        """Raises LocalProtocolError unless it is ready, or rests."""
        if task in self._ready:
            del self._ready[task]
        elif any(task == resting for _, _, resting in self._resting):  # in a replay
            self._resting = [entry for entry in self._resting if entry[2] != task]
            heapq.heapify(self._resting)
        else:
            raise LocalProtocolError(f"{task} is not ready")
        self._running.add(task)
        stage = self._stages[task.step]
        self._item(task).attempts += 1
        if stage.state is StepState.PENDING:
            stage.state = StepState.RUNNING

    def expanded(self, task: Task, items: Sequence[Any] | None = None) -> None:
        """A PLAN task: ``when`` holds, and ``for_each`` gives these items; None for a step without it. More than ``max_items`` are a
        failure."""
        stage = self._over(task, TaskKind.PLAN)
        assert (items is not None) == stage.step.fans_out, "for_each and its items"
        if items is not None and len(items) > stage.step.max_items:
            text = f"for_each gives {len(items)} items; max_items is {stage.step.max_items}"
            self._fail_plan(stage, Failure(TOO_MANY_ITEMS, text))
            return
        stage.plan.state = StepState.SUCCEEDED
        stage.values = items if items is not None else ()
        self._open_items(stage, 1 if items is None else len(items))

    def succeeded(self, task: Task, output: Any) -> None:
        """A RUN task whose job gave ``output``: plain JSON."""
        stage = self._over(task, TaskKind.RUN)
        self._end_item(stage, self._item(task), StepState.SUCCEEDED, output)

    def skipped(self, task: Task) -> None:
        """Its ``when`` is false: the whole step of a PLAN task, one item of a RUN task."""
        stage = self._over(task, task.kind)
        if task.kind is TaskKind.PLAN:
            stage.plan.state = StepState.SKIPPED
            self._end(stage, StepState.SKIPPED)
        else:
            self._end_item(stage, self._item(task), StepState.SKIPPED)

    def failed(self, task: Task, code: str, message: str, retryable: bool, now_s: float = 0.0) -> None:
        """``retryable``: another attempt could go better; a bad template or input would not."""
        stage = self._over(task, task.kind)
        item, retry, failure = self._item(task), stage.step.retry, Failure(code, message)
        item.failures += 1
        item.error = failure
        if retryable and item.failures < retry.max_attempts:
            pause_s = retry.pause_s(item.failures, chance(self._run_id, task))
            heapq.heappush(self._resting, (now_s + pause_s, next(self._count), _next_attempt(task)))
        elif task.kind is TaskKind.PLAN:
            self._fail_plan(stage, failure)
        elif stage.step.on_failure is OnFailure.SKIP:
            self._end_item(stage, item, StepState.SKIPPED)
        else:
            self._fail(stage, failure, item)

    def lost(self, task: Task) -> None:
        """It ended without its doing, with its Coordinator: the next attempt is ready at once and the failure does not count."""
        self._over(task, task.kind)
        self._ready[_next_attempt(task)] = None

    def cancelled(self, task: Task) -> None:
        """It was ended because the run stops. Raises LocalProtocolError where it does not."""
        if not self.stopping:
            raise LocalProtocolError(f"{task} was cancelled, and the run goes on")
        self._over(task, task.kind)

    def cancel(self) -> None:
        """The account does not want the run any more. Of no use to one that has ended."""
        self._is_cancelled = self._is_cancelled or not self.ended

    # ---- how it stands

    def step_result(self, key: str) -> StepResult:
        """A step as it stands now. Raises KeyError."""
        return self._result_of(self._stages[key])

    def steps(self) -> tuple[StepResult, ...]:
        """All steps as they stand now, in the order of the definition."""
        return tuple(self._result_of(stage) for stage in self._stages.values())

    def result(self) -> FlowResult:
        """Once the run has ended."""
        assert self.ended, "the run goes on"
        steps = self.steps()
        failed = next((step for step in steps if step.state is StepState.FAILED), None)
        end = FlowEnd.CANCELLED if self._is_cancelled else FlowEnd.SUCCEEDED if failed is None else FlowEnd.FAILED
        has_some = any(step.state is StepState.SUCCEEDED for step in steps)
        partial = end is not FlowEnd.SUCCEEDED and has_some
        return FlowResult(end, partial, steps, failed.error if failed else None, failed.key if failed else "")

    def default_output(self) -> dict[str, Any]:
        """What a run without ``output`` gives: the outputs of the steps that nobody needs."""
        results = [self.step_result(key) for key in self.definition.leaves]
        return {step.key: step.outputs if step.fans_out else step.output for step in results}

    # ---- inside

    def _item(self, task: Task) -> _Item:
        stage = self._stages[task.step]
        return stage.plan if task.kind is TaskKind.PLAN else stage.items[task.index]

    def _over(self, task: Task, kind: TaskKind) -> _Stage:
        if task not in self._running or task.kind is not kind:
            raise LocalProtocolError(f"{task} is not running")
        self._running.remove(task)
        return self._stages[task.step]

    def _offer(self, stage: _Stage) -> None:
        """All that it needs has ended well."""
        if stage.step.has_plan:
            self._ready[Task(TaskKind.PLAN, stage.step.key)] = None
        else:
            self._open_items(stage, 1)

    def _open_items(self, stage: _Stage, count: int) -> None:
        stage.items = [_Item() for _ in range(count)]
        stage.open_items = count
        for index in range(count):
            self._ready[Task(TaskKind.RUN, stage.step.key, index)] = None
        if not count:
            self._end(stage, StepState.SUCCEEDED)

    def _end_item(self, stage: _Stage, item: _Item, state: StepState, output: Any = None) -> None:
        item.state, item.output = state, output
        if state is StepState.SUCCEEDED:
            item.error = None  # that of an earlier attempt
        stage.open_items -= 1
        if stage.open_items:
            return
        failed = next((each for each in stage.items if each.state is StepState.FAILED), None)
        if failed is not None:
            self._end(stage, StepState.FAILED, failed.error)
        elif stage.step.fans_out:
            self._end(stage, StepState.SUCCEEDED)
        else:
            self._end(stage, state, item.error)

    def _fail_plan(self, stage: _Stage, failure: Failure) -> None:
        stage.plan.state, stage.plan.error = StepState.FAILED, failure
        if stage.step.on_failure is OnFailure.SKIP:
            self._end(stage, StepState.SKIPPED, failure)
        else:
            self._fail(stage, failure)

    def _fail(self, stage: _Stage, failure: Failure, item: _Item | None = None) -> None:
        """For good; ``item``: None where it is the plan that failed."""
        stops = stage.step.on_failure is OnFailure.ABORT or self.definition.fail_mode is FailMode.FAIL_FAST
        self._has_failed = self._has_failed or stops
        if item is not None:
            self._end_item(stage, item, StepState.FAILED)
        if item is None or stops:
            self._end(stage, StepState.FAILED, failure)

    def _end(self, stage: _Stage, state: StepState, error: Failure | None = None) -> None:
        """Once; what needs it gets nearer to its turn, or is blocked."""
        if stage.state in _OVER:
            return
        ended = deque([(stage, state, error)])
        while ended:
            stage, state, error = ended.popleft()
            stage.state, stage.error = state, error
            self._open_stages -= 1
            for key in self.definition.dependants[stage.step.key]:
                dependant = self._stages[key]
                dependant.waits_for -= 1
                if state not in _PASSES and dependant.state not in _OVER:
                    dependant.state = StepState.BLOCKED  # at once, or it would be here twice
                    ended.append((dependant, StepState.BLOCKED, None))
                elif not dependant.waits_for and dependant.state is StepState.PENDING:
                    self._offer(dependant)

    def _view(self, stage: _Stage) -> dict[str, Any]:
        """A step that has ended, as templates see it."""
        if stage.view is None:
            result = self._result_of(stage)
            error = result.error and result.error.to_json()
            stage.view = {"state": str(result.state), "output": result.output, "outputs": result.outputs, "error": error}
        return stage.view

    def _result_of(self, stage: _Stage) -> StepResult:
        state = StepState.CANCELLED if self.ended and stage.state not in _OVER else stage.state
        items = tuple(ItemResult(self._item_state(item), item.output, item.error, item.attempts) for item in stage.items)
        first = next((item.error for item in items if item.state is StepState.FAILED), None)  # not the first to fail: that is chance
        return StepResult(stage.step.key, state, stage.step.fans_out, items, first or stage.error)

    def _item_state(self, item: _Item) -> StepState:
        if item.state in _OVER:
            return item.state
        if self.ended:
            return StepState.CANCELLED
        return StepState.RUNNING if item.attempts else StepState.PENDING


def chance(run_id: str, task: Task) -> float:
    """In [0, 1), the same each time for one attempt of one run."""
    digest = hashlib.sha256(f"archipelag/flow-backoff/1\n{run_id}\n{task.suffix}\n{task.kind}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _next_attempt(task: Task) -> Task:
    return Task(task.kind, task.step, task.index, task.attempt + 1)
