"""Runs of workflows on the board of runs: begins them, goes on with those of Coordinators that have gone, and says how they ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trio

from coordinator.books.jobs import Job, JobState
from coordinator.books.runs import Run, RunState
from coordinator.jobs import Event
from coordinator.runs.board import RunContext, RunResult
from coordinator.workflows.definition import Definition, parse_definition
from coordinator.workflows.errors import FlowError
from coordinator.workflows.inputs import output_of
from coordinator.workflows.live import OUTPUT_GONE, LiveFlow, OutputGone, Tools, output_of_job
from coordinator.workflows.run_spec import RunSpec, unpack_spec
from coordinator.workflows.state import Failure, FlowEnd, FlowResult, ItemResult, StepResult, StepState
from protocol import limits

log = logging.getLogger(__name__)

BAD_DEFINITION, BAD_OUTPUT = "bad_definition", "bad_output"
_IN_THREAD_BYTES = 20_000  # definitions from this size on are parsed beside the loop
_PREPARED_MAX = 1_000
_END = {FlowEnd.SUCCEEDED: RunState.SUCCEEDED, FlowEnd.FAILED: RunState.FAILED, FlowEnd.CANCELLED: RunState.CANCELLED}


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a run that has ended, but for outputs of its steps: those are kept with its jobs. ``output``: what the run's own
    ``output`` gave; ``leaves``: where it has none, the steps whose outputs are the run's."""

    steps: tuple[StepResult, ...]
    partial: bool = False
    output: Any = None
    leaves: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        steps = [
            [
                step.key,
                str(step.state),
                step.fans_out,
                [[str(item.state), item.attempts, *_failure(item.error)] for item in step.items],
                *_failure(step.error),
            ]
            for step in self.steps
        ]
        return {"steps": steps, "partial": self.partial, "output": self.output, "leaves": list(self.leaves)}


def _failure(failure: Failure | None) -> tuple[str, str]:
    return (failure.code, failure.message) if failure is not None else ("", "")


def read_kept(value: Mapping[str, Any]) -> Kept:
    """Of ``Kept.to_json``."""
    steps = []
    for key, state, fans_out, items, code, message in value["steps"]:
        read = tuple(ItemResult(StepState(it[0]), None, Failure(it[2], it[3]) if it[2] else None, it[1]) for it in items)
        steps.append(StepResult(key, StepState(state), fans_out, read, Failure(code, message) if code else None))
    return Kept(tuple(steps), bool(value["partial"]), value["output"], tuple(value["leaves"]))


async def read_definition(value: object, size: int) -> Definition:
    """``size`` in bytes, about. Raises FlowError."""
    if size < _IN_THREAD_BYTES:
        return parse_definition(value)
    return await trio.to_thread.run_sync(parse_definition, value)


def succeeded_ids(jobs: Mapping[str, Job]) -> list[str]:
    return [job.id for job in jobs.values() if job.state is JobState.SUCCEEDED]


def outputs_json(events: Mapping[str, list[Event]]) -> dict[str, Any]:
    """By job id."""
    return {job_id: output_of_job(its) for job_id, its in events.items()}


