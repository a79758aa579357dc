"""Cargos' files from peers and sources, on real hosts on loopback: who lies, stalls or vanishes, what is full, and what is shared."""

from __future__ import annotations

import hashlib
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from node.blob_fetcher import BlobFetcher
from node.blobs_served import Pace
from node.cargo_store import CargoStore, FetchCounts, FileWanted, SharedFiles, open_cargo_store, peers_to_ask
from node.loading import Loadings
from node.net.frames import FrameStream
from protocol import blob_fetch, limits
from protocol.ads import CargoLoading
from protocol.blobs import BlobKey, Chunk, Have, Held, pack_held, tree_of
from protocol.cargos import CargoFile, CargoManifest, address_of, canonical_manifest
from protocol.errors import LinkLost
from runtimes.store import DiskFull, FetchError, ModelStore, WebPolicy, WrongContent
from runtimes.store.blob_partial import BlobPartial
from runtimes.store.blob_store import BlobStore
from runtimes.store.cache import Cache
from tests.node.blob_net import CHUNKS, DATA, MIB, PARTS, ROOT, SHA256, Net, Peer, hello, honest, network, never
from tests.protocol import samples
from tests.protocol.test_protocol_cargos import manifest as any_manifest
from tests.runtimes.store.source_server import Site, serving_site

SMALL = b"a small file beside it"
NO_WEB = WebPolicy(tries=1)
CAP_BYTES = 2**30


def of_data(*sources: str, **changes: Any) -> CargoFile:
    return replace(CargoFile("model.bin", SHA256, len(DATA), sources, ROOT), **changes)


def cargo(*files: CargoFile, **changes: Any) -> CargoManifest:
    return any_manifest(files=files, entry=files[0].path, **changes)


def cargo_store(net: Net, peers: Sequence[Peer] | None = None, web: WebPolicy = NO_WEB, cap_bytes: int = CAP_BYTES) -> CargoStore:
    """Its own folder is that of ``net.store``."""
    asked = [peer.peer for peer in (net.peers if peers is None else peers)]
    folder = net.folder / "mine"
    net.store = BlobStore(folder, cap_bytes)
    fetcher = BlobFetcher(net.host, net.store, hello)
    return CargoStore(
        fetcher, ModelStore(folder, cap_bytes, web), lambda hints, refused: [peer for peer in asked if peer not in refused], web
    )


async def fetch(files: CargoStore, manifest: CargoManifest, seconds: float = 20) -> dict[str, bytes]:
    with trio.fail_after(seconds):
        return {path: at.read_bytes() for path, at in (await files.fetch(manifest)).items()}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving_site(tmp_path) as made:
        made.files["/model.bin"] = DATA
        yield made


async def test_two_good_peers_and_one_that_lies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with network(tmp_path, 3) as net:
        liar = net.peers[0]

        async def lie(stream: FrameStream, request: int, index: int) -> None:
            await stream.send(Chunk(request, index, bytes(len(PARTS[index]))))

        liar.behave(lie)
        files = cargo_store(net)
        assert await fetch(files, cargo(of_data())) == {"model.bin": DATA}
        assert list(files.bad_peers) == [liar.peer] and "not the blob's" in files.bad_peers[liar.peer]
        assert liar.peer in caplog.text, "it is named"
        assert len(liar.sent) <= blob_fetch.WINDOW_FIRST_CHUNKS + 10
        assert files.counts == FetchCounts(files=1, bytes_from_peers=len(DATA))
        Cache(net.store.cache_dir, CAP_BYTES).evict(0)
        assert await fetch(files, cargo(of_data())) == {"model.bin": DATA}
        assert liar.streams == 1, "it is not asked for anything else"


