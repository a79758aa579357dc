"""The role of a Coordinator: wires the libp2p host, the book and the streams to ``coordinator``, which decides."""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio

from coordinator.cache.service import AnswerCache
from coordinator.config import CoordinatorConfig
from coordinator.pipelines import Pipelines
from coordinator.ports import JobRun
from coordinator.server import CoordinatorServer, open_coordinator
from node import AGENT
from node.announce import AdsServer
from node.answer_embedder import AnswerEmbedder
from node.bookkeeper import BookKeeper, now_ms
from node.cargo_links import CargoLinks
from node.cargo_listing import CargoListing
from node.cargo_news import CargoNews
from node.catchup import CatchUp
from node.collector import set_for_long_service
from node.control import serve_control
from node.datadir import PEERS_FILE, DataDir
from node.direct_served import DirectServer
from node.greeting import exchange_hello
from node.holder import Links
from node.island import peers_json
from node.net.discovery import Discovery
from node.net.frames import FrameStream
from node.net.host import Host, PeerLost, open_host
from node.notice_store import NEWS_FOLDER
from node.ready import remove_ready, write_ready
from node.shipped import shipped_addresses
from node.signals import watch_signals
from node.spread import Spreader
from node.trust import check_delegation
from privacy.keys import NodeKey
from protocol import limits
from protocol.ads import sign_lost
from protocol.book import Book
from protocol.cargo_jobs import CargoInput
from protocol.direct import DESK, DESK_PROTOCOL, SETTLE, SETTLE_PROTOCOL
from protocol.errors import Code, LinkLost, Refused, RemoteProtocolError
from protocol.hold import HOLD, HOLD_PROTOCOL, DropShard, HoldProgress, HoldRefused, HoldShard, SetAsk, ShardHeld
from protocol.messages import ADS, ADS_PROTOCOL, PROTOCOL_VERSION, Hello, NodeRole
from protocol.shards import ShardManifest
from protocol.tickets import Delegation, network_id_of, sign_delegation

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoordinatorRole:
    data_dir: str
    http: CoordinatorConfig
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    bootstrap: tuple[str, ...] = ()
    mdns: bool = True
    ready_file: str | None = None
    manifests: Mapping[str, ShardManifest] = field(default_factory=dict)
    network_of: str | None = None  # data folder of a Coordinator whose network this one is to serve too
    cache_model: str = ""  # Cargo that ships and says which questions are alike; empty: only equal ones are


