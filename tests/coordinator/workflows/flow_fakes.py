"""A run's context without a Coordinator: jobs do what a function says, and a dictionary is the books."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from coordinator.books.jobs import Job, JobState
from coordinator.books.runs import Run, RunKind, RunState
from coordinator.exchange.bids import Bid, BidSource, Work
from coordinator.http.child_orders import ChildOrders
from coordinator.jobs import Accepted, ChoiceResult, Event, Settled, Text
from coordinator.orders import Order
from coordinator.runs.board import RunResult
from coordinator.workflows.definition import parse_definition
from coordinator.workflows.live import Tools
from coordinator.workflows.run_spec import RunSpec
from coordinator.workflows.runner import WorkflowRunner
from coordinator.workflows.templates import Templates
from protocol.errors import Refused
from protocol.generation import FinishReason, GenerationRequest

PRICE = 1_000
RUN_ID = "wf_1"
Do = Callable[[Order], Awaitable[str]]


def run_row(**changes: Any) -> Run:
    return replace(Run(RUN_ID, "ann", RunKind.WORKFLOW, "test", RunState.RUNNING, "me", 1, 1), **changes)


def prompt_of(order: Order) -> str:
    (asked,) = order.spec.choices
    assert isinstance(asked, GenerationRequest)
    return asked.messages[-1].content if asked.messages else asked.prompt


async def echo(order: Order) -> str:
    return prompt_of(order)


def events_of(text: str) -> list[Event]:
    result = ChoiceResult(0, FinishReason.STOP, ("island",), ("echo-1",), 1, 0, len(text.split()), PRICE, 1, 1)
    return [Accepted(0, "island", "echo-1", 0.0), Text(0, text), Settled(PRICE), result]


@dataclass
class FakeContext:
    """Implements what runners use of coordinator.runs.board.RunContext. ``rows`` and ``said`` outlive it: the next context of the run gets
    them. ``began``: ids of jobs in the order in which they came to an Island, with when."""

    run: Run
    spec: bytes
    do: Do = echo
    rows: dict[str, Job] = field(default_factory=dict)
    said: dict[str, list[Event]] = field(default_factory=dict)
    began: list[tuple[str, float]] = field(default_factory=list)
    running: int = 0
    running_max: int = 0
    done: Mapping[str, Job] = field(default_factory=dict)

    async def job(self, order: Order) -> list[Event]:
        job_id = order.spec.job_id
        assert job_id not in self.rows, f"{job_id} ran before"
        job = Job(job_id, "ann", order.spec.cargo, "job", JobState.SUBMITTED, 0, 0, "market", "me", 1, now_ms(), parent=self.run.id)
        self.rows[job_id] = job
        self.began.append((job_id.removeprefix(f"{self.run.id}."), trio.current_time()))
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            events = events_of(await self.do(order))
        except Refused as refusal:
            self._end(job, JobState.FAILED, error_code=refusal.code.value, error_message=refusal.message)
            raise
        except trio.Cancelled:
            self._end(job, JobState.CANCELLED, error_code="cancelled")
            raise
        finally:
            self.running -= 1
        self.said[job_id] = events
        self._end(job, JobState.SUCCEEDED, price_micros=PRICE)
        return events

    def _end(self, job: Job, state: JobState, **more: Any) -> None:
        self.rows[job.id] = replace(job, state=state, finished_at_ms=now_ms(), **more)

    async def outputs(self, job_ids: list[str]) -> dict[str, list[Event]]:
        return {job_id: self.said[job_id] for job_id in job_ids if job_id in self.said}

    def next(self, do: Do | None = None) -> FakeContext:
        """Of the Coordinator that takes the run over: what was open is lost."""
        lost: dict[str, Any] = {"state": JobState.FAILED, "error_code": "coordinator_lost", "finished_at_ms": now_ms()}
        rows = {job.id: job if job.ended else replace(job, **lost) for job in self.rows.values()}
        return FakeContext(self.run, self.spec, do or self.do, rows, self.said, self.began, done=dict(rows))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.began]


def now_ms() -> int:
    return 1_700_000_000_000 + round(trio.current_time() * 1000)


async def bids(account: str, cargo: str, work: Work, explicit: int | None) -> tuple[Bid, int | None]:
    return (Bid(explicit, BidSource.EXPLICIT), None) if explicit is not None else (Bid(PRICE, BidSource.MARKET), PRICE // 2)


@asynccontextmanager
async def runner() -> AsyncIterator[WorkflowRunner]:
    orders = ChildOrders(lambda account: bytes(32), lambda cargo: True, 3600.0, 600.0)
    async with Templates() as templates:
        yield WorkflowRunner(Tools(orders, templates, bids, lambda cargo: None, now_ms))


def context(*steps: dict[str, Any], do: Do = echo, given: Any = None, spec: dict[str, Any] | None = None, **more: Any) -> FakeContext:
    """Of a run of these steps; ``more``: fields of its definition, ``spec``: of its specification."""
    definition = parse_definition({"steps": list(steps), **more})
    packed = RunSpec(definition.to_json(), given, **(spec or {})).pack()
    return FakeContext(run_row(), packed, do)


def step(key: str, prompt: str = "", **more: Any) -> dict[str, Any]:
    return {"key": key, "cargo": "echo", "input": {"prompt": prompt or f"from {key}"}, **more}


def states(result: RunResult) -> dict[str, str]:
    return {each[0]: each[1] for each in result.value["steps"]}
