"""What to ask from whom: a table of single moments, and whole fetches simulated with seeds."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from protocol import blob_fetch, limits
from protocol.blob_fetch import SOURCES, Ask, BlobFetch, Drop, Fault, choose_root
from protocol.blobs import BlobCode

FIRST = blob_fetch.WINDOW_FIRST_CHUNKS


def asks(plan: BlobFetch, now_s: float = 0.0) -> list[Ask]:
    return [step for step in plan.steps(now_s) if isinstance(step, Ask)]


def drops(plan: BlobFetch, now_s: float = 0.0) -> list[tuple[str, Fault]]:
    return [(step.peer, step.fault) for step in plan.steps(now_s) if isinstance(step, Drop)]


def started(*peers: str, chunks: int = 40) -> tuple[BlobFetch, list[Ask]]:
    plan = BlobFetch(chunks)
    for peer in peers:
        plan.joined(peer, None, 0.0)
    return plan, asks(plan)


def give(plan: BlobFetch, ask: Ask, now_s: float, count: int | None = None) -> None:
    """The first chunks of a request come and are good."""
    for index in range(ask.first, ask.first + (ask.count if count is None else count)):
        assert plan.arrived(ask.peer, ask.request, index, now_s)
        plan.verified(ask.peer, index)
        plan.ready(ask.peer, now_s)


def test_peers_begin_with_the_lowest_chunks_and_none_twice() -> None:
    _, said = started("a", "b")
    assert [(ask.peer, ask.first, ask.count) for ask in said] == [("a", 0, FIRST), ("b", FIRST, FIRST)]


def test_nothing_is_said_twice() -> None:
    plan, _ = started("a", "b")
    assert plan.steps(0.1) == []


def test_what_is_there_already_is_not_asked_for() -> None:
    plan = BlobFetch(6, there=(0, 2, 3))
    plan.joined("a", None, 0.0)
    assert [(ask.first, ask.count) for ask in asks(plan)] == [(1, 1), (4, 2)] and plan.left == 3


def test_windows_follow_the_measured_speed() -> None:
    plan, (a, b) = started("a", "b", chunks=1000)
    for turn in range(1, 60):
        now_s = turn * 0.01
        give(plan, a, now_s, 1)
        a = Ask(a.peer, a.request, a.first + 1, a.count - 1)
        if not a.count:
            (a,) = [ask for ask in asks(plan, now_s) if ask.peer == "a"][:1] or [a]
            break
    for index in range(b.first, b.first + 4):
        plan.arrived("b", b.request, index, 0.5 * (index - b.first + 1))
        plan.verified("b", index)
        plan.ready("b", 0.5 * (index - b.first + 1))
    assert plan.window("a") > 4 * plan.window("b") and plan.window("b") == 1


@pytest.mark.parametrize("every", [1, 2])
def test_a_request_is_bounded_and_so_are_windows_and_open_requests(every: int) -> None:
    """Of every second chunk a request can have only one."""
    plan = BlobFetch(5000, there=(index for index in range(5000) if index % every))
    plan.joined("a", None, 0.0)
    owed: list[tuple[int, int]] = []
    for _ in range(600):
        for ask in asks(plan):
            assert ask.count <= limits.BLOB_REQUEST_CHUNKS_MAX
            owed += [(ask.request, index) for index in range(ask.first, ask.first + ask.count)]
        assert len(owed) <= blob_fetch.WINDOW_CHUNKS_MAX
        assert len({request for request, _ in owed}) <= limits.BLOB_REQUESTS_OPEN_MAX
        request, index = owed.pop(0)
        plan.arrived("a", request, index, 0.0)
        plan.verified("a", index)
        plan.ready("a", 0.0)


@pytest.mark.parametrize("request_shift, index_shift", [(0, 1), (1, 0), (-1, 0), (0, -1), (0, 10_000)])
def test_what_was_not_asked_for_is_a_breach(request_shift: int, index_shift: int) -> None:
    plan, (a, b) = started("a", "b")
    assert not plan.arrived("b", b.request + request_shift, b.first + index_shift, 0.1)
    assert drops(plan, 0.1) == [("b", Fault.BREACH)] and plan.faults["b"].fault.is_guilt
    assert not plan.joined("b", None, 0.2), "and it is not heard again"
    assert "a" in plan.peers() and a.peer == "a"


def test_a_chunk_that_nobody_was_asked_for() -> None:
    plan = BlobFetch(1)
    plan.joined("a", None, 0.0)
    plan.joined("b", None, 0.0)
    plan.steps(0.0)
    plan.arrived("b", 1, 0, 0.1)
    assert drops(plan) == [("b", Fault.BREACH)]


def chunks_of(said: list[Ask]) -> set[int]:
    return {index for ask in said for index in range(ask.first, ask.first + ask.count)}


def test_a_bad_chunk_blames_its_sender_alone_and_is_asked_elsewhere() -> None:
    plan, (a, b) = started("a", "b", chunks=16)
    owed = chunks_of([b])
    assert plan.arrived("b", b.request, b.first, 0.1)
    plan.ready("b", 0.1)
    plan.bad("b", b.first)
    give(plan, a, 0.01)
    steps = plan.steps(0.02)
    assert [(step.peer, step.fault) for step in steps if isinstance(step, Drop)] == [("b", Fault.LIE)]
    assert owed <= chunks_of([step for step in steps if isinstance(step, Ask)]) and plan.peers() == ("a",)
    assert set(plan.faults) == {"b"}


def test_a_lie_is_found_out_after_the_link_was_lost() -> None:
    plan, (_, b) = started("a", "b")
    plan.arrived("b", b.request, b.first, 0.1)
    plan.lost("b", "gone")
    plan.bad("b", b.first)
    assert plan.faults["b"].fault is Fault.LIE and not plan.joined("b", None, 0.3)


def test_who_was_lost_may_come_back_and_what_it_owed_is_free() -> None:
    plan, (a, b) = started("a", "b", chunks=16)
    give(plan, b, 0.1, 1)
    plan.lost("a", "gone")
    assert plan.left == 15 and plan.joined("a", None, 0.2)
    said = asks(plan, 0.2)
    assert min(chunks_of(said)) == a.first and b.first + 1 not in chunks_of(said)


def test_a_peer_that_stands_still_is_dropped() -> None:
    plan, _ = started("a", "b")
    assert drops(plan, blob_fetch.STALL_S - 0.1) == []
    assert {peer for peer, fault in drops(plan, blob_fetch.STALL_S + 0.1) if fault is Fault.STALLED} == {"a", "b"}
    assert plan.is_stuck and plan.joined("a", None, 20.0), "it may be better later"


def test_our_own_slowness_is_not_the_peers() -> None:
    plan, (a,) = started("a")
    plan.arrived("a", a.request, 0, 0.1)  # and this machine's disk takes its time
    assert drops(plan, 100.0) == []
    plan.verified("a", 0)
    plan.ready("a", 100.0)
    assert drops(plan, 100.0 + blob_fetch.STALL_S / 2) == []


def test_a_peer_much_slower_than_another_is_dropped() -> None:
    plan, (a, _) = started("a", "b", chunks=4000)
    said = [a]
    now_s = 0.0
    while now_s < blob_fetch.SLOW_AFTER_S + 0.5:
        ask = next(one for one in said if one.peer == "a")
        said.remove(ask)
        now_s += 0.01 * ask.count
        give(plan, ask, now_s)
        steps = plan.steps(now_s)
        said += [step for step in steps if isinstance(step, Ask)]
        if any(isinstance(step, Drop) for step in steps):
            break
    assert {drop.fault for drop in plan.faults.values()} == {Fault.SLOW} and list(plan.faults) == ["b"]


def endgame() -> tuple[BlobFetch, Ask]:
    """All is asked for; a has given its part in no time, and b still owes the chunks 2 and 3."""
    plan, (a, b) = started("a", "b", chunks=4)
    assert (a.count, b.first, b.count) == (2, 2, 2)
    give(plan, a, 0.02)
    return plan, b


def test_endgame_asks_a_second_peer_for_the_chunk_that_would_come_last() -> None:
    plan, _ = endgame()
    assert asks(plan, 0.05) == [], "what b owes may still come soon"
    (again,) = asks(plan, 1.0)
    assert (again.peer, again.first, again.count) == ("a", 3, 1)
    assert asks(plan, 1.0) == [], "one at a time"
    give(plan, again, 1.01)
    assert [(ask.peer, ask.first) for ask in asks(plan, 1.02)] == [("a", 2)]
    assert plan.left == 1


def test_a_chunk_that_comes_twice_is_no_fault() -> None:
    plan, b = endgame()
    give(plan, asks(plan, 1.0)[0], 1.01)
    give(plan, b, 1.02, 1)
    assert plan.is_done
    assert not plan.arrived("b", b.request, 3, 1.1)
    assert plan.wasted == 1 and plan.faults == {} and plan.came == {"a": 3, "b": 1}


@pytest.mark.parametrize("code", list(BlobCode))
def test_refusals(code: BlobCode) -> None:
    plan, (a,) = started("a", chunks=4)
    give(plan, a, 0.1, 1)
    plan.refused("a", a.request, code, 0.2)
    if code is BlobCode.BUSY:
        assert plan.steps(0.3) == [] and not plan.is_stuck
        assert next(ask.first for ask in asks(plan, 0.2 + blob_fetch.BUSY_REST_S)) == 1
    elif code is BlobCode.NOT_HELD:
        assert plan.steps(0.3) == [] and plan.is_stuck and plan.peers() == ("a",)
    else:
        assert drops(plan) == [("a", Fault.REFUSED)] and not plan.faults["a"].fault.is_guilt


def test_who_is_busy_for_ever_is_dropped() -> None:
    plan, said = started("a", chunks=1)
    now_s = 0.0
    for _ in range(blob_fetch.BUSY_MAX + 1):
        assert plan.peers() == ("a",)
        plan.refused("a", said[0].request, BlobCode.BUSY, now_s)
        now_s += blob_fetch.BUSY_REST_S
        said = asks(plan, now_s)
    assert plan.faults["a"].fault is Fault.REFUSED and plan.is_stuck


def test_refusing_what_it_was_not_asked_is_a_breach() -> None:
    plan, (a,) = started("a")
    plan.refused("a", a.request + 1, BlobCode.BUSY, 0.1)
    assert drops(plan) == [("a", Fault.BREACH)]


def test_a_peer_is_asked_for_what_it_holds() -> None:
    plan = BlobFetch(10)
    plan.joined("a", [index in (3, 4, 8) for index in range(10)], 0.0)
    assert [(ask.first, ask.count) for ask in asks(plan)] == [(3, 2), (8, 1)]
    assert not plan.is_stuck


def test_sources_are_asked_for_what_no_peer_has() -> None:
    plan = BlobFetch(4)
    plan.joined(SOURCES, None, 0.0)
    plan.joined("a", [True, True, False, True], 0.0)
    *of_a, of_sources = asks(plan)
    assert [(ask.peer, ask.first, ask.count) for ask in of_a] == [("a", 0, 2), ("a", 3, 1)]
    assert (of_sources.peer, of_sources.first, of_sources.count) == (SOURCES, 2, 1)
    plan.lost("a", "gone")
    assert asks(plan, 0.1) == [], "one request of theirs at a time"
    give(plan, of_sources, 0.01)
    assert [(ask.peer, ask.first, ask.count) for ask in asks(plan, 0.1)] == [(SOURCES, 0, 2)]


def test_stuck_is_when_nobody_has_the_rest() -> None:
    plan = BlobFetch(2)
    assert plan.is_stuck
    plan.joined("a", [True, False], 0.0)
    assert not plan.is_stuck
    (ask,) = asks(plan)
    give(plan, ask, 0.1)
    assert plan.is_stuck and not plan.is_done


@pytest.mark.parametrize(
    "votes, stored, chosen",
    [
        ({}, "", None),
        ({"a": "x"}, "", "x"),
        ({"a": "x", "b": "y", "c": "y"}, "", "y"),
        ({"a": "y", "b": "x"}, "", "x"),
        ({"a": "y", "b": "x"}, "y", "y"),
        ({"a": "y", "b": "x", "c": "x"}, "y", "x"),
        ({"a": "x"}, "z", "x"),
    ],
)
def test_the_tree_that_most_name(votes: dict[str, str], stored: str, chosen: str | None) -> None:
    assert choose_root(votes, stored) == chosen


# -- whole fetches


@dataclass(eq=False)
class SimPeer:
    """``chunk_s``: to send one; from ``dies_s`` on it is gone; ``lies`` of its chunks are bad; ``stops_at`` chunks it stands still."""

    name: str
    chunk_s: float
    held: list[bool] | None = None
    dies_s: float = float("inf")
    lies: float = 0.0
    stops_at: int = 10**9
    queue: list[tuple[int, int]] = field(default_factory=list)
    is_sending: bool = False
    sent: int = 0
    lied: bool = False


class Sim:
    """Peers that send one chunk after another; every chunk that the plan is told of is good or bad as it came."""

    def __init__(self, chunks: int, peers: list[SimPeer], seed: int) -> None:
        self.random = random.Random(seed)
        self.plan = BlobFetch(chunks)
        self.peers = {peer.name: peer for peer in peers}
        self.stored: set[int] = set()
        self.events: list[tuple[float, int, str, str]] = []
        self.count = 0
        self.now_s = 0.0

    def later(self, delay_s: float, what: str, name: str) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.now_s + delay_s, self.count, what, name))

    def run(self, until_s: float = 3600.0) -> None:
        for peer in self.peers.values():
            self.plan.joined(peer.name, peer.held, 0.0)
            if peer.dies_s < until_s:
                self.later(peer.dies_s, "die", peer.name)
        self.later(0.0, "tick", "")
        while not self.plan.is_done and not self.plan.is_stuck and self.now_s < until_s:
            self.now_s, _, what, name = heapq.heappop(self.events)
            getattr(self, what)(name)
            self.act()

    def act(self) -> None:
        for step in self.plan.steps(self.now_s):
            peer = self.peers[step.peer]
            if isinstance(step, Drop):
                peer.queue.clear()
                continue
            peer.queue += [(step.request, index) for index in range(step.first, step.first + step.count)]
            self.send(peer)

    def send(self, peer: SimPeer) -> None:
        if peer.queue and not peer.is_sending and peer.sent < peer.stops_at and self.now_s < peer.dies_s:
            peer.is_sending = True
            self.later(peer.chunk_s * self.random.uniform(0.7, 1.4), "came", peer.name)

    def tick(self, name: str) -> None:
        self.later(0.1, "tick", "")

    def die(self, name: str) -> None:
        self.plan.lost(name, "died")
        self.peers[name].queue.clear()

    def came(self, name: str) -> None:
        peer = self.peers[name]
        peer.is_sending = False
        if not peer.queue or self.now_s >= peer.dies_s:
            return
        request, index = peer.queue.pop(0)
        peer.sent += 1
        assert peer.held is None or peer.held[index], "asked for what it does not hold"
        if self.plan.arrived(name, request, index, self.now_s):
            if self.random.random() < peer.lies:
                peer.lied = True
                self.plan.bad(name, index)
            else:
                self.stored.add(index)
                self.plan.verified(name, index)
        self.plan.ready(name, self.now_s)
        self.send(peer)


@pytest.mark.parametrize("seed", range(60))
def test_any_mixture_with_one_honest_peer_ends_well(seed: int) -> None:
    chance = random.Random(seed)
    chunks = chance.choice([1, 2, 7, 98, 500])
    peers = [SimPeer("honest", chance.uniform(0.005, 0.2))]
    for number in range(chance.randrange(6)):
        peer = SimPeer(f"p{number}", chance.choice([0.003, 0.01, 0.1, 1.0, 5.0]))
        if chance.random() < 0.3:
            peer.lies = chance.choice([0.02, 0.5, 1.0])
        if chance.random() < 0.3:
            peer.dies_s = chance.uniform(0.0, 3.0)
        if chance.random() < 0.2:
            peer.stops_at = chance.randrange(20)
        if chance.random() < 0.3:
            peer.held = [chance.random() < 0.5 for _ in range(chunks)]
        peers.append(peer)
    sim = Sim(chunks, peers, seed)
    sim.run()
    assert sim.plan.is_done and sim.stored == set(range(chunks))
    assert "honest" not in sim.plan.faults
    guilty = {name for name, drop in sim.plan.faults.items() if drop.fault.is_guilt}
    assert guilty == {peer.name for peer in peers if peer.lied}, "exactly who lied is blamed"
    alone_s = chunks * peers[0].chunk_s * 1.4
    assert sim.now_s <= alone_s + blob_fetch.STALL_S + 1.0, "company costs no more than one who stands still"
    assert sum(sim.plan.came.values()) == chunks


@pytest.mark.parametrize("seed", range(10))
def test_equal_peers_share_the_work(seed: int) -> None:
    peers = [SimPeer(f"p{number}", 0.02) for number in range(4)]
    sim = Sim(400, peers, seed)
    sim.run()
    assert sim.now_s < 1.2 * 400 * 0.02 * 1.05 / 4
    assert min(sim.plan.came.values()) > 80 and sim.plan.wasted <= 4


@pytest.mark.parametrize("seed", range(10))
def test_a_fast_and_a_slow_peer_share_by_speed(seed: int) -> None:
    sim = Sim(400, [SimPeer("fast", 0.01), SimPeer("slow", 0.09)], seed)
    sim.run()
    assert sim.now_s < 400 / (1 / 0.0105 + 1 / 0.0945) * 1.15
    assert sim.plan.came["slow"] >= 20 and sim.plan.faults == {}


@pytest.mark.parametrize("seed", range(10))
def test_nobody_has_everything_and_together_they_do(seed: int) -> None:
    chance = random.Random(seed)
    first = [chance.random() < 0.5 for _ in range(200)]
    sim = Sim(200, [SimPeer("a", 0.02, first), SimPeer("b", 0.02, [not one for one in first])], seed)
    sim.run()
    assert sim.plan.is_done and sim.plan.came["a"] == sum(first)


def test_the_same_events_give_the_same_steps() -> None:
    def run() -> tuple[float, dict[str, int]]:
        sim = Sim(300, [SimPeer("a", 0.02, lies=0.01), SimPeer("b", 0.03, dies_s=2.0), SimPeer("c", 0.05)], 3)
        sim.run()
        return sim.now_s, dict(sim.plan.came)

    assert run() == run()


def test_a_large_blob_is_planned_quickly() -> None:
    """A blob of the greatest size and a peer that holds next to nothing of it: a step looks for work once, not each time."""
    plan = BlobFetch(limits.BLOB_BYTES_MAX // limits.BLOB_CHUNK_BYTES)
    held = [False] * plan.chunks
    plan.joined("a", None, 0.0)
    plan.joined("nothing", held, 0.0)
    for _ in range(2000):
        plan.steps(0.0)
    assert plan._peers["nothing"].found_nothing_at == plan._returns


# Peers that are slow together


def test_sources_help_out_while_the_peers_together_are_slow() -> None:
    plan = BlobFetch(100)
    plan.joined("a", None, 0.0)
    plan.joined(SOURCES, None, 0.0)
    (of_a,) = asks(plan)
    assert of_a.peer == "a"
    assert asks(plan, blob_fetch.SOURCES_AFTER_S - 0.1) == [], "it has not had its time yet"
    (of_sources,) = asks(plan, blob_fetch.SOURCES_AFTER_S + 0.1)
    assert (of_sources.peer, of_sources.first) == (SOURCES, FIRST), "behind what the slow one owes"
    assert asks(plan, blob_fetch.SOURCES_AFTER_S + 0.2) == [], "one request at a time"
    now_s = blob_fetch.SOURCES_AFTER_S + 0.3
    give(plan, of_sources, now_s)
    for turn in range(of_a.count):  # the peer has found its feet
        assert plan.arrived("a", of_a.request, turn, now_s)
        plan.verified("a", turn)
        plan.ready("a", now_s)
    for _ in range(20):
        for ask in asks(plan, now_s):
            if ask.peer == "a":
                for index in range(ask.first, ask.first + ask.count):
                    now_s += 0.01
                    plan.arrived("a", ask.request, index, now_s)
                    plan.verified("a", index)
                    plan.ready("a", now_s)
            else:
                give(plan, ask, now_s)
    assert plan.is_done and plan.came["a"] > 50, "then it is asked, and the sources are left in peace"


def test_quick_peers_need_no_help() -> None:
    plan = BlobFetch(500)
    plan.joined("a", None, 0.0)
    plan.joined(SOURCES, None, 0.0)
    now_s = 0.0
    while not plan.is_done:
        for ask in asks(plan, now_s):
            assert ask.peer == "a"
            for index in range(ask.first, ask.first + ask.count):
                now_s += 0.05
                plan.arrived("a", ask.request, index, now_s)
                plan.verified("a", index)
                plan.ready("a", now_s)
    assert now_s > 2 * blob_fetch.SOURCES_AFTER_S
