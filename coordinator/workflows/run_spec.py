"""What a run of a workflow is to do, as it stands sealed in the books: everything that another Coordinator needs to go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.workflows.state import Task, TaskKind

_VERSION = 1


@dataclass(frozen=True, slots=True)
class RunSpec:
    """``definition``: in its canonical form. ``input``: what the templates know as such. ``bid_micros``: of each job; ``max_price_micros``:
    of all together; None: no limit. ``policy``: where its jobs may run, as JSON. ``quote``: what it was said to cost, as it is shown.
    ``source``: the saved version that it is. ``taken``: step -> item -> output, of steps that another run has done."""

    definition: Mapping[str, Any]
    input: Any = None
    bid_micros: int | None = None
    max_price_micros: int | None = None
    priority: int = 0
    policy: str = ""
    quote: Mapping[str, Any] | None = None
    source: str = ""
    taken: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Raises ValueError for what is no JSON."""
        taken = {step: {str(item): output for item, output in items.items()} for step, items in self.taken.items()}
        value = {
            "version": _VERSION,
            "definition": self.definition,
            "input": self.input,
            "bid_micros": self.bid_micros,
            "max_price_micros": self.max_price_micros,
            "priority": self.priority,
            "policy": self.policy,
            "quote": self.quote,
            "source": self.source,
            "taken": taken,
        }
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def unpack_spec(data: bytes) -> RunSpec:
    """Raises ValueError for what ``pack`` did not make, or that of another version did."""
    value = json.loads(data)
    if not isinstance(value, dict) or value.pop("version", None) != _VERSION:
        raise ValueError("no specification of a run of this version")
    taken = {step: {int(item): output for item, output in items.items()} for step, items in value.pop("taken").items()}
    return RunSpec(**value, taken=taken)


def job_id(run_id: str, task: Task) -> str:
    """``RUN.STEP.ITEM.ATTEMPT``; keys of steps have no dots."""
    return f"{run_id}.{task.suffix}"


def task_of(run_id: str, job_id: str) -> Task | None:
    """None for an id that is not of this run."""
    step, *numbers = job_id.removeprefix(f"{run_id}.").split(".")
    if not job_id.startswith(f"{run_id}.") or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return None
    return Task(TaskKind.RUN, step, int(numbers[0]), int(numbers[1]))