class WorkflowRunner:
    """Implements coordinator.runs.board.Runner. ``live``: runs that are under way here."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.live: dict[str, LiveFlow] = {}
        self._prepared: dict[str, tuple[RunSpec, Definition]] = {}

    def __repr__(self) -> str:
        return f"<WorkflowRunner {len(self.live)} running>"

    def prepare(self, run_id: str, spec: RunSpec, definition: Definition) -> None:
        """A run that is about to begin here: so it need not be read again."""
        if len(self._prepared) < _PREPARED_MAX:
            self._prepared[run_id] = spec, definition

    def unprepare(self, run_id: str) -> None:
        """It did not begin."""
        self._prepared.pop(run_id, None)

    async def run(self, context: RunContext) -> RunResult:
        """See Runner. Raises BooksRefused, BooksUnavailable."""
        try:
            flow = await self._flow(context)
        except (ValueError, FlowError) as error:
            log.warning("workflow %s cannot be read: %s", context.run.id, type(error).__name__)
            return RunResult(RunState.FAILED, {}, BAD_DEFINITION, "this version cannot run it any more; save it anew")
        self.live[context.run.id] = flow
        try:
            await flow.replay()
            await flow.drive(context)
            result = await self._ended(flow)
        except OutputGone as gone:
            result = _gone(flow, gone.step)
        except Exception:  # not where it is cancelled: ``cancelled`` asks for what it had come to
            del self.live[context.run.id]
            raise
        del self.live[context.run.id]
        return result

    async def cancelled(self, context: RunContext) -> RunResult:
        """See Runner."""
        flow = self.live.pop(context.run.id, None)
        if flow is None:
            try:
                flow = await self._flow(context)
                await flow.replay()
            except (ValueError, FlowError, OutputGone) as error:
                log.warning("workflow %s cannot be read: %s", context.run.id, type(error).__name__)
                return RunResult(RunState.CANCELLED, {})
        flow.state.cancel()
        return RunResult(RunState.CANCELLED, _kept(flow).to_json())

    async def _flow(self, context: RunContext) -> LiveFlow:
        """Raises ValueError, FlowError, BooksUnavailable."""
        prepared = self._prepared.pop(context.run.id, None)
        if prepared is None:
            spec = unpack_spec(context.spec)
            prepared = spec, await read_definition(spec.definition, len(context.spec))
            for cargo in {step.cargo for step in prepared[1].steps}:
                self.tools.remember(cargo)  # or it would be unknown to a Coordinator that has just started and waits for its Islands
        spec, definition = prepared
        done = succeeded_ids(context.done)
        outputs = outputs_json(await context.outputs(done)) if done else {}
        return LiveFlow(context.run, spec, definition, self.tools, context.done, outputs)

    async def rebuilt(self, run: Run, packed: bytes, jobs: Mapping[str, Job], outputs: Mapping[str, Any]) -> LiveFlow:
        """A run that is under way elsewhere, as its jobs in the books show it. Raises ValueError, FlowError, OutputGone."""
        spec = unpack_spec(packed)
        flow = LiveFlow(run, spec, await read_definition(spec.definition, len(packed)), self.tools, jobs, outputs)
        await flow.replay()
        return flow

    async def _ended(self, flow: LiveFlow) -> RunResult:
        result = flow.state.result()
        output, failure = await self._output(flow, result)
        value = _kept(flow, output).to_json()
        if failure is not None:
            return RunResult(RunState.FAILED, value, BAD_OUTPUT, failure)
        if result.error is None:
            return RunResult(_END[result.state], value)
        message = f"step {result.failed_step}: {result.error.message}"
        return RunResult(_END[result.state], value, result.error.code[: limits.NAME_CHARS_MAX // 2], message)

    async def _output(self, flow: LiveFlow, result: FlowResult) -> tuple[Any, str | None]:
        """What the run's own ``output`` gives, and what is wrong with it: of a run that has failed, nothing is."""
        if flow.definition.output is None or result.state is FlowEnd.CANCELLED:
            return None, None
        try:
            output = await output_of(flow.definition, flow.state.final_variables(), self.tools.renders)
        except FlowError as error:
            return None, str(error) if result.state is FlowEnd.SUCCEEDED else None
        if len(json.dumps(output)) > limits.FLOW_OUTPUT_BYTES_MAX:
            return None, f"output: is over {limits.FLOW_OUTPUT_BYTES_MAX} bytes"
        return output, None


def _kept(flow: LiveFlow, output: Any = None) -> Kept:
    steps = flow.state.steps()
    has_some = any(step.state is StepState.SUCCEEDED for step in steps)
    is_partial = has_some and not all(step.state in (StepState.SUCCEEDED, StepState.SKIPPED) for step in steps)
    return Kept(steps, is_partial, output, flow.definition.leaves if flow.definition.output is None else ())


def _gone(flow: LiveFlow, step: str) -> RunResult:
    """It is not done again: its account would pay twice, and hear something else the second time."""
    text = f"step {step} was done, and what it said is not kept any more; run the workflow again"
    flow.state.cancel()
    return RunResult(RunState.FAILED, _kept(flow).to_json(), OUTPUT_GONE, text)
