"""Runs of workflows as their account sees them: made of the run's row, the rows of its jobs, and what its runner knows or has kept.
Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.books.jobs import Job, JobState
from coordinator.books.runs import Run, RunState
from coordinator.statement import time_text
from coordinator.workflows.run_spec import task_of
from coordinator.workflows.state import StepResult, StepState, Task
from protocol.prices import format_credits

ENDED = frozenset(StepState) - {StepState.PENDING, StepState.RUNNING}


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the rows of a step's jobs say. ``jobs``: by item, then attempt. Times in Unix milliseconds, 0: not yet."""

    jobs: tuple[tuple[Task, Job], ...] = ()

    @property
    def price_micros(self) -> int:
        return sum(job.price_micros for _, job in self.jobs)

    @property
    def started_at_ms(self) -> int:
        return min((job.created_at_ms for _, job in self.jobs), default=0)

    @property
    def ended_at_ms(self) -> int:
        """Of the last job; 0 while one runs."""
        if any(not job.ended for _, job in self.jobs):
            return 0
        return max((job.finished_at_ms for _, job in self.jobs), default=0)


NO_FACTS = StepFacts()


def facts_of(run_id: str, jobs: Iterable[Job]) -> dict[str, StepFacts]:
    """By step."""
    found: dict[str, list[tuple[Task, Job]]] = {}
    for job in jobs:
        task = task_of(run_id, job.id)
        if task is not None:
            found.setdefault(task.step, []).append((task, job))
    ordered = {step: sorted(its, key=lambda one: (one[0].index, one[0].attempt)) for step, its in found.items()}
    return {step: StepFacts(tuple(its)) for step, its in ordered.items()}


def with_outputs(
    steps: Sequence[StepResult], facts: Mapping[str, StepFacts], outputs: Mapping[str, Any], taken: Mapping[str, Mapping[int, Any]]
) -> list[StepResult]:
    """Steps of which only the states were kept, with what their jobs said (by job id) and what they took over."""
    filled = []
    for step in steps:
        by_item = dict(taken.get(step.key, {}))
        by_item |= {task.index: outputs[job.id] for task, job in facts.get(step.key, NO_FACTS).jobs if job.id in outputs}
        items = [
            replace(item, output=by_item.get(index)) if item.state is StepState.SUCCEEDED else item for index, item in enumerate(step.items)
        ]
        filled.append(replace(step, items=tuple(items)))
    return filled


def step_json(step: StepResult, facts: StepFacts, is_taken: bool) -> dict[str, Any]:
    """A step with its outputs. ``is_taken``: another run has done it."""
    has_ended = step.state in ENDED
    shown: dict[str, Any] = {
        "key": step.key,
        "state": str(step.state),
        "attempts": sum(item.attempts for item in step.items) if not is_taken else 0,
        "tasks": len(step.items),
        "output": step.output,
        "error": step.error.to_json() if step.error is not None else None,
        "started_at": time_json(facts.started_at_ms),
        "completed_at": time_json(facts.ended_at_ms) if has_ended else None,
        "duration_ms": facts.ended_at_ms - facts.started_at_ms if has_ended and facts.ended_at_ms else None,
        "price": format_credits(facts.price_micros),
        "job_ids": [job.id for _, job in facts.jobs],
        "taken_over": is_taken,
    }
    if step.fans_out:
        shown["outputs"] = step.outputs
        shown["errors"] = [item.error.to_json() if item.error is not None else None for item in step.items]
    return shown


def output_of_leaves(steps: Iterable[StepResult], leaves: Iterable[str]) -> dict[str, Any]:
    """What a run without ``output`` gives."""
    by_key = {step.key: step for step in steps}
    return {key: by_key[key].outputs if by_key[key].fans_out else by_key[key].output for key in leaves if key in by_key}


def run_json(run: Run, steps: Sequence[Mapping[str, Any]], output: Any, price_micros: int, quote: Any, workflow: str) -> dict[str, Any]:
    """A run with its steps."""
    return {
        **listed_json(run),
        "workflow": workflow or None,
        "duration_ms": run.finished_at_ms - run.created_at_ms if run.ended else None,
        "price": format_credits(price_micros),
        "quote": quote,
        "output": output,
        "steps": list(steps),
    }


def listed_json(run: Run) -> dict[str, Any]:
    """A run as it stands in a list."""
    return {
        "id": run.id,
        "object": "workflow",
        "name": run.name,
        "state": run.state.value,
        "created_at": time_json(run.created_at_ms),
        "completed_at": time_json(run.finished_at_ms),
        "origin": run.origin or None,
        "error": error_json(run.error_code, run.error_message),
    }


def error_json(code: str, message: str) -> dict[str, str] | None:
    return {"code": code, "message": message or "no more is known"} if code else None


def time_json(unix_ms: int) -> str | None:
    return time_text(unix_ms) if unix_ms else None


def message_of(run: Run) -> str:
    """What to say to who has asked for a run's end."""
    texts = {
        RunState.CANCELLED: "the run was cancelled; what its finished steps said is kept",
        RunState.SUCCEEDED: "the run had ended before",
        RunState.FAILED: "the run had failed before",
    }
    return texts.get(run.state, "the Coordinator that has the run was told to end it")


# ---- the timeline


def timeline(run: Run, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """What happened, in the order of time: the run, and each try at each item of each step."""
    events: list[tuple[int, int, dict[str, Any]]] = [(run.created_at_ms, 0, _event(run.created_at_ms, "run_begun"))]
    for step, facts in facts_of(run.id, jobs).items():
        is_many = any(task.index for task, _ in facts.jobs)
        for task, job in facts.jobs:
            what = {"step": step, "item": task.index if is_many else None, "attempt": task.attempt, "job_id": job.id}
            kind = "begun" if task.attempt == 1 else "tried_again"
            events.append((job.created_at_ms, 1, _event(job.created_at_ms, kind, **what)))
            if job.ended:
                events.append((job.finished_at_ms, 2, _ended(job, what)))
    if run.ended:
        took = {"duration_ms": run.finished_at_ms - run.created_at_ms, "error": error_json(run.error_code, run.error_message)}
        events.append((run.finished_at_ms, 3, _event(run.finished_at_ms, f"run_{run.state}", **took)))
    return [event for _, _, event in sorted(events, key=lambda one: one[:2])]


def _ended(job: Job, what: Mapping[str, Any]) -> dict[str, Any]:
    text = "the job was cancelled" if job.state is JobState.CANCELLED else ""
    more = {
        "duration_ms": job.finished_at_ms - job.created_at_ms,
        "island": job.island or None,
        "price": format_credits(job.price_micros),
        "error": error_json(job.error_code, job.error_message or text),
    }
    return _event(job.finished_at_ms, job.state.value, **what, **more)


def _event(at_ms: int, kind: str, **more: Any) -> dict[str, Any]:
    empty = {"step": None, "item": None, "attempt": None, "job_id": None, "duration_ms": None, "island": None, "price": None, "error": None}
    return {"at": time_json(at_ms), "type": kind, **{**empty, **more}}
