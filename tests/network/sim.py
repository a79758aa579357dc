"""A seeded discrete-event simulator of a whole network: real ads, real signatures, the real book, and a model of GossipSub.

Theory of operation. Time is a number and events are a heap; one ``random.Random`` draws everything, so a seed is a run. What nodes say
is made and judged by the code that runs in production: ``protocol.ads``, ``protocol.book.apply``, ``protocol.catchup``. What is modelled
is the transport and GossipSub (mesh of 6, between 4 and 12; full messages inside the mesh; dedupe by message id; a heartbeat of 1 s
with IHAVE to 6 peers outside the mesh and IWANT for what is missing; PRUNE with backoff).

The model is harsher than TCP where it matters: an RPC that is lost is lost, with everything in it, instead of coming late. Keepalives
are the exception, since a transport that repeats a lost segment does not end a connection: a link is noticed as dead by the first
ping after the silence began plus KEEPALIVE_TIMEOUT_S. No link is ever reset: the dead vanish as a machine does whose plug is pulled.

Rules of a node: what changes its book is passed on, nothing else; a Coordinator that loses a link to an Island in its book publishes a
notice; an Island that is called dead, or finds a Coordinator again, makes a newer ad; each CATCHUP_INTERVAL_S a node compares its book
with a random neighbour's. Clocks differ by up to ``clock_skew_s``.

Signatures are checked once for each distinct envelope and the result is kept (``open_ad``); what depends on the time is checked by
every node with its own clock.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from privacy.keys import NodeKey
from protocol import limits
from protocol.ads import (
    AD_VERSION,
    Ad,
    Hardware,
    Lost,
    check_ad_time,
    check_lost_time,
    open_ad,
    open_lost,
    sign_ad,
    sign_lost,
)
from protocol.book import AdHeard, Book, LostHeard, Outcome, Tick, apply, must_refute
from protocol.catchup import answer, next_request
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.messages import Announce, BookRequest
from protocol.prices import Ask

START_MS = 1_795_000_000_000
NETWORK = "simulated"
SLOT_S = 0.01  # how finely run_until looks

MESH, MESH_LOW, MESH_HIGH = 6, 4, 12
LAZY_PEERS = 6
HEARTBEAT_S = 1.0
HISTORY_WINDOWS, GOSSIP_WINDOWS = 5, 3
PRUNE_BACKOFF_S = 60.0
HOMES = 2  # Coordinators that an Island keeps a link to


@dataclass(frozen=True, slots=True)
class Config:
    """``degree`` is how many others a newcomer dials; as many dial it, so it ends with about twice as many links."""

    nodes: int
    seed: int
    coordinators: int = 3
    latency_s: float = 0.05
    jitter: float = 0.2  # share of the latency, up and down
    loss: float = 0.05
    degree: int = 8
    clock_skew_s: float = 5.0
    repair: bool = True  # IHAVE and IWANT
    catchup: bool = True


# ---- GossipSub, one node's view of one topic


@dataclass(frozen=True, slots=True)
class Full:
    key: bytes
    envelope: bytes


@dataclass(frozen=True, slots=True)
class IHave:
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class IWant:
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Graft:
    pass


@dataclass(frozen=True, slots=True)
class Prune:
    pass


Send = Callable[[int, Any], None]


class GossipSub:
    """No clock, no wire: ``send(neighbour, rpc)`` is handed in, so is the time."""

    def __init__(self, chance: Random, neighbours: set[int], send: Send) -> None:
        self._chance, self._neighbours, self._send = chance, neighbours, send
        self.mesh: set[int] = set()
        self._backoff: dict[int, float] = {}
        self._seen: OrderedDict[bytes, float] = OrderedDict()
        self._history: deque[list[bytes]] = deque([[]], maxlen=HISTORY_WINDOWS)
        self._kept: dict[bytes, bytes] = {}

    def publish(self, envelope: bytes, now_s: float) -> None:
        key = hashlib.sha256(envelope).digest()
        self.note(key, now_s)
        self.forward(Full(key, envelope), None)

    def note(self, key: bytes, now_s: float) -> bool:
        """Whether this message is new here."""
        if key in self._seen:
            return False
        self._seen[key] = now_s + limits.GOSSIP_SEEN_S
        return True

    def forward(self, full: Full, source: int | None) -> None:
        self._history[-1].append(full.key)
        self._kept[full.key] = full.envelope
        for peer in sorted(self.mesh):
            if peer != source:
                self._send(peer, full)

    def missing(self, keys: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return tuple(key for key in keys if key not in self._seen)

    def give(self, peer: int, keys: tuple[bytes, ...]) -> None:
        for key in keys:
            if key in self._kept:
                self._send(peer, Full(key, self._kept[key]))

    def grafted(self, peer: int, now_s: float) -> None:
        if len(self.mesh) >= MESH_HIGH or self._backoff.get(peer, 0.0) > now_s:
            self._send(peer, Prune())
        else:
            self.mesh.add(peer)

    def pruned(self, peer: int, now_s: float) -> None:
        self.mesh.discard(peer)
        self._backoff[peer] = now_s + PRUNE_BACKOFF_S

    def dropped(self, peer: int) -> None:
        self.mesh.discard(peer)
        self._backoff.pop(peer, None)

    def heartbeat(self, now_s: float, repair: bool) -> None:
        self._balance(now_s)
        if repair:
            self._gossip()
        while self._seen and next(iter(self._seen.values())) < now_s:
            self._seen.popitem(last=False)
        if len(self._history) == HISTORY_WINDOWS:
            for key in self._history[0]:
                self._kept.pop(key, None)
        self._history.append([])

    def _balance(self, now_s: float) -> None:
        if len(self.mesh) < MESH_LOW:
            free = [p for p in sorted(self._neighbours - self.mesh) if self._backoff.get(p, 0.0) <= now_s]
            for peer in self._draw(free, MESH - len(self.mesh)):
                self.mesh.add(peer)
                self._send(peer, Graft())
        elif len(self.mesh) > MESH_HIGH:
            for peer in self._draw(sorted(self.mesh), len(self.mesh) - MESH):
                self.pruned(peer, now_s)
                self._send(peer, Prune())

    def _gossip(self) -> None:
        recent = list(itertools.islice(reversed(self._history), GOSSIP_WINDOWS))
        keys = tuple(itertools.chain.from_iterable(recent))
        if keys:
            for peer in self._draw(sorted(self._neighbours - self.mesh), LAZY_PEERS):
                self._send(peer, IHave(keys))

    def _draw(self, peers: list[int], count: int) -> list[int]:
        return self._chance.sample(peers, min(count, len(peers)))


# ---- a node


@dataclass(slots=True)
class Node:
    number: int
    key: NodeKey
    coordinator: bool
    clock_ms: int  # how far its clock is ahead
    book: Book
    chance: Random
    gossip: GossipSub
    neighbours: set[int]
    boot: int = 0
    sequence: int = 0
    ask: Ask = field(default_factory=Ask)
    homes: tuple[int, ...] = ()  # Coordinators whose addresses it was given: redialled for ever
    alive: bool = True
    sent: list[bytes] = field(default_factory=list)  # every envelope it ever signed: what an attacker could replay

    @property
    def peer(self) -> str:
        return self.key.peer_id


@dataclass(slots=True)
class Statistics:
    rpcs: int = 0
    lost_rpcs: int = 0
    events: int = 0
    full_messages: int = 0
    duplicates: int = 0
    repaired: int = 0  # came because IWANT asked for it
    by_catchup: int = 0  # changed a book by way of catch-up
    stale: int = 0
    refused: int = 0
    signatures: int = 0


class Simulator:
    """``warm`` starts with everybody knowing everybody, as a network does that has run for a while."""

    def __init__(self, config: Config, *, warm: bool = True) -> None:
        self.config, self.now_s = config, 0.0
        self.chance = Random(config.seed)
        self.statistics = Statistics()
        self.nodes: list[Node] = []
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._opened: dict[bytes, Ad | tuple[str, Lost] | RemoteProtocolError] = {}
        self._cut: dict[int, int] = {}  # node to the side of the partition that it is on
        self._wanted: set[tuple[int, bytes]] = set()
        for number in range(config.nodes):
            self._make(number)
        self._coordinators = frozenset(node.peer for node in self.nodes if node.coordinator)
        for node in self.nodes:
            node.book = replace(node.book, coordinators=self._coordinators)
            self._dial_around(node)
        if warm:
            self._warm_up()
        else:
            for node in self.nodes:
                self.at(self.chance.uniform(0.0, 2.0), self.advertise, node)

    def __repr__(self) -> str:
        return f"<Simulator seed {self.config.seed}: {len(self.living())} of {len(self.nodes)} nodes at {self.now_s:.2f} s>"

    # -- time

    def at(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (self.now_s + delay_s, next(self._order), call, arguments))

    def run_for(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._heap and self._heap[0][0] <= end_s:
            self.now_s, _, call, arguments = heapq.heappop(self._heap)
            self.statistics.events += 1
            call(*arguments)
        self.now_s = end_s

    def run_until(self, done: Callable[[], bool], limit_s: float) -> float:
        """Seconds until ``done``; infinity when it is not so within the limit."""
        start_s = self.now_s
        while not done():
            if self.now_s - start_s >= limit_s:
                return float("inf")
            self.run_for(SLOT_S)
        return self.now_s - start_s

    # -- what happens to a network

    def living(self) -> list[Node]:
        return [node for node in self.nodes if node.alive]

    def islands(self) -> list[Node]:
        return [node for node in self.nodes if node.alive and not node.coordinator]

    def advertise(self, node: Node, after: int = 0) -> None:
        """The node says what it offers, under a sequence that is newer than all it said before and than ``after``."""
        if not node.alive or node.coordinator:
            return
        now_ms = self.clock_ms(node)
        node.boot = node.boot or now_ms
        node.sequence = max(now_ms, node.sequence + 1, after + 1)
        self._publish(node, sign_ad(self._ad(node), node.key))

    def set_price(self, node: Node, per_job: int) -> None:
        node.ask = Ask(per_job=per_job)
        self.advertise(node)

    def kill(self, node: Node) -> None:
        """The plug is pulled: no goodbye, and no packet that says so."""
        node.alive = False
        for number in sorted(node.neighbours):
            self._lose_later(self.nodes[number], node)

    def join(self, *, catch_up: bool = True) -> Node:
        node = self._make(len(self.nodes))
        node.book = replace(node.book, coordinators=self._coordinators)
        self._dial_around(node)
        self.advertise(node)
        if catch_up and self.config.catchup:
            for number in sorted(node.neighbours):
                self._ask_for_book(node, number)
        return node

    def partition(self, *sides: Iterable[Node]) -> None:
        """Nothing passes between the sides until ``heal``."""
        self._cut = {node.number: side for side, nodes in enumerate(sides) for node in nodes}
        for node in self.living():
            for number in sorted(node.neighbours):
                if not self._joined(node.number, number):
                    self._lose_later(node, self.nodes[number])

    def heal(self) -> None:
        """The wire works again; nodes that know each other's addresses redial."""
        self._cut = {}
        for node in self.living():
            self.at(self.chance.uniform(0.0, limits.RECONNECT_HELD_MAX_S), self._dial_around, node)

    def inject(self, node: Node, envelope: bytes) -> None:
        """Somebody hands the node an envelope as gossip."""
        self._heard(node, Full(hashlib.sha256(envelope).digest(), envelope), None)

    def clock_ms(self, node: Node) -> int:
        return START_MS + int(self.now_s * 1000) + node.clock_ms

    # -- building

    def _make(self, number: int) -> Node:
        key = NodeKey(hashlib.sha256(b"simulated node %d" % number).digest())
        chance = Random(self.chance.getrandbits(64))
        neighbours: set[int] = set()
        node = Node(
            number=number,
            key=key,
            coordinator=number < self.config.coordinators,
            clock_ms=int(self.chance.uniform(-1, 1) * self.config.clock_skew_s * 1000),
            book=Book(NETWORK),
            chance=chance,
            gossip=GossipSub(chance, neighbours, lambda peer, rpc: self._send(number, peer, rpc)),
            neighbours=neighbours,
        )
        others = [c for c in range(self.config.coordinators) if c != number]
        node.homes = tuple(others if node.coordinator else chance.sample(others, min(HOMES, len(others))))
        self.nodes.append(node)
        self.at(chance.uniform(0.0, HEARTBEAT_S), self._heartbeat, node)
        self.at(chance.uniform(0.0, limits.CATCHUP_INTERVAL_S), self._catch_up, node)
        self.at(chance.uniform(0.5, 1.0) * limits.AD_REFRESH_S, self._refresh, node)
        self.at(chance.uniform(0.0, 5.0), self._tick, node)
        return node

    def _warm_up(self) -> None:
        """One book for all: it never changes in place, so sharing it is free."""
        book = Book(NETWORK, coordinators=self._coordinators)
        for node in self.islands():
            node.boot = node.sequence = self.clock_ms(node)
            envelope = sign_ad(self._ad(node), node.key)
            node.sent.append(envelope)
            book, _ = apply(AdHeard(self._ad(node), envelope), book, START_MS)
        for node in self.nodes:
            node.book = book
        self.run_for(3 * HEARTBEAT_S)

    def _ad(self, node: Node) -> Ad:
        return Ad(
            version=AD_VERSION,
            network=NETWORK,
            peer=node.peer,
            boot=node.boot,
            sequence=node.sequence,
            expires_at_ms=node.sequence + int(limits.AD_LIFETIME_S * 1000),
            agent="simulated",
            addresses=(f"/ip4/10.0.{node.number // 256}.{node.number % 256}/tcp/4001",),
            region="",
            hardware=Hardware(1, 0, 0),
            runtimes=("echo",),
            memory_offered_bytes=0,
            default_ask=node.ask,
            offers=(),
        )

    # -- links

    def _joined(self, left: int, right: int) -> bool:
        return self._cut.get(left, 0) == self._cut.get(right, 0)

    def _dial_around(self, node: Node) -> None:
        """Its own Coordinators, up to ``degree`` links at random, and never fewer than two Coordinators where there are two."""
        if not node.alive:
            return
        reachable = [n for n in self.nodes if n.alive and n is not node and self._joined(n.number, node.number)]
        for home in [n for n in reachable if n.number in node.homes and n.number not in node.neighbours]:
            self._link(node, home)
        far = [n for n in reachable if n.number not in node.neighbours]
        for other in node.chance.sample(far, max(0, min(len(far), self.config.degree - len(node.neighbours)))):
            self._link(node, other)
        linked = sum(self.nodes[number].coordinator for number in node.neighbours)
        free = [n for n in far if n.coordinator and n.number not in node.neighbours]
        for other in node.chance.sample(free, max(0, min(len(free), HOMES - linked))):
            self._link(node, other)

    def _link(self, left: Node, right: Node) -> None:
        left.neighbours.add(right.number)
        right.neighbours.add(left.number)
        for one, other in ((left, right), (right, left)):
            if one.sequence and other.coordinator:
                self.advertise(one)  # an Island that finds a Coordinator tells it at once

    def _lose_later(self, node: Node, silent: Node) -> None:
        """``node`` notices the silence of ``silent`` by its next ping on this link and the timeout after it."""
        next_ping_s = node.chance.uniform(0.0, limits.KEEPALIVE_INTERVAL_S)
        self.at(next_ping_s + limits.KEEPALIVE_TIMEOUT_S, self._lose, node, silent)

    def _lose(self, node: Node, silent: Node) -> None:
        back = silent.alive and self._joined(node.number, silent.number)
        if not node.alive or back or silent.number not in node.neighbours:
            return
        node.neighbours.discard(silent.number)
        node.gossip.dropped(silent.number)
        if node.coordinator:
            self._notify_loss(node, silent.peer)
        self.at(node.chance.uniform(0.2, 1.0), self._dial_around, node)

    def _notify_loss(self, node: Node, peer: str) -> None:
        entry = node.book.entries.get(peer)
        if entry is not None:
            lost = Lost(NETWORK, peer, entry.ad.sequence, self.clock_ms(node))
            self._publish(node, sign_lost(lost, node.key))

    # -- wire

    def _send(self, source: int, target: int, rpc: Any) -> None:
        self.statistics.rpcs += 1
        if self.chance.random() < self.config.loss:
            self.statistics.lost_rpcs += 1
            return
        wobble = 1.0 + self.chance.uniform(-1.0, 1.0) * self.config.jitter
        self.at(self.config.latency_s * wobble, self._deliver, source, target, rpc)

    def _deliver(self, source: int, target: int, rpc: Any) -> None:
        node = self.nodes[target]
        if not node.alive or not self._joined(source, target):
            return
        match rpc:
            case Full():
                self._heard(node, rpc, source)
            case IHave(keys):
                self._ask_for_missing(node, source, keys)
            case IWant(keys):
                node.gossip.give(source, keys)
            case Graft():
                node.gossip.grafted(source, self.now_s)
            case Prune():
                node.gossip.pruned(source, self.now_s)
            case BookRequest():
                self._send(target, source, Announce(answer(rpc, node.book, self.clock_ms(node))))
            case Announce(envelopes):
                self._caught_up(node, source, envelopes)

    def _ask_for_missing(self, node: Node, source: int, keys: tuple[bytes, ...]) -> None:
        missing = node.gossip.missing(keys)
        if missing:
            self._wanted.update((node.number, key) for key in missing)
            self._send(node.number, source, IWant(missing))

    # -- a node's duties

    def _publish(self, node: Node, envelope: bytes) -> None:
        node.sent.append(envelope)
        self._take(node, envelope)
        node.gossip.publish(envelope, self.now_s)

    def _heard(self, node: Node, full: Full, source: int | None) -> None:
        self.statistics.full_messages += 1
        if not node.gossip.note(full.key, self.now_s):
            self.statistics.duplicates += 1
            return
        self.statistics.repaired += (node.number, full.key) in self._wanted
        if self._take(node, full.envelope) is Outcome.CHANGED:
            node.gossip.forward(full, source)

    def _take(self, node: Node, envelope: bytes) -> Outcome:
        """What ``BookKeeper.hear`` does: read, apply, and answer when the node itself was called dead."""
        now_ms = self.clock_ms(node)
        event: AdHeard | LostHeard
        try:
            opened = self._open(envelope)
            if isinstance(opened, Ad):
                check_ad_time(opened, now_ms)
                event = AdHeard(opened, envelope)
            else:
                witness, lost = opened
                check_lost_time(lost, now_ms)
                event = LostHeard(witness, lost, envelope)
        except RemoteProtocolError:
            self.statistics.refused += 1
            return Outcome.REFUSED
        node.book, outcome = apply(event, node.book, now_ms)
        self.statistics.stale += outcome is Outcome.STALE
        self.statistics.refused += outcome is Outcome.REFUSED
        refuted = isinstance(event, LostHeard) and must_refute(event.lost, node.peer, node.sequence)
        if isinstance(event, LostHeard) and refuted and outcome is Outcome.CHANGED:
            self.at(0.0, self.advertise, node, event.lost.sequence)
        return outcome

    def _open(self, envelope: bytes) -> Ad | tuple[str, Lost]:
        if envelope not in self._opened:
            self.statistics.signatures += 1
            self._opened[envelope] = _really_open(envelope)
        opened = self._opened[envelope]
        if isinstance(opened, RemoteProtocolError):
            raise opened
        return opened

    def _heartbeat(self, node: Node) -> None:
        if node.alive:
            node.gossip.heartbeat(self.now_s, self.config.repair)
            self.at(HEARTBEAT_S, self._heartbeat, node)

    def _refresh(self, node: Node) -> None:
        if node.alive:
            if self.clock_ms(node) - node.sequence >= limits.AD_REFRESH_S * 500:
                self.advertise(node)
            self.at(limits.AD_REFRESH_S, self._refresh, node)

    def _tick(self, node: Node) -> None:
        if node.alive:
            node.book, _ = apply(Tick(), node.book, self.clock_ms(node))
            self.at(5.0, self._tick, node)

    def _catch_up(self, node: Node) -> None:
        if node.alive:
            if self.config.catchup and node.neighbours:
                self._ask_for_book(node, node.chance.choice(sorted(node.neighbours)))
            self.at(limits.CATCHUP_INTERVAL_S * node.chance.uniform(0.8, 1.2), self._catch_up, node)

    def _ask_for_book(self, node: Node, neighbour: int) -> None:
        self._send(node.number, neighbour, next_request(node.book, node.chance))

    def _caught_up(self, node: Node, source: int, envelopes: tuple[bytes, ...]) -> None:
        changed = sum(self._take(node, envelope) is Outcome.CHANGED for envelope in envelopes)
        self.statistics.by_catchup += changed
        if changed:
            self._ask_for_book(node, source)


def _really_open(envelope: bytes) -> Ad | tuple[str, Lost] | RemoteProtocolError:
    try:
        return open_ad(envelope)
    except SignatureError:
        try:
            return open_lost(envelope)
        except RemoteProtocolError as error:
            return error
    except RemoteProtocolError as error:
        return error
