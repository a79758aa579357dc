"""A Coordinator's host with a desk that the tests script, Islands, and a bridge in front of them, in one process on loopback."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import trio

from coordinator.direct_port import ClaimOutcome
from coordinator.http.errors import ApiError
from node.announce import AdsServer
from node.bookkeeper import BookKeeper
from node.bridge_role import BridgeRole, serve_bridge
from node.datadir import DataDir
from node.direct_served import DirectServer
from node.jobs_served import JobServer, Terms, island_hello
from node.net.host import Host, open_host
from privacy.keys import NodeKey
from protocol import limits
from protocol.ads import CargoOffer
from protocol.counts import check_count_of_ticket, read_count
from protocol.direct import (
    DESK,
    DESK_PROTOCOL,
    SETTLE,
    SETTLE_PROTOCOL,
    Attempt,
    Claim,
    JobBilled,
    JobDropped,
    JobSettled,
    MendWanted,
    Models,
    ModelsWanted,
    OfferedModel,
    PlaceFreed,
    RateStanding,
    TicketGranted,
    TicketWanted,
)
from protocol.errors import Code, Refused, RemoteProtocolError
from protocol.messages import ADS, ADS_PROTOCOL, JOB, JOB_PROTOCOL, PROTOCOL_VERSION, Hello, NodeRole
from protocol.prices import Ask
from protocol.receipts import check_receipt_of_ticket, read_receipt
from protocol.tickets import (
    TICKET_VERSION,
    Delegation,
    Ticket,
    TicketGuard,
    network_id_of,
    read_ticket,
    sign_delegation,
    sign_ticket,
    ticket_hash,
)
from runtimes.base import LoadedCargo
from runtimes.echo import EchoCargo

T = TypeVar("T")

NETWORK_KEY, COORDINATOR = NodeKey(b"n" * 32), NodeKey(b"c" * 32)
NETWORK = network_id_of(NETWORK_KEY.public_key)
API_KEY = "ak_" + "A" * 43
WRONG_KEY = "ak_" + "B" * 43
BOOT = 1_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(eq=False)
class Island:
    """``claims``: what it wants to be paid for, by ticket."""

    host: Host
    key: NodeKey
    cargo: LoadedCargo
    server: JobServer
    ask: Ask
    claims: dict[bytes, list[Claim]] = field(default_factory=dict)
    final: set[bytes] = field(default_factory=set)
    addresses: tuple[str, ...] = ()

    @property
    def peer(self) -> str:
        return self.key.peer_id

    def put_nowait(self, claim: Claim, final: bool) -> None:
        self.claims.setdefault(claim.ticket, []).append(claim)
        if final:
            self.final.add(claim.ticket)

    def offer(self) -> CargoOffer:
        facts = self.cargo.facts()
        return CargoOffer(
            name=facts.name,
            content_hash=facts.content_hash,
            runtime=facts.runtime,
            engine=facts.engine,
            ask=self.ask,
            context_tokens=facts.context_tokens,
            kv_tokens_total=0,
            kv_tokens_free=0,
            slots_total=facts.slots_total,
            slots_free=facts.slots_free,
            weights_bytes=0,
            kv_bytes_per_token=0,
            compute_bytes=0,
            tokens_per_s=0.0,
        )


@dataclass
class ScriptedDesk:
    """A DirectDesk that places on the first Island which is not excluded. What it says no with is taken from ``refusals``, one a wish."""

    islands: list[Island] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # that stand for Cargos of other names
    refusals: list[Exception | None] = field(default_factory=list)
    count_every: int = 8
    wanted: list[TicketWanted] = field(default_factory=list)
    granted: list[bytes] = field(default_factory=list)
    places: list[PlaceFreed] = field(default_factory=list)
    desks: list[str] = field(default_factory=list)  # whose streams are open
    settled: list[JobSettled] = field(default_factory=list)
    dropped: list[JobDropped] = field(default_factory=list)
    claimed: list[Claim] = field(default_factory=list)
    cancelled: int = 0
    standing: RateStanding = field(default_factory=RateStanding)
    alter: Callable[[Ticket], Ticket] = lambda ticket: ticket
    hold_up: trio.Event | None = None  # grants wait for it
    settle_hold_up: trio.Event | None = None
    _nonces: itertools.count[int] = field(default_factory=itertools.count)
    _changed: trio.Event = field(default_factory=trio.Event)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, condition: Callable[[], Any]) -> None:
        with trio.fail_after(10):
            while not condition():
                await self._changed.wait()

    def _check_key(self, api_key: str) -> None:
        if api_key != API_KEY:
            raise ApiError(401, "the API key is not known here", code="invalid_api_key", kind="authentication_error")

    async def grant(self, wanted: TicketWanted, holder: str) -> TicketGranted:
        self._check_key(wanted.api_key)
        self.wanted.append(wanted)
        self._tell()
        if self.refusals and (refusal := self.refusals.pop(0)) is not None:
            raise refusal
        if self.hold_up is not None:
            try:
                await self.hold_up.wait()
            except trio.Cancelled:
                self.cancelled += 1
                self._tell()
                raise
        return self._granted(wanted, holder)

    def _granted(self, wanted: TicketWanted, holder: str) -> TicketGranted:
        excluded = {one.peer for one in wanted.excluded}
        cargo = self.names.get(wanted.cargo, wanted.cargo)
        able = [island for island in self.islands if island.peer not in excluded and cargo == island.offer().name]
        if not able:
            raise Refused(Code.NO_ISLAND, "no Island that can take this job is left")
        island, now = able[0], now_ms()
        ticket = Ticket(
            version=TICKET_VERSION,
            network=NETWORK,
            issuer=COORDINATOR.peer_id,
            holder=holder,
            job_id=wanted.job_id,
            route=(island.peer,),
            boots=(BOOT,),
            cargo=cargo,
            content_hash=island.offer().content_hash,
            token_limit=wanted.output_tokens,
            price_limit_micros=10**9,
            cache_salt=bytes(32),
            nonce=next(self._nonces).to_bytes(limits.NONCE_BYTES, "big"),
            issued_at_ms=now,
            expires_at_ms=now + 60_000,
            count_every=self.count_every,
        )
        sealed = sign_ticket(self.alter(ticket), COORDINATOR)
        self.granted.append(sealed)
        return TicketGranted(
            wanted.request, sealed, island.addresses, 1, "EU", island.offer(), 10**9, '{"score":50}', self.standing
        )

    async def mend(self, wanted: MendWanted, holder: str) -> TicketGranted:
        raise Refused(Code.NO_ISLAND, "no pipelines here")

    def opened(self, holder: str) -> None:
        self.desks.append(holder)

    def closed(self, holder: str) -> None:
        self.desks.remove(holder)

    def freed(self, freed: PlaceFreed, holder: str) -> None:
        self.places.append(freed)
        self._tell()

    async def settle(self, settled: JobSettled, holder: str) -> JobBilled:
        if self.settle_hold_up is not None:
            await self.settle_hold_up.wait()
        self.settled.append(settled)
        self._tell()
        return JobBilled(settled.request, self.price(settled.attempts, holder), 10**10)

    async def drop(self, dropped: JobDropped, holder: str) -> JobBilled:
        self.dropped.append(dropped)
        self._tell()
        return JobBilled(dropped.request, self.price(dropped.attempts, holder), 10**10)

    def price(self, attempts: Sequence[Attempt], holder: str) -> int:
        """As the books would check it; a receipt is paid as far as it is counted."""
        total = 0
        for attempt in attempts:
            ticket = read_ticket(attempt.ticket)
            assert ticket.holder == holder and attempt.ticket in self.granted
            counted = -1
            if attempt.count:
                count = read_count(attempt.count)
                check_count_of_ticket(count, ticket, ticket_hash(attempt.ticket))
                counted = count.tokens
            if attempt.receipt:
                receipt = read_receipt(attempt.receipt)
                check_receipt_of_ticket(receipt, ticket)
                assert receipt.sent_tokens == counted, "an honest bridge has signed for all of it"
                total += receipt.price_micros
        return total

    async def models(self, wanted: ModelsWanted, holder: str) -> Models:
        self._check_key(wanted.api_key)
        names = sorted({island.offer().name for island in self.islands})
        models = tuple(OfferedModel(name, BOOT // 1000) for name in names)
        return Models(wanted.request, models, len(self.islands), self.standing)

    async def claim(self, claim: Claim, sender: str) -> ClaimOutcome:
        self.claimed.append(claim)
        self._tell()
        return ClaimOutcome(True, read_receipt(claim.receipt).price_micros)


@dataclass(eq=False)
class Bridged:
    """``url``: of the bridge's API."""

    desk: ScriptedDesk
    coordinator: Host
    server: DirectServer
    url: str
    stop: trio.Event
    nursery: trio.Nursery
    coordinator_address: str

    def http(self, key: str = API_KEY) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30)

    async def cut_off(self) -> None:
        """The Coordinator loses everybody, and greets nobody."""

        async def refuse(stream: Any) -> None:
            raise RemoteProtocolError("nobody is here")

        self.coordinator.set_handler(ADS_PROTOCOL, ADS, refuse)
        for peer in self.coordinator.connected_peers():
            await self.coordinator.disconnect(peer)

    def bring_back(self) -> None:
        serve_coordinator(self.coordinator, self.desk)

    async def with_openai(self, work: Callable[[openai.OpenAI], T], **settings: Any) -> T:
        """Runs ``work`` with OpenAI's client in a thread, where it belongs."""

        def run() -> T:
            with openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, **settings) as client:
                return work(client)

        return await trio.to_thread.run_sync(run)