async def test_a_peer_that_vanishes(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:

        async def die(stream: FrameStream, request: int, index: int) -> None:
            if len(net.peers[0].sent) > 3:
                stream.abort()
                raise LinkLost("dead")
            await honest(stream, request, index)

        net.peers[0].behave(die)
        files = cargo_store(net)
        assert await fetch(files, cargo(of_data())) == {"model.bin": DATA} and not files.bad_peers


async def test_a_peer_that_stands_still_is_helped_out_by_the_source(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before it is given up: what it owes is the only thing that waits for that."""
    monkeypatch.setattr(blob_fetch, "SOURCES_AFTER_S", 0.3)
    monkeypatch.setattr(blob_fetch, "STALL_S", 1.5)
    async with network(tmp_path, 1) as net:
        net.peers[0].behave(never)
        files = cargo_store(net, web=site.policy)
        assert await fetch(files, cargo(of_data(site.url("/model.bin")))) == {"model.bin": DATA}
        assert files.counts == FetchCounts(files=1, bytes_from_sources=len(DATA))
        first = int((site.asked[0][1] or "").removeprefix("bytes=").removesuffix("-"))
        assert first == blob_fetch.WINDOW_FIRST_CHUNKS * MIB, "it began behind what the peer owed"


async def test_the_source_gives_what_peers_lack(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 1) as net:
        (peer,) = net.peers
        peer.held = Have(2, Held.SOME, pack_held([index < 20 for index in range(CHUNKS)]))
        peer.behave(honest)
        files = cargo_store(net, web=site.policy)
        assert await fetch(files, cargo(of_data(site.url("/model.bin")))) == {"model.bin": DATA}
        assert files.counts == FetchCounts(files=1, bytes_from_peers=20 * MIB, bytes_from_sources=len(DATA) - 20 * MIB)
        assert [wanted for _, wanted, _ in site.asked] == [f"bytes={20 * MIB}-"]


async def test_without_a_peer_the_source_gives_all(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 0) as net:
        files = cargo_store(net, web=site.policy)
        assert await fetch(files, cargo(of_data(site.url("/model.bin")))) == {"model.bin": DATA}
        assert files.counts == FetchCounts(files=1, bytes_from_sources=len(DATA), whole=1)
        assert net.is_whole()
        assert await fetch(cargo_store(net, []), cargo(of_data())) == {"model.bin": DATA}, "what is here needs nobody"


async def test_a_source_that_lies_in_the_middle_is_left_and_a_peer_is_enough(tmp_path: Path, site: Site) -> None:
    site.files["/model.bin"] = bytes(len(DATA))
    async with network(tmp_path, 2) as net:
        for peer, share in zip(net.peers, (range(0, 12), range(12, CHUNKS - 1)), strict=True):
            peer.held = Have(2, Held.SOME, pack_held([index in share for index in range(CHUNKS)]))
            peer.behave(honest)
        files = cargo_store(net, web=site.policy)
        with pytest.raises(WrongContent, match=SHA256):
            await fetch(files, cargo(of_data(site.url("/model.bin"))))
        assert not files.bad_peers, "no peer is to blame"
        net.peers[1].held = Have(2, Held.ALL)
        assert await fetch(files, cargo(of_data(site.url("/model.bin")))) == {"model.bin": DATA}


async def test_all_bad_is_a_clear_error(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 1) as net:

        async def lie(stream: FrameStream, request: int, index: int) -> None:
            await stream.send(Chunk(request, index, bytes(len(PARTS[index]))))

        net.peers[0].behave(lie)
        files = cargo_store(net, web=site.policy)
        with pytest.raises(FetchError, match=r"(?s)does not exist.*And text-stats: model.bin cannot be had from peers.*not the blob's"):
            await fetch(files, cargo(of_data(site.url("/other"))))
        with pytest.raises(FetchError, match=r"none is known.*no source that can be read"):
            await fetch(files, cargo(of_data()))
        with pytest.raises(FetchError, match="no source that can be read"):
            await fetch(files, cargo(of_data(f"peer:{SHA256}")))
        assert files.counts.failed == 3 and not files.loadings.now() and not files.store.model(SHA256)
        assert not [name for name in net.left_behind() if name.endswith(".bin")]


async def test_a_source_inside_the_network_is_not_asked(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 0) as net:
        with pytest.raises(FetchError, match="no public address"):
            await fetch(cargo_store(net, web=site.policy), cargo(of_data(site.url("/model.bin", "inside.example"))))
        assert not site.asked and net.left_behind() == []


async def test_a_root_and_a_hash_of_different_files_never_run(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 0) as net:
        wrong = of_data(site.url("/model.bin"), root="ab" * 32)
        with pytest.raises(WrongContent, match="not of the same file"):
            await fetch(cargo_store(net, web=site.policy), cargo(wrong))


async def test_a_manifest_with_a_wrong_root_has_no_honest_peer_barred(tmp_path: Path) -> None:
    """Or anybody could cut an Island off from its neighbours by a manifest that names the hash of a file that they have."""
    async with network(tmp_path, 2) as net:
        files = cargo_store(net)
        with pytest.raises(FetchError, match="it, or who named both, is wrong"):
            await fetch(files, cargo(of_data(root="ab" * 32)))
        assert not files.bad_peers
        assert await fetch(files, cargo(of_data())) == {"model.bin": DATA}


async def test_files_of_all_kinds_under_their_paths(tmp_path: Path, site: Site) -> None:
    site.files["/small"] = SMALL
    small = CargoFile("etc/small.tree", hashlib.sha256(SMALL).hexdigest(), len(SMALL), (site.url("/small"),))
    empty = CargoFile("empty.txt", hashlib.sha256().hexdigest(), 0)
    async with network(tmp_path, 1) as net:
        files = cargo_store(net, web=site.policy)
        manifest = cargo(of_data(), of_data(path="again.onnx"), small, replace(small, path="b.json"), empty)
        found = await fetch(files, manifest)
        expected = {"model.bin": DATA, "again.onnx": DATA, "etc/small.tree": SMALL, "b.json": SMALL, "empty.txt": b""}
        assert found == expected
        assert len(site.asked) == 1 and files.counts.files == 2
        assert await fetch(files, manifest) == expected and len(site.asked) == 1
        with pytest.raises(WrongContent, match="the manifest says 5"):
            await fetch(files, cargo(of_data(size_bytes=5, root="")))


async def test_two_cargos_that_share_a_file_fetch_it_once(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        net.peers[0].behave(honest)
        files = cargo_store(net)
        found: list[dict[str, bytes]] = []

        async def one(name: str) -> None:
            found.append(await fetch(files, cargo(of_data(path=f"{name}.bin"), name=name)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "one")
            nursery.start_soon(one, "two")
        assert sorted(net.peers[0].sent) == list(range(CHUNKS)), "each chunk once"
        assert sorted(path for each in found for path in each) == ["one.bin", "two.bin"]
        assert files.counts == FetchCounts(files=1, bytes_kept=len(DATA), bytes_from_peers=len(DATA))


# Room


def blob_of(net: Net, data: bytes, path: str, site: Site) -> CargoFile:
    site.files[f"/{path}"] = data
    root = tree_of([data]).root()
    return CargoFile(path, hashlib.sha256(data).hexdigest(), len(data), (site.url(f"/{path}"),), root)


async def test_a_cap_the_least_recently_used_goes_and_what_is_held_stays(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 0) as net:
        files = cargo_store(net, web=site.policy, cap_bytes=250_000)
        a, b, c = (cargo(blob_of(net, bytes([letter]) * 100_000, f"{letter}.bin", site)) for letter in (1, 2, 3))
        digests = [manifest.files[0].sha256 for manifest in (a, b, c)]
        await fetch(files, a)
        await fetch(files, b)
        await fetch(files, c)
        assert [files.store.model(digest) is not None for digest in digests] == [False, True, True]
        async with files.held(b) as held_b, files.held(c):
            site.asked.clear()
            with pytest.raises(DiskFull, match=r"100,000 bytes are to be stored.*200,000 of them are in use"):
                await fetch(files, a)
            assert not site.asked and held_b["2.bin"].read_bytes() == bytes([2]) * 100_000
        await fetch(files, a)
        with pytest.raises(DiskFull, match="may hold 250,000"):
            await fetch(files, cargo(blob_of(net, bytes(300_000), "large.bin", site)))


async def test_too_little_disk_is_said_before_a_byte_is_asked_for(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with network(tmp_path, 1) as net:
        net.peers[0].behave(honest)
        files = cargo_store(net, web=site.policy)
        monkeypatch.setattr(Cache, "_free_bytes", lambda self: 5_000_000)
        with pytest.raises(DiskFull, match=rf"5,000,000 bytes to spare, {len(DATA):,} are needed"):
            await fetch(files, cargo(of_data(site.url("/model.bin"))))
        assert not net.peers[0].sent and not site.asked and net.left_behind() == []


@pytest.mark.parametrize("way", ["peers", "sources"])
async def test_a_disk_that_fills_up_leaves_no_half_file(
    tmp_path: Path, site: Site, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sources' way the kernel itself says no: past a limit that is set on this process."""
    written: list[int] = []

    def full(self: BlobPartial, rest: memoryview, at: int) -> None:
        written.append(at)
        if len(written) > 5:
            raise OSError(28, "No space left on device")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with network(tmp_path, 1 if way == "peers" else 0) as net:
        files = cargo_store(net, web=site.policy)
        monkeypatch.setattr(BlobPartial, "_write", full)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000 if way == "sources" else soft, hard))
        try:
            with pytest.raises(DiskFull, match="is full"):
                await fetch(files, cargo(of_data(site.url("/model.bin"))))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert net.left_behind() == [] and files.store.model(SHA256) is None and not files.loadings.now()
        assert (len(written) > 5) == (way == "peers") and bool(site.asked) == (way == "sources")
        monkeypatch.undo()
        assert await fetch(files, cargo(of_data(site.url("/model.bin")))) == {"model.bin": DATA}


