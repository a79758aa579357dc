"""What accounts do with workflows: start, look at, watch, cancel and run them again. Runs on trio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import trio

from coordinator.books import run_queries, workflow_rows
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import Job
from coordinator.books.runs import Run, RunKind, RunState
from coordinator.runs.board import RunBoard
from coordinator.workflows import view
from coordinator.workflows.definition import Definition
from coordinator.workflows.errors import FlowError
from coordinator.workflows.live import LiveFlow, OutputGone
from coordinator.workflows.quote import FlowQuote
from coordinator.workflows.quoting import Quoter
from coordinator.workflows.run_spec import RunSpec, unpack_spec
from coordinator.workflows.runner import WorkflowRunner, outputs_json, read_definition, read_kept, succeeded_ids
from coordinator.workflows.state import StepResult, StepState
from coordinator.workflows.store import FlowStore, Reference
from protocol import limits
from protocol.errors import ArchipelagError
from protocol.prices import format_credits

_PAUSE_S = 0.05  # between two looks at a run that changes all the time
_PAUSE_LARGE_S = 0.5
_LARGE_TASKS = 500
_POLL_S = 0.5  # of a run that another Coordinator has

KIND = RunKind.WORKFLOW


class FlowRefused(ArchipelagError):
    """What an account asks for cannot be. ``code``: over_max_price, too_many_runs, run_running, run_expired, output_expired, unknown_step
    or outputs_too_large; ``param``: which field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a run, or for its quote. One of ``definition``, as its client wrote it, and ``reference``; ``fail_mode`` instead of the
    definition's own; ``size``: of the definition in bytes, about. ``policy``: JSON, or empty."""

    account: str
    name: str = ""
    definition: Mapping[str, Any] | None = None
    reference: Reference | None = None
    input: Any = None
    fail_mode: str | None = None
    size: int = 0
    bid_micros: int | None = None
    max_price_micros: int | None = None
    priority: int = 0
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Once:
    """By what a request is known when it comes again. ``run_id`` follows from its idempotency key where it ``has_key``."""

    run_id: str
    fingerprint: str = ""
    is_retry: bool = False
    has_key: bool = False


