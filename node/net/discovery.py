"""How a node finds peers and keeps them: bootstrap addresses, peers remembered on disk, the LAN, and redialling with backoff.

Theory of operation. Three sources name peers: the configuration, ``peers.json`` of the last run, and mDNS. Peers to *hold* are dialled
again for as long as the node lives, at most about a second apart, so that a peer that returns is back within two. Of the others the
node keeps PEERS_WANTED connections, chosen at random, each failure doubling the pause before that peer is tried again.

What is remembered is only where peers were; who they are Noise proves at every dial, so a forged entry costs one failed dial.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from node.datadir import write_atomically
from node.net.host import Host, PeerConnected, split_address
from node.net.mdns import FoundPeer, MdnsSocketError, serve_mdns
from protocol import checks, limits
from protocol.errors import ConfigError, LinkLost

log = logging.getLogger(__name__)

_FORMAT = 1
_HELD_DIAL_TIMEOUT_S = 4.0
_LOOK_ROUND_S = 1.0
_AGAIN_S = 5.0  # a peer that hangs up on us is not dialled again before


def backoff_s(attempt: int, rng: random.Random, max_s: float = limits.RECONNECT_MAX_S) -> float:
    """Pause before dial number ``attempt`` + 1 (0: the first failed), in seconds.

    Doubles from RECONNECT_MIN_S to ``max_s``; the upper half is left to chance, so that peers which lost the same node do not all
    come back in the same instant.
    """
    doubled = limits.RECONNECT_MIN_S * 2.0 ** min(attempt, 32)
    return min(doubled, max_s) * (0.5 + 0.5 * rng.random())


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """Where a peer was reached last; ``seen_s`` is Unix time in seconds."""

    peer_id: str
    addresses: tuple[str, ...]
    seen_s: float

    def __post_init__(self) -> None:
        checks.peer_id("peer_id", self.peer_id)
        checks.in_range("seen_s", self.seen_s, 0.0, 1e12)
        if not 0 < len(self.addresses) <= limits.AD_ADDRESSES_MAX:
            raise ValueError(f"a peer has 1 to {limits.AD_ADDRESSES_MAX} addresses")
        for address in self.addresses:
            split_address(f"{address}/p2p/{self.peer_id}")


class PeerBook:
    """At most PEERS_REMEMBERED_MAX peers; the one that was not seen for longest goes first."""

    def __init__(self, peers: Iterable[KnownPeer] = ()) -> None:
        self._peers: dict[str, KnownPeer] = {}
        self.changed = False
        for peer in peers:
            self._put(peer)

    def __len__(self) -> int:
        return len(self._peers)

    def __repr__(self) -> str:
        return f"<PeerBook, {len(self)} peers{', changed' if self.changed else ''}>"

    def get(self, peer_id: str) -> KnownPeer | None:
        return self._peers.get(peer_id)

    def peers(self) -> list[KnownPeer]:
        return list(self._peers.values())

    def note(self, peer: KnownPeer) -> None:
        self._put(peer)
        self.changed = True

    def _put(self, peer: KnownPeer) -> None:
        self._peers[peer.peer_id] = peer
        if len(self._peers) > limits.PEERS_REMEMBERED_MAX:
            del self._peers[min(self._peers.values(), key=lambda one: one.seen_s).peer_id]

    def to_json(self) -> bytes:
        listed = [{"peer_id": p.peer_id, "addresses": p.addresses, "seen_s": round(p.seen_s)} for p in self.peers()]
        return json.dumps({"format": _FORMAT, "peers": listed}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> PeerBook:
        """Raises ValueError for a file that is no peer book; a bad entry in a good file is left out."""
        content = json.loads(data)
        if (
            not isinstance(content, dict)
            or content.get("format") != _FORMAT
            or not isinstance(content.get("peers"), list)
        ):
            raise ValueError(f"it is no list of peers in format {_FORMAT}")
        return cls(peer for entry in content["peers"] if (peer := _known_peer(entry)) is not None)


def _known_peer(entry: Any) -> KnownPeer | None:
    try:
        return KnownPeer(entry["peer_id"], tuple(entry["addresses"]), float(entry["seen_s"]))
    except (KeyError, TypeError, ValueError, ConfigError):
        return None


def _usable(peer_id: str, addresses: Sequence[str]) -> tuple[str, ...]:
    usable = []
    for address in dict.fromkeys(address.partition("/p2p/")[0] for address in addresses):
        try:
            split_address(f"{address}/p2p/{peer_id}")
        except ConfigError:
            continue
        usable.append(address)
    return tuple(usable[: limits.AD_ADDRESSES_MAX])


def load_peers(path: Path) -> PeerBook:
    """The book of the last run; an empty one, with a warning, when the file cannot be read. Never fails."""
    try:
        with path.open("rb") as file:
            data = file.read(limits.PEERS_FILE_BYTES_MAX + 1)
        if len(data) > limits.PEERS_FILE_BYTES_MAX:
            raise ValueError(f"it is over {limits.PEERS_FILE_BYTES_MAX} bytes")
        return PeerBook.from_json(data)
    except FileNotFoundError:
        return PeerBook()
    except (OSError, ValueError, RecursionError) as error:
        log.warning("remembered peers in %s are left aside: %s", path, error)
        return PeerBook()


class Discovery:
    """Finds peers and keeps connections to them while ``run`` runs.

    ``hold`` are addresses (ending in /p2p/PEER_ID) whose connection is restored whenever it is lost; ``bootstrap`` are addresses that
    are dialled like remembered peers. ``found`` is told of each peer that mDNS names.
    """

    def __init__(
        self,
        host: Host,
        peers_file: Path | None,
        *,
        network: str = "",
        role: str = "",
        bootstrap: Sequence[str] = (),
        hold: Sequence[str] = (),
        mdns: bool = False,
        rng: random.Random,
        found: Callable[[FoundPeer], None] | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.book = load_peers(peers_file) if peers_file is not None else PeerBook()
        self._host, self._file = host, peers_file
        self._network, self._role, self._mdns = network, role, mdns
        self._rng, self._now_s, self._found = rng, now_s, found
        self._held = [split_address(address) for address in hold]
        self._failures: dict[str, int] = {}
        self._not_before_s: dict[str, float] = {}  # trio time
        for known in self.book.peers():
            host.remember(known.peer_id, known.addresses)
        for transport, peer_id in map(split_address, bootstrap):
            self.learn(peer_id, (transport,))

    def __repr__(self) -> str:
        return f"<Discovery {self.book!r}, holds {len(self._held)}, {len(self._failures)} failing>"

    def learn(self, peer_id: str, addresses: Sequence[str]) -> None:
        """Addresses of a peer that somebody named; dialled when connections are wanted. Malformed ones are left out."""
        transports = _usable(peer_id, addresses)
        if peer_id == self._host.peer_id or not transports:
            return
        self._host.remember(peer_id, transports)
        known = self.book.get(peer_id)
        if known is None or known.addresses != transports:
            self.book.note(KnownPeer(peer_id, transports, self._now_s()))
            self._not_before_s.pop(peer_id, None)

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled, then saves what it knows."""
        try:
            async with trio.open_nursery() as nursery:
                for transport, peer_id in self._held:
                    nursery.start_soon(self._hold, peer_id, transport)
                nursery.start_soon(self._note_connected)
                nursery.start_soon(self._look_round)
                nursery.start_soon(self._save_regularly)
                if self._mdns:
                    nursery.start_soon(self._watch_lan)
                task_status.started()
        finally:
            self._save()

    # -- holding

    async def _hold(self, peer_id: str, transport: str) -> None:
        attempt = 0
        while True:
            try:
                addresses = dict.fromkeys((transport, *self._host.remembered(peer_id)))
                self._host.remember(peer_id, tuple(addresses))
                await self._host.connect(peer_id, _HELD_DIAL_TIMEOUT_S)
                if attempt:
                    log.info("connected to %s again", peer_id)
                attempt = 0
                await self._host.wait_lost(peer_id)
                log.info("lost %s; redialling", peer_id)
            except LinkLost as error:
                if attempt == 0:
                    log.warning("%s; trying again until it answers", error)
                attempt += 1
            await trio.sleep(backoff_s(attempt, self._rng, limits.RECONNECT_HELD_MAX_S))

    # -- looking round

    async def _look_round(self) -> None:
        while True:
            candidate = self._candidate()
            if candidate is None:
                await trio.sleep(_LOOK_ROUND_S)
                continue
            try:
                await self._host.connect(candidate)
                self._failures.pop(candidate, None)
                self._not_before_s[candidate] = trio.current_time() + _AGAIN_S
            except LinkLost:
                attempt = self._failures.get(candidate, 0)
                self._failures[candidate] = attempt + 1
                self._not_before_s[candidate] = trio.current_time() + backoff_s(attempt, self._rng)

    def _candidate(self) -> str | None:
        """A peer to dial now, or None when there are enough connections or nobody is due."""
        if len(self._host.connected_peers()) >= limits.PEERS_WANTED:
            return None
        now_s = trio.current_time()
        due = [
            peer.peer_id
            for peer in self.book.peers()
            if not self._host.is_connected(peer.peer_id)
            and peer.peer_id != self._host.peer_id
            and self._not_before_s.get(peer.peer_id, 0.0) <= now_s
        ]
        return self._rng.choice(due) if due else None

    async def _note_connected(self) -> None:
        with self._host.peer_events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    addresses = self._host.remembered(event.peer_id)
                    if addresses:
                        self.book.note(KnownPeer(event.peer_id, addresses, self._now_s()))

    # -- disk

    async def _save_regularly(self) -> None:
        while True:
            await trio.sleep(limits.PEERS_SAVE_INTERVAL_S)
            self._save()

    def _save(self) -> None:
        """Some hundred lines, so it is not worth a thread."""
        if self._file is None or not self.book.changed:
            return
        try:
            write_atomically(self._file, self.book.to_json())
            self.book.changed = False
        except OSError as error:
            log.warning("cannot remember peers in %s: %s", self._file, error.strerror)

    # -- LAN

    async def _watch_lan(self) -> None:
        try:
            await serve_mdns(self._host.peer_id, self._host.addresses(), self._network, self._role, self._hear_lan)
        except MdnsSocketError as error:
            log.warning("mDNS is off, peers on this LAN are not found by themselves: %s", error)

    def _hear_lan(self, peer: FoundPeer) -> None:
        if self._network and peer.network and peer.network != self._network:
            return
        if self._host.remembered(peer.peer_id) != peer.addresses:
            log.info("found %s on this LAN", peer.peer_id)
        self.learn(peer.peer_id, peer.addresses)
        if self._found is not None:
            self._found(peer)
