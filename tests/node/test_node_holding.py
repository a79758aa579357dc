"""Orders to hold layers, between two real hosts: who may give them, what fits, and what becomes of them. The engines only pretend."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import trio

from node import holding
from node.blobs_served import BlobServer
from node.bookkeeper import now_ms
from node.cargo_store import CargoStore, open_cargo_store
from node.datadir import DataDir
from node.holding import Held, HoldSettings, ShardHolder, bring_from_peers
from node.jobs_served import island_hello
from node.net.host import Host, open_host
from node.stages_served import Neighbours, StageServer
from node.trust import Pins
from privacy.keys import NodeKey
from protocol.blobs import BLOB, BLOB_PROTOCOL
from protocol.errors import Code, ConfigError, LinkLost, Refused
from protocol.hold import HOLD, HOLD_PROTOCOL, DropShard, HoldProgress, HoldRefused, HoldShard, ShardHeld
from protocol.messages import PROTOCOL_VERSION, Hello, NodeRole
from protocol.prices import Ask
from protocol.shards import LayerRange, ShardManifest
from protocol.tickets import Delegation, TicketGuard, network_id_of, sign_delegation
from runtimes.gguf.messages import Ready
from runtimes.gguf.shard import cut, make_manifest
from runtimes.gguf.shard_store import ShardStore, is_public
from runtimes.manifests import catalogue_manifests
from runtimes.store import ModelStore, no_progress
from runtimes.store.blob_store import BlobStore
from runtimes.store.cache import Cache
from tests.node.stage_net import wait_until
from tests.runtimes.gguf.tiny_models import TINY, write_tiny

BOOT = 1_795_000_000_000
COORDINATOR, ISLAND, NETWORK_KEY, STRANGER = (NodeKey(letter * 32) for letter in (b"c", b"i", b"n", b"x"))
NETWORK = network_id_of(NETWORK_KEY.public_key)
MANIFEST = catalogue_manifests()["smollm2-135m"]
FIRST, SECOND = LayerRange(0, 10), LayerRange(10, 20)
CELLS = 1024
NEEDED = MANIFEST.stage_bytes(FIRST, CELLS)


class PretendedEngine:
    """As much of a loaded stage as the holder looks at."""

    def __init__(self, held: Held) -> None:
        weights = held.manifest.weights_bytes(held.layers)
        self.ready = Ready("echo/1", 8192, held.cells, 16, weights, 7680, 1000, 50.0, 0, 576, 60_000_000)
        self.alive, self.worker_pid, self.restarts = True, 4711, 0
        self._more = trio.Event()

    async def wait_changed(self) -> None:
        await self._more.wait()
        self._more = trio.Event()

    def change(self) -> None:
        self._more.set()


class Loader:
    """In place of ShardHolder._load: each load waits until it is let go."""

    def __init__(self) -> None:
        self.loads: list[Held] = []
        self.closed = 0
        self.go = trio.Event()
        self.may_close = trio.Event()
        self.may_close.set()
        self.error: Exception | None = None

    async def load(self, held: Held, stack: AsyncExitStack) -> None:
        self.loads.append(held)
        held.what = ("cutting", 3, 10)
        await self.go.wait()
        if self.error is not None:
            raise self.error

        async def close() -> None:
            with trio.CancelScope(shield=True):
                await self.may_close.wait()
            self.closed += 1

        stack.push_async_callback(close)
        held.shard_hash = "5a" * 32
        held.engine = PretendedEngine(held)


class Place:
    """An Island that holds what a Coordinator orders, and that Coordinator."""

    def __init__(self, hosts: tuple[Host, Host, Host], holder: ShardHolder, loader: Loader, ads: list[int]) -> None:
        self.coordinator, self.island, self.stranger = hosts
        self.holder, self.loader, self.ads = holder, loader, ads

    async def order(
        self, message: object, hello: Hello | None = None, sender: Host | None = None, heard: list[Any] | None = None
    ) -> list[Any]:
        """All answers, in ``heard`` as they come."""
        heard = [] if heard is None else heard
        sender = sender or self.coordinator
        await sender.connect(self.island.addresses()[0])
        with trio.fail_after(10):
            stream = await sender.open(self.island.peer_id, HOLD_PROTOCOL, HOLD)
            async with stream:
                await stream.send(hello or coordinator_hello())
                assert isinstance(await stream.receive(), Hello)
                await stream.send(message)
                while not heard or (isinstance(heard[-1], HoldProgress) and heard[-1].what != "dropped"):
                    heard.append(await stream.receive())
        return heard

    async def refusal(self, message: object) -> HoldRefused:
        answer = (await self.order(message))[-1]
        assert isinstance(answer, HoldRefused), answer
        return answer


def coordinator_hello(**changes: Any) -> Hello:
    delegation = sign_delegation(Delegation(NETWORK, COORDINATOR.peer_id, now_ms() + 3_600_000), NETWORK_KEY)
    return replace(Hello(PROTOCOL_VERSION, NodeRole.COORDINATOR, NETWORK, "test", delegation), **changes)


def hold(layers: LayerRange = FIRST, cells: int = CELLS, manifest: ShardManifest = MANIFEST, **changes: Any) -> HoldShard:
    return replace(HoldShard(manifest, layers, cells, BOOT, now_ms() + 60_000), **changes)


@asynccontextmanager
async def place(folder: Path, memory_bytes: int = 2 * NEEDED, is_real: bool = False) -> AsyncIterator[Place]:
    loader, ads = Loader(), [1]
    pins = Pins(DataDir.open(folder))
    guard = TicketGuard(ISLAND.peer_id, BOOT, NETWORK)

    def changed() -> int:
        ads.append(ads[-1] + 1)
        return ads[-1]

    def hello() -> Hello:
        return island_hello(NETWORK, "test")

    async with (
        open_host(COORDINATOR.seed) as coordinator,
        open_host(ISLAND.seed) as island,
        open_host(STRANGER.seed) as stranger,
        trio.open_nursery() as nursery,
    ):
        holder = ShardHolder(
            HoldSettings(memory_bytes, threads=1, cache_dir=folder / "cache"),
            BOOT,
            guard,
            Neighbours(island, hello, lambda peer: ()),
            StageServer(guard, hello),
            hello,
            lambda hello, sender: guard.trust(pins.check_hello(hello, sender, now_ms())),
            changed,
            lambda name: Ask(per_job=3),
        )
        if not is_real:
            holder._load = loader.load  # type: ignore[method-assign]
        island.set_handler(HOLD_PROTOCOL, HOLD, holder.serve)
        await nursery.start(holder.run)
        try:
            yield Place((coordinator, island, stranger), holder, loader, ads)
        finally:
            loader.may_close.set()
            nursery.cancel_scope.cancel()


async def test_an_order_is_loaded_advertised_and_dropped(tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        at.loader.go.set()
        sequence = at.ads[-1]
        answer = (await at.order(hold()))[-1]
        assert isinstance(answer, ShardHeld) and answer.shard_hash == "5a" * 32
        assert answer.sequence == at.ads[-1] > sequence, "it stands in the ad before it is said to be held"
        (offer,) = at.holder.offers()
        assert (offer.name, offer.layers, offer.total_layers, offer.kv_tokens_total) == ("smollm2-135m", FIRST, 30, CELLS)
        assert (offer.shard_hash, offer.token_us, offer.is_free, offer.ask) == ("5a" * 32, 20_000, True, Ask(per_job=3))
        assert at.holder.free_bytes == NEEDED
        (said,) = at.holder.status()
        assert (said["state"], said["layers"], said["bytes_needed"], said["pid"]) == ("ready", "0-9", NEEDED, 4711)
        sequence = at.ads[-1]
        (answer,) = await at.order(DropShard(MANIFEST.model_sha256, FIRST))
        assert answer == HoldProgress("dropped", 1, 1)
        assert at.holder.free_bytes == 2 * NEEDED and not at.holder.offers() and not at.holder.status()
        assert at.loader.closed == 1 and at.ads[-1] > sequence, "the ad says so"
        refusal = await at.refusal(DropShard(MANIFEST.model_sha256, FIRST))
        assert refusal.code is Code.UNKNOWN_CARGO and "not held here" in refusal.message


async def test_what_was_dropped_is_free_once_it_is_said(tmp_path: Path) -> None:
    """A process takes a moment to end; the memory is another's only then."""
    async with place(tmp_path, NEEDED) as at, trio.open_nursery() as nursery:
        at.loader.go.set()
        await at.order(hold())
        at.loader.may_close = trio.Event()
        answers: list[Any] = []

        async def drop() -> None:
            answers.extend(await at.order(DropShard(MANIFEST.model_sha256, FIRST)))

        nursery.start_soon(drop)
        await wait_until(lambda: at.loader.loads[0].scope.cancel_called)
        refusal = await at.refusal(hold())
        assert refusal.code is Code.DRAINING and not answers, "what is on its way out is not held"
        assert (await at.refusal(hold(SECOND))).code is Code.NO_CAPACITY
        at.loader.may_close.set()
        await wait_until(lambda: answers)
        assert isinstance((await at.order(hold()))[-1], ShardHeld)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"boot": BOOT - 1}, Code.BAD_TICKET, "earlier run"),
        ({"expires_at_ms": 1_000}, Code.BAD_TICKET, "expired"),
        ({"cells": 200_000}, Code.NO_CAPACITY, f"of the {2 * NEEDED} offered are free"),
    ],
)
async def test_orders_that_are_refused(changes: dict[str, Any], code: Code, words: str, tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        refusal = await at.refusal(hold(**changes))
        assert refusal.code is code and words in refusal.message
        assert at.holder.free_bytes == 2 * NEEDED and not at.loader.loads and at.holder.refused == 1
        at.loader.go.set()
        assert isinstance((await at.order(hold()))[-1], ShardHeld)


async def test_more_than_is_free_is_refused_with_both_figures(tmp_path: Path) -> None:
    async with place(tmp_path, NEEDED + 5) as at:
        at.loader.go.set()
        await at.order(hold())
        refusal = await at.refusal(hold(SECOND))
        needed = MANIFEST.stage_bytes(SECOND, CELLS)
        assert f"need {needed} bytes; 5 of the {NEEDED + 5} offered" in refusal.message


@pytest.mark.parametrize("who", ["an Island", "nobody's delegation", "somebody else's delegation", "another network", "expired"])
async def test_who_is_no_coordinator_of_the_network_is_not_heard(who: str, tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        at.loader.go.set()
        await at.order(hold())  # the network is known from here
        sender = None
        if who == "an Island":
            hello = island_hello(NETWORK, "test")
        elif who == "nobody's delegation":
            hello = coordinator_hello(delegation=b"")
        elif who == "somebody else's delegation":
            hello, sender = coordinator_hello(), at.stranger
        elif who == "another network":
            other = network_id_of(STRANGER.public_key)
            hello = coordinator_hello(delegation=sign_delegation(Delegation(other, COORDINATOR.peer_id, now_ms() + 60_000), STRANGER))
        else:
            hello = coordinator_hello(delegation=sign_delegation(Delegation(NETWORK, COORDINATOR.peer_id, 1_000), NETWORK_KEY))
        for message in (hold(SECOND), DropShard(MANIFEST.model_sha256, FIRST)):
            with pytest.raises(LinkLost):
                await at.order(message, hello, sender)
        assert at.holder.orders == 1 and len(at.loader.loads) == 1 and len(at.holder.offers()) == 1


async def test_what_is_no_order_ends_the_stream(tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        for message in (HoldProgress("x", 0, 0), coordinator_hello()):
            with pytest.raises(LinkLost):
                await at.order(message)
        assert at.holder.free_bytes == 2 * NEEDED


async def test_the_same_order_twice_is_one_load_and_both_hear_how_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "_PROGRESS_S", 0.01)
    async with place(tmp_path) as at, trio.open_nursery() as nursery:
        answers: list[list[Any]] = [[], []]
        for heard in answers:
            nursery.start_soon(at.order, hold(), None, None, heard)
        await wait_until(lambda: at.holder.orders == 2 and at.loader.loads)
        (said,) = at.holder.status()
        assert said["state"] == "cutting" and at.holder.free_bytes == NEEDED and not at.holder.offers()
        await wait_until(lambda: all(HoldProgress("cutting", 3, 10) in heard for heard in answers))
        at.loader.go.set()
        await wait_until(lambda: all(isinstance(heard[-1], ShardHeld) for heard in answers))
        assert len(at.loader.loads) == 1
        assert isinstance((await at.order(hold(cells=CELLS // 2)))[0], ShardHeld), "what is held already is answered at once"
        refusal = await at.refusal(hold(cells=CELLS + 1))
        assert refusal.code is Code.NO_CAPACITY and f"held with {CELLS} KV cells, not {CELLS + 1}" in refusal.message


async def test_a_coordinator_that_hangs_up_does_not_end_the_load(tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        with trio.move_on_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(at.order, hold())
                await wait_until(lambda: at.loader.loads)
                nursery.cancel_scope.cancel()
        at.loader.go.set()
        await wait_until(at.holder.offers)
        assert isinstance((await at.order(hold()))[0], ShardHeld) and len(at.loader.loads) == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("no source that this Island may read"), Code.NO_CAPACITY, "no source"),
        (Refused(Code.NO_CAPACITY, "too little\nmemory"), Code.NO_CAPACITY, "too little memory"),
        (OSError(28, "No space left on device"), Code.NO_CAPACITY, "No space left"),
        (ConfigError("x" * 5000), Code.NO_CAPACITY, "xxx"),
        (ZeroDivisionError("a prompt"), Code.INTERNAL, "broke"),
    ],
)
async def test_a_load_that_fails_says_why_and_frees_its_memory(error: Exception, code: Code, words: str, tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        at.loader.error = error
        at.loader.go.set()
        refusal = await at.refusal(hold())
        assert refusal.code is code and words in refusal.message and "prompt" not in refusal.message
        assert at.holder.free_bytes == 2 * NEEDED and not at.holder.status()
        at.loader.error = None
        assert isinstance((await at.order(hold()))[-1], ShardHeld), "the next order is a new try"


async def test_a_shard_that_is_dropped_while_it_is_loaded(tmp_path: Path) -> None:
    async with place(tmp_path) as at, trio.open_nursery() as nursery:
        answers: list[Any] = []

        async def one() -> None:
            answers.extend(await at.order(hold()))

        nursery.start_soon(one)
        await wait_until(lambda: at.loader.loads)
        await at.order(DropShard(MANIFEST.model_sha256, FIRST))
        await wait_until(lambda: answers and isinstance(answers[-1], HoldRefused))
        assert answers[-1].code is Code.DRAINING and at.holder.free_bytes == 2 * NEEDED


async def test_memory_is_counted_for_each_shard(tmp_path: Path) -> None:
    async with place(tmp_path, 10 * NEEDED) as at:
        at.loader.go.set()
        last = LayerRange(20, 30)
        sizes = {layers: MANIFEST.stage_bytes(layers, CELLS) for layers in (FIRST, SECOND, last)}
        free = 10 * NEEDED
        for layers, size in sizes.items():
            await at.order(hold(layers))
            free -= size
            assert at.holder.free_bytes == free
        assert {offer.layers for offer in at.holder.offers()} == set(sizes)
        kept = 4 * MANIFEST.width * CELLS
        expected = MANIFEST.weights_bytes(SECOND) + MANIFEST.kv_bytes_per_token(SECOND) * CELLS + kept + MANIFEST.process_bytes(SECOND)
        assert sizes[SECOND] - expected == MANIFEST.compute_bytes[1]
        await at.order(DropShard(MANIFEST.model_sha256, SECOND))
        assert at.holder.free_bytes == free + sizes[SECOND]
        refusal = await at.refusal(hold(LayerRange(0, 30), 10**6))
        assert refusal.code is Code.NO_CAPACITY and f"{free + sizes[SECOND]} of the" in refusal.message


async def test_an_engine_that_ends_leaves_the_ad_until_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.AD_CHANGE_INTERVAL_S", 0.0)
    async with place(tmp_path) as at:
        at.loader.go.set()
        await at.order(hold())
        engine = at.loader.loads[0].engine
        sequence = at.ads[-1]
        engine.alive = False
        engine.change()
        await wait_until(lambda: at.ads[-1] > sequence)
        assert not at.holder.offers() and at.holder.status()[0]["state"] == "restarting"
        assert at.holder.free_bytes == NEEDED, "its memory stays set aside"
        engine.alive = True
        engine.change()
        await wait_until(lambda: at.ads[-1] > sequence + 1)
        assert len(at.holder.offers()) == 1


async def test_a_shard_that_takes_more_than_was_set_aside_is_given_up(tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        at.loader.go.set()
        light = replace(MANIFEST, layer_bytes=(1,) * 30, embedding_bytes=1)
        real = PretendedEngine.__init__

        def heavy(self: PretendedEngine, held: Held) -> None:
            real(self, held)
            self.ready = replace(self.ready, weights_bytes=10 * NEEDED)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PretendedEngine, "__init__", heavy)
            refusal = await at.refusal(hold(manifest=light))
        assert refusal.code is Code.NO_CAPACITY and str(light.stage_bytes(FIRST, CELLS)) in refusal.message
        assert at.holder.free_bytes == 2 * NEEDED and at.loader.closed == 1


# -- where the file comes from


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    """The real model, out of the cache that all tests share."""
    return Path(ModelStore().fetch("smollm2-135m").path)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, ShardManifest]:
    """A small model, and its manifest with a source on this machine."""
    path = write_tiny(tmp_path / "tiny-model.bin", TINY["llama"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, make_manifest(path, "tiny", digest, (f"file://{path}",))


def store(folder: Path, *shard_dirs: Path) -> ShardStore:
    return ShardStore(ModelStore(folder / "cache"), shard_dirs)


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_sources_on_this_machine_are_not_read_for_a_manifest_from_elsewhere(
    scheme: str, tiny: tuple[Path, ShardManifest], tmp_path: Path
) -> None:
    path, manifest = tiny
    source = f"file://{path}" if scheme == "file" else "http://127.0.0.1:1/model.gguf"
    half = LayerRange(0, 2)
    ready_made = replace(manifest, shard_layers=(half,), shard_hashes=("ab" * 32,), shard_bytes=(1,), shard_urls=(source,))
    for stranger in (replace(manifest, model_sources=(source,)), replace(ready_made, model_sources=())):
        with pytest.raises(ConfigError, match="--shard-dir"), store(tmp_path).obtain(stranger, half):
            pass
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_the_owners_own_manifest_may_name_his_files(tiny: tuple[Path, ShardManifest], tmp_path: Path) -> None:
    with ShardStore(ModelStore(tmp_path / "cache"), (), own_manifest=True).obtain(tiny[1], LayerRange(0, 2)) as found:
        assert found.path.exists() and len(found.sha256) == 64


def test_a_real_model_in_a_shard_dir_is_cut(smollm2_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(smollm2_path)
    stranger = replace(MANIFEST, name="from-elsewhere", model_sources=(f"file://{smollm2_path}",))
    with pytest.raises(ConfigError, match="names no source that this Island may read"), store(tmp_path).obtain(stranger, LayerRange(3, 5)):
        pass
    with store(tmp_path, folder).obtain(stranger, LayerRange(3, 5)) as found:
        assert found.path.stat().st_size < MANIFEST.model_bytes // 10
    with store(tmp_path).obtain(stranger, LayerRange(3, 5)) as again:
        assert again == found, "it is in the cache now"
    found.path.write_bytes(_spoiled(found.path.read_bytes()))
    with pytest.raises(ConfigError), store(tmp_path).obtain(stranger, LayerRange(3, 5)):
        pass


def _spoiled(data: bytes) -> bytes:
    """One bit of the last weight is another."""
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("has_hash", [True, False])
def test_a_tampered_shard_in_a_shard_dir_is_not_used(has_hash: bool, tiny: tuple[Path, ShardManifest], tmp_path: Path) -> None:
    """Where the manifest names no hash, the owner vouches for what is in his folder."""
    path, manifest = tiny
    folder, half = tmp_path / "mine", LayerRange(0, 2)
    folder.mkdir()
    shard = folder / "shard.gguf"
    digest = cut(path, shard, half, manifest.model_sha256)
    if has_hash:
        manifest = replace(manifest, shard_layers=(half,), shard_hashes=(digest,), shard_bytes=(shard.stat().st_size,), shard_urls=("",))
    with store(tmp_path, folder).obtain(manifest, half) as found:
        assert (found.path, found.sha256) == (shard, digest)
    shard.write_bytes(_spoiled(shard.read_bytes()))
    if has_hash:
        with pytest.raises(ConfigError, match="--shard-dir"), store(tmp_path, folder).obtain(manifest, half):
            pass
        path.rename(folder / "model.gguf")
        with store(tmp_path, folder).obtain(manifest, half) as found:
            assert found.path != shard and found.sha256 == digest, "cut anew from the model that lies beside it"
    else:
        with store(tmp_path, folder).obtain(manifest, half) as found:
            assert found.sha256 != digest


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:100], lambda data: b"x" * 5000])
def test_files_in_a_shard_dir_that_are_none(
    spoil: Callable[[bytes], bytes], tiny: tuple[Path, ShardManifest], tmp_path: Path
) -> None:
    path, manifest = tiny
    folder, half = tmp_path / "mine", LayerRange(0, 2)
    folder.mkdir()
    (folder / "a-bad.gguf").write_bytes(spoil(path.read_bytes()))
    digest = cut(path, folder / "b-good.gguf", half, manifest.model_sha256)
    with store(tmp_path, folder).obtain(manifest, half) as found:
        assert found.sha256 == digest


# -- shards from other Islands


HALF = LayerRange(0, 2)


def with_shard(tiny: tuple[Path, ShardManifest], folder: Path) -> tuple[Path, ShardManifest]:
    """A shard's file and a manifest that names it, without any source."""
    path, manifest = tiny
    shard = folder / "shard.bin"
    digest = cut(path, shard, HALF, manifest.model_sha256)
    named = {"shard_layers": (HALF,), "shard_hashes": (digest,), "shard_bytes": (shard.stat().st_size,), "shard_urls": ("",)}
    return shard, replace(manifest, model_sources=(), **named)  # type: ignore[arg-type]


@asynccontextmanager
async def giving(folder: Path, files: Sequence[Path]) -> AsyncIterator[tuple[CargoStore, BlobServer]]:
    """A store in ``folder / "mine"`` whose one neighbour gives these files away."""
    cache = Cache(folder / "theirs", 2**30)
    for file in files:
        copy = folder / "copy"
        copy.write_bytes(file.read_bytes())
        cache.add(copy, hashlib.sha256(copy.read_bytes()).hexdigest(), ".gguf", "test", "test")

    def hello() -> Hello:
        return island_hello(NETWORK, "test")

    async with open_host(STRANGER.seed) as giver, open_host(ISLAND.seed) as island:
        server = BlobServer(BlobStore(folder / "theirs", 2**30), hello)
        giver.set_handler(BLOB_PROTOCOL, BLOB, server.serve)
        await island.connect(giver.addresses()[0])
        yield open_cargo_store(island, hello, list, lambda peer: (), folder / "mine", 2**30), server


def held_of(manifest: ShardManifest, layers: LayerRange = HALF) -> Held:
    return Held(manifest, layers, CELLS, NEEDED)


async def bring(files: CargoStore, folder: Path, held: Held) -> tuple[str, ShardStore]:
    ours = ShardStore(ModelStore(folder / "mine"))
    with trio.fail_after(20):
        return await bring_from_peers(files, held, ours, no_progress), ours


async def test_a_shard_that_another_island_has_comes_from_there(tiny: tuple[Path, ShardManifest], tmp_path: Path) -> None:
    shard, manifest = with_shard(tiny, tmp_path)
    async with giving(tmp_path, [shard, tiny[0]]) as (files, server):
        came_from, ours = await bring(files, tmp_path, held_of(manifest))
        assert came_from == "peers" and server.bytes_total == files.counts.bytes_from_peers == shard.stat().st_size
        with ours.obtain(manifest, HALF) as found:
            assert found.path.read_bytes() == shard.read_bytes() and found.sha256 == manifest.shard_hashes[0]
        assert await bring(files, tmp_path, held_of(manifest)) == ("", ANY), "what is here is not asked for"
        assert server.bytes_total == shard.stat().st_size


async def test_without_the_shard_the_model_comes_and_is_cut(tiny: tuple[Path, ShardManifest], tmp_path: Path) -> None:
    shard, manifest = with_shard(tiny, tmp_path)
    async with giving(tmp_path, [tiny[0]]) as (files, _):
        came_from, ours = await bring(files, tmp_path, held_of(manifest))
        assert came_from == "cut of a model from peers" and files.counts.bytes_from_peers == manifest.model_bytes
        with ours.obtain(manifest, HALF) as found:
            assert found.path.read_bytes() == shard.read_bytes() and found.came_from == "cut"
        with ours.obtain(manifest, HALF) as found:
            assert found.came_from == "cache"
        entries = {entry.model.sha256: entry.in_use for entry in ModelStore(tmp_path / "mine").list()}
        assert set(entries) == {manifest.model_sha256, found.sha256}, "a shard counts towards the cap like any other file"


async def test_a_shard_is_held_while_it_is_loaded(tiny: tuple[Path, ShardManifest], tmp_path: Path) -> None:
    manifest = tiny[1]
    ours = ShardStore(ModelStore(tmp_path / "mine"), own_manifest=True)
    with ours.obtain(manifest, HALF) as found:
        assert ModelStore(tmp_path / "mine").evict(0) == [] and found.path.exists()
    assert len(ModelStore(tmp_path / "mine").evict(0)) == 1 and not found.path.exists()
    with ours.obtain(manifest, HALF) as again:
        assert again == found and again.came_from == "cut"


async def test_nobody_has_it_and_all_is_as_without_peers(tiny: tuple[Path, ShardManifest], tmp_path: Path) -> None:
    _, manifest = with_shard(tiny, tmp_path)
    async with giving(tmp_path, []) as (files, _):
        came_from, ours = await bring(files, tmp_path, held_of(manifest))
        assert came_from == "" and files.counts.failed == 2
        with pytest.raises(ConfigError, match="names no source"), ours.obtain(manifest, HALF):
            pass


def test_what_is_cut_of_a_private_model_stays_here(tiny: tuple[Path, ShardManifest]) -> None:
    manifest = tiny[1]
    assert not is_public(manifest) and not is_public(replace(manifest, model_sources=()))
    assert not is_public(replace(manifest, model_sources=("https://a/b", "file:///c")))
    assert is_public(replace(manifest, model_sources=("https://a/b", "hf:a/b"))) and is_public(MANIFEST)


async def test_an_order_without_a_source_is_refused_by_the_real_loader(tiny: tuple[Path, ShardManifest], tmp_path: Path) -> None:
    async with place(tmp_path / "island", is_real=True) as at:
        refusal = await at.refusal(hold(LayerRange(0, 2), manifest=tiny[1]))
        assert refusal.code is Code.UNKNOWN_CARGO and "names no source that this Island may read" in refusal.message
        assert at.holder.free_bytes == 2 * NEEDED
