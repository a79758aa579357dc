"""The bridge's end of a desk's stream, by hand: answers that nobody waits for, and words that a Coordinator does not say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from node.desk_client import _Link, _Question
from protocol.direct import DESK, JobBilled, ModelsWanted, PlaceFreed, RequestWithdrawn, TicketGranted
from protocol.errors import LinkLost, RemoteProtocolError
from protocol.tickets import sign_ticket, ticket_hash
from tests.node import memory_streams
from tests.protocol import samples
from tests.protocol.samples import COORDINATOR, HOLDER, JOB_ID


def granted(request: int) -> TicketGranted:
    ticket = sign_ticket(samples.ticket(job_id=JOB_ID), COORDINATOR)
    return TicketGranted(request, ticket, (), 1, "", samples.offer(), 1)


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[_Link, Any, list[BaseException]]]:
    near, far = memory_streams.memory_pair(DESK, HOLDER.peer_id, COORDINATOR.peer_id)
    link, ended = _Link(near), list[BaseException]()

    async def run() -> None:
        try:
            await link.run(lambda message: None)
        except* (LinkLost, RemoteProtocolError) as group:
            ended.extend(group.exceptions)

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 10
        nursery.start_soon(run)
        yield link, far, ended
        nursery.cancel_scope.cancel()


async def test_a_ticket_that_nobody_waits_for_is_given_back() -> None:
    """It has crossed the word that nobody wants it any more."""
    async with linked() as (_, far, _ended):
        await far.send(granted(5))
        freed = await far.receive()
        assert freed == PlaceFreed(JOB_ID, ticket_hash(granted(5).ticket))


async def test_an_answer_goes_to_who_asked() -> None:
    async with linked() as (link, far, _):
        one, two = link.asked.setdefault(1, _Question()), link.asked.setdefault(2, _Question())
        await far.send(JobBilled(2, 7, 0))
        await two.done.wait()
        assert two.answer == JobBilled(2, 7, 0) and not one.done.is_set()
        link.lose()
        assert one.done.is_set() and one.answer is None, "it is asked again"


@pytest.mark.parametrize("said", [PlaceFreed(JOB_ID, bytes(32)), RequestWithdrawn(1)], ids=lambda said: type(said).__name__)
async def test_what_a_coordinator_does_not_say_ends_the_stream(said: Any) -> None:
    async with linked() as (_, far, ended):
        await far.send(said)
        await trio.testing.wait_all_tasks_blocked()
        assert [type(error) for error in ended] == [RemoteProtocolError]


async def test_an_answer_to_nothing_is_passed_over() -> None:
    async with linked() as (_, far, ended):
        await far.send(JobBilled(9, 0, 0))
        await far.send(ModelsWanted(9, samples.API_KEY))
        await trio.testing.wait_all_tasks_blocked()
        assert not ended