class NetworkPort:
    """``coordinator.ports.IslandPort`` over libp2p."""

    def __init__(
        self,
        host: Host,
        keeper: BookKeeper,
        links: Links,
        spreader: Spreader,
        key: NodeKey,
        hello: Callable[[], Hello],
    ) -> None:
        self._host, self._keeper, self._links, self._spreader, self._key = host, keeper, links, spreader, key
        self._hello = hello

    def book(self) -> Book:
        return self._keeper.book

    async def wait_book_changed(self) -> None:
        await self._keeper.wait_changed()

    @asynccontextmanager
    async def run_job(self, island: str, ticket: bytes, payload: bytes | CargoInput) -> AsyncIterator[JobRun]:
        entry = self._keeper.book.entries.get(island)
        if entry is not None and island not in self._host.connected_peers():
            self._host.remember(island, entry.ad.addresses)
        try:
            async with self._links.run_job(island, ticket, payload) as job:
                yield job
        except Refused as error:
            if error.code is Code.LINK_LOST and island not in self._host.connected_peers():
                self.lost(island)
            raise

    async def hold_shard(self, island: str, order: HoldShard, progress: Callable[[HoldProgress], None]) -> ShardHeld:
        async with self._ordered(island, order) as stream:
            return await self._wait_held(stream, progress)

    async def drop_shard(self, island: str, order: DropShard) -> None:
        async with self._ordered(island, order) as stream:
            answer = await stream.receive()
            if isinstance(answer, HoldRefused):
                raise Refused(answer.code, answer.message)

    async def set_ask(self, island: str, order: SetAsk) -> None:
        async with self._ordered(island, order) as stream:
            answer = await stream.receive()
            if isinstance(answer, HoldRefused):
                raise Refused(answer.code, answer.message)

    @asynccontextmanager
    async def _ordered(self, island: str, order: HoldShard | DropShard | SetAsk) -> AsyncIterator[FrameStream]:
        """The stream on which the Island answers an order. Raises Refused(LINK_LOST)."""
        entry = self._keeper.book.entries.get(island)
        if entry is not None and island not in self._host.connected_peers():
            self._host.remember(island, entry.ad.addresses)
        try:
            with trio.fail_after(limits.HELLO_TIMEOUT_S):
                stream = await self._host.open(island, HOLD_PROTOCOL, HOLD)
            async with stream:
                await exchange_hello(stream, self._hello())
                await stream.send(order)
                yield stream
        except (LinkLost, RemoteProtocolError, OSError, trio.TooSlowError) as error:
            raise Refused(Code.LINK_LOST, f"Island {island} does not take the order: {error or 'time-out'}") from error

    @staticmethod
    async def _wait_held(stream: FrameStream, progress: Callable[[HoldProgress], None]) -> ShardHeld:
        with trio.fail_after(limits.SHARD_LOAD_S):
            while True:
                message = await stream.receive()
                if isinstance(message, HoldProgress):
                    progress(message)
                elif isinstance(message, ShardHeld):
                    return message
                elif isinstance(message, HoldRefused):
                    raise Refused(message.code, message.message)
                else:
                    raise RemoteProtocolError(f"{type(message).__name__} is no answer to an order")

    def lost(self, peer: str) -> None:
        """Takes an Island out of the book and tells the network; it comes back by announcing itself anew."""
        lost = self._keeper.loss_of(peer)
        if lost is not None:
            log.info("Island %s is gone", peer)
            notice = sign_lost(lost, self._key)
            self._keeper.hear(notice)
            self._spreader.publish_nowait(notice)
        self._links.drop(peer, "its connection ended")


async def run_coordinator(role: CoordinatorRole) -> None:
    """Runs until a signal, then drains. Raises ConfigError when it cannot start."""
    data = DataDir.open(role.data_dir)
    with data.locked():
        if role.network_of:
            data.join(Path(role.network_of).expanduser())
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            await nursery.start(watch_signals, stop)
            async with open_host(data.key("identity").seed, role.listen) as host:
                await _Coordinator(role, data, host, stop).run()
            nursery.cancel_scope.cancel()


