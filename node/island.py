"""The role of an Island: loads Cargos, advertises them, and serves jobs to whoever shows a ticket."""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import trio

from node import AGENT
from node.announce import AdsClient, AdSource, AdsServer, CoordinatorFinder, SignedAd
from node.blobs_served import BlobServer
from node.bookkeeper import BookKeeper, now_ms
from node.cargo_deck import Deck, open_deck
from node.cargo_links import CargoLinks
from node.cargo_news import CargoNews
from node.cargo_store import CargoStore, open_cargo_store
from node.cargos import ECHO, CargoSettings, engine_threads, load_cargos
from node.catchup import CatchUp
from node.claims import CLAIMS_FOLDER, Claims, SettleClient
from node.control import serve_control
from node.datadir import PEERS_FILE, DataDir
from node.gpus import detect_gpus
from node.hardware import detect
from node.holding import HoldSettings, ShardHolder
from node.jobs_served import JobServer, Terms, island_hello
from node.manifest_cargos import ManifestCargos
from node.net.discovery import Discovery
from node.net.host import Host, open_host
from node.net.mdns import FoundPeer
from node.notice_store import NEWS_FOLDER
from node.ready import remove_ready, write_ready
from node.signals import watch_signals
from node.spread import Spreader
from node.stages_served import Neighbours, StageServer
from node.trust import Pins
from privacy.keys import NodeKey
from protocol import checks, limits
from protocol.ads import AD_VERSION, Ad, CargoLoading, CargoOffer, Gpu, Hardware, PathMeasure, sign_ad
from protocol.blobs import BLOB, BLOB_PROTOCOL
from protocol.errors import ArchipelagError, Code, Refused, RemoteProtocolError
from protocol.hold import HOLD, HOLD_PROTOCOL
from protocol.messages import ADS, ADS_PROTOCOL, JOB, JOB_PROTOCOL, Hello, NodeRole
from protocol.prices import Ask, format_ask, format_credits
from protocol.stage_messages import STAGE, STAGE_PROTOCOL
from protocol.tickets import TicketGuard
from runtimes.catalogue import ROOTS
from runtimes.sandbox.probe import Sandbox

log = logging.getLogger(__name__)

DEFAULT_ASK = Ask(per_job=1000)  # 0.001 credits
READ_WARNING = "whoever owns an Island can read what it computes, unless the job is sealed"