def coordinator_hello() -> Hello:
    delegation = Delegation(NETWORK, COORDINATOR.peer_id, now_ms() + 3_600_000)
    sealed = sign_delegation(delegation, NETWORK_KEY)
    return Hello(PROTOCOL_VERSION, NodeRole.COORDINATOR, NETWORK, "test", sealed)


def serve_coordinator(host: Host, desk: Any) -> DirectServer:
    """The protocols that bridges and Islands with claims need."""
    keeper = BookKeeper(NETWORK)
    server = DirectServer(desk, coordinator_hello)
    host.set_handler(ADS_PROTOCOL, ADS, AdsServer(keeper, coordinator_hello, tuple, lambda envelope: None).serve)
    host.set_handler(DESK_PROTOCOL, DESK, server.serve_desk)
    host.set_handler(SETTLE_PROTOCOL, SETTLE, server.serve_settle)
    return server


@asynccontextmanager
async def open_island(number: int, cargo: LoadedCargo, ask: Ask = Ask(per_job=1000)) -> AsyncIterator[Island]:  # noqa: B008
    key = NodeKey(bytes([number]) * 32)
    guard = TicketGuard(key.peer_id, BOOT, NETWORK)
    guard.trust(Delegation(NETWORK, COORDINATOR.peer_id, now_ms() + 3_600_000))
    async with open_host(key.seed) as host:
        server = JobServer(key, guard, NETWORK, {"echo": Terms(cargo, ask)}, lambda: island_hello(NETWORK, "test"))
        island = Island(host, key, cargo, server, ask, addresses=tuple(host.addresses()))
        server._claims = island
        host.set_handler(JOB_PROTOCOL, JOB, server.serve)
        yield island


