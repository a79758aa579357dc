"""Islands that serve blobs, on real hosts on loopback, and one that fetches; a test gives each of them its habits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from node.blob_fetcher import BlobFetcher, BlobWanted, Fetched
from node.blobs_served import BlobServer
from node.greeting import answer_hello
from node.jobs_served import island_hello
from node.net.frames import FrameStream
from node.net.host import Host, open_host
from privacy.keys import NodeKey
from protocol import limits
from protocol.blobs import (
    BLOB,
    BLOB_PROTOCOL,
    BlobKey,
    BlobTree,
    Chunk,
    ChunksWanted,
    Have,
    HaveWanted,
    Held,
    Tree,
    TreeWanted,
    tree_of,
)
from protocol.messages import Hello
from runtimes.store.blob_store import BlobStore
from runtimes.store.cache import Cache

MIB = limits.BLOB_CHUNK_BYTES
CHUNKS = 24
DATA = random.Random(5).randbytes((CHUNKS - 1) * MIB + 4567)
SHA256 = hashlib.sha256(DATA).hexdigest()
PARTS = [DATA[at : at + MIB] for at in range(0, len(DATA), MIB)]
TREE = tree_of(PARTS)
ROOT = TREE.root()
LISTEN = ["/ip4/127.0.0.1/tcp/0"]


def hello() -> Hello:
    return island_hello("", "test")


def stored(folder: Path, data: bytes = DATA) -> BlobStore:
    """A store that holds ``data``."""
    cache = Cache(folder, 2**30)
    source = folder / "source"
    source.write_bytes(data)
    cache.add(source, hashlib.sha256(data).hexdigest(), ".bin", "test", "test")
    return BlobStore(folder, 2**30)


@dataclass
class Peer:
    """An Island that serves DATA; a test gives it habits. ``chunk``: what is sent for (stream, request, index), or does otherwise."""

    host: Host
    server: BlobServer
    tree: BlobTree = TREE
    sha256: str = SHA256
    held: Have = field(default_factory=lambda: Have(2, Held.ALL))
    sent: list[int] = field(default_factory=list)
    streams: int = 0

    @property
    def peer(self) -> str:
        return self.host.peer_id

    def behave(self, chunk: Callable[[FrameStream, int, int], Awaitable[None]]) -> None:
        """In place of the real server, from now on."""

        async def serve(stream: FrameStream) -> None:
            self.streams += 1
            await answer_hello(stream, hello)
            while True:
                wanted = await stream.receive()
                if isinstance(wanted, TreeWanted):
                    await stream.send(Tree(wanted.request, self.sha256, self.tree.size, self.tree.leaves))
                elif isinstance(wanted, HaveWanted):
                    await stream.send(self.held)
                else:
                    assert isinstance(wanted, ChunksWanted)
                    for index in range(wanted.first, wanted.first + wanted.count):
                        self.sent.append(index)
                        await chunk(stream, wanted.request, index)

        self.host.set_handler(BLOB_PROTOCOL, BLOB, serve)


async def honest(stream: FrameStream, request: int, index: int) -> None:
    await stream.send(Chunk(request, index, PARTS[index]))


@dataclass
class Net:
    folder: Path
    host: Host
    store: BlobStore
    peers: list[Peer]

    async def fetch(self, *peers: Peer, **options: Any) -> Fetched:
        wanted = options.pop("wanted", BlobWanted("test", ROOT, SHA256, ".bin"))
        fetcher = BlobFetcher(self.host, self.store, hello)
        with trio.fail_after(20):
            return await fetcher.fetch(wanted, [one.peer for one in peers or self.peers], **options)

    def is_whole(self) -> bool:
        found = self.store.find(BlobKey.SHA256, SHA256)
        return found is not None and found.model.path.read_bytes() == DATA and found.root == ROOT

    def left_behind(self) -> list[str]:
        return [path.name for path in self.store.cache_dir.iterdir() if path.suffix in (".partial", ".state", ".bin", ".tmp")]


@asynccontextmanager
async def network(folder: Path, count: int) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        peers: list[Peer] = []

        async def live(number: int, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            async with open_host(NodeKey(number.to_bytes(32, "big")).seed, LISTEN) as host:
                server = BlobServer(stored(folder / f"peer{number}"), hello)
                host.set_handler(BLOB_PROTOCOL, BLOB, server.serve)
                peers.append(Peer(host, server))
                task_status.started()
                await trio.sleep_forever()

        for number in range(1, count + 1):
            (folder / f"peer{number}").mkdir()
            await nursery.start(live, number)
        async with open_host(NodeKey(b"f" * 32).seed, LISTEN) as host:
            for peer in peers:
                host.remember(peer.peer, peer.host.addresses())
            yield Net(folder, host, BlobStore(folder / "mine", 2**30), peers)
        nursery.cancel_scope.cancel()


async def never(stream: FrameStream, request: int, index: int) -> None:
    await trio.sleep_forever()
