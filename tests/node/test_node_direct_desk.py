"""The Coordinator's desk as a stream handler: bounds, breaches, wrong keys, withdrawn wishes, and bugs that stay where they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from coordinator.http.errors import ApiError
from node.greeting import exchange_hello
from node.net.host import open_host
from privacy.keys import NodeKey
from protocol import limits
from protocol.direct import (
    DESK,
    DESK_PROTOCOL,
    DeskRefused,
    JobBilled,
    JobDropped,
    JobSettled,
    MendWanted,
    Models,
    ModelsWanted,
    PlaceFreed,
    RequestWithdrawn,
    TicketGranted,
    TicketWanted,
)
from protocol.errors import Code, LinkLost, RemoteProtocolError
from protocol.messages import PROTOCOL_VERSION, Hello, NodeRole
from runtimes.echo import EchoCargo
from tests.node.direct_net import API_KEY, COORDINATOR, NETWORK, WRONG_KEY, ScriptedDesk, open_island, serve_coordinator

JOB_ID = "ab" * 12


def wanted(request: int, **changes: Any) -> TicketWanted:
    fields: dict[str, Any] = {
        "request": request,
        "api_key": API_KEY,
        "job_id": JOB_ID,
        "choices": 1,
        "kind": "chat",
        "cargo": "echo",
        "prompt_tokens": 3,
        "output_tokens": 100,
    }
    return TicketWanted(**(fields | changes))


class Client:
    def __init__(self, stream: Any, desk: ScriptedDesk, server: Any) -> None:
        self.stream, self.desk, self.server = stream, desk, server

    async def ask(self, message: Any) -> Any:
        await self.stream.send(message)
        return await self.receive()

    async def receive(self) -> Any:
        with trio.fail_after(5):
            return await self.stream.receive()


def hello(role: NodeRole = NodeRole.CONSUMER, network: str = NETWORK) -> Hello:
    return Hello(PROTOCOL_VERSION, role, network, "test")


@asynccontextmanager
async def at_the_desk(said: Hello | None = None) -> AsyncIterator[Client]:
    desk = ScriptedDesk()
    async with (
        open_host(COORDINATOR.seed) as coordinator,
        open_host(NodeKey(b"b" * 32).seed, ()) as host,
        open_island(1, EchoCargo()) as island,
    ):
        desk.islands.append(island)
        server = serve_coordinator(coordinator, desk)
        await host.connect(coordinator.addresses()[0])
        async with await host.open(coordinator.peer_id, DESK_PROTOCOL, DESK) as stream:
            await exchange_hello(stream, said or hello())
            yield Client(stream, desk, server)


async def test_requests_of_every_kind() -> None:
    async with at_the_desk() as client:
        granted = await client.ask(wanted(1))
        assert isinstance(granted, TicketGranted) and granted.request == 1 and granted.ticket == client.desk.granted[0]
        assert isinstance(await client.ask(ModelsWanted(2, API_KEY)), Models)
        assert isinstance(await client.ask(JobSettled(3, JOB_ID, ())), JobBilled)
        assert isinstance(await client.ask(JobDropped(4, JOB_ID, Code.CANCELLED)), JobBilled)
        refused = await client.ask(MendWanted(5, JOB_ID, bytes(32), 0, 1, Code.LINK_LOST, "stage 0"))
        assert isinstance(refused, DeskRefused) and (refused.code, refused.status) == (Code.NO_ISLAND, 503)
        await client.stream.send(PlaceFreed(JOB_ID, bytes(32)))
        await client.desk.wait(lambda: client.desk.places)
        counts = client.server.counts
        assert (counts.granted, counts.settled, counts.dropped, counts.refused, counts.desks_open) == (1, 1, 1, 1, 1)


async def test_answers_come_as_they_are_ready() -> None:
    async with at_the_desk() as client:
        client.desk.hold_up = trio.Event()
        await client.stream.send(wanted(1))
        await client.desk.wait(lambda: client.desk.wanted)
        assert isinstance(await client.ask(ModelsWanted(2, API_KEY)), Models)
        client.desk.hold_up.set()
        assert (await client.receive()).request == 1


async def test_a_withdrawn_wish_is_not_answered() -> None:
    async with at_the_desk() as client:
        client.desk.hold_up = trio.Event()
        await client.stream.send(wanted(1))
        await client.desk.wait(lambda: client.desk.wanted)
        await client.stream.send(RequestWithdrawn(1))
        await client.stream.send(RequestWithdrawn(77))
        await client.desk.wait(lambda: client.desk.cancelled)
        client.desk.hold_up = None
        assert (await client.ask(wanted(1))).request == 1, "its number is free, and nothing else came"


async def test_a_bridge_that_is_gone_leaves_nothing_behind() -> None:
    async with at_the_desk() as client:
        client.desk.hold_up = trio.Event()
        for number in range(1, 6):
            await client.stream.send(wanted(number))
        await client.desk.wait(lambda: len(client.desk.wanted) == 5)
        client.stream.abort()
        await client.desk.wait(lambda: client.desk.cancelled == 5)
        with trio.fail_after(5):
            while client.server.counts.desks_open:
                await trio.sleep(0.01)


async def test_the_books_hear_whose_streams_are_open() -> None:
    async with at_the_desk() as client:
        await client.ask(ModelsWanted(1, API_KEY))
        assert client.desk.desks == [NodeKey(b"b" * 32).peer_id]
        client.stream.abort()
        with trio.fail_after(5):
            while client.desk.desks:
                await trio.sleep(0.01)


async def test_wrong_keys_are_heard_five_times_a_minute() -> None:
    async with at_the_desk() as client:
        for number in range(1, limits.DESK_WRONG_KEYS_PER_MINUTE + 1):
            refused = await client.ask(ModelsWanted(number, WRONG_KEY))
            assert (refused.status, refused.error_code) == (401, "invalid_api_key")
        barred = await client.ask(wanted(10))
        assert (barred.status, barred.error_code) == (429, "rate_limit_exceeded") and 0 < barred.retry_after_s <= 60
        assert not client.desk.wanted, "the books are not asked, whatever key it shows now"
        assert isinstance(await client.ask(JobSettled(11, JOB_ID, ())), JobBilled), "what runs is settled"


async def test_the_wrong_keys_of_one_peer_are_not_another_s() -> None:
    async with at_the_desk() as client:
        server = client.server
        for _ in range(limits.DESK_WRONG_KEYS_PER_MINUTE):
            assert (await server.answer(ModelsWanted(1, WRONG_KEY), "one")).status == 401
        assert (await server.answer(ModelsWanted(1, API_KEY), "one")).status == 429
        assert isinstance(await server.answer(ModelsWanted(1, API_KEY), "two"), Models)
        server._clock = lambda: trio.current_time() + 61
        assert isinstance(await server.answer(ModelsWanted(1, API_KEY), "one"), Models)


async def test_a_bug_in_one_request_ends_that_request_only(caplog: pytest.LogCaptureFixture) -> None:
    async with at_the_desk() as client:
        client.desk.refusals = [ZeroDivisionError("secret words")]
        broken = await client.ask(wanted(1))
        assert isinstance(broken, DeskRefused) and (broken.status, broken.message) == (500, "internal error")
        assert isinstance(await client.ask(wanted(2)), TicketGranted)
    assert "secret words" not in "".join(record.getMessage() for record in caplog.records)


async def test_what_the_books_say_reaches_the_bridge_with_its_headers() -> None:
    async with at_the_desk() as client:
        headers = {"Retry-After": "7", "X-RateLimit-Limit": "100", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "7"}
        client.desk.refusals = [
            ApiError(429, "too many\nrequests", code="rate_limit_exceeded", kind="rate_limit_error", headers=headers),
            ApiError(402, "no", param="bid_price"),
        ]
        refused = await client.ask(wanted(1))
        assert (refused.code, refused.kind, refused.retry_after_s) == ("", "rate_limit_error", 7)
        assert (refused.standing.limit, refused.standing.remaining, refused.standing.reset_s) == (100, 0, 7)
        assert refused.message == "too many requests"
        assert (await client.ask(wanted(2))).param == "bid_price"


async def test_a_coordinator_that_drains_grants_nothing_and_settles_on() -> None:
    async with at_the_desk() as client:
        client.server.draining = True
        refused = await client.ask(wanted(1))
        assert (refused.code, refused.status) == (Code.DRAINING, 503) and refused.retry_after_s
        assert isinstance(await client.ask(JobSettled(2, JOB_ID, ())), JobBilled)


BREACHES: dict[str, list[Any]] = {
    "a number that is in use": [wanted(1), wanted(1)],
    "an answer": [JobBilled(1, 0, 0)],
    "hello again": [hello()],
}


@pytest.mark.parametrize("name", BREACHES)
async def test_a_breach_ends_the_stream(name: str) -> None:
    async with at_the_desk() as client:
        client.desk.hold_up = trio.Event()
        for message in BREACHES[name]:
            await client.stream.send(message)
        with pytest.raises(LinkLost):
            while True:
                await client.receive()


async def test_one_request_too_many_is_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DESK_REQUESTS_MAX", 3)
    async with at_the_desk() as client:
        client.desk.hold_up = trio.Event()
        for number in range(1, 5):
            await client.stream.send(wanted(number))
        with pytest.raises(LinkLost):
            await client.receive()


@pytest.mark.parametrize("said", [hello(NodeRole.ISLAND), hello(NodeRole.COORDINATOR), hello(network="elsewhere")])
async def test_who_has_nothing_to_say_at_the_desk(said: Hello) -> None:
    with pytest.raises((LinkLost, RemoteProtocolError)):
        async with at_the_desk(said):
            raise AssertionError("it was greeted")
