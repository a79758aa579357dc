"""Random workflows with random outcomes in random orders: what always holds."""

from __future__ import annotations

from random import Random

import pytest

from coordinator.workflows.definition import Definition, FailMode
from coordinator.workflows.state import FlowEnd, FlowResult, FlowState, StepState, Task, TaskKind
from tests.coordinator.workflows.flow_outcomes import drawn, drive, happen, random_definition

ROUNDS = 150
GOOD = (StepState.SUCCEEDED, StepState.SKIPPED)
ENDED = (*GOOD, StepState.FAILED, StepState.BLOCKED, StepState.CANCELLED)


class Watched(FlowState):
    """Checks each beginning against the rules."""

    def __init__(self, definition: Definition) -> None:
        super().__init__(definition, {}, "r")
        self.seen: set[Task] = set()

    def begun(self, task: Task) -> None:
        step = self.step_of(task)
        assert all(self.step_result(need).state in GOOD for need in step.needs), f"{task} before what it needs"
        assert task not in self.seen, f"{task} twice"
        self.seen.add(task)
        if task.kind is TaskKind.RUN:
            items = self.step_result(task.step).items
            assert items[task.index].state not in ENDED, f"{task} again, and its item is over"
        super().begun(task)


def rebuilt(definition: Definition, known: set[Task], chance: Random, failing: float, seed: int) -> FlowState:
    """A new table that is told what is known, in another order."""
    state, draw = FlowState(definition, {}, "r"), drawn(seed)
    while to_tell := [task for task in state.ready(0.0, is_replay=True) if task in known]:
        task = chance.choice(to_tell)
        state.begun(task)
        happen(state, task, draw, failing)
    return state


def check_result(definition: Definition, result: FlowResult) -> None:
    steps = {step.key: step for step in result.steps}
    assert all(step.state in ENDED for step in result.steps)
    failed = [step for step in result.steps if step.state is StepState.FAILED]
    assert (result.state is FlowEnd.FAILED) == bool(failed) and (result.error is not None) == bool(failed)
    for step in definition.steps:
        needs = [steps[need].state for need in step.needs]
        if steps[step.key].state is StepState.BLOCKED:
            assert StepState.FAILED in needs or StepState.BLOCKED in needs
        if steps[step.key].state in (StepState.SUCCEEDED, StepState.FAILED):
            assert all(need in GOOD for need in needs)
    if definition.fail_mode is FailMode.BEST_EFFORT and not any(step.on_failure == "abort" for step in definition.steps):
        assert all(step.state is not StepState.CANCELLED for step in result.steps), "nothing is left undone"


@pytest.mark.parametrize("fail_mode", list(FailMode))
@pytest.mark.parametrize("failing", [0.0, 0.12, 0.4])
def test_any_order_gives_the_same(fail_mode: FailMode, failing: float) -> None:
    ends = set()
    for seed in range(ROUNDS):
        chance = Random(seed)
        definition = random_definition(chance, fail_mode)
        state = Watched(definition)
        over = drive(state, chance, drawn(seed), failing, width=chance.choice([1, 3, 100]))
        result = state.result()
        check_result(definition, result)
        ends.add(result.state)
        again = rebuilt(definition, set(over), chance, failing, seed)
        assert again.ended and again.result() == result, f"seed {seed}"
        assert again.default_output() == state.default_output() and again.final_variables() == state.final_variables()
    assert FlowEnd.SUCCEEDED in ends and (failing == 0.0 or FlowEnd.FAILED in ends)


@pytest.mark.parametrize("failing", [0.0, 0.12])
def test_a_run_that_breaks_off_anywhere_comes_to_the_same(failing: float) -> None:
    """Of a best-effort run what was running is lost; the rest is done by a table that was told the beginning."""
    for seed in range(ROUNDS):
        chance = Random(seed)
        definition = random_definition(chance, FailMode.BEST_EFFORT)
        if any(step.on_failure == "abort" for step in definition.steps):
            continue
        whole = FlowState(definition, {}, "r")
        over = drive(whole, chance, drawn(seed), failing, width=3)
        known = set(over[: chance.randint(0, len(over))])
        second = rebuilt(definition, known, chance, failing, seed)
        more = drive(second, chance, drawn(seed), failing, width=3)
        assert known.isdisjoint(more), "nothing that is known is done again"
        assert second.result() == whole.result(), f"seed {seed}"


def test_half_of_a_run_stands_the_same_in_any_order() -> None:
    for seed in range(ROUNDS):
        chance = Random(seed)
        definition = random_definition(chance, FailMode.BEST_EFFORT)
        over = drive(FlowState(definition, {}, "r"), chance, drawn(seed), 0.1, width=5)
        known = set(over[: len(over) // 2])
        first, second = (rebuilt(definition, known, Random(n), 0.1, seed) for n in (1, 2))
        assert first.steps() == second.steps()
        assert set(first.ready(0.0, is_replay=True)) == set(second.ready(0.0, is_replay=True))