# Killed


_FETCHES = """
import sys, trio
from pathlib import Path
from node.cargo_store import open_cargo_store
from node.net.host import open_host
from protocol.cargos import read_manifest
from tests.node.blob_net import hello
async def main():
    async with open_host(b"k" * 32, ["/ip4/127.0.0.1/tcp/0"]) as host:
        await host.connect(sys.argv[2])
        files = open_cargo_store(host, hello, list, lambda peer: (), Path(sys.argv[1]), 2**30)
        manifest = read_manifest(Path(sys.argv[3]).read_bytes())
        await files.fetch(manifest, lambda stage, done, total: print(done, flush=True))
trio.run(main)
"""


async def test_a_process_that_is_killed_in_the_middle_is_gone_on_with(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        (peer,) = net.peers

        async def chunk(stream: FrameStream, request: int, index: int) -> None:
            await (never if len(peer.sent) > 10 else honest)(stream, request, index)

        peer.behave(chunk)
        files = cargo_store(net)
        (tmp_path / "manifest").write_bytes(canonical_manifest(cargo(of_data())))
        command = [sys.executable, "-c", _FETCHES, str(tmp_path / "mine"), peer.host.addresses()[0], str(tmp_path / "manifest")]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2])
        assert process.stdout is not None
        heard = b""
        with trio.fail_after(30):
            while f"\n{10 * MIB}\n".encode() not in b"\n" + heard:
                heard += await process.stdout.receive_some()
            process.send_signal(signal.SIGKILL)
            await process.wait()
        assert files.store.model(SHA256) is None, "half a file is none"
        peer.sent.clear()
        peer.behave(honest)
        assert await fetch(files, cargo(of_data())) == {"model.bin": DATA}
        assert set(peer.sent) == set(range(10, CHUNKS)) and files.counts.bytes_from_peers == len(DATA) - 10 * MIB


