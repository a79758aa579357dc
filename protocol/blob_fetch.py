"""Which chunk of a blob to ask from which peer next.

Theory of operation. The shell tells what happens (a peer joined, a chunk arrived, was found good or bad, a link was lost) and asks
``steps`` what to do. Peers that hold the blob are asked in parallel, lowest chunks first, each for a window of chunks that is as long as
it can send in WINDOW_S at the speed that was measured; towards the end windows shrink to a fair share of what is left. When nothing is
left to ask for and somebody is idle, chunks whose sender is much slower than the idle one are asked for a second time (endgame).

Rules.
- A peer answers in the order of the requests, so what arrives is the head of what it owes; anything else is a breach and ends it.
- A bad chunk blames exactly the peer that sent it. It is not asked again during this fetch, and what it owed is asked elsewhere.
- Only the peer's own time is measured: from when the shell was ready to hear it (``ready``) to when a chunk came.
- The publisher's sources are a peer of their own, SOURCES, asked only for chunks that no peer can give, or for any while the peers
  together are slow.
- A chunk counts as there when it was verified, never before.

Time (seconds on any clock that only rises) is an argument; there is no chance.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from protocol import limits
from protocol.blobs import BlobCode

SOURCES = "sources"  # no peer id looks like that

WINDOW_S = 0.25  # longer than a round trip to the other end of the world
WINDOW_FIRST_CHUNKS = 4
WINDOW_CHUNKS_MAX = 64
STALL_S = 10.0  # a peer that owes us a chunk and sends none for so long is dropped
SLOW_AFTER_S = 5.0
SLOW_FACTOR = 32.0  # and one that is so much slower than the fastest
SOURCES_AFTER_S = 2.0  # peers have so long to show how fast they are
SOURCES_BELOW_CHUNKS_S = 2.0  # peers that together give fewer chunks in a second are helped out
BUSY_REST_S = 1.0
BUSY_MAX = 5  # a peer that says so more often in a row is dropped
ENDGAME_FACTOR = 2.0  # a chunk is asked for twice where the second peer is so much sooner
ENDGAME_GAIN_S = 0.2  # and at least so much
_SPEED_WEIGHT = 0.25  # of the newest chunk in the measured speed
_MISSING, _ASKED, _THERE = 0, 1, 2


class Fault(StrEnum):
    """Why a peer is no longer asked. ``lie`` and ``breach`` are its guilt."""

    LIE = "lie"
    BREACH = "breach"
    STALLED = "stalled"
    SLOW = "slow"
    LOST = "lost"
    REFUSED = "refused"

    @property
    def is_guilt(self) -> bool:
        return self in (Fault.LIE, Fault.BREACH)


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask ``peer`` for these chunks."""

    peer: str
    request: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Drop:
    """End the stream to ``peer``."""

    peer: str
    fault: Fault
    detail: str


Step = Ask | Drop


def choose_root(votes: Mapping[str, str], stored: str = "") -> str | None:
    """Which tree to fetch by, where only the SHA-256 of the whole is known: the root that most peers name; among equals the one that a
    broken-off download has, then the smallest. ``votes``: root by peer."""
    counts = Counter(votes.values())
    return min(counts, key=lambda root: (-counts[root], root != stored, root), default=None)


@dataclass(eq=False, slots=True)
class _Peer:
    """``held``: a byte a chunk, not 0 where it has it; None for all. ``owed``: request and chunk, in the order in which they come."""

    name: str
    held: bytearray | None
    joined_s: float
    since_s: float
    owed: deque[tuple[int, int]] = field(default_factory=deque)
    is_heard: bool = True
    chunk_s: float = 0.0
    came: int = 0
    busy: int = 0
    rests_until_s: float = 0.0
    found_nothing_at: int = -1

    def has(self, index: int) -> bool:
        return self.held is None or bool(self.held[index])

    def requests(self) -> int:
        """How many are open."""
        return len({request for request, _ in self.owed})

    def pace_s(self, now_s: float) -> float:
        """Seconds a chunk, as far as one can tell now."""
        waits_s = now_s - self.since_s if self.owed and self.is_heard else 0.0
        return max(self.chunk_s, waits_s)


