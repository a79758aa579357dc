"""Ads: what an Island can do and what it charges, signed by it and spread by gossip.

An ad's ``sequence`` is the Unix time in milliseconds at which it was made, at least one more than the one before; so it grows across
restarts without a file, and a number from the future betrays itself. ``boot`` is the sequence of the first ad of this run: tickets
name it, so what was issued for an earlier run of the node cannot be used again.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import checks, limits
from protocol.envelope import Label, open_envelope, seal
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.identity import Signer
from protocol.prices import Ask
from protocol.registry import Struct
from protocol.shards import LayerRange

AD_VERSION = 1
_BYTES_MAX = 2**50


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    backend: str  # "cuda", "vulkan", "metal"
    vram_bytes: int

    def __post_init__(self) -> None:
        checks.printable("gpu name", self.name, limits.NAME_CHARS_MAX)
        checks.label("gpu backend", self.backend, limits.NAME_CHARS_MAX)
        checks.in_range("vram_bytes", self.vram_bytes, 0, _BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Hardware:
    cpus: int
    ram_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()

    def __post_init__(self) -> None:
        checks.in_range("cpus", self.cpus, 1, 100_000)
        checks.in_range("ram_bytes", self.ram_bytes, 0, _BYTES_MAX)
        checks.in_range("disk_free_bytes", self.disk_free_bytes, 0, _BYTES_MAX)
        checks.at_most("gpus", self.gpus, limits.AD_GPUS_MAX)


@dataclass(frozen=True, slots=True)
class CargoOffer:
    """One loaded (warm) Cargo. Rooms are in tokens of KV cache, speed is measured in tokens per second of one stream, 0.0 unknown."""

    name: str
    content_hash: str
    runtime: str
    engine: str
    ask: Ask
    context_tokens: int
    kv_tokens_total: int
    kv_tokens_free: int
    slots_total: int
    slots_free: int
    weights_bytes: int
    kv_bytes_per_token: int
    compute_bytes: int
    tokens_per_s: float

    def __post_init__(self) -> None:
        checks.label("cargo name", self.name, limits.NAME_CHARS_MAX)
        checks.content_hash("content_hash", self.content_hash)
        checks.label("runtime", self.runtime, limits.NAME_CHARS_MAX)
        checks.label("engine", self.engine, limits.NAME_CHARS_MAX)
        checks.in_range("context_tokens", self.context_tokens, 1, 2**31)
        checks.in_range("kv_tokens_total", self.kv_tokens_total, 0, 2**40)
        checks.in_range("kv_tokens_free", self.kv_tokens_free, 0, self.kv_tokens_total)
        checks.in_range("slots_total", self.slots_total, 0, 100_000)
        checks.in_range("slots_free", self.slots_free, 0, self.slots_total)
        for name in ("weights_bytes", "kv_bytes_per_token", "compute_bytes"):
            checks.in_range(name, getattr(self, name), 0, _BYTES_MAX)
        checks.in_range("tokens_per_s", self.tokens_per_s, 0.0, 1e7)


@dataclass(frozen=True, slots=True)
class ShardOffer:
    """A loaded range of a model's layers. Rooms are in KV tokens, ``slots`` in jobs; ``token_us`` is measured: one decoded token through
    these layers.

    ``content_hash`` is the whole model's, ``shard_hash`` that of the file. ``process_bytes``: what the stage's process takes beside
    weights, KV cache and compute buffers. ``is_free``: no pipeline is using it.
    """

    name: str
    content_hash: str
    shard_hash: str
    layers: LayerRange
    total_layers: int
    engine: str
    ask: Ask
    slots: int
    kv_tokens_total: int
    weights_bytes: int
    kv_bytes_per_token: int
    compute_bytes: int
    process_bytes: int
    token_us: int
    is_free: bool

    def __post_init__(self) -> None:
        checks.label("cargo name", self.name, limits.NAME_CHARS_MAX)
        checks.content_hash("content_hash", self.content_hash)
        checks.content_hash("shard_hash", self.shard_hash)
        checks.in_range("total_layers", self.total_layers, self.layers.high, limits.LAYERS_MAX)
        checks.in_range("slots", self.slots, 1, 100_000)
        checks.label("engine", self.engine, limits.NAME_CHARS_MAX)
        checks.in_range("kv_tokens_total", self.kv_tokens_total, 0, 2**40)
        for name in ("weights_bytes", "kv_bytes_per_token", "compute_bytes", "process_bytes"):
            checks.in_range(name, getattr(self, name), 0, _BYTES_MAX)
        checks.in_range("token_us", self.token_us, 0, 2**40)


@dataclass(frozen=True, slots=True)
class CargoLoading:
    """A Cargo, or a model, whose files the Island is bringing here. ``address``: the Cargo's content address, of a model without a manifest
    its SHA-256. Bytes are of all its files together; the total is 0 where nobody knows it yet."""

    name: str
    address: str
    done_bytes: int
    total_bytes: int

    def __post_init__(self) -> None:
        checks.label("cargo name", self.name, limits.NAME_CHARS_MAX)
        checks.content_hash("address", self.address)
        checks.in_range("total_bytes", self.total_bytes, 0, _BYTES_MAX)
        checks.in_range("done_bytes", self.done_bytes, 0, self.total_bytes or _BYTES_MAX)


@dataclass(frozen=True, slots=True)
class PathMeasure:
    """Measured round trip to a neighbour."""

    peer: str
    round_trip_us: int

    def __post_init__(self) -> None:
        checks.peer_id("path peer", self.peer)
        checks.in_range("round_trip_us", self.round_trip_us, 0, 60_000_000)


@dataclass(frozen=True, slots=True)
class Ad:
    version: int
    network: str
    peer: str
    boot: int
    sequence: int
    expires_at_ms: int
    agent: str
    addresses: tuple[str, ...]
    region: str
    hardware: Hardware
    runtimes: tuple[str, ...]
    memory_offered_bytes: int
    default_ask: Ask
    offers: tuple[CargoOffer, ...]
    paths: tuple[PathMeasure, ...] = ()
    draining: bool = False
    shards: tuple[ShardOffer, ...] = ()
    memory_free_bytes: int = 0  # for shards that a Coordinator plans; 0 where the Island takes none
    loading: tuple[CargoLoading, ...] = ()
    sandbox: str = ""  # what walls native Cargos run behind; empty where none was needed yet
    sandbox_reason: str = ""

    def __post_init__(self) -> None:
        if self.version != AD_VERSION:
            raise ValueError(f"ad version {self.version} is not {AD_VERSION}")
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.peer_id("peer", self.peer)
        checks.in_range("boot", self.boot, 1, 2**53)
        checks.in_range("sequence", self.sequence, self.boot, 2**53)
        checks.in_range("expires_at_ms", self.expires_at_ms, self.sequence, self.sequence + limits.AD_LIFETIME_S * 1000)
        checks.printable("agent", self.agent, limits.NAME_CHARS_MAX)
        checks.at_most("addresses", self.addresses, limits.AD_ADDRESSES_MAX)
        for address in self.addresses:
            checks.printable("address", address, limits.TEXT_CHARS_MAX)
        checks.printable("region", self.region, limits.NAME_CHARS_MAX)
        checks.at_most("runtimes", self.runtimes, limits.AD_OFFERS_MAX)
        for runtime in self.runtimes:
            checks.label("runtime", runtime, limits.NAME_CHARS_MAX)
        checks.in_range("memory_offered_bytes", self.memory_offered_bytes, 0, _BYTES_MAX)
        checks.at_most("offers", self.offers, limits.AD_OFFERS_MAX)
        checks.unique("offers", [offer.name for offer in self.offers])  # or it would have two prices
        checks.at_most("paths", self.paths, limits.AD_PATHS_MAX)
        checks.at_most("shards", self.shards, limits.AD_SHARDS_MAX)
        checks.unique("shards", [(shard.content_hash, shard.layers) for shard in self.shards])
        if self.sandbox:
            checks.label("sandbox", self.sandbox, limits.NAME_CHARS_MAX)
        checks.printable("sandbox_reason", self.sandbox_reason, limits.TEXT_CHARS_MAX)
        checks.in_range("memory_free_bytes", self.memory_free_bytes, 0, _BYTES_MAX)
        checks.at_most("loading", self.loading, limits.AD_LOADING_MAX)
        checks.unique("loading", [one.address for one in self.loading])

    def offer(self, cargo: str) -> CargoOffer | None:
        return next((offer for offer in self.offers if offer.name == cargo), None)


@dataclass(frozen=True, slots=True)
class Lost:
    """A Coordinator saw the connection to ``peer`` end while ``sequence`` was its newest ad. A newer ad takes the word back."""

    network: str
    peer: str
    sequence: int
    seen_at_ms: int

    def __post_init__(self) -> None:
        checks.label("network", self.network, limits.NAME_CHARS_MAX)
        checks.peer_id("peer", self.peer)
        checks.in_range("seen_at_ms", self.seen_at_ms, 1, 2**53)
        # The witness has read that ad, so it was not from its future; otherwise one notice could bar a peer for good.
        checks.in_range("sequence", self.sequence, 1, self.seen_at_ms + limits.CLOCK_SKEW_S * 1000)


_AD: Struct[Ad] = Struct(Ad, limits.AD_BYTES_MAX)
_LOST: Struct[Lost] = Struct(Lost, limits.AD_BYTES_MAX)


def sign_ad(ad: Ad, signer: Signer) -> bytes:
    return seal(Label.AD, _AD.encode(ad), signer)


def read_ad(data: bytes, now_ms: int) -> Ad:
    """The ad in an envelope. Raises RemoteProtocolError (SignatureError) unless its own peer signed it and it is neither expired nor
    from the future."""
    ad = open_ad(data)
    check_ad_time(ad, now_ms)
    return ad


def open_ad(data: bytes) -> Ad:
    """The part of ``read_ad`` that does not depend on the time: who has seen an envelope before need not do it again."""
    envelope = open_envelope(Label.AD, data)
    ad = _AD.decode(envelope.payload)
    if envelope.signer != ad.peer:
        raise SignatureError(f"an ad for {ad.peer} was signed by {envelope.signer}")
    return ad


def check_ad_time(ad: Ad, now_ms: int) -> None:
    """Raises RemoteProtocolError for an ad that has expired or comes from the future."""
    if ad.sequence > now_ms + limits.CLOCK_SKEW_S * 1000:
        raise RemoteProtocolError(f"the ad of {ad.peer} comes from {ad.sequence - now_ms} ms in the future")
    if ad.expires_at_ms < now_ms - limits.CLOCK_SKEW_S * 1000:
        raise RemoteProtocolError(f"the ad of {ad.peer} expired {now_ms - ad.expires_at_ms} ms ago")


def sign_lost(lost: Lost, signer: Signer) -> bytes:
    return seal(Label.LOST, _LOST.encode(lost), signer)


def read_lost(data: bytes, now_ms: int) -> tuple[str, Lost]:
    """Peer id of the witness, and what it saw; whether that witness may say so is the book's decision."""
    witness, lost = open_lost(data)
    check_lost_time(lost, now_ms)
    return witness, lost


def open_lost(data: bytes) -> tuple[str, Lost]:
    """The part of ``read_lost`` that does not depend on the time."""
    envelope = open_envelope(Label.LOST, data)
    return envelope.signer, _LOST.decode(envelope.payload)


def check_lost_time(lost: Lost, now_ms: int) -> None:
    """Raises RemoteProtocolError for a notice that is too old or from the future."""
    age_ms = now_ms - lost.seen_at_ms
    if not -limits.CLOCK_SKEW_S * 1000 <= age_ms <= (limits.AD_LIFETIME_S + limits.CLOCK_SKEW_S) * 1000:
        raise RemoteProtocolError(f"a notice of loss that is {age_ms} ms old: too old, or from the future")