async def test_what_peers_began_the_source_alone_goes_on_with(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 1) as net:
        (peer,) = net.peers
        peer.held = Have(2, Held.SOME, pack_held([index < 9 for index in range(CHUNKS)]))
        peer.behave(honest)
        with pytest.raises(FetchError, match="chunks are missing"):
            await fetch(cargo_store(net), cargo(of_data()))
        files = cargo_store(net, [], web=site.policy)
        assert await fetch(files, cargo(of_data(site.url("/model.bin")))) == {"model.bin": DATA}
        assert [wanted for _, wanted, _ in site.asked] == [f"bytes={9 * MIB}-"]
        assert files.counts == FetchCounts(files=1, bytes_from_sources=len(DATA) - 9 * MIB)


async def test_a_download_from_the_source_that_broke_off_is_gone_on_with(tmp_path: Path, site: Site) -> None:
    """By the source, and where there is one by a peer."""
    site.cuts = [5 * MIB + 17] * 1 + [0] * 50
    async with network(tmp_path, 1) as net:
        net.peers[0].behave(honest)
        manifest = cargo(of_data(site.url("/model.bin")))
        with pytest.raises(FetchError, match="are kept"):
            await fetch(cargo_store(net, [], web=site.policy), manifest)
        assert await fetch(cargo_store(net), manifest) == {"model.bin": DATA}
        assert set(net.peers[0].sent) == set(range(5, CHUNKS))