class BlobFetch:
    """One blob of ``chunks`` chunks, of which ``there`` are here already."""

    def __init__(self, chunks: int, there: Iterable[int] = ()) -> None:
        self.chunks = chunks
        self._state = bytearray(chunks)
        for index in there:
            self._state[index] = _THERE
        self.left = self._state.count(_MISSING)
        self._missing = self.left
        self._lowest = 0  # none below is missing
        self._returns = 0  # how often a chunk became missing again
        self._under_way: Counter[int] = Counter()  # by chunk: who owes it, and how often it is being verified
        self._peers: dict[str, _Peer] = {}
        self._pending: list[Step] = []
        self._requests = 0
        self.faults: dict[str, Drop] = {}  # the last of each peer that was dropped
        self.came: Counter[str] = Counter()  # good chunks, by peer
        self.wasted = 0  # chunks that came twice
        self._are_slow = False  # the peers together

    def __repr__(self) -> str:
        return f"<BlobFetch: {self.left} of {self.chunks} chunks left, {len(self._peers)} peers>"

    @property
    def is_done(self) -> bool:
        return self.left == 0

    @property
    def is_stuck(self) -> bool:
        """Whether nothing is under way and nobody here holds what is left; a peer that rests is waited for."""
        if self.is_done or self._under_way:
            return False
        return not any(self._run(peer, 1) for peer in self._peers.values())

    def peers(self) -> Sequence[str]:
        return tuple(self._peers)

    def window(self, name: str) -> int:
        """How many chunks the peer may owe us."""
        return self._window(self._peers[name])

    # -- what happened

    def joined(self, name: str, held: Sequence[bool] | None, now_s: float) -> bool:
        """A peer that holds these chunks (None: all). False where it is here already, or was dropped by its own guilt."""
        if name in self._peers or (name in self.faults and self.faults[name].fault.is_guilt):
            return False
        self._peers[name] = _Peer(name, None if held is None else bytearray(held), now_s, now_s)
        return True

    def lost(self, name: str, detail: str) -> None:
        """The link to the peer has ended; it may join again."""
        self._drop(name, Fault.LOST, detail, tell=False)

    def breached(self, name: str, detail: str) -> None:
        """The peer said something that the protocol forbids."""
        self._drop(name, Fault.BREACH, detail)

    def arrived(self, name: str, request: int, index: int, now_s: float) -> bool:
        """A chunk came, not verified yet. Whether it is worth verifying; then ``verified`` or ``bad`` follows."""
        peer = self._peers.get(name)
        if peer is None:
            return False
        if not peer.owed or peer.owed[0] != (request, index):
            owed = f"chunk {peer.owed[0][1]} of request {peer.owed[0][0]}" if peer.owed else "nothing"
            self._drop(name, Fault.BREACH, f"sent chunk {index} of request {request}, but owed {owed}")
            return False
        peer.owed.popleft()
        took_s = now_s - peer.since_s
        peer.chunk_s = took_s if not peer.came else peer.chunk_s + _SPEED_WEIGHT * (took_s - peer.chunk_s)
        peer.came, peer.busy, peer.since_s, peer.is_heard = peer.came + 1, 0, now_s, False
        if self._state[index] == _THERE:
            self.wasted += 1
            return False
        return True

    def ready(self, name: str, now_s: float) -> None:
        """What came from the peer is out of the way: from now on it is the peer's time that runs."""
        peer = self._peers.get(name)
        if peer is not None and not peer.is_heard:
            peer.is_heard, peer.since_s = True, now_s

    def verified(self, name: str, index: int) -> None:
        """The chunk is good and stored."""
        if self._state[index] == _THERE:
            self.wasted += 1
            return
        if self._state[index] == _MISSING:
            self._missing -= 1
        self._state[index] = _THERE
        self._under_way.pop(index, None)
        self.left -= 1
        self.came[name] += 1

    def bad(self, name: str, index: int) -> None:
        """The chunk is not the blob's: the peer that sent it is to blame."""
        self._release(index)
        self._drop(name, Fault.LIE, f"sent a chunk {index} that is not the blob's")

    def refused(self, name: str, request: int, code: BlobCode, now_s: float) -> None:
        """The peer says no to the rest of its oldest request."""
        peer = self._peers.get(name)
        if peer is None:
            return
        if not peer.owed or peer.owed[0][0] != request:
            self._drop(name, Fault.BREACH, f"refused request {request}, which is not the next one that it owes")
            return
        indices = []
        while peer.owed and peer.owed[0][0] == request:
            indices.append(peer.owed.popleft()[1])
        peer.since_s = now_s
        for index in indices:
            self._release(index)
        if code is BlobCode.NOT_HELD:
            peer.held = peer.held or bytearray(b"\x01" * self.chunks)
            for index in indices:
                peer.held[index] = 0
        elif code is BlobCode.BUSY and peer.busy < BUSY_MAX:
            peer.busy += 1
            peer.rests_until_s = now_s + BUSY_REST_S
        else:
            self._drop(name, Fault.REFUSED, f"refused: {code}")

    # -- what to do

    def steps(self, now_s: float) -> list[Step]:
        """What the shell has to do now. Call it after each event, and a few times a second."""
        self._drop_slow(now_s)
        self._are_slow = self._find_slow(now_s)
        order = sorted(self._peers.values(), key=lambda peer: (peer.name == SOURCES, peer.chunk_s, peer.name))
        for peer in order:
            if now_s < peer.rests_until_s or (peer.name == SOURCES and peer.owed):
                continue
            self._fill(peer, now_s)
        for peer in order:
            if not peer.owed and peer.came and peer.name != SOURCES and now_s >= peer.rests_until_s:
                self._ask_again(peer, now_s)
        steps, self._pending = self._pending, []
        return steps

    def _fill(self, peer: _Peer, now_s: float) -> None:
        window = self._window(peer)
        while self._missing and window - len(peer.owed) >= max(1, window // 2) and peer.requests() < limits.BLOB_REQUESTS_OPEN_MAX:
            run = self._run(peer, min(window - len(peer.owed), limits.BLOB_REQUEST_CHUNKS_MAX))
            if not run:
                return
            self._ask(peer, run, now_s)
            if peer.name == SOURCES:
                return  # the next peer that joins may have the rest

    def _window(self, peer: _Peer) -> int:
        if not peer.came:
            by_speed = WINDOW_FIRST_CHUNKS
        else:  # at most twice what was good of what it sent
            grown = min(WINDOW_CHUNKS_MAX, WINDOW_FIRST_CHUNKS + 2 * self.came[peer.name])
            by_speed = min(grown, int(WINDOW_S / peer.chunk_s)) if peer.chunk_s > 0 else grown
        others = len(self._peers.keys() - {SOURCES, peer.name})
        share = -(-(self._missing + len(peer.owed)) // (2 * others + 2)) if others else by_speed
        return max(1, min(by_speed, max(2, share)))

    def _run(self, peer: _Peer, count: int) -> range:
        """The lowest chunks in a row that are to be asked for and that the peer holds."""
        if peer.found_nothing_at == self._returns:
            return range(0)
        state = self._state
        first = state.find(_MISSING, self._lowest)
        self._lowest = first if first >= 0 else self.chunks
        while first >= 0 and not self._may_ask(peer, first):
            first = state.find(_MISSING, first + 1)
        if first < 0:
            if peer.name != SOURCES:
                peer.found_nothing_at = self._returns
            return range(0)
        end = first + 1
        while end < self.chunks and end - first < count and state[end] == _MISSING and self._may_ask(peer, end):
            end += 1
        return range(first, end)

    def _may_ask(self, peer: _Peer, index: int) -> bool:
        if peer.name != SOURCES:
            return peer.has(index)
        return self._are_slow or not any(other.has(index) for other in self._peers.values() if other is not peer)

    def _ask(self, peer: _Peer, run: range, now_s: float) -> None:
        self._requests += 1
        if not peer.owed:
            peer.since_s = now_s
        for index in run:
            if self._state[index] == _MISSING:
                self._missing -= 1
                self._state[index] = _ASKED
            self._under_way[index] += 1
            peer.owed.append((self._requests, index))
        self._pending.append(Ask(peer.name, self._requests, run.start, len(run)))

    def _ask_again(self, idle: _Peer, now_s: float) -> None:
        """Endgame: the chunk that would come last, if the idle peer is much sooner with it."""
        worst: tuple[float, int] | None = None
        for peer in self._peers.values():
            for position, (_, index) in enumerate(peer.owed, 1):
                expected_s = position * peer.pace_s(now_s)
                if self._state[index] == _ASKED and self._under_way[index] == 1 and idle.has(index):
                    worst = max(worst, (expected_s, index)) if worst is not None else (expected_s, index)
        if worst is None:
            return
        expected_s, index = worst
        if expected_s > ENDGAME_FACTOR * idle.chunk_s and expected_s - idle.chunk_s > ENDGAME_GAIN_S:
            self._ask(idle, range(index, index + 1), now_s)

    def _find_slow(self, now_s: float) -> bool:
        """Whether the peers, those that have had time to show it, give less than SOURCES_BELOW_CHUNKS_S together."""
        peers = [peer for peer in self._peers.values() if peer.name != SOURCES]
        if any(now_s - peer.joined_s < SOURCES_AFTER_S for peer in peers):
            return False
        paces_s = [peer.pace_s(now_s) for peer in peers if peer.came or peer.owed]
        if any(pace_s <= 0 for pace_s in paces_s):
            return False
        return sum(1 / pace_s for pace_s in paces_s) < SOURCES_BELOW_CHUNKS_S

    def _drop_slow(self, now_s: float) -> None:
        fastest = min((p for p in self._peers.values() if p.came and p.held is None), key=lambda p: p.chunk_s, default=None)
        for peer in list(self._peers.values()):
            if not peer.owed or not peer.is_heard or peer.name == SOURCES:
                continue
            if now_s - peer.since_s > STALL_S:
                self._drop(peer.name, Fault.STALLED, f"sent nothing for {STALL_S:g} s")
            elif fastest is None or fastest is peer or now_s - peer.joined_s < SLOW_AFTER_S:
                continue
            elif peer.pace_s(now_s) > SLOW_FACTOR * max(fastest.chunk_s, WINDOW_S / WINDOW_CHUNKS_MAX):
                self._drop(peer.name, Fault.SLOW, f"is {SLOW_FACTOR:g} times slower than another")

    def _drop(self, name: str, fault: Fault, detail: str, tell: bool = True) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            if name in self.faults and fault.is_guilt and not self.faults[name].fault.is_guilt:
                self.faults[name] = Drop(name, fault, detail)  # its link was lost before its last chunk was looked at
            return
        for _, index in peer.owed:
            self._release(index)
        drop = self.faults[name] = Drop(name, fault, detail)
        if tell:
            self._pending.append(drop)

    def _release(self, index: int) -> None:
        """One who owed the chunk does so no longer."""
        if self._state[index] == _THERE:
            return
        self._under_way[index] -= 1
        if self._under_way[index] > 0:
            return
        del self._under_way[index]
        self._state[index] = _MISSING
        self._missing += 1
        self._lowest = min(self._lowest, index)
        self._returns += 1
