"""A bridge whose job runs over several Islands: the driver says that its route is broken, the desk mends it, the answer goes on."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from node.greeting import answer_hello
from node.jobs_served import island_hello
from node.net.host import open_host
from privacy.keys import NodeKey
from protocol.counts import CountGuard
from protocol.direct import MendWanted, TicketGranted, TicketWanted
from protocol.errors import Code, Refused
from protocol.generation import FinishReason, pack_tokens
from protocol.messages import (
    JOB,
    JOB_PROTOCOL,
    JobAccepted,
    JobCancel,
    JobChunk,
    JobCount,
    JobDone,
    JobFailed,
    JobOpen,
    RouteBroken,
    RouteMended,
)
from protocol.prices import Ask
from protocol.receipts import RECEIPT_VERSION, Ending, Receipt, sign_receipt
from protocol.shards import LayerRange
from protocol.tickets import TicketStage, read_ticket, sign_ticket, ticket_hash
from runtimes.echo import EchoCargo
from tests.node.direct_net import COORDINATOR, NETWORK, Bridged, ScriptedDesk, bridged, now_ms

FIRST, SPARE, DRIVER = (NodeKey(bytes([number]) * 32) for number in (21, 22, 23))
HELLO: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


class Driver:
    """Sends two tokens, breaks, waits to be mended, sends two more, and keeps the counts of the ticket that opened the job."""

    def __init__(self) -> None:
        self.opened: list[bytes] = []
        self.mended: list[bytes] = []
        self.cancelled = 0
        self.guard: CountGuard | None = None
        self.settled = trio.Event()

    async def serve(self, stream: Any) -> None:
        await answer_hello(stream, lambda: island_hello(NETWORK, "driver"))
        while True:
            message = await stream.receive()
            if isinstance(message, JobOpen):
                self.opened.append(message.ticket)
                self.guard = CountGuard(read_ticket(message.ticket), message.ticket)
                await stream.send(JobAccepted(message.job, "echo/1", 1, 0))
                await self._send(stream, message.job, 0)
                await stream.send(RouteBroken(message.job, 0, 1, Code.LINK_LOST, "stage 0 is gone"))
            elif isinstance(message, RouteMended):
                self.mended.append(message.ticket)
                await self._send(stream, message.job, 2)
                await stream.send(self._done(message.job))
            elif isinstance(message, JobCount):
                assert self.guard is not None
                self.guard.hear(message.count)
                if self.guard.is_settled and self.guard.sent_tokens == 4:
                    self.settled.set()
            elif isinstance(message, JobCancel):
                self.cancelled += 1
                await stream.send(JobFailed(message.job, Code.CANCELLED, "cancelled"))

    async def _send(self, stream: Any, job: int, step: int) -> None:
        await stream.send(JobChunk(job, step, f"{step} ", b"", pack_tokens([step, step + 1])))
        assert self.guard is not None
        self.guard.sent(step + 2, hashlib.sha256(pack_tokens(list(range(step + 2)))).digest())

    def _done(self, job: int) -> JobDone:
        ticket, guard = read_ticket(self.opened[0]), self.guard
        assert guard is not None
        receipt = Receipt(
            version=RECEIPT_VERSION,
            network=NETWORK,
            island=DRIVER.peer_id,
            job_id=ticket.job_id,
            ticket_hash=ticket_hash(self.opened[0]),
            content_hash=ticket.content_hash,
            prompt_tokens=1,
            cached_tokens=0,
            sent_tokens=4,
            output_hash=guard.sent_hash,
            compute_ms=1,
            price_micros=7,
            finish_reason=Ending.STOP,
            finished_at_ms=now_ms(),
        )
        return JobDone(job, FinishReason.STOP, "", 1, 0, 4, 1, 1, sign_receipt(receipt, DRIVER))


class PipelineDesk(ScriptedDesk):
    """Grants a route of two stages, and mends its first one."""

    driver_addresses: tuple[str, ...] = ()
    mends: list[MendWanted]
    can_mend = True

    def _route(self, granted: TicketGranted, first: NodeKey) -> TicketGranted:
        ask = Ask(per_job=3)
        ticket = replace(
            read_ticket(granted.ticket),
            route=(first.peer_id, DRIVER.peer_id),
            boots=(1, 1),
            stages=(TicketStage(LayerRange(0, 3), ask), TicketStage(LayerRange(3, 6), ask)),
            nonce=first.public_key[:16],
        )
        sealed = sign_ticket(ticket, COORDINATOR)
        self.granted.append(sealed)
        return replace(granted, ticket=sealed, addresses=self.driver_addresses)

    def _granted(self, wanted: TicketWanted, holder: str) -> TicketGranted:
        self._plain = super()._granted(wanted, holder)
        return self._route(self._plain, FIRST)

    async def mend(self, wanted: MendWanted, holder: str) -> TicketGranted:
        self.mends.append(wanted)
        if not self.can_mend:
            raise Refused(Code.NO_ISLAND, "nobody can take the place")
        return replace(self._route(self._plain, SPARE), request=wanted.request)


@asynccontextmanager
async def piped(folder: Path) -> AsyncIterator[tuple[Bridged, Driver, PipelineDesk]]:
    driver = Driver()
    async with open_host(DRIVER.seed) as host:
        host.set_handler(JOB_PROTOCOL, JOB, driver.serve)
        async with bridged(folder, EchoCargo()) as net:
            net.desk.__class__ = PipelineDesk
            desk: Any = net.desk
            desk.driver_addresses, desk.mends = tuple(host.addresses()), []
            yield net, driver, desk


async def test_a_broken_route_is_mended_and_the_answer_goes_on(tmp_path: Path) -> None:
    async with piped(tmp_path) as (net, driver, desk), net.http() as client:
        answer = (await client.post("/v1/chat/completions", json=HELLO)).json()
        assert answer["choices"][0]["message"]["content"] == "0 2 "
        (mend,) = desk.mends
        assert mend.ticket_hash == ticket_hash(driver.opened[0]) and (mend.index, mend.code) == (0, Code.LINK_LOST)
        assert read_ticket(driver.mended[0]).route == (SPARE.peer_id, DRIVER.peer_id)
        with trio.fail_after(5):
            await driver.settled.wait()
        (attempt,) = desk.settled[0].attempts
        assert attempt.ticket == driver.opened[0] and attempt.receipt and attempt.count
        assert answer["metadata"]["price"] == "0.000007"


async def test_a_route_that_nobody_can_mend_ends_the_job(tmp_path: Path) -> None:
    async with piped(tmp_path) as (net, driver, desk), net.http() as client:
        desk.can_mend = False
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_island")
        await desk.wait(lambda: desk.dropped)
        assert desk.dropped[0].code is Code.NO_ISLAND and driver.cancelled == 1
        (attempt,) = desk.dropped[0].attempts
        assert attempt.count and not attempt.receipt, "two tokens came, and are signed for"


async def test_the_route_stands_in_the_headers(tmp_path: Path) -> None:
    async with piped(tmp_path) as (net, _, _), net.http() as client:
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert answer.headers["x-archipelag-route"].split(",") == [FIRST.peer_id, DRIVER.peer_id]


