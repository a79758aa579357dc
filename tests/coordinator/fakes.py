"""A network of scripted Islands behind the Coordinator's port, and what a test needs to talk to a Coordinator in front of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from coordinator.config import CoordinatorConfig
from coordinator.keys import create_key, database_url_of
from coordinator.server import CoordinatorServer, open_coordinator
from privacy.keys import NodeKey
from protocol.ads import AD_VERSION, Ad, CargoOffer, Hardware
from protocol.book import Book, Entry
from protocol.errors import Code, Refused
from protocol.generation import GENERATION, FinishReason, GenerationRequest, pack_tokens, unpack_tokens
from protocol.hold import HoldProgress, HoldShard, ShardHeld
from protocol.messages import JobAccepted, JobChunk, JobDone
from protocol.prices import Ask
from protocol.receipts import RECEIPT_VERSION, Receipt, sign_receipt
from protocol.tickets import Delegation, Ticket, TicketGuard, ticket_hash

NETWORK = "0123456789abcdef0123456789abcdef"
COORDINATOR = NodeKey(bytes([9]) * 32)
HASH_A, HASH_B = "aa" * 32, "bb" * 32


def island_key(number: int) -> NodeKey:
    return NodeKey(bytes([number]) * 32)


def offer(name: str = "echo", **changes: Any) -> CargoOffer:
    plain = CargoOffer(
        name=name,
        content_hash=HASH_A,
        runtime="echo",
        engine="echo-1",
        ask=Ask(per_job=1000),
        context_tokens=100_000,
        kv_tokens_total=1_000_000,
        kv_tokens_free=1_000_000,
        slots_total=256,
        slots_free=256,
        weights_bytes=0,
        kv_bytes_per_token=0,
        compute_bytes=0,
        tokens_per_s=0.0,
    )
    return replace(plain, **changes)


def ad(peer: str, offers: tuple[CargoOffer, ...], sequence: int = 1000, **changes: Any) -> Ad:
    plain = Ad(
        version=AD_VERSION,
        network=NETWORK,
        peer=peer,
        boot=1000,
        sequence=sequence,
        expires_at_ms=sequence + 60_000,
        agent="test",
        addresses=(),
        region="",
        hardware=Hardware(1, 1, 1),
        runtimes=("echo",),
        memory_offered_bytes=0,
        default_ask=Ask(),
        offers=offers,
    )
    return replace(plain, **changes)


@dataclass
class Script:
    """How an Island behaves. ``words`` are its tokens, one id each; None: the last message's own words.

    ``fail_open``: raised instead of a connection. ``refuse``: raised before JobAccepted. ``fail_after``: number of tokens sent in this
    attempt before ``failure`` is raised; 0 is after JobAccepted. ``hang_after``: waits for ever there. Each is used ``times`` times.
    """

    words: tuple[str, ...] | None = None
    fail_open: Refused | None = None
    refuse: Refused | None = None
    fail_after: int | None = None
    failure: Code = Code.LINK_LOST
    hang_after: int | None = None
    times: int = 1_000_000
    batch: int = 1
    token_s: float = 0.0
    accept_s: float = 0.0
    logprobs: Callable[[list[str]], bytes] = lambda words: b""


@dataclass
class FakeIsland:
    key: NodeKey
    offers: tuple[CargoOffer, ...]
    scripts: list[Script] = field(default_factory=list)
    boot: int = 1000
    requests: list[GenerationRequest] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    open_now: int = 0
    open_max: int = 0
    cancelled: int = 0

    @property
    def peer(self) -> str:
        return self.key.peer_id

    def script(self) -> Script:
        while self.scripts and self.scripts[0].times == 0:
            self.scripts.pop(0)
        if not self.scripts:
            return Script()
        self.scripts[0].times -= 1
        return self.scripts[0]


class FakePort:
    """An IslandPort without a network. Tickets are checked as an Island would."""

    def __init__(self, *islands: FakeIsland) -> None:
        self.islands = {island.peer: island for island in islands}
        self._guards: dict[str, TicketGuard] = {}
        self._book = Book(NETWORK)
        self._changed = trio.Event()
        self._sequence = 1000
        for island in islands:
            self.advertise(island)

    def book(self) -> Book:
        return self._book

    async def wait_book_changed(self) -> None:
        await self._changed.wait()

    async def hold_shard(self, island: str, order: HoldShard, progress: Callable[[HoldProgress], None]) -> ShardHeld:
        raise Refused(Code.NO_CAPACITY, "these Islands hold no shards")

    def advertise(self, island: FakeIsland, **changes: Any) -> None:
        """A newer ad of an Island, which may be new."""
        self._sequence += 1
        self.islands[island.peer] = island
        guard = TicketGuard(island.peer, island.boot, NETWORK)
        guard.trust(Delegation(NETWORK, COORDINATOR.peer_id, 2**52))
        self._guards[island.peer] = guard
        made = ad(island.peer, island.offers, self._sequence, **{"boot": island.boot, **changes})
        self._put({**self._book.entries, island.peer: Entry(made, b"")})

    def lose(self, island: FakeIsland) -> None:
        self._put({peer: entry for peer, entry in self._book.entries.items() if peer != island.peer})

    def _put(self, entries: dict[str, Entry]) -> None:
        self._book = replace(self._book, entries=entries)
        self._changed.set()
        self._changed = trio.Event()

    @asynccontextmanager
    async def run_job(self, island: str, ticket: bytes, payload: bytes) -> AsyncIterator[_Run]:
        it = self.islands[island]
        script = it.script()
        if script.fail_open is not None:
            raise script.fail_open
        admitted = self._guards[island].admit(ticket, COORDINATOR.peer_id, time.time_ns() // 1_000_000)
        request = GENERATION.decode(payload)
        it.requests.append(request)
        it.tickets.append(admitted)
        it.open_now += 1
        it.open_max = max(it.open_max, it.open_now)
        try:
            yield _Run(it, script, request, admitted, ticket)
        except trio.Cancelled:
            it.cancelled += 1
            raise
        finally:
            it.open_now -= 1


class _Run:
    def __init__(
        self, island: FakeIsland, script: Script, request: GenerationRequest, ticket: Ticket, raw: bytes
    ) -> None:
        self._island, self._script, self._request, self._ticket, self._raw = island, script, request, ticket, raw

    def mend(self, ticket: bytes) -> None:
        raise AssertionError("these Islands have no routes to mend")

    async def __aiter__(self) -> AsyncIterator[Any]:
        script, request = self._script, self._request
        if script.refuse is not None:
            raise script.refuse
        await trio.sleep(script.accept_s)
        words = list(script.words) if script.words is not None else words_of(request)
        reason = FinishReason.LENGTH if len(words) > request.max_tokens else FinishReason.STOP
        words = words[: request.max_tokens]
        prompt_tokens = sum(len(m.content.split()) for m in request.messages) + len(request.prompt.split())
        offered = self._island.offers[0]
        yield JobAccepted(1, offered.engine, prompt_tokens, 0)
        start = len(request.resume) // 4
        assert unpack_tokens(request.resume) == [1000 + i for i in range(start)], "an answer goes on behind its own ids"
        sent, step = 0, start
        while step < len(words):
            await self._stop_here(sent)
            batch = words[step : step + script.batch]
            await trio.sleep(script.token_s)
            raw = pack_tokens([1000 + step + i for i in range(len(batch))])
            text = "".join(batch)
            yield JobChunk(1, sent, text, script.logprobs(batch) if request.top_logprobs >= 0 else b"", raw)
            sent += len(batch)
            step += len(batch)
        await self._stop_here(sent)
        yield JobDone(1, reason, "", prompt_tokens, 0, step, 1000, 2000, self._receipt(prompt_tokens, sent, reason))

    async def _stop_here(self, sent: int) -> None:
        if self._script.fail_after == sent:
            raise Refused(self._script.failure, "as the script says")
        if self._script.hang_after == sent:
            await trio.sleep_forever()

    def _receipt(self, prompt_tokens: int, sent: int, reason: FinishReason) -> bytes:
        receipt = Receipt(
            version=RECEIPT_VERSION,
            network=NETWORK,
            island=self._island.peer,
            job_id=self._ticket.job_id,
            ticket_hash=ticket_hash(self._raw),
            content_hash=self._ticket.content_hash,
            prompt_tokens=prompt_tokens,
            cached_tokens=0,
            sent_tokens=sent,
            output_hash=bytes(32),
            compute_ms=3,
            price_micros=1000,
            finish_reason=reason,
            finished_at_ms=1,
        )
        return sign_receipt(receipt, self._island.key)


def words_of(request: GenerationRequest) -> list[str]:
    """What an echo says: one token a word, each but the first with its space."""
    text = request.messages[-1].content if request.messages else request.prompt
    words = text.split()
    return [word if index == 0 else " " + word for index, word in enumerate(words)]


def island(number: int = 1, *scripts: Script, **changes: Any) -> FakeIsland:
    return FakeIsland(island_key(number), (offer(**changes),), list(scripts))


@dataclass
class Running:
    """A Coordinator that serves, and a key for it."""

    server: CoordinatorServer
    port: FakePort
    key: str
    database_url: str

    @property
    def url(self) -> str:
        return self.server.url


@asynccontextmanager
async def coordinator(folder: Path, *islands: FakeIsland, **settings: Any) -> AsyncIterator[Running]:
    url = database_url_of(folder)
    key = create_key(url)
    port = FakePort(*islands)
    config = CoordinatorConfig(database_url=url, **settings)
    async with open_coordinator(config, port, COORDINATOR, NETWORK, bytes(32), lambda: {"peer_id": "x"}) as server:
        yield Running(server, port, key, url)