@dataclass(frozen=True, slots=True)
class IslandConfig:
    data_dir: str
    coordinators: tuple[str, ...]
    cargos: CargoSettings
    asks: Mapping[str, Ask] = field(default_factory=dict)
    default_ask: Ask = DEFAULT_ASK
    region: str = ""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    bootstrap: tuple[str, ...] = ()
    mdns: bool = True
    ca_file: str | None = None
    ready_file: str | None = None
    memory_offered_bytes: int | None = None
    remote_asks: bool = False


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What an ad says and never changes in a run."""

    key: NodeKey
    boot: int
    network: str
    hardware: Hardware


class AdMaker:
    """Builds ads out of what the Cargos say of themselves now."""

    def __init__(self, fixed: _Fixed, config: IslandConfig, host: Host, terms: Mapping[str, Terms]) -> None:
        self._fixed, self._config, self._host, self._terms = fixed, config, host, terms
        self._sequence = fixed.boot - 1
        self.holder: ShardHolder | None = None
        self.sandbox: Callable[[], Sandbox | None] = lambda: None
        self.loading: tuple[CargoLoading, ...] = ()
        self.draining = False

    def __call__(self) -> SignedAd:
        self._sequence = max(now_ms(), self._sequence + 1)
        holder, sandbox = self.holder, self.sandbox()
        held = () if holder is None else holder.whole()
        offers = tuple(_offer(terms) for terms in (*self._terms.values(), *held) if terms.cargo.alive)
        ad = Ad(
            version=AD_VERSION,
            network=self._fixed.network,
            peer=self._fixed.key.peer_id,
            boot=self._fixed.boot,
            sequence=self._sequence,
            expires_at_ms=self._sequence + int(limits.AD_LIFETIME_S * 1000),
            agent=AGENT,
            addresses=tuple(self._host.addresses()[: limits.AD_ADDRESSES_MAX]),
            region=self._config.region,
            hardware=self._fixed.hardware,
            runtimes=tuple(sorted({offer.runtime for offer in offers})),
            memory_offered_bytes=self._config.memory_offered_bytes or self._fixed.hardware.ram_bytes,
            default_ask=self._config.default_ask,
            offers=offers,
            paths=self._paths(),
            draining=self.draining,
            shards=() if holder is None else holder.offers(),
            memory_free_bytes=0 if holder is None or self.draining else holder.free_bytes,
            loading=self.loading,
            sandbox=sandbox.level.value if sandbox is not None else "",
            sandbox_reason=checks.made_printable(sandbox.reason) if sandbox is not None else "",
        )
        return SignedAd(ad, sign_ad(ad, self._fixed.key))

    def _paths(self) -> tuple[PathMeasure, ...]:
        measured = self._host.round_trips_s()
        return tuple(PathMeasure(peer, int(s * 1e6)) for peer, s in list(measured.items())[: limits.AD_PATHS_MAX])


def _offer(terms: Terms) -> CargoOffer:
    facts = terms.cargo.facts()
    return CargoOffer(
        name=facts.name,
        content_hash=facts.content_hash,
        runtime=facts.runtime,
        engine=facts.engine,
        ask=terms.ask,
        context_tokens=facts.context_tokens,
        kv_tokens_total=facts.kv_tokens_total,
        kv_tokens_free=facts.kv_tokens_free,
        slots_total=facts.slots_total,
        slots_free=facts.slots_free,
        weights_bytes=facts.weights_bytes,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        compute_bytes=facts.compute_bytes,
        tokens_per_s=facts.tokens_per_s,
    )


async def run_island(config: IslandConfig) -> None:
    """Runs until a signal, then drains. Raises ConfigError when it cannot start."""
    data = DataDir.open(config.data_dir)
    with data.locked():
        async with trio.open_nursery() as nursery:
            island = _Island(config, data)
            await nursery.start(watch_signals, island.stop)
            nursery.start_soon(island.stop_early, nursery.cancel_scope)
            await island.run()
            nursery.cancel_scope.cancel()


class _Island:
    """One run of the role, in the order of its methods."""

    def __init__(self, config: IslandConfig, data: DataDir) -> None:
        self._config, self._data = config, data
        self._key = data.key("identity")
        self._pins = Pins(data)
        self._boot = now_ms()
        self._rng = random.Random(secrets.randbits(64))  # jitter must differ between nodes, nothing else depends on it
        self.stop = trio.Event()
        self._serving = False
        self.gpus: tuple[Gpu, ...] = ()

    async def stop_early(self, scope: trio.CancelScope) -> None:
        """Before it serves there is nothing to drain: a signal just ends the start."""
        await self.stop.wait()
        if not self._serving:
            scope.cancel()

    async def run(self) -> None:
        config = self._config
        async with AsyncExitStack() as stack:
            deck = await stack.enter_async_context(open_deck(self._key.peer_id, config.cargos.grants))
            registered = await load_cargos(config.cargos, deck, stack, self._key.peer_id)
            if set(config.cargos.names) != {ECHO}:  # an Island that only echoes has no use for a GPU
                report = await trio.to_thread.run_sync(detect_gpus)
                self.gpus = report.gpus
                for gpu in report.gpus:
                    log.info("GPU %s (%s), %.1f GiB", gpu.name, gpu.backend, gpu.vram_bytes / 1024**3)
            for name in sorted(set(config.asks) - {*deck.cargos, *(name.partition("@")[0] for name in registered)}):
                log.warning("--ask %s: no Cargo of that name is loaded; loaded: %s", name, ", ".join(sorted(deck.cargos)) or "none")
            log.info("this Island is %s; note: %s", self._key.peer_id, READ_WARNING)
            host = await stack.enter_async_context(open_host(self._key.seed, config.listen))
            finder = CoordinatorFinder(
                host, self._pins, (*config.coordinators, *config.bootstrap), self._hello, config.ca_file
            )
            async with trio.open_nursery() as nursery:
                discovery = self._discovery(host, finder)
                await nursery.start(discovery.run)
                await self._join(finder)
                await _Service(self, host, finder, deck, registered, discovery).run()
                nursery.cancel_scope.cancel()

    def _discovery(self, host: Host, finder: CoordinatorFinder) -> Discovery:
        config = self._config

        def found(peer: FoundPeer) -> None:
            """A Coordinator on the LAN is one to join only where none was named, or when it has to prove that it is of our network."""
            if peer.role == NodeRole.COORDINATOR and (self._pins.network or not config.coordinators):
                finder.learn([f"{address}/p2p/{peer.peer_id}" for address in peer.addresses])

        return Discovery(
            host,
            self._data.path / PEERS_FILE,
            network=self._pins.network,
            role=NodeRole.ISLAND,
            bootstrap=config.bootstrap,
            mdns=config.mdns,
            rng=self._rng,
            found=found,
        )

    def _hello(self) -> Hello:
        return island_hello(self._pins.network, AGENT)

    async def _join(self, finder: CoordinatorFinder) -> None:
        """Learns at first contact which network this is; later the pin says so and no Coordinator is needed to start."""
        told = False
        while not self._pins.network:
            try:
                stream, _ = await finder.open()
                await stream.aclose()
            except (OSError, ArchipelagError, trio.TooSlowError) as error:
                if not told:
                    log.warning("waiting for a Coordinator: %s", str(error) or type(error).__name__)
                told = True
                await trio.sleep(limits.RECONNECT_MIN_S + self._rng.random() * limits.RECONNECT_MIN_S)


class _Service:
    """What runs once the network is known."""

    def __init__(
        self,
        island: _Island,
        host: Host,
        finder: CoordinatorFinder,
        deck: Deck,
        registered: Sequence[str],
        discovery: Discovery,
    ) -> None:
        config, key, network = island._config, island._key, island._pins.network
        self._island, self._host, self._config = island, host, config
        self._asks = dict(config.asks)
        self._deck, self._registered = deck, registered
        self._terms = {name: Terms(on_deck.cargo, self._ask_of(name)) for name, on_deck in deck.cargos.items()}
        fixed = _Fixed(key, island._boot, network, detect(island._data.path, island.gpus))
        self._maker = AdMaker(fixed, config, host, self._terms)
        self._ads = AdSource(self._maker)
        self._keeper = BookKeeper(network, own_peer=key.peer_id)
        self._keeper.refute = self._ads.fresh
        self._keeper.met = lambda ad: discovery.learn(ad.peer, ad.addresses)
        self._guard = TicketGuard(key.peer_id, island._boot, network)
        self._neighbours = Neighbours(host, island._hello, self._addresses_of)
        self._stages = StageServer(self._guard, island._hello)
        self._files = self._open_files()
        self._blobs = BlobServer(
            self._files.store, island._hello, self._check_kin, self._files.shared.may, limits.BLOB_SERVE_BYTES_S_MAX
        )
        self._holder = self._make_holder()
        self._maker.holder = self._holder
        self._maker.sandbox = lambda: deck.known_sandbox
        self._claims = Claims(island._data.folder(CLAIMS_FOLDER), now_ms, island._rng)
        self._jobs = JobServer(
            key, self._guard, network, self._terms, island._hello, self._holder, self._claims, self._meet
        )
        self._spreader = Spreader(host, network, self._keeper)
        self._client = AdsClient(finder, self._ads, self._keeper, self._guard.trust, island._rng)
        self._news = CargoNews(island._data.folder(NEWS_FOLDER), network)
        self._cargo_links = CargoLinks(
            host,
            self._news,
            network,
            island._hello,
            self._meet,
            island._rng,
            self._spreader.gossip,
            lambda: self._client.coordinators,
        )
        self._manifests = ManifestCargos(
            deck, registered, self._terms, self._ask_of, self._news, self._files, self._jobs, self._ads.fresh
        )
        self._ads_server = AdsServer(
            self._keeper, island._hello, finder.known, self._spreader.publish_nowait, self._meet
        )

    def _make_holder(self) -> ShardHolder:
        config, island = self._config, self._island
        cargos = config.cargos
        settings = HoldSettings(
            memory_bytes=cargos.shard_memory_bytes(),
            threads=engine_threads(cargos.threads, 1),
            gpu_layers=cargos.gpu_layers,
            cache_dir=cargos.cache_dir,
            folders=cargos.shard_dirs,
            sandbox=self._deck.sandbox,
        )

        def changed() -> int:
            return self._ads.fresh().ad.sequence

        return ShardHolder(
            settings,
            island._boot,
            self._guard,
            self._neighbours,
            self._stages,
            island._hello,
            self._check,
            changed,
            self._ask_of,
            self._set_ask if config.remote_asks else None,
            self._files,
        )

    def _open_files(self) -> CargoStore:
        """Where Cargos' files and shards come from; what everybody can have is given to others while it is loaded."""
        cache_dir = self._config.cargos.cache_dir
        files = open_cargo_store(self._host, self._island._hello, self._keeper.book.ads, self._addresses_of, cache_dir)
        for terms in self._terms.values():
            if (digest := terms.cargo.facts().content_hash) in ROOTS:
                files.shared.share(digest)
        return files

    def _ask_of(self, name: str) -> Ask:
        """What the owner wants; else what the Cargo's publisher suggests, if it is anything; else the default."""
        on_deck = self._deck.cargos.get(name)
        suggested = on_deck.manifest.ask if on_deck is not None and on_deck.manifest is not None else Ask()
        return self._asks.get(name, suggested if suggested != Ask() else self._config.default_ask)

    def _set_ask(self, name: str, ask: Ask) -> None:
        """As the owner wants it, until the next start. Raises Refused for a Cargo that is not here."""
        terms = self._terms.get(name)
        if terms is None and all(held.manifest.name != name for held in self._holder.ready()):
            raise Refused(Code.UNKNOWN_CARGO, f"this Island does not hold Cargo {name}")
        self._asks[name] = ask
        if terms is not None:
            self._terms[name] = replace(terms, ask=ask)
        log.info("the owner asks %s for %s from now on", format_ask(ask), name)

    def _check(self, hello: Hello, sender: str) -> None:
        """Raises unless a Coordinator of our network says hello."""
        self._guard.trust(self._island._pins.check_hello(hello, sender, now_ms()))

    def _check_kin(self, hello: Hello, sender: str) -> None:
        """Files are for nodes of our network. Raises RemoteProtocolError."""
        if hello.network != self._island._pins.network:
            raise RemoteProtocolError(f"{sender} is of network {hello.network[:80] or 'none'}")

    def _meet(self, hello: Hello, sender: str) -> None:
        """Any Coordinator of our network may give us jobs, also one that we have never been told of. Raises RemoteProtocolError."""
        if hello.role is NodeRole.COORDINATOR:
            self._check(hello, sender)
            self._keeper.trust(sender)

    def _addresses_of(self, peer: str) -> tuple[str, ...]:
        entry = self._keeper.book.entries.get(peer)
        return entry.ad.addresses if entry is not None else self._host.remembered(peer)

    async def run(self) -> None:
        self._host.set_handler(JOB_PROTOCOL, JOB, self._jobs.serve)
        self._host.set_handler(STAGE_PROTOCOL, STAGE, self._stages.serve)
        self._host.set_handler(HOLD_PROTOCOL, HOLD, self._holder.serve)
        self._host.set_handler(ADS_PROTOCOL, ADS, self._ads_server.serve)
        self._host.set_handler(BLOB_PROTOCOL, BLOB, self._blobs.serve)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._holder.run)
            nursery.start_soon(self._keeper.run)
            nursery.start_soon(self._spreader.run)
            nursery.start_soon(self._cargo_links.run)
            nursery.start_soon(self._client.run)
            nursery.start_soon(self._settle)
            nursery.start_soon(CatchUp(self._host, self._keeper, self._island._hello, self._island._rng).run)
            nursery.start_soon(self._refresh_ads)
            nursery.start_soon(self._spread_ads)
            nursery.start_soon(self._watch_loading)
            self._manifests.begin(nursery)
            await nursery.start(serve_control, self._island._data, {"status": self.status, "peers": self.peers})
            nursery.start_soon(self._say_ready)
            self._island._serving = True
            await self._island.stop.wait()
            await self._drain()
            nursery.cancel_scope.cancel()

    async def _settle(self) -> None:
        """Claims go to the Coordinator that this Island is joined to."""
        client = SettleClient(self._host, lambda: self._client.coordinator, self._island._hello, self._check)
        async with client.opened() as desk:
            await self._claims.run(desk)

    async def _say_ready(self) -> None:
        await self._manifests.loaded.wait()
        await self._client.ready.wait()
        names = sorted(self._terms)
        log.info("ready: %s", ", ".join(names) or "no Cargo loaded, memory offered")
        write_ready(
            self._config.ready_file,
            peer_id=self._island._key.peer_id,
            addresses=list(self._host.addresses()),
            cargos=names,
        )

    async def _drain(self) -> None:
        """No new jobs; those that run get DRAIN_S seconds."""
        remove_ready(self._config.ready_file)
        self._jobs.draining = self._maker.draining = True
        self._ads.fresh()
        with trio.move_on_after(limits.DRAIN_S) as scope:
            await self._jobs.wait_idle()
            await self._stages.wait_idle()
            await trio.sleep(_LAST_WORDS_S)
        if scope.cancelled_caught:
            log.warning("%d jobs, or jobs over stages here, did not finish within %.0f s", self._jobs.counts.running, limits.DRAIN_S)

    async def _refresh_ads(self) -> None:
        while True:
            await trio.sleep(limits.AD_REFRESH_S * self._island._rng.uniform(0.9, 1.0))
            self._ads.fresh()

    async def _spread_ads(self) -> None:
        """Every ad goes to gossip too; the Coordinator at the other end of our stream hears it either way."""
        signed = self._ads.current or self._ads.fresh()
        while True:
            self._keeper.hear(signed.envelope)
            self._spreader.publish_nowait(signed.envelope)
            signed = await self._ads.wait_next(signed)

    async def _watch_loading(self) -> None:
        """How far downloads are stands in the ad."""
        while True:
            self._maker.loading = await self._files.loadings.wait_changed(self._maker.loading)
            self._ads.fresh()
            await trio.sleep(limits.AD_LOADING_INTERVAL_S)

    def status(self) -> Mapping[str, Any]:
        counts = self._jobs.counts
        return {
            "role": "island",
            "peer_id": self._island._key.peer_id,
            "addresses": list(self._host.addresses()),
            "network": self._island._pins.network,
            "coordinator": self._client.coordinator,
            "coordinators": list(self._client.coordinators),
            "ready": self._client.ready.is_set(),
            "draining": self._jobs.draining,
            "cargos": [asdict(terms.cargo.facts()) | {"alive": terms.cargo.alive} for terms in self._terms.values()],
            "shards": self._holder.status(),
            "memory_free_bytes": self._holder.free_bytes,
            "loading": [asdict(one) for one in self._files.loadings.now()],
            "files": asdict(self._files.counts) | {"bytes_served": self._blobs.bytes_total, "bad_peers": dict(self._files.bad_peers)},
            "jobs": asdict(counts),
            "claims": {"waiting": len(self._claims), **asdict(self._claims.counts)},
            "tickets": {"admitted": self._guard.admitted, "refused": self._guard.refused},
            "gossip": self._spreader.statistics(),
            "sandbox": str(self._deck.known_sandbox or "not needed yet"),
            "news": self._news.status(),
            "host": asdict(self._host.statistics()),
        }

    def peers(self) -> Mapping[str, Any]:
        return peers_json(self._host, self._keeper)


_LAST_WORDS_S = 0.2  # lets the last frames and the ad that says "draining" leave


def peers_json(host: Host, keeper: BookKeeper) -> dict[str, Any]:
    """Who is connected, and which Islands the book knows."""
    connected, rtts = set(host.connected_peers()), host.round_trips_s()
    known = {
        ad.peer: {
            "cargos": [offer.name for offer in ad.offers],
            "region": ad.region,
            "agent": ad.agent,
            "asks": {offer.name: format_credits(offer.ask.per_job) for offer in ad.offers},
            "draining": ad.draining,
        }
        for ad in keeper.book.ads()
    }
    peers = sorted(connected | set(known))
    return {
        "peers": [
            {
                "peer_id": peer,
                "connected": peer in connected,
                "round_trip_ms": _ms(rtts.get(peer)),
                "island": known.get(peer),
            }
            for peer in peers
        ]
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
