"""specs/workflows.md and the code say the same: states, fields, codes."""

from __future__ import annotations

import re
from pathlib import Path

from coordinator.books.runs import Run, RunKind, RunState
from coordinator.http import workflow_routes
from coordinator.workflows import definition, live, runner, state, view
from coordinator.workflows.state import StepResult, StepState
from protocol.envelope import Label

_SPECS = Path(__file__).parents[3] / "specs"
PAGE, HTTP = (_SPECS / "workflows.md").read_text(), (_SPECS / "http-api.md").read_text()


def test_states_and_fields_of_a_step() -> None:
    said = PAGE[PAGE.index("A run is `running`") : PAGE.index("How a run fails")]
    assert set(re.findall(r"`(\w+)`", said)) == {*RunState, *StepState}
    fields = re.findall(r"^\| (`\w+`(?:, `\w+`)?) \|", PAGE[: PAGE.index("`fail_mode` is")], re.MULTILINE)
    assert {name for cell in fields for name in re.findall(r"\w+", cell)} == set(definition._STEP_FIELDS) - {"workload"}
    assert Label.WORKFLOW in PAGE and all(f"`{name}`" in PAGE for name in live.LOST)


def test_codes() -> None:
    codes = re.findall(r"^\| `(\w+)` \| ", PAGE[PAGE.index("How a run fails") : PAGE.index("### Attempts")], re.MULTILINE)
    ours = {live.BAD_VALUE, state.TOO_MANY_ITEMS, live.OVER_PRICE, live.OUTPUT_GONE, runner.BAD_OUTPUT, runner.BAD_DEFINITION}
    assert set(codes) == ours | {"internal_error"}
    section = HTTP[HTTP.index("### Workflows") : HTTP.index("### The cache of answers")]
    assert set(workflow_routes._REFUSED) - {"invalid_value"} <= set(re.findall(r"`(\w+)`", section))


def test_fields_of_runs_and_steps() -> None:
    run = view.run_json(Run("wf_1", "a", RunKind.WORKFLOW, "", RunState.RUNNING, "me", 1, 1), [], None, 0, None, "")
    step = view.step_json(StepResult("a", StepState.PENDING, False), view.NO_FACTS, False)
    assert re.search(r"A run: `\{([^}]*)\}`", HTTP)[1].split(", ") == list(run)  # type: ignore[index]
    assert re.search(r"A step: `\{([^}]*)\}`", HTTP)[1].split(", ") == list(step)  # type: ignore[index]
    event = view._event(1, "begun")
    assert re.search(r"events: \[\{([^}]*)\}\]", HTTP)[1].split(", ") == list(event)  # type: ignore[index]
