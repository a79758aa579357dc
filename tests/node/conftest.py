"""A coordinator-shaped holder and an Island, as two real hosts on loopback in one process."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import trio

from node.holder import Links
from node.jobs_served import JobServer, Terms, island_hello
from node.localnet import LocalNetwork
from node.net.host import Host, open_host
from privacy.keys import NodeKey
from protocol.direct import Claim
from protocol.generation import GENERATION, GenerationRequest
from protocol.messages import JOB, JOB_PROTOCOL
from protocol.prices import Ask
from protocol.tickets import TICKET_VERSION, Delegation, Ticket, TicketGuard, network_id_of, sign_ticket
from runtimes.base import Loaded
from runtimes.echo import EchoCargo

BOOT = 1_000
# Coordinators that tests start load no embedding model beside them, which takes a second of a core, unless a test says so.
os.environ.setdefault("ARCHIPELAG_CACHE_MODEL", "off")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class KeptClaims:
    """What an Island claims: the versions of each, by ticket; whether the newest is final."""

    said: dict[bytes, list[Claim]] = field(default_factory=dict)
    final: set[bytes] = field(default_factory=set)
    changed: trio.Event = field(default_factory=trio.Event)

    def put_nowait(self, claim: Claim, final: bool) -> None:
        self.said.setdefault(claim.ticket, []).append(claim)
        if final:
            self.final.add(claim.ticket)
        self.changed.set()
        self.changed = trio.Event()

    async def wait_final(self, ticket: bytes) -> Claim:
        """The last word on a ticket."""
        with trio.fail_after(10):
            while ticket not in self.final:
                await self.changed.wait()
        return self.said[ticket][-1]


@dataclass
class Pair:
    """``holder`` may issue tickets for ``island``; both are connected."""

    holder_key: NodeKey
    island_key: NodeKey
    holder: Host
    island: Host
    links: Links
    server: JobServer
    guard: TicketGuard
    cargo: Loaded
    network: str
    claims: KeptClaims
    _nonces: itertools.count[int] = field(default_factory=itertools.count)

    def ticket(self, **changes: object) -> Ticket:
        now = now_ms()
        fields: dict[str, object] = {
            "version": TICKET_VERSION,
            "network": self.network,
            "issuer": self.holder_key.peer_id,
            "holder": self.holder_key.peer_id,
            "job_id": "job_test",
            "route": (self.island_key.peer_id,),
            "boots": (BOOT,),
            "cargo": "echo",
            "content_hash": self.cargo.facts().content_hash,
            "token_limit": 1024,
            "price_limit_micros": 10**9,
            "cache_salt": bytes(32),
            "nonce": next(self._nonces).to_bytes(16, "big"),
            "issued_at_ms": now,
            "expires_at_ms": now + 60_000,
        }
        return Ticket(**(fields | changes))  # type: ignore[arg-type]

    def sealed(self, **changes: object) -> bytes:
        return sign_ticket(self.ticket(**changes), self.holder_key)


def prompt(text: str, **changes: object) -> bytes:
    return GENERATION.encode(GenerationRequest(prompt=text, **changes))  # type: ignore[arg-type]


@asynccontextmanager
async def open_pair(cargo: Loaded | None = None, ask: Ask = Ask(per_job=7)) -> AsyncIterator[Pair]:  # noqa: B008
    holder_key, island_key = NodeKey(b"h" * 32), NodeKey(b"i" * 32)
    network = network_id_of(b"n" * 32)
    guard = TicketGuard(island_key.peer_id, BOOT, network)
    guard.trust(Delegation(network, holder_key.peer_id, now_ms() + 3_600_000))
    cargo = cargo or EchoCargo()
    claims = KeptClaims()
    terms = {"echo": Terms(cargo, ask)}
    server = JobServer(island_key, guard, network, terms, lambda: island_hello(network, "test"), claims=claims)
    async with open_host(holder_key.seed) as holder, open_host(island_key.seed) as island:
        island.set_handler(JOB_PROTOCOL, JOB, server.serve)
        await holder.connect(island.addresses()[0])
        async with trio.open_nursery() as nursery:
            links = Links(holder, nursery, lambda: island_hello(network, "holder"), holder_key)
            yield Pair(holder_key, island_key, holder, island, links, server, guard, cargo, network, claims)
            nursery.cancel_scope.cancel()


class Kit:
    """What the tests of this folder share; given out by the fixture ``kit``."""

    open_pair = staticmethod(open_pair)
    prompt = staticmethod(prompt)
    now_ms = staticmethod(now_ms)
    boot = BOOT

    @staticmethod
    async def collect(job: AsyncIterator[Any]) -> list[Any]:
        return [event async for event in job]


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="module")
def client(network: LocalNetwork) -> Iterator[httpx.Client]:
    """A Consumer of the module's own network of real processes."""
    key = network.make_key("read", "write", account="ann")
    with httpx.Client(base_url=network.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client