@asynccontextmanager
async def bridged(
    folder: Path, *cargos: LoadedCargo, api_key: str = API_KEY, coordinator_url: str = ""
) -> AsyncIterator[Bridged]:
    """A bridge to a Coordinator and to an Island for each Cargo, one with echo where none is named. ``coordinator_url``: that it knows too,
    and need not dial."""
    desk = ScriptedDesk()
    data = DataDir.open(folder / "bridge")
    async with trio.open_nursery() as nursery, open_host(COORDINATOR.seed) as coordinator:
        server = serve_coordinator(coordinator, desk)
        for number, cargo in enumerate(cargos or (EchoCargo(),), 1):
            opened = trio.Event()
            nursery.start_soon(_keep_island, number, cargo, desk, opened)
            await opened.wait()
        async with open_host(data.key("identity").seed, ()) as host:
            stop = trio.Event()
            known = (coordinator.addresses()[0], *([coordinator_url] if coordinator_url else ()))
            role = BridgeRole(str(folder / "bridge"), known, api_key)
            url = await nursery.start(serve_bridge, role, data, host, stop)
            yield Bridged(desk, coordinator, server, url, stop, nursery, coordinator.addresses()[0])
            nursery.cancel_scope.cancel()


async def _keep_island(number: int, cargo: LoadedCargo, desk: ScriptedDesk, opened: trio.Event) -> None:
    async with open_island(number, cargo) as island:
        desk.islands.append(island)
        opened.set()
        await trio.sleep_forever()
