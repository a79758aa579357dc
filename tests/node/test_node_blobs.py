"""Blobs between real hosts on loopback: several peers at once, and what each of them may do wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from node.blob_fetcher import BlobFetcher, BlobUnavailable, BlobWanted
from node.greeting import exchange_hello
from node.net.frames import FrameStream
from node.net.host import open_host
from privacy.keys import NodeKey
from protocol import blob_fetch, limits
from protocol.blob_fetch import Fault
from protocol.blobs import (
    BLOB,
    BLOB_PROTOCOL,
    BlobCode,
    BlobKey,
    BlobRefused,
    Chunk,
    ChunksWanted,
    Have,
    HaveWanted,
    Held,
    Tree,
    TreeWanted,
    pack_held,
    tree_of,
)
from protocol.errors import LinkLost
from runtimes.store import DiskFull, WrongContent
from runtimes.store.blob_partial import BlobPartial
from runtimes.store.blob_store import BlobStore
from tests.node.blob_net import (
    CHUNKS,
    DATA,
    LISTEN,
    MIB,
    PARTS,
    ROOT,
    SHA256,
    TREE,
    Net,
    hello,
    honest,
    network,
    never,
)


@pytest.mark.parametrize("by", ["root", "sha256", "both"])
async def test_two_peers_give_a_blob_together(tmp_path: Path, by: str) -> None:
    async with network(tmp_path, 2) as net:
        for peer in net.peers:  # a root is known where a tree was made
            peer.server._store.find(BlobKey.SHA256, SHA256)
        seen: list[int] = []
        wanted = BlobWanted("test", "" if by == "sha256" else ROOT, "" if by == "root" else SHA256, ".bin")
        fetched = await net.fetch(wanted=wanted, progress=lambda what, done, total: seen.append(done))
        assert net.is_whole() and fetched.faults == {}
        assert sum(fetched.chunks_by_peer.values()) == CHUNKS and min(fetched.chunks_by_peer.values()) > 0
        assert seen == sorted(seen) and seen[-1] == len(DATA)
        assert len(net.left_behind()) == 1
        again = await net.fetch(wanted=wanted)
        assert again.blob == fetched.blob and not again.chunks_by_peer, "what is here is not fetched"


async def test_a_liar_is_found_at_its_wrong_chunk_and_alone_to_blame(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:
        liar, other = net.peers

        async def chunk(stream: FrameStream, request: int, index: int) -> None:
            data = PARTS[index]
            await stream.send(Chunk(request, index, data if len(liar.sent) != 3 else data[:-1] + bytes([data[-1] ^ 1])))

        liar.behave(chunk)
        fetched = await net.fetch()
        assert net.is_whole()
        assert [(peer, drop.fault) for peer, drop in fetched.faults.items()] == [(liar.peer, Fault.LIE)]
        assert f"chunk {liar.sent[2]} " in fetched.faults[liar.peer].detail
        assert fetched.chunks_by_peer[liar.peer] >= 2, "what it sent before was good"
        assert fetched.chunks_by_peer[other.peer] + fetched.chunks_by_peer[liar.peer] == CHUNKS


async def test_one_lie_is_enough(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:
        liar, other = net.peers

        async def chunk(stream: FrameStream, request: int, index: int) -> None:
            await stream.send(Chunk(request, index, bytes(len(PARTS[index]))))

        liar.behave(chunk)
        fetched = await net.fetch()
        assert net.is_whole() and dict(fetched.chunks_by_peer) == {other.peer: CHUNKS}
        assert [drop.fault for drop in fetched.faults.values()] == [Fault.LIE]
        assert liar.streams == 1, "it is not asked again"
        assert len(liar.sent) <= blob_fetch.WINDOW_FIRST_CHUNKS + 10, "what may come before the first is looked at"


async def test_a_peer_that_dies_in_the_middle(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:
        mortal, other = net.peers

        async def chunk(stream: FrameStream, request: int, index: int) -> None:
            if len(mortal.sent) > 2:
                stream.abort()
                raise LinkLost("dead")
            await honest(stream, request, index)

        mortal.behave(chunk)
        fetched = await net.fetch()
        assert net.is_whole() and fetched.faults[mortal.peer].fault is Fault.LOST
        assert fetched.chunks_by_peer[other.peer] >= CHUNKS - 8


async def test_a_slow_peer_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:
        slow, other = net.peers
        slow.behave(never)
        began_s = trio.current_time()
        fetched = await net.fetch()
        assert net.is_whole() and trio.current_time() - began_s < blob_fetch.STALL_S, "what it owes was asked for twice"
        assert dict(fetched.chunks_by_peer) == {other.peer: CHUNKS} and slow.sent


async def test_a_peer_that_stands_still_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_fetch, "STALL_S", 0.5)

    async def source(offset: int, count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return DATA[offset : offset + count]

    async with network(tmp_path, 1) as net:
        net.peers[0].behave(never)
        fetched = await net.fetch(source=source)
        assert net.is_whole() and fetched.faults[net.peers[0].peer].fault is Fault.STALLED


@pytest.mark.parametrize("excess", ["twice", "another", "unasked", "too long", "another request", "a tree"])
async def test_a_peer_that_sends_other_than_what_it_was_asked_for(tmp_path: Path, excess: str) -> None:
    async with network(tmp_path, 2) as net:
        bad, _other = net.peers

        async def chunk(stream: FrameStream, request: int, index: int) -> None:
            if excess == "a tree":
                await stream.send(Tree(request, SHA256, TREE.size, TREE.leaves))
            elif excess == "another request":
                await stream.send(Chunk(request + 1000, index, PARTS[index]))
            elif excess == "too long":
                await stream.send(Chunk(request, index, PARTS[index][:-1]))
            elif excess == "another":
                await stream.send(Chunk(request, index + 1, PARTS[index]))
            else:
                await honest(stream, request, index)
                await stream.send(Chunk(request, index if excess == "twice" else 10**5, PARTS[index]))

        bad.behave(chunk)
        fetched = await net.fetch()
        assert net.is_whole() and list(fetched.faults) == [bad.peer]
        assert fetched.faults[bad.peer].fault is (Fault.LIE if excess == "too long" else Fault.BREACH)


@pytest.mark.parametrize(("sha256", "fault"), [("", Fault.LIE), (SHA256, Fault.REFUSED)])
async def test_a_false_tree_under_a_known_root_is_not_followed(tmp_path: Path, sha256: str, fault: Fault) -> None:
    """Asked by the root it is a lie. Asked by the hash it may be the truth: then who named both to us is wrong."""
    async with network(tmp_path, 2) as net:
        liar, _other = net.peers
        liar.tree = tree_of([bytes(MIB)] * CHUNKS)
        liar.behave(honest)
        _other.server._store.find(BlobKey.SHA256, SHA256)
        fetched = await net.fetch(wanted=BlobWanted("test", ROOT, sha256, ".bin"))
        assert net.is_whole() and fetched.faults[liar.peer].fault is fault and not liar.sent


async def test_a_false_tree_where_only_the_hash_is_known(tmp_path: Path) -> None:
    """Two of three lie alike: their tree is followed, the whole is wrong, they are to blame, and it is fetched from the third."""
    false = [bytes(MIB)] * 3

    async def chunk(stream: FrameStream, request: int, index: int) -> None:
        await stream.send(Chunk(request, index, false[index]))

    async with network(tmp_path, 3) as net:
        liars, other = net.peers[:2], net.peers[2]
        for liar in liars:
            liar.tree = tree_of(false)
            liar.behave(chunk)
        fetched = await net.fetch(wanted=BlobWanted("test", "", SHA256, ".bin"))
        assert net.is_whole() and dict(fetched.chunks_by_peer) == {other.peer: CHUNKS}
        assert {peer: drop.fault for peer, drop in fetched.faults.items()} == {liar.peer: Fault.LIE for liar in liars}


async def test_a_root_and_a_hash_of_different_files(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        net.peers[0].sha256 = "0" * 64
        net.peers[0].behave(honest)
        with pytest.raises(WrongContent, match="not of the same file"):
            await net.fetch(wanted=BlobWanted("test", ROOT, "0" * 64, ".bin"))
        assert net.left_behind() == []


async def test_unknown_blobs(tmp_path: Path) -> None:
    async with network(tmp_path, 2) as net:
        with pytest.raises(BlobUnavailable, match="nobody has it") as caught:
            await net.fetch(wanted=BlobWanted("test", "1" * 64))
        assert {drop.fault for drop in caught.value.faults.values()} == {Fault.REFUSED} and len(caught.value.faults) == 2
        with pytest.raises(BlobUnavailable, match="no peer is known"):
            with trio.fail_after(10):
                await BlobFetcher(net.host, net.store, hello).fetch(BlobWanted("test", ROOT), [])


async def test_what_is_not_for_others_is_not_there(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        net.peers[0].server._may = lambda sha256: sha256 != SHA256
        with pytest.raises(BlobUnavailable):
            await net.fetch()


async def test_a_blob_larger_than_its_manifest_says(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        with pytest.raises(BlobUnavailable, match="are allowed"):
            await net.fetch(wanted=BlobWanted("test", ROOT, SHA256, ".bin", bytes_max=1000))


async def test_cut_and_resumed(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        (peer,) = net.peers
        reached = trio.Event()

        async def chunk(stream: FrameStream, request: int, index: int) -> None:
            if len(peer.sent) > 10:
                reached.set()
                await trio.sleep_forever()
            await honest(stream, request, index)

        peer.behave(chunk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(net.fetch)
            await reached.wait()
            there = 0
            while there < 10:  # until the writers are done with what has come
                await trio.testing.wait_all_tasks_blocked(0.01)
                there = peer_chunks_there(net)
            nursery.cancel_scope.cancel()
        peer.sent.clear()
        peer.behave(honest)
        fetched = await net.fetch()
        assert net.is_whole() and fetched.chunks_by_peer[peer.peer] == CHUNKS - 10
        assert set(peer.sent) == set(range(10, CHUNKS)), "what was there is not asked for again"


def peer_chunks_there(net: Net) -> int:
    path = next(net.store.cache_dir.glob("*.partial"))
    data = path.read_bytes()
    return sum(data[at : at + MIB] == part for at, part in zip(range(0, len(data), MIB), PARTS, strict=True))


async def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []

    def write(self: BlobPartial, rest: memoryview, at: int) -> None:
        writes.append(at)
        if len(writes) > 5:
            raise OSError(28, "No space left on device")

    async with network(tmp_path, 2) as net:
        monkeypatch.setattr(BlobPartial, "_write", write)
        with pytest.raises(DiskFull, match="is full"):
            await net.fetch()
        assert net.left_behind() == []


async def test_a_cache_that_is_too_small_says_so_before_a_chunk_is_asked_for(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        net.peers[0].behave(honest)
        net.store = BlobStore(tmp_path / "small", 1000)
        with pytest.raises(DiskFull, match="ARCHIPELAG_CACHE_BYTES"):
            await net.fetch()
        assert net.peers[0].sent == [] and net.left_behind() == []


async def test_sources_give_what_no_peer_has(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        (peer,) = net.peers
        bits = bits_of({0, 1, 2, 3, 7})
        peer.held = Have(2, Held.SOME, bits)
        peer.behave(honest)
        read: list[int] = []

        async def source(offset: int, count: int) -> bytes:
            read.append(offset // MIB)
            await trio.lowlevel.checkpoint()
            return DATA[offset : offset + count]

        fetched = await net.fetch(source=source)
        assert net.is_whole() and set(peer.sent) == {0, 1, 2, 3, 7}
        assert sorted(read) == sorted(set(range(CHUNKS)) - {0, 1, 2, 3, 7}) and fetched.chunks_by_peer[blob_fetch.SOURCES] == CHUNKS - 5


def bits_of(held: set[int]) -> bytes:
    return pack_held([index in held for index in range(CHUNKS)])


async def test_a_peer_with_a_part_and_no_sources(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        (peer,) = net.peers
        peer.held = Have(2, Held.SOME, bits_of({0, 5}))
        peer.behave(honest)
        with pytest.raises(BlobUnavailable, match="22 of 24 chunks are missing"):
            await net.fetch()
        assert peer_chunks_there(net) == 2, "and they are kept"


async def test_a_source_that_lies(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net:
        (peer,) = net.peers
        peer.held = Have(2, Held.SOME, bits_of({0}))
        peer.behave(honest)

        async def source(offset: int, count: int) -> bytes:
            await trio.lowlevel.checkpoint()
            return bytes(count)

        with pytest.raises(BlobUnavailable) as caught:
            await net.fetch(source=source)
        assert caught.value.faults[blob_fetch.SOURCES].fault is Fault.LIE


# -- the server


@asynccontextmanager
async def talking(net: Net) -> AsyncIterator[FrameStream]:
    async with await net.host.open(net.peers[0].peer, BLOB_PROTOCOL, BLOB) as stream:
        with trio.fail_after(10):
            await exchange_hello(stream, hello())
            yield stream


async def ask(stream: FrameStream, message: object) -> Any:
    await stream.send(message)
    return await stream.receive()


async def test_ranges_and_refusals(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net, talking(net) as stream:
        tree = await ask(stream, TreeWanted(7, BlobKey.SHA256, SHA256))
        assert tree.request == 7 and tree.tree() == TREE and tree.sha256 == SHA256
        assert await ask(stream, HaveWanted(8, ROOT)) == Have(8, Held.ALL)
        assert await ask(stream, HaveWanted(9, "3" * 64)) == Have(9, Held.NONE)
        for first, count in ((CHUNKS, 1), (CHUNKS - 1, 2), (CHUNKS - 15, 16), (2**17, 1)):
            refused = await ask(stream, ChunksWanted(10, ROOT, first, count))
            assert isinstance(refused, BlobRefused) and refused.code is BlobCode.OUT_OF_RANGE and refused.request == 10
        refused = await ask(stream, ChunksWanted(11, "3" * 64, 0, 1))
        assert refused.code is BlobCode.UNKNOWN_BLOB
        await stream.send(ChunksWanted(12, ROOT, CHUNKS - 6, 6))
        for index in range(CHUNKS - 6, CHUNKS):
            assert await stream.receive() == Chunk(12, index, PARTS[index])


async def test_what_is_no_question_ends_the_stream(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net, talking(net) as stream:
        await stream.send(Chunk(1, 0, b"here"))
        with pytest.raises(LinkLost):
            await stream.receive()


async def test_streams_of_one_peer_are_bounded(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net, talking(net) as first, talking(net) as second:
        async with talking(net) as third:
            refused = await ask(third, TreeWanted(1, BlobKey.SHA256, SHA256))
            assert isinstance(refused, BlobRefused) and refused.code is BlobCode.BUSY
        await first.aclose()
        while net.peers[0].server._streams[net.host.peer_id] > 1:
            await trio.testing.wait_all_tasks_blocked(0.01)
        async with talking(net) as third:
            assert isinstance(await ask(third, TreeWanted(1, BlobKey.SHA256, SHA256)), Tree)
        assert isinstance(await ask(second, HaveWanted(1, ROOT)), Have)


async def test_who_does_not_read_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_SEND_S", 0.2)
    async with network(tmp_path, 1) as net, talking(net) as stream:
        server = net.peers[0].server
        server._store.find(BlobKey.SHA256, SHA256)
        for request in range(1, 4):
            await stream.send(ChunksWanted(request, ROOT, 0, 16))
        while server._streams:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert 0 < server.bytes_total <= limits.STREAM_WINDOW_BYTES, "no more than its window"


async def test_a_file_that_was_cut_short_is_unreadable(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net, talking(net) as stream:
        found = net.peers[0].server._store.find(BlobKey.SHA256, SHA256)
        assert found is not None
        await stream.send(ChunksWanted(1, ROOT, 0, 1))
        await stream.receive()
        with open(found.model.path, "r+b") as file:
            file.truncate(MIB)
        refused = await ask(stream, ChunksWanted(2, ROOT, 1, 1))
        assert refused.code is BlobCode.UNREADABLE


async def test_an_older_peer_is_no_culprit(tmp_path: Path) -> None:
    async with network(tmp_path, 1) as net, open_host(NodeKey(b"o" * 32).seed, LISTEN) as old:
        net.host.remember(old.peer_id, old.addresses())
        with trio.fail_after(20):
            fetched = await BlobFetcher(net.host, net.store, hello).fetch(
                BlobWanted("test", ROOT, SHA256), [old.peer_id, net.peers[0].peer]
            )
        assert fetched.faults[old.peer_id].fault is Fault.REFUSED and net.is_whole()
