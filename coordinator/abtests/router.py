"""Sends each request to the version that it is to get: the first of those who run orders, in front of the cache and the desk."""

from __future__ import annotations

from typing import Protocol

from coordinator.abtests.service import AbTests
from coordinator.jobs import Assigned, CacheHit, CachePassed, CacheWaits, Emit, Event, Replayed, collected
from coordinator.orders import Order


class Worker(Protocol):
    async def run(self, order: Order, emit: Emit) -> None: ...


class AbRouter:
    """``worker``: the cache or the desk. Runs on trio."""

    def __init__(self, tests: AbTests, worker: Worker) -> None:
        self._tests, self._worker = tests, worker

    def __repr__(self) -> str:
        return f"<AbRouter {self._tests!r}>"

    async def assign(self, order: Order) -> Order:
        return await self._tests.assign(order)

    async def run(self, order: Order, emit: Emit) -> None:
        """Says first which arm the request is in, if it is in one. Of a request that may have come before it is said once it is known that
        it is answered anew: an earlier answer names the arm of its own job. Raises what Desk.run raises."""
        order = await self._tests.assign(order)
        arm = order.arm
        if arm is None:
            await self._worker.run(order, emit)
            return

        is_said = not (order.is_retry or order.idempotency_key)

        async def noting(event: Event) -> None:
            nonlocal is_said
            if isinstance(event, CacheHit):
                self._tests.note_cached(arm)
            if not (is_said or isinstance(event, CachePassed | CacheWaits)):
                is_said = True
                if not isinstance(event, Replayed):
                    await emit(Assigned(arm.test, arm.variant))
            await emit(event)

        if is_said:
            await emit(Assigned(arm.test, arm.variant))
        await self._worker.run(order, noting)

    async def collect(self, order: Order) -> list[Event]:
        """All events at once."""
        return await collected(self.run, order)

    def note_cached(self, order: Order) -> None:
        """Of an order that was assigned: its answer came from the cache."""
        if order.arm is not None:
            self._tests.note_cached(order.arm)