# What others get


async def test_files_are_given_to_others_while_they_are_held(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:
        giver = net.peers[0]
        mine = CargoStore(BlobFetcher(giver.host, giver.server._store, hello), ModelStore(tmp_path / "peer1"), lambda hints, refused: [])
        giver.server._may = mine.shared.may
        files = cargo_store(net, [giver])
        with pytest.raises(FetchError, match="unknown_blob"):
            await fetch(files, cargo(of_data()))
        async with mine.held(cargo(of_data())):
            assert await fetch(files, cargo(of_data())) == {"model.bin": DATA}
        assert not mine.shared.may(SHA256), "what is not loaded any more is not given"


def test_files_are_shared_as_often_as_they_are_held() -> None:
    shared = SharedFiles()
    with shared.sharing("a"):
        with shared.sharing("a"):
            assert shared.may("a") and not shared.may("b")
        assert shared.may("a")
    assert not shared.may("a")
    shared.share("b")
    with shared.sharing("b"):
        pass
    assert shared.may("b")


def test_a_peer_gets_its_share_and_another_is_not_held_up() -> None:
    pace = Pace(4_000_000)
    waits_s = [pace.wait_s("a", 1_000_000, 0.0) for _ in range(5)]
    assert waits_s == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert pace.wait_s("b", 1_000_000, 0.0) == 0.0 and pace.wait_s("a", 1_000_000, 2.0) == 0.0
    for number in range(3000):
        pace.wait_s(str(number), 1, number * 1.0)
    assert len(pace._paid_until_s) <= 1001


async def test_a_slow_pace_is_kept(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        net.peers[0].server.pace = Pace(40 * MIB)
        began_s = trio.current_time()
        await fetch(cargo_store(net), cargo(of_data()))
        assert trio.current_time() - began_s > 0.2, "24 chunks at 40 a second, and a quarter of a second at once"


# Whom to ask


def test_who_is_asked_and_in_which_order() -> None:
    cargo_hash, shard_hash = "aa" * 32, "bb" * 32
    far = samples.ad(samples.FIRST, offers=(samples.offer(content_hash=cargo_hash),), shards=())
    near = samples.ad(samples.MIDDLE, offers=(), shards=(samples.shard(shard_hash=shard_hash),))
    stranger = samples.ad(samples.OTHER)
    ads = [far, near, stranger]
    rtts = {near.peer: 0.01, samples.HOLDER.peer_id: 0.02}
    connected = [samples.COORDINATOR.peer_id, samples.HOLDER.peer_id, far.peer]
    own = samples.ISLAND.peer_id
    both = frozenset({cargo_hash, shard_hash})
    assert peers_to_ask(ads, both, connected, rtts, own) == (near.peer, far.peer, samples.HOLDER.peer_id, samples.COORDINATOR.peer_id)
    assert peers_to_ask(ads, frozenset({cargo_hash}), [], rtts, own) == (far.peer,)
    assert peers_to_ask(ads, both, [], {}, own, refused={near.peer}) == (far.peer,)
    assert peers_to_ask(ads, both, [], {}, far.peer) == (near.peer,), "never ourselves"
    many = [samples.ad(samples.key(number), offers=(samples.offer(content_hash=cargo_hash),)) for number in range(100, 140)]
    chosen = [peers_to_ask(many, frozenset({cargo_hash}), [], {}, own) for own in ("a", "b")]
    assert {len(one) for one in chosen} == {limits.BLOB_PEERS_ASKED_MAX} and chosen[0] != chosen[1], "not all ask the same ones"


async def test_neighbours_are_found_and_so_is_who_advertises_it(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:
        manifest = cargo(of_data())
        advertised, neighbour = net.peers
        for peer, share in ((advertised, range(12)), (neighbour, range(12, CHUNKS))):
            peer.held = Have(2, Held.SOME, pack_held([index in share for index in range(CHUNKS)]))
            peer.behave(honest)
        offer = samples.offer(content_hash=address_of(manifest))
        ad = replace(samples.ad(offers=(offer,)), peer=advertised.peer)
        addresses = {advertised.peer: advertised.host.addresses()}
        files = open_cargo_store(net.host, hello, lambda: [ad], lambda peer: addresses.get(peer, ()), tmp_path / "mine", CAP_BYTES)
        await net.host.connect(neighbour.host.addresses()[0])
        assert await fetch(files, manifest) == {"model.bin": DATA}
        assert (min(advertised.sent), min(neighbour.sent)) == (0, 12)


# How far it is


async def test_progress_is_in_the_ad_and_gone_when_it_is_over(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        files = cargo_store(net)
        manifest = cargo(of_data())
        seen: list[tuple[CargoLoading, ...]] = []
        with trio.fail_after(20):
            await files.fetch(manifest, lambda stage, done, total: seen.append(files.loadings.now()))
        assert {(one.name, one.address, one.total_bytes) for (one,) in seen} == {("text-stats", address_of(manifest), len(DATA))}
        done = [one.done_bytes for (one,) in seen]
        assert done == sorted(done) and done[-1] == len(DATA) and not files.loadings.now()


async def test_how_far_it_is_is_said_every_two_seconds(autojump_clock: trio.testing.MockClock) -> None:
    loadings = Loadings()
    said: list[tuple[float, int]] = []

    async def say() -> None:
        known: tuple[CargoLoading, ...] = ()
        while True:
            known = await loadings.wait_changed(known)
            said.append((trio.current_time(), known[0].done_bytes if known else -1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(say)
        await trio.sleep(100)
        with loadings.loading("a", "ab" * 32, 1000) as one:
            hear = one.heard(lambda stage, done, total: None, 600)
            for number in range(10):
                await trio.sleep(0.45)
                hear("x", number * 100, None)
            one.finished(600)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    start_s = said[0][0]
    assert [(round(at - start_s, 1), done) for at, done in said] == [(0, 0), (2, 300), (4, 600), (4.5, -1)]


def test_loadings_are_bounded_and_each_address_once() -> None:
    loadings = Loadings()
    opened = [loadings.loading(f"c{number}", f"{number:064x}", number) for number in range(20)]
    for one in opened:
        one.__enter__()
    assert [one.name for one in loadings.now()] == [f"c{number}" for number in range(limits.AD_LOADING_MAX)]
    twice = Loadings()
    with twice.loading("a", "ab" * 32, 0) as first, twice.loading("a", "ab" * 32, 0):
        first.heard(lambda stage, done, total: None, 0)("x", 70, 100)
        assert twice.now() == (CargoLoading("a", "ab" * 32, 70, 100),)


async def test_a_single_file_only_from_peers(tmp_path: Path, site: Site) -> None:
    async with network(tmp_path, 0) as net:
        files = cargo_store(net, web=site.policy)
        with pytest.raises(FetchError, match="none is known"):
            await files.bring(FileWanted("a", SHA256, len(DATA), ROOT, ".bin", (site.url("/model.bin"),), joins_only=True))
        assert not site.asked
    async with network(_made(tmp_path / "more"), 1) as net:
        files = cargo_store(net)
        await files.bring(FileWanted("a", SHA256, 0))
        found = files.store.find(BlobKey.SHA256, SHA256)
        assert found is not None and found.root == ROOT


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
