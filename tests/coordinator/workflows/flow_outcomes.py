"""Random workflows, what their tasks come to, and a driver that has it happen in any order that the table allows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any

from coordinator.workflows.definition import Definition, FailMode, parse_definition
from coordinator.workflows.state import FlowState, Task, TaskKind

Drawn = Callable[[Task], float]


def random_definition(chance: Random, fail_mode: FailMode) -> Definition:
    """Up to 14 steps that need any of those before them."""
    steps: list[dict[str, Any]] = []
    for number in range(chance.randint(1, 14)):
        needs = [step["key"] for step in steps if chance.random() < 0.3]
        step: dict[str, Any] = {"key": f"s{number}", "cargo": "echo", "depends_on": needs}
        if chance.random() < 0.3:
            step["when"] = "{{ input.go }}"
        if chance.random() < 0.3:
            step |= {"for_each": "{{ input.items }}", "max_items": 4}
        if chance.random() < 0.5:
            step["retry"] = {"max_attempts": chance.randint(1, 4)}
        action = chance.choice([None, "retry", "skip", "skip", "abort" if chance.random() < 0.2 else None])
        if action is not None:
            step["on_failure"] = action
        steps.append(step)
    chance.shuffle(steps)
    return parse_definition({"steps": steps, "fail_mode": str(fail_mode)})


def drawn(seed: int) -> Drawn:
    """A number in [0, 1) for each task, the same whenever it is asked for."""

    def draw(task: Task) -> float:
        digest = hashlib.sha256(f"{seed} {task.kind} {task.suffix}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return draw


def happen(state: FlowState, task: Task, draw: Drawn, failing: float) -> None:
    """What the task comes to."""
    number = draw(task)
    if number < failing:
        state.failed(task, f"code{int(number * 1e6) % 7}", "it did not go well", retryable=number < failing * 0.8)
    elif number < failing + 0.05:
        state.lost(task)
    elif number < failing + 0.12 and (task.kind is TaskKind.RUN or state.step_of(task).when is not None):
        state.skipped(task)
    elif task.kind is TaskKind.PLAN:
        fans_out = state.step_of(task).fans_out
        state.expanded(task, list(range(int(number * 1e6) % 6)) if fans_out else None)
    else:
        state.succeeded(task, {"text": f"{task.suffix}"})


def drive(state: FlowState, chance: Random, draw: Drawn, failing: float, width: int) -> list[Task]:
    """To its end, with up to ``width`` tasks at once that begin and end in any order. Gives the tasks in the order of their outcomes."""
    over: list[Task] = []
    now_s = 0.0
    while not state.ended:
        running = sorted(state.running, key=lambda task: (task.step, task.index, task.attempt))
        ready = state.ready(now_s)
        if ready and len(running) < width and (not running or chance.random() < 0.6):
            state.begun(chance.choice(ready))
        elif running:
            task = chance.choice(running)
            happen(state, task, draw, failing)
            over.append(task)
        else:
            wake_s = state.next_wake_s()
            assert wake_s is not None and wake_s > now_s, f"nothing to do and not ended: {state}"
            now_s = wake_s
    return over
