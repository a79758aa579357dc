"""Leases of jobs, on a clock that the tests move: who renews, who gives up, and when."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from node.holder import Link
from node.jobs_served import JobServer, Terms, island_hello
from privacy.keys import NodeKey
from protocol import limits
from protocol.errors import Code, Refused
from protocol.generation import GENERATION, GenerationRequest
from protocol.messages import JOB, JobAccepted, JobAlive, JobCancel, JobChunk, JobDone
from protocol.prices import Ask
from protocol.tickets import TICKET_VERSION, Delegation, Ticket, TicketGuard, network_id_of, sign_ticket
from runtimes.echo import EchoCargo
from tests.node import memory_streams

HOLDER, ISLAND = NodeKey(b"h" * 32), NodeKey(b"i" * 32)
NETWORK = network_id_of(b"n" * 32)


class _Cargo(EchoCargo):
    """Whether its engine lives is the test's to say."""

    lives = True

    @property
    def alive(self) -> bool:
        return self.lives


class Net:
    def __init__(self, cargo: EchoCargo, now_ms: int) -> None:
        self._now_ms = now_ms
        guard = TicketGuard(ISLAND.peer_id, 1, NETWORK)
        guard.trust(Delegation(NETWORK, HOLDER.peer_id, now_ms + 10**9))
        self.server = JobServer(ISLAND, guard, NETWORK, {"echo": Terms(cargo, Ask())}, lambda: island_hello(NETWORK, "test"))
        self.cargo = cargo
        self.near, self.far = memory_streams.memory_pair(JOB, HOLDER.peer_id, ISLAND.peer_id)
        self.link = Link(self.near, HOLDER)

    def ticket(self) -> bytes:
        now_ms = self._now_ms
        ticket = Ticket(
            version=TICKET_VERSION,
            network=NETWORK,
            issuer=HOLDER.peer_id,
            holder=HOLDER.peer_id,
            job_id="job",
            route=(ISLAND.peer_id,),
            boots=(1,),
            cargo="echo",
            content_hash=self.cargo.facts().content_hash,
            token_limit=4096,
            price_limit_micros=0,
            cache_salt=bytes(32),
            nonce=bytes(16),
            issued_at_ms=now_ms,
            expires_at_ms=now_ms + 60_000,
        )
        return sign_ticket(ticket, HOLDER)


@asynccontextmanager
async def linked(cargo: EchoCargo, now_ms: int) -> AsyncIterator[Net]:
    net = Net(cargo, now_ms)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(net.server.serve, net.far)
        await net.near.send(island_hello(NETWORK, "holder"))
        await net.near.receive()
        for task in (net.link.outbox.run, net.link.read, net.link.watch_leases):
            nursery.start_soon(task)
        yield net
        nursery.cancel_scope.cancel()


def payload(words: int = 3) -> bytes:
    return GENERATION.encode(GenerationRequest(prompt="word " * words, max_tokens=4096))


async def test_a_slow_answer_is_renewed_every_half_minute(kit: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with linked(EchoCargo(delay_s=200.0), kit.now_ms()) as net:
        job = net.link.open(net.ticket(), payload(2))
        started_s = trio.current_time()
        events = [event async for event in job]
        assert isinstance(events[-1], JobDone) and trio.current_time() - started_s == pytest.approx(400.0)
        assert not any(isinstance(event, JobAlive) for event in events), "it is between Island and holder"
        renewals = [message for message in net.far.sent if isinstance(message, JobAlive)]
        assert len(renewals) == 400 // limits.LEASE_RENEW_S


async def test_a_job_whose_engine_has_died_is_not_renewed_and_given_up(
    kit: Any, autojump_clock: trio.testing.MockClock
) -> None:
    cargo = _Cargo(delay_s=1_000.0)
    async with linked(cargo, kit.now_ms()) as net:
        job = net.link.open(net.ticket(), payload())
        cargo.lives = False
        started_s = trio.current_time()
        with pytest.raises(Refused) as caught:
            async for _ in job:
                pass
        assert caught.value.code is Code.LEASE_LOST and caught.value.retryable
        assert trio.current_time() - started_s == pytest.approx(limits.LEASE_S)
        await trio.testing.wait_all_tasks_blocked()
        assert any(isinstance(message, JobCancel) for message in net.near.sent), "the slot is freed, if anybody listens"
        assert net.server.counts.cancelled == 1


async def test_an_island_that_is_frozen_loses_its_jobs(kit: Any, autojump_clock: trio.testing.MockClock) -> None:
    """The connection stands, nothing comes: the lease runs from the last thing that came."""
    async with linked(EchoCargo(delay_s=7.0), kit.now_ms()) as net:
        job = net.link.open(net.ticket(), payload(50))
        started_s, chunks = trio.current_time(), 0
        with pytest.raises(Refused) as caught:
            async for event in job:
                chunks += isinstance(event, JobChunk)
                net.far.frozen = chunks == 3
        assert caught.value.code is Code.LEASE_LOST and chunks == 3
        assert trio.current_time() - started_s == pytest.approx(3 * 7.0 + limits.LEASE_S)


async def test_each_job_has_its_own_lease(kit: Any, autojump_clock: trio.testing.MockClock) -> None:
    """One that is accepted while the watch sleeps is not given up early, nor late."""
    cargo = _Cargo(delay_s=1_000.0)
    async with linked(cargo, kit.now_ms()) as net:
        cargo.lives = False
        ended: list[float] = []

        async def follow(job: Any) -> None:
            with pytest.raises(Refused):
                async for _ in job:
                    pass
            ended.append(trio.current_time() - started_s)

        started_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, net.link.open(net.ticket(), payload()))
            await trio.sleep(25)
            net.server._guard._nonces.clear()
            nursery.start_soon(follow, net.link.open(net.ticket(), payload()))
        assert ended == [pytest.approx(limits.LEASE_S), pytest.approx(25 + limits.LEASE_S)]


async def test_a_job_that_waits_to_be_accepted_has_no_lease_yet(kit: Any, autojump_clock: trio.testing.MockClock) -> None:
    class _Late(EchoCargo):
        @asynccontextmanager
        async def run(self, request: Any) -> AsyncIterator[Any]:
            await trio.sleep(3 * limits.LEASE_S)
            async with super().run(request) as run:
                yield run

    async with linked(_Late(), kit.now_ms()) as net:
        events = [event async for event in net.link.open(net.ticket(), payload())]
        assert isinstance(events[0], JobAccepted) and isinstance(events[-1], JobDone)
        assert not any(isinstance(message, JobAlive) for message in net.far.sent)


async def test_links_watch_their_leases(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same over libp2p, where nobody moves the clock."""
    monkeypatch.setattr(limits, "LEASE_S", 0.2)
    async with kit.open_pair(EchoCargo(delay_s=60.0)) as pair:
        with pytest.raises(Refused) as caught, trio.fail_after(10):
            async with pair.links.run_job(pair.island_key.peer_id, pair.sealed(), kit.prompt("x")) as job:
                await kit.collect(job)
        assert caught.value.code is Code.LEASE_LOST
        await pair.server.wait_idle()
        assert pair.server.counts.cancelled == 1