class _Coordinator:
    def __init__(self, role: CoordinatorRole, data: DataDir, host: Host, stop: trio.Event) -> None:
        self._role, self._data, self._host, self._stop = role, data, host, stop
        self._key, self._network_key = data.key("identity"), data.key("network")
        self._network = network_id_of(self._network_key.public_key)
        self._rng = random.Random(secrets.randbits(64))
        self._keeper = BookKeeper(self._network)
        self._keeper.trust(self._key.peer_id)
        self._spreader = Spreader(host, self._network, self._keeper)
        self._ads_server = AdsServer(
            self._keeper, self._hello, self._addresses, self._spreader.publish_nowait, self._meet
        )
        self._news = CargoNews(data.folder(NEWS_FOLDER), self._network)
        self._cargo_links = CargoLinks(
            host, self._news, self._network, self._hello, self._meet, self._rng, self._spreader.gossip
        )
        self._links: Links | None = None
        self._pipelines: Pipelines | None = None
        self._direct: DirectServer | None = None
        self._cache: AnswerCache | None = None
        self._embedder = AnswerEmbedder(role.cache_model) if role.cache_model else None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._links = Links(self._host, nursery, self._hello)
            port = NetworkPort(self._host, self._keeper, self._links, self._spreader, self._key, self._hello)
            self._host.set_handler(ADS_PROTOCOL, ADS, self._ads_server.serve)
            nursery.start_soon(self._keeper.run)
            nursery.start_soon(self._spreader.run)
            nursery.start_soon(self._cargo_links.run)
            nursery.start_soon(self._watch_peers, port)
            nursery.start_soon(CatchUp(self._host, self._keeper, self._hello, self._rng).run)
            discovery = self._discovery()
            self._keeper.met = lambda ad: discovery.learn(ad.peer, ad.addresses)
            await nursery.start(discovery.run)
            await nursery.start(serve_control, self._data, {"status": self.status, "peers": self.peers, "cache": self.cache})
            salt = self._data.secret("salt")
            async with open_coordinator(
                self._role.http,
                port,
                self._key,
                self._network,
                salt,
                self._well_known,
                self._role.manifests,
                self._host.round_trips_s,
                await trio.to_thread.run_sync(shipped_addresses),
                self._embedder,
                self._delegation,
            ) as server, self._listing(server).running():
                self._pipelines, self._cache = server.pipelines, server.cache
                self._direct = direct = DirectServer(server.direct, self._hello)
                self._host.set_handler(DESK_PROTOCOL, DESK, direct.serve_desk)
                self._host.set_handler(SETTLE_PROTOCOL, SETTLE, direct.serve_settle)
                set_for_long_service()
                self._say_ready(server)
                if self._embedder is not None:
                    nursery.start_soon(self._embedder.run)
                await self._stop.wait()
                remove_ready(self._role.ready_file)
                direct.draining = True
                await server.drain(limits.DRAIN_S)
            nursery.cancel_scope.cancel()

    def _discovery(self) -> Discovery:
        return Discovery(
            self._host,
            self._data.path / PEERS_FILE,
            network=self._network,
            role=NodeRole.COORDINATOR,
            bootstrap=self._role.bootstrap,
            mdns=self._role.mdns,
            rng=self._rng,
        )

    def _listing(self, server: CoordinatorServer) -> CargoListing:
        return CargoListing(server.registry, self._news, self._network, self._key, self._delegation, now_ms)

    def _delegation(self) -> bytes:
        expires_at_ms = now_ms() + int(limits.DELEGATION_LIFETIME_S * 1000)
        return sign_delegation(Delegation(self._network, self._key.peer_id, expires_at_ms), self._network_key)

    def _hello(self) -> Hello:
        return Hello(PROTOCOL_VERSION, NodeRole.COORDINATOR, self._network, AGENT, self._delegation())

    def _meet(self, hello: Hello, sender: str) -> None:
        """Another Coordinator of our network is believed when it says that an Island is gone. Raises RemoteProtocolError."""
        if hello.role is NodeRole.COORDINATOR:
            delegation = check_delegation(hello, sender, now_ms())
            if delegation.network == self._network:
                self._keeper.trust(sender)

    def _addresses(self) -> tuple[str, ...]:
        return tuple(self._host.addresses()[: limits.AD_ADDRESSES_MAX])

    def _well_known(self) -> dict[str, Any]:
        return {"peer_id": self._key.peer_id, "addresses": list(self._addresses()), "network": self._network}

    def _say_ready(self, server: CoordinatorServer) -> None:
        log.info(
            "ready: %s, network %s, Islands join through %s", server.url, self._network, ", ".join(self._addresses())
        )
        write_ready(
            self._role.ready_file, peer_id=self._key.peer_id, addresses=list(self._addresses()), http=server.url
        )

    async def _watch_peers(self, port: NetworkPort) -> None:
        async for event in self._host.peer_events():
            if isinstance(event, PeerLost):
                port.lost(event.peer_id)

    def status(self) -> Mapping[str, Any]:
        book = self._keeper.statistics()
        return {
            "role": "coordinator",
            "peer_id": self._key.peer_id,
            "addresses": list(self._addresses()),
            "network": self._network,
            "islands": book.islands,
            "pipelines": self._pipelines.status() if self._pipelines is not None else [],
            "direct": asdict(self._direct.counts) if self._direct is not None else {},
            "gossip": self._spreader.statistics(),
            "news": self._news.status(),
            "cache_model": self._embedder.statistics() if self._embedder is not None else {},
            "links": repr(self._links),
            "host": asdict(self._host.statistics()),
        }

    def cache(self) -> Mapping[str, Any]:
        """What ``cache stats`` shows: numbers and states, never a question or an answer."""
        if self._cache is None:
            return {"error": "the Coordinator is still being started"}
        told = self._cache.stats_json("")
        told.pop("own", None)  # of an account, which an operator is not
        return told

    def peers(self) -> Mapping[str, Any]:
        return peers_json(self._host, self._keeper)