class Flows:
    """``clock_ms`` gives Unix milliseconds. All methods raise BooksRefused or BooksUnavailable."""

    def __init__(
        self,
        board: RunBoard,
        runner: WorkflowRunner,
        store: FlowStore,
        quoter: Quoter,
        clock_ms: Callable[[], int],
        retry_window_s: float,
    ) -> None:
        self._board, self._runner, self.store, self._quoter = board, runner, store, quoter
        self._clock_ms, self._retry_window_s = clock_ms, retry_window_s

    def __repr__(self) -> str:
        return f"<Flows {self._runner!r}>"

    # ---- starting

    async def read(self, asked: Asked) -> tuple[Definition, str, str]:
        """The definition, the run's name, and the saved version that it is. Raises FlowError, StoreRefused, SealBroken."""
        value, name, source, size = asked.definition, asked.name, "", asked.size
        if asked.reference is not None:
            found = await self.store.open(asked.account, asked.reference)
            value, name, source = found.definition, name or found.row.name, found.row.id
            size = len(found.row.body)
        assert value is not None
        if asked.fail_mode is not None:
            value = {**value, "fail_mode": asked.fail_mode}
        return await read_definition(value, size), name, source

    async def start(self, asked: Asked, once: Once) -> tuple[Run, bool]:
        """A run, and whether it is new. Raises FlowError, StoreRefused, SealBroken, FlowRefused."""
        definition, name, source = await self.read(asked)
        is_known = await self._is_known(asked.account, once)
        quote = None
        if not is_known:
            quoted = await self._quoter.quote(definition, asked)
            if asked.max_price_micros is not None and quoted.micros > asked.max_price_micros:
                wanted, most = format_credits(quoted.micros), format_credits(asked.max_price_micros)
                raise FlowRefused("over_max_price", f"the run may cost {wanted} credits, and max_price is {most}", "max_price")
            quote = quoted.to_json()
        spec = RunSpec(
            definition.to_json(), asked.input, asked.bid_micros, asked.max_price_micros, asked.priority, asked.policy, quote, source
        )
        return await self._submit(spec, definition, asked.account, name, once, is_known)

    async def _is_known(self, account: str, once: Once) -> bool:
        """Whether the request has made a run before."""
        books = self._board.books
        if once.has_key and await books.ask(run_queries.run_without_spec, once.run_id, account) is not None:
            return True
        since_ms = self._clock_ms() - int(self._retry_window_s * 1000)
        return once.is_retry and await books.ask(run_queries.run_by_fingerprint, account, once.fingerprint, since_ms) is not None

    async def quote(self, asked: Asked) -> FlowQuote:
        """Raises FlowError, StoreRefused, SealBroken."""
        definition, _, _ = await self.read(asked)
        return await self._quoter.quote(definition, asked)

    async def _submit(
        self, spec: RunSpec, definition: Definition, account: str, name: str, once: Once, is_known: bool, origin: str = ""
    ) -> tuple[Run, bool]:
        if not is_known and await self._board.books.ask(run_queries.open_runs, account, KIND) >= limits.FLOW_RUNS_OPEN_MAX:
            text = f"an account may have {limits.FLOW_RUNS_OPEN_MAX} workflows running; wait until one has ended"
            raise FlowRefused("too_many_runs", text)
        packed = await trio.to_thread.run_sync(spec.pack) if spec.taken else spec.pack()
        if len(packed) > limits.FLOW_TAKEN_BYTES_MAX:
            text = f"what its steps said is over {limits.FLOW_TAKEN_BYTES_MAX} bytes; run the workflow again"
            raise FlowRefused("outputs_too_large", text)
        self._runner.prepare(once.run_id, spec, definition)
        is_new = False
        try:
            run, is_new = await self._board.submit(
                once.run_id,
                account,
                KIND,
                name,
                len(definition.steps),
                packed,
                fingerprint=once.fingerprint,
                is_retry=once.is_retry,
                origin=origin,
            )
        finally:
            if not is_new:
                self._runner.unprepare(once.run_id)
        return run, is_new

    async def rerun(self, account: str, run_id: str, step: str, once: Once) -> tuple[Run, bool]:
        """A new run that does this step and all that need it again, and has from the old one what all others said. Raises FlowRefused."""
        origin = await self._board.find(run_id, account, KIND)
        if not origin.ended:
            raise FlowRefused("run_running", "the run goes on; cancel it first, or wait for its end")
        spec = self._spec(origin)
        definition = await read_definition(spec.definition, len(origin.spec))
        if step not in definition.by_key:
            raise FlowRefused("unknown_step", f"the run has no such step; it has {', '.join(definition.by_key)}"[:500], "from")
        again = definition.affected(step)
        jobs = await self._jobs(origin)
        await self._need_small(origin)
        kept = [job_id for job_id in succeeded_ids(jobs) if _step(job_id) not in again]
        outputs = outputs_json(await self._board.outputs(kept))
        if len(outputs) < len(kept):
            raise FlowRefused("output_expired", "what its steps said is not kept any more; run the workflow again")
        taken: dict[str, dict[int, Any]] = {key: dict(items) for key, items in spec.taken.items() if key not in again}
        for key, facts in view.facts_of(origin.id, jobs.values()).items():
            for task, job in facts.jobs:
                if job.id in outputs:
                    taken.setdefault(key, {})[task.index] = outputs[job.id]
        is_known = await self._is_known(account, once)
        return await self._submit(replace(spec, taken=taken), definition, account, origin.name, once, is_known, origin.id)

    async def _need_small(self, run: Run) -> None:
        """Raises FlowRefused where all that a run's jobs have said is too much to be told at once."""
        if await self._board.books.ask(workflow_rows.output_bytes, run.id) > limits.FLOW_SHOWN_BYTES_MAX:
            text = "all that its steps said is too large for one answer; read each job's at /api/v1/jobs/{id}/output"
            raise FlowRefused("outputs_too_large", text)

    async def cancel(self, account: str, run_id: str) -> Run:
        return await self._board.cancel(run_id, account, KIND)

    # ---- looking

    async def runs(self, account: str, limit: int, offset: int) -> tuple[list[Run], int]:
        return await self._board.books.ask(run_queries.runs_of, account, KIND, limit, offset)

    async def timeline(self, account: str, run_id: str) -> tuple[Run, list[dict[str, Any]]]:
        run = await self._board.find(run_id, account, KIND)
        return run, view.timeline(run, (await self._jobs(run)).values())

    async def show(self, account: str, run_id: str) -> dict[str, Any]:
        """A run with its steps and what they said. Raises FlowRefused, SealBroken."""
        run = await self._board.find(run_id, account, KIND)
        await self._need_small(run)
        return await self.shown(run)

    async def shown(self, run: Run, with_outputs: bool = True) -> dict[str, Any]:
        """See ``show``."""
        jobs = await self._jobs(run)
        facts, price = view.facts_of(run.id, jobs.values()), sum(job.price_micros for job in jobs.values())
        if not run.spec:
            return view.run_json(run, [], None, price, None, "")  # its time is over
        spec = self._spec(run)
        steps, output = await self._steps(run, spec, jobs, facts, with_outputs)
        shown = [view.step_json(step, facts.get(step.key, view.NO_FACTS), step.key in spec.taken) for step in steps]
        return view.run_json(run, shown, output, price, spec.quote, spec.source)

    async def _steps(
        self, run: Run, spec: RunSpec, jobs: Mapping[str, Job], facts: Mapping[str, view.StepFacts], with_outputs: bool
    ) -> tuple[list[StepResult], Any]:
        """Steps with their outputs, and the run's output."""
        flow = self._runner.live.get(run.id)
        if flow is not None and not run.ended:
            return list(flow.state.steps()), None
        if run.ended:
            value = self._board.result_of(run)
            if "steps" not in value:
                return [], None  # it could not even be read
            kept = read_kept(value)
            if not with_outputs:
                return list(kept.steps), None
            outputs = outputs_json(await self._board.outputs(succeeded_ids(jobs)))
            steps = view.with_outputs(kept.steps, facts, outputs, spec.taken)
            has_output = run.state is not RunState.CANCELLED
            return steps, view.output_of_leaves(steps, kept.leaves) if kept.leaves and has_output else kept.output
        rebuilt = await self._rebuilt(run, jobs)
        return list(rebuilt.state.steps()) if rebuilt is not None else [], None

    async def _rebuilt(self, run: Run, jobs: Mapping[str, Job]) -> LiveFlow | None:
        """A run that is under way elsewhere; None where this version cannot read it."""
        outputs = outputs_json(await self._board.outputs(succeeded_ids(jobs)))
        try:
            return await self._runner.rebuilt(run, self._board.spec_of(run), jobs, outputs)
        except (ValueError, FlowError, OutputGone):
            return None

    async def _jobs(self, run: Run) -> dict[str, Job]:
        return {job.id: job for job in await self._board.books.ask(run_queries.children_of, run.id)}

    def _spec(self, run: Run) -> RunSpec:
        """Raises FlowRefused, SealBroken."""
        packed = self._board.spec_of(run)
        if not packed:
            raise FlowRefused("run_expired", "what the run was to do is not kept any more")
        return unpack_spec(packed)

    # ---- watching

    async def watch(self, account: str, run_id: str) -> AsyncIterator[dict[str, Any]]:
        """Each step as it is, then each change of one, then the run's end. Raises BooksRefused(NO_JOB)."""
        run = await self._board.find(run_id, account, KIND)
        told: dict[str, tuple[Any, ...]] = {}
        while True:
            flow = self._runner.live.get(run_id)
            for event in _live_events(flow) if flow is not None else await self._events(run):
                mark = event["state"], event["attempts"]
                if event["state"] != StepState.PENDING and told.get(event["key"]) != mark:
                    told[event["key"]] = mark
                    yield event
            if run.ended:
                yield {"type": "complete", "state": run.state.value, "error": view.error_json(run.error_code, run.error_message)}
                return
            await self._next(flow)
            if flow is None or self._runner.live.get(run_id) is not flow:
                run = await self._again(run)

    async def _next(self, flow: LiveFlow | None) -> None:
        """Until there may be something new."""
        if flow is None:
            await trio.sleep(_PAUSE_S if self._runner.live else _POLL_S)
            return
        with trio.move_on_after(_POLL_S):
            await flow.bell.wait()
        await trio.sleep(_PAUSE_LARGE_S if sum(track.attempts for track in flow.tracks.values()) > _LARGE_TASKS else _PAUSE_S)

    async def _again(self, run: Run) -> Run:
        """As it is now, or as it was where the books are away: whoever watches has time."""
        try:
            while self._board.is_live(run.id) and run.id not in self._runner.live and not run.ended:
                await trio.sleep(_PAUSE_S)  # it begins, or its end is being written
                run = await self._board.find(run.id, run.account, KIND)
            return await self._board.find(run.id, run.account, KIND)
        except BooksUnavailable:
            return run

    async def _events(self, run: Run) -> list[dict[str, Any]]:
        """The steps of a run that is not under way here."""
        try:
            shown = await self.shown(run, with_outputs=False)
        except (BooksUnavailable, FlowRefused):
            return []
        keys = ("key", "state", "attempts", "tasks", "price", "duration_ms", "error")
        return [{"type": "step", **{key: step[key] for key in keys}} for step in shown["steps"]]


def _live_events(flow: LiveFlow) -> list[dict[str, Any]]:
    events = []
    for step in flow.state.steps():
        track = flow.tracks[step.key]
        has_ended = step.state in view.ENDED and track.started_at_ms
        events.append(
            {
                "type": "step",
                "key": step.key,
                "state": str(step.state),
                "attempts": sum(item.attempts for item in step.items),
                "tasks": len(step.items),
                "price": format_credits(track.price_micros),
                "duration_ms": track.ended_at_ms - track.started_at_ms if has_ended else None,
                "error": step.error.to_json() if step.error is not None else None,
            }
        )
    return events


def _step(job_id: str) -> str:
    return job_id.split(".")[1]
