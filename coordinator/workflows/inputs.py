"""What a task gets: the input of its job, and whether it runs at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.workflows.conditions import is_true
from coordinator.workflows.definition import Definition, Step
from coordinator.workflows.errors import FlowError
from coordinator.workflows.pointers import placed
from coordinator.workflows.values import Renders, evaluate


@dataclass(frozen=True, slots=True)
class Plan:
    """``runs`` is False where the step is skipped. ``items``: of for_each; None for a step without it."""

    runs: bool
    items: list[Any] | None = None


async def plan_of(step: Step, variables: Mapping[str, Any], renders: Renders) -> Plan:
    """The PLAN task of a step. Raises FlowError, also where ``for_each`` gives no list."""
    if step.when is not None and not step.asks_each and not is_true(await evaluate(step.when, variables, renders, "when")):
        return Plan(False)
    if step.for_each is None:
        return Plan(True)
    items = await evaluate(step.for_each, variables, renders, "for_each")
    if not isinstance(items, list):
        raise FlowError("for_each", f"gives {_kind(items)} and not a list")
    return Plan(True, items)


async def input_of(step: Step, variables: Mapping[str, Any], renders: Renders) -> dict[str, Any] | None:
    """The input for a RUN task's job; None where the item's ``when`` is false. Raises FlowError."""
    if step.asks_each and step.when is not None and not is_true(await evaluate(step.when, variables, renders, "when")):
        return None
    given = await evaluate(step.input, variables, renders, "input")
    for pointer, value in step.mapping:
        name = pointer.tokens[0] if len(pointer.tokens) == 1 else str(pointer)
        part = await evaluate(value, variables, renders, f"input_mapping.{name}")
        try:
            given = placed(given, pointer, part)
        except FlowError as error:
            raise error.at(f"input_mapping.{name}") from None
    if not isinstance(given, dict):
        raise FlowError("input_mapping", "makes the input something else than an object")
    return given


async def output_of(definition: Definition, variables: Mapping[str, Any], renders: Renders) -> Any:
    """What a run with an ``output`` of its own gives. Raises FlowError."""
    assert definition.output is not None, "the run gives what its last steps gave"
    return await evaluate(definition.output, variables, renders, "output")


def _kind(value: object) -> str:
    kinds = {str: "a text", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
