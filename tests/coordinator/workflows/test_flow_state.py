"""The state table of a run, a transition at a time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from coordinator.workflows.definition import Definition, parse_definition
from coordinator.workflows.state import Failure, FlowEnd, FlowState, StepState, Task, TaskKind, chance
from protocol import limits
from protocol.errors import LocalProtocolError

RUN, PLAN = TaskKind.RUN, TaskKind.PLAN


def definition(*steps: str, fail_mode: str = "fail_fast", **fields: dict[str, Any]) -> Definition:
    """``"c a b"``: the step c needs a and b; ``c={…}``: more fields of it."""
    entries = []
    for line in steps:
        key, *needs = line.split()
        entries.append({"key": key, "cargo": "echo", "depends_on": needs} | fields.get(key, {}))
    return parse_definition({"steps": entries, "fail_mode": fail_mode})


def state_of(*steps: str, fail_mode: str = "fail_fast", **fields: dict[str, Any]) -> FlowState:
    return FlowState(definition(*steps, fail_mode=fail_mode, **fields), {"x": 1}, "run", "name")


def suffixes(state: FlowState, now_s: float = 0.0) -> list[str]:
    return [task.suffix for task in state.ready(now_s)]


def begin(state: FlowState, step: str, now_s: float = 0.0) -> Task:
    """Begins the first task of a step that is ready."""
    task = next(task for task in state.ready(now_s) if task.step == step)
    state.begun(task)
    return task


def succeed(state: FlowState, step: str, output: Any = "out") -> None:
    state.succeeded(begin(state, step), output)


def fail(state: FlowState, step: str, retryable: bool = False, now_s: float = 0.0) -> None:
    state.failed(begin(state, step, now_s), "cargo_failed", f"{step} is broken", retryable, now_s)


def states(state: FlowState) -> str:
    """``a=succeeded b=blocked``"""
    return " ".join(f"{step.key}={step.state}" for step in state.steps())


def test_a_diamond() -> None:
    state = state_of("a", "b a", "c a", "d b c")
    assert suffixes(state) == ["a.0.1"] and states(state) == "a=pending b=pending c=pending d=pending"
    task = begin(state, "a")
    assert suffixes(state) == [] and states(state).startswith("a=running")
    state.succeeded(task, {"text": "A"})
    assert suffixes(state) == ["b.0.1", "c.0.1"]
    succeed(state, "c", {"text": "C"})
    assert suffixes(state) == ["b.0.1"]
    succeed(state, "b", {"text": "B"})
    last = begin(state, "d")
    assert state.variables(last) == {
        "input": {"x": 1},
        "run": {"id": "run", "name": "name"},
        "b": {"state": "succeeded", "output": {"text": "B"}, "outputs": [{"text": "B"}], "error": None},
        "c": {"state": "succeeded", "output": {"text": "C"}, "outputs": [{"text": "C"}], "error": None},
    }
    assert not state.ended
    state.succeeded(last, {"text": "D"})
    result = state.result()
    assert state.ended and (result.state, result.partial, result.error) == (FlowEnd.SUCCEEDED, False, None)
    assert state.default_output() == {"d": {"text": "D"}}
    assert set(state.final_variables()) == {"input", "run", "a", "b", "c", "d"}


def test_a_limit_to_what_is_ready() -> None:
    state = state_of(*"abcde")
    assert [task.step for task in state.ready(0.0, 2)] == ["a", "b"]
    begin(state, "a")
    assert [task.step for task in state.ready(0.0, 2)] == ["b", "c"]


def test_nothing_happens_twice_or_before_its_time() -> None:
    state = state_of("a", "b a")
    early = Task(RUN, "b")
    with pytest.raises(LocalProtocolError, match="not ready"):
        state.begun(early)
    task = begin(state, "a")
    for wrong in (state.begun, state.expanded, state.cancelled):
        with pytest.raises(LocalProtocolError):
            wrong(task)
    state.succeeded(task, 1)
    for again in (state.skipped, state.lost):
        with pytest.raises(LocalProtocolError, match="not running"):
            again(task)
    with pytest.raises(LocalProtocolError, match="not running"):
        state.succeeded(task, 1)
    with pytest.raises(LocalProtocolError, match="not running"):
        state.failed(task, "c", "m", True)
    with pytest.raises(LocalProtocolError, match="not ready"):
        state.begun(Task(RUN, "a", 0, 2))


def test_fail_fast_ends_the_run_at_once() -> None:
    state = state_of("a", "b", "c a", "d", "e")
    running = begin(state, "b")
    succeed(state, "d")
    fail(state, "a")
    assert state.stopping and state.ready(0.0) == [] and not state.ended
    state.cancelled(running)
    result = state.result()
    assert states(state) == "a=failed b=cancelled c=blocked d=succeeded e=cancelled"
    assert (result.state, result.partial, result.failed_step) == (FlowEnd.FAILED, True, "a")
    assert result.error == Failure("cargo_failed", "a is broken")


def test_what_still_succeeds_while_the_run_fails_counts() -> None:
    state = state_of("a", "b")
    running = begin(state, "b")
    fail(state, "a")
    state.succeeded(running, "B")
    assert states(state) == "a=failed b=succeeded" and state.result().partial


def test_best_effort_goes_on_with_the_others() -> None:
    state = state_of("a", "b", "c a b", "d c", "e b", fail_mode="best_effort")
    fail(state, "a")
    assert not state.stopping and states(state) == "a=failed b=pending c=blocked d=blocked e=pending"
    succeed(state, "b")
    succeed(state, "e", "E")
    result = state.result()
    assert (result.state, result.partial, result.failed_step) == (FlowEnd.FAILED, True, "a")
    assert state.default_output() == {"d": None, "e": "E"}


def test_best_effort_of_which_nothing_is_left_is_not_partial() -> None:
    state = state_of("a", "b a", fail_mode="best_effort")
    fail(state, "a")
    assert state.ended and not state.result().partial


def test_abort_ends_a_best_effort_run() -> None:
    state = state_of("a", "b", fail_mode="best_effort", a={"on_failure": "abort"})
    fail(state, "a")
    assert state.ended and states(state) == "a=failed b=cancelled"


def test_skip_lets_dependants_run_with_nothing() -> None:
    state = state_of("a", "b a", a={"on_failure": "skip"})
    fail(state, "a")
    seen = state.variables(begin(state, "b"))["a"]
    error = {"code": "cargo_failed", "message": "a is broken"}
    assert seen == {"state": "skipped", "output": None, "outputs": [None], "error": error}


def test_a_condition_that_is_false_skips_the_step() -> None:
    state = state_of("a", "b a", "c b", b={"when": "{{ a.output.text }}"})
    succeed(state, "a")
    plan = begin(state, "b")
    assert plan == Task(PLAN, "b") and suffixes(state) == []
    state.skipped(plan)
    seen = state.variables(begin(state, "c"))["b"]
    assert seen == {"state": "skipped", "output": None, "outputs": [], "error": None}


def test_a_condition_that_is_true() -> None:
    state = state_of("a", a={"when": True})
    state.expanded(begin(state, "a"))
    assert state.ready(0.0) == [Task(RUN, "a")]
    succeed(state, "a")
    assert state.result().state is FlowEnd.SUCCEEDED


def test_retries_rest_longer_each_time_and_the_same_in_each_life() -> None:
    retry = {"max_attempts": 3, "backoff_s": 10, "jitter": 0.5}
    state = state_of("a", a={"retry": retry})
    fail(state, "a", retryable=True, now_s=100.0)
    wake_s = state.next_wake_s()
    assert wake_s is not None and 105.0 < wake_s <= 110.0
    assert wake_s == 100.0 + 10.0 * (1 - 0.5 * chance("run", Task(RUN, "a", 0, 1)))
    assert suffixes(state, wake_s - 0.001) == [] and not state.ended
    assert suffixes(state, wake_s) == ["a.0.2"] and state.next_wake_s() is None
    fail(state, "a", retryable=True, now_s=wake_s)
    later_s = state.next_wake_s()
    assert later_s is not None and wake_s + 10.0 < later_s <= wake_s + 20.0
    fail(state, "a", retryable=True, now_s=later_s)
    step = state.step_result("a")
    assert state.ended and step.state is StepState.FAILED and step.items[0].attempts == 3


def test_what_is_not_retryable_is_not_tried_again() -> None:
    state = state_of("a", a={"on_failure": "retry"})
    fail(state, "a", retryable=False)
    assert state.ended


def test_success_after_a_failure_leaves_no_error() -> None:
    state = state_of("a", a={"retry": {"max_attempts": 2, "backoff_s": 0}})
    fail(state, "a", retryable=True)
    succeed(state, "a")
    assert state.step_result("a").error is None and state.result().state is FlowEnd.SUCCEEDED
    assert state.step_result("a").to_json() == {"key": "a", "state": "succeeded", "output": "out", "error": None, "attempts": 2}


def test_what_its_coordinator_lost_is_no_failure() -> None:
    state = state_of("a")
    for attempt in range(1, 5):
        assert suffixes(state) == [f"a.0.{attempt}"]
        state.lost(begin(state, "a"))
    succeed(state, "a")
    assert state.result().state is FlowEnd.SUCCEEDED


def test_a_replay_sees_what_rests_and_leaves_it_resting() -> None:
    retry = {"max_attempts": 2, "backoff_s": 10, "jitter": 0}
    state = state_of("a", "b", a={"retry": retry}, b={"retry": retry})
    fail(state, "a", retryable=True)
    fail(state, "b", retryable=True)
    again = state.ready(0.0, is_replay=True)
    assert again == [Task(RUN, "a", 0, 2), Task(RUN, "b", 0, 2)] and state.ready(0.0) == []
    state.begun(again[0])
    state.succeeded(again[0], "A")
    assert state.ready(9.9) == [] and state.ready(10.0) == [again[1]]


def test_a_replay_of_a_run_that_failed_hears_of_the_others_too() -> None:
    state = state_of("a", "b", "c b")
    fail(state, "a")
    assert state.ready(0.0) == []
    for key in "bc":
        (task,) = state.ready(0.0, is_replay=True)
        state.begun(task)
        state.succeeded(task, key)
    assert states(state) == "a=failed b=succeeded c=succeeded"


def test_fan_out_and_join() -> None:
    state = state_of("a", "b a", a={"for_each": "{{ input.l }}"})
    state.expanded(begin(state, "a"), ["x", "y", "z"])
    assert suffixes(state) == ["a.0.1", "a.1.1", "a.2.1"]
    tasks = state.ready(0.0)
    for task in tasks:
        state.begun(task)
    assert state.variables(tasks[1]) == {"input": {"x": 1}, "run": {"id": "run", "name": "name"}, "item": "y", "index": 1}
    for task in reversed(tasks):
        assert suffixes(state) == []
        state.succeeded(task, task.index)
    seen = state.variables(begin(state, "b"))["a"]
    assert seen == {"state": "succeeded", "output": None, "outputs": [0, 1, 2], "error": None}


def test_nothing_to_fan_out_over() -> None:
    state = state_of("a", "b a", a={"for_each": []})
    state.expanded(begin(state, "a"), [])
    assert states(state) == "a=succeeded b=pending" and suffixes(state) == ["b.0.1"]
    assert state.step_result("a").outputs == []


def test_too_many_items() -> None:
    state = state_of("a", a={"for_each": "{{ input.l }}", "max_items": 2, "on_failure": "retry"})
    state.expanded(begin(state, "a"), [1, 2, 3])
    error = state.result().error
    assert error == Failure("too_many_items", "for_each gives 3 items; max_items is 2")


def test_items_that_fail_with_best_effort() -> None:
    state = state_of("a", "b a", fail_mode="best_effort", a={"for_each": "{{ input.l }}"})
    state.expanded(begin(state, "a"), ["x", "y", "z"])
    tasks = state.ready(0.0)
    for task in tasks:
        state.begun(task)
    state.failed(tasks[2], "late", "m", False)
    state.failed(tasks[1], "early", "m", False)
    assert states(state) == "a=running b=pending"
    state.succeeded(tasks[0], "X")
    step = state.step_result("a")
    assert (step.state, step.outputs, step.error) == (StepState.FAILED, ["X", None, None], Failure("early", "m"))
    assert states(state) == "a=failed b=blocked"
    assert [item["state"] for item in step.to_json()["items"]] == ["succeeded", "failed", "failed"]


def test_items_that_are_skipped_give_null_in_their_place() -> None:
    state = state_of("a", "b a", a={"for_each": "{{ input.l }}", "on_failure": "skip"})
    state.expanded(begin(state, "a"), ["x", "y", "z"])
    fail(state, "a")
    state.skipped(begin(state, "a"))
    succeed(state, "a", "Z")
    assert state.step_result("a").outputs == [None, None, "Z"] and states(state) == "a=succeeded b=pending"


def test_one_item_ends_a_fail_fast_run() -> None:
    state = state_of("a", a={"for_each": "{{ input.l }}"})
    state.expanded(begin(state, "a"), ["x", "y", "z"])
    first = begin(state, "a")
    fail(state, "a")
    assert state.stopping and not state.ended
    state.cancelled(first)
    assert [item.state for item in state.step_result("a").items] == ["cancelled", "failed", "cancelled"]


def test_a_plan_that_fails() -> None:
    for on_failure, wanted in ((None, "a=failed b=blocked"), ("skip", "a=skipped b=pending")):
        state = state_of("a", "b a", fail_mode="best_effort", a={"when": "{{ input.x }}", "on_failure": on_failure})
        fail(state, "a")
        assert states(state) == wanted


def test_cancel() -> None:
    state = state_of("a", "b", "c a", b={"retry": {"max_attempts": 2}})
    succeed(state, "a")
    fail(state, "b", retryable=True)
    running = begin(state, "c")
    state.cancel()
    assert state.next_wake_s() is None and state.ready(1e9) == [] and not state.ended
    state.cancelled(running)
    result = state.result()
    assert (result.state, result.partial, states(state)) == (FlowEnd.CANCELLED, True, "a=succeeded b=cancelled c=cancelled")


def test_a_run_that_has_ended_cannot_be_cancelled() -> None:
    state = state_of("a")
    succeed(state, "a")
    state.cancel()
    assert state.result().state is FlowEnd.SUCCEEDED


def test_chance_is_spread_and_repeats() -> None:
    drawn = [chance("run", Task(RUN, "a", index)) for index in range(1000)]
    assert drawn == [chance("run", Task(RUN, "a", index)) for index in range(1000)]
    assert 0.45 < sum(drawn) / 1000 < 0.55 and min(drawn) < 0.02 and max(drawn) > 0.98


def test_ten_thousand_tasks_cost_little() -> None:
    """issue: the engine does 500 steps/s; the table alone has to do 20,000 transitions/s, here with a wide margin for a busy machine."""
    count = limits.FLOW_ITEMS_MAX
    state = state_of("a", "b a", a={"for_each": "{{ input.l }}", "max_items": count})
    started = time.process_time()
    state.expanded(begin(state, "a"), list(range(count)))
    while not state.ended:
        for task in state.ready(0.0, 16):
            state.begun(task)
            state.variables(task)
            state.succeeded(task, task.index)
    took_s = time.process_time() - started
    assert state.step_result("a").outputs == list(range(count))
    assert 2 * count / took_s > 20_000
