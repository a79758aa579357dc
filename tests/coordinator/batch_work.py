"""A world for the scheduler of batches: Islands that take a while, without a Coordinator, on a clock that jumps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from coordinator.batches.progress import BatchProgress, parts_of
from coordinator.batches.scheduler import BatchTerms, ItemRefused, work_through
from coordinator.cache.asking import CacheAsk
from coordinator.exchange.bids import Work
from coordinator.jobs import Accepted, ChoiceResult, Event, JobSpec, Settled
from coordinator.orders import Order
from protocol.errors import Code, Refused
from protocol.generation import FinishReason, GenerationRequest

RUN = "batch_1"
PRICE = 7


@dataclass
class Lane:
    """One place on an Island. ``pace_s``: what a job takes there."""

    island: str
    pace_s: float = 1.0
    busy: bool = False


@dataclass
class World:
    """A RunContext of Islands with a place each: the fastest free one takes a job. ``faults(index, attempt)``: raised instead of an answer.
    ``paid``: jobs that came to their end, in order; ``cancelled``: those that were left."""

    lanes: list[Lane]
    faults: Callable[[int, int], Exception | None] = lambda index, attempt: None
    purse: Callable[[], Exception | None] = lambda: None  # raised before a job is in the books
    settle_s: float = 0.0
    extra_s: dict[str, float] = field(default_factory=dict)  # job -> what it takes longer
    homes: dict[str, str] = field(default_factory=dict)  # job -> Island that it takes; trio begins tasks in any order
    asked_cache: dict[str, bool] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    paid: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0  # or waiting for a place
    running_max: int = 0
    holds: int = 0  # of jobs that are not settled
    holds_max: int = 0
    served: Counter[str] = field(default_factory=Counter)
    freed: trio.Event = field(default_factory=trio.Event)

    @property
    def slots(self) -> int:
        return len(self.lanes)

    async def job(self, order: Order) -> list[Event]:
        job_id = order.spec.job_id
        self.begun.append(job_id)
        self.asked_cache[job_id] = order.cache is not None and order.cache.reads
        if (refusal := self.purse()) is not None:
            raise refusal
        self.holds += 1
        self.holds_max = max(self.holds_max, self.holds)
        try:
            return await self._job(order, job_id)
        except trio.Cancelled:
            self.cancelled.append(job_id)
            raise
        finally:
            self.holds -= 1

    async def _job(self, order: Order, job_id: str) -> list[Event]:
        parts = parts_of(RUN, job_id)
        assert parts is not None
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        lane: Lane | None = None
        try:
            lane = await self._lane(order.spec.avoid, self.homes.get(job_id, ""))
            accepted = Accepted(0, lane.island, "e", 0.0)
            order.check(accepted)
            await trio.sleep(lane.pace_s + self.extra_s.get(job_id, 0.0))
            fault = self.faults(*parts)
            if fault is not None:
                raise fault
        finally:
            self.running -= 1
            if lane is not None:
                lane.busy = False
            self.freed.set()
            self.freed = trio.Event()
        result = ChoiceResult(0, FinishReason.STOP, (lane.island,), ("e",), 1, 0, 1, 0, 0, 0)
        order.check(result)
        self.paid.append(job_id)  # what is on its way to the books gets there, whoever is cancelled meanwhile
        await trio.sleep(self.settle_s)
        self.served[lane.island] += 1
        return [accepted, Settled(PRICE), result]

    async def _lane(self, avoid: frozenset[str], home: str) -> Lane:
        while True:
            free = [lane for lane in self.lanes if not lane.busy and lane.island not in avoid and home in ("", lane.island)]
            if free:
                lane = min(free, key=lambda each: each.pace_s)
                lane.busy = True
                return lane
            await self.freed.wait()


@dataclass
class Inputs:
    total: int
    bad: frozenset[int] = frozenset()
    asked: list[tuple[int, frozenset[str]]] = field(default_factory=list)

    async def order(self, index: int, job_id: str, avoid: frozenset[str]) -> Order:
        self.asked.append((index, avoid))
        if index in self.bad:
            raise ItemRefused("invalid_value", "that is none")
        spec = JobSpec(job_id, "echo", bytes(32), (GenerationRequest(prompt="x", max_tokens=1),), avoid=avoid)
        return Order(spec=spec, work=Work(1, 1), kind="job", parent=RUN, cache=CacheAsk("echo", "ann", bytes([index % 256])))


def even(*paces_s: float) -> list[Lane]:
    return [Lane(f"island-{number}", pace_s) for number, pace_s in enumerate(paces_s)]


async def worked(
    world: World, inputs: Inputs, terms: BatchTerms | None = None, progress: BatchProgress | None = None, slots: int | None = None
) -> BatchProgress:
    """The batch as it ended."""
    progress = progress if progress is not None else BatchProgress(RUN, inputs.total)
    capacity = world.slots if slots is None else slots
    await work_through(world, inputs, terms or BatchTerms(), lambda: capacity, progress, lambda: int(trio.current_time() * 1000))
    assert world.running == world.holds == 0
    return progress


def refused(code: Code) -> Refused:
    return Refused(code, "as the test wants it")
