"""``/archipelag/blob/1`` on an Island: it hands out blobs of its store, a chunk at a time.

All is bounded: streams of one peer and of all together, one request at a time on each, of that at most _READ_CHUNKS in memory, the bytes
that a peer gets in a second, and the time that it may take to read a chunk. What else it asks for meanwhile waits unread in the stream's
window. Files are read in a thread.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import trio

from node.greeting import answer_hello
from node.net.frames import FrameStream
from protocol import limits
from protocol.blobs import (
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
)
from protocol.errors import ConfigError, LinkLost, RemoteProtocolError
from protocol.messages import Hello
from runtimes.store.blob_store import BlobStore, OpenBlob, StoredBlob

log = logging.getLogger(__name__)

_READ_CHUNKS = 4  # a thread is entered once for so many
_BURST_S = 0.25  # so much of its share a peer may have at once
_PACED_PEERS_MAX = 1000  # remembered until their time has passed
Wanted = TreeWanted | HaveWanted | ChunksWanted


class _Refusal(Exception):
    """One request is answered by BlobRefused."""

    def __init__(self, code: BlobCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Pace:
    """How fast each peer may be served: at most ``bytes_s_max``, a little more at once. Pure; the time is an argument."""

    def __init__(self, bytes_s_max: float) -> None:
        self._bytes_s_max = bytes_s_max
        self._paid_until_s: dict[str, float] = {}

    def wait_s(self, peer: str, size: int, now_s: float) -> float:
        """Count ``size`` bytes for the peer; how long they have to wait."""
        if len(self._paid_until_s) >= _PACED_PEERS_MAX:
            self._paid_until_s = {one: until_s for one, until_s in self._paid_until_s.items() if until_s > now_s}
        until_s = max(now_s, self._paid_until_s.get(peer, 0.0)) + size / self._bytes_s_max
        self._paid_until_s[peer] = until_s
        return max(0.0, until_s - now_s - _BURST_S)


class BlobServer:
    """``may``: whether the file with this SHA-256 is for others; ``check`` raises unless a Hello and its sender are welcome;
    ``bytes_s_max``: to one peer, over all its streams."""

    def __init__(
        self,
        store: BlobStore,
        hello: Callable[[], Hello],
        check: Callable[[Hello, str], object] = lambda hello, sender: None,
        may: Callable[[str], bool] = lambda sha256: True,
        bytes_s_max: float = math.inf,
    ) -> None:
        self._store, self._hello, self._check, self._may = store, hello, check, may
        self.pace = Pace(bytes_s_max)
        self._streams: Counter[str] = Counter()
        self.bytes_served: Counter[str] = Counter()  # by peer, of those that have a stream now
        self.bytes_total = 0
        self.refused = 0

    def __repr__(self) -> str:
        return f"<BlobServer of {self._store!r}, {self._streams.total()} streams, {self.bytes_total} bytes served>"

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream. Raises LinkLost when it ends, RemoteProtocolError when the peer breaks the protocol."""
        await answer_hello(stream, self._hello, self._check)
        with self._place(stream.remote_peer) as has_place, ExitStack() as opened:
            visit = _Visit(self, stream, opened)
            while (wanted := await self._next(stream)) is not None:
                if not has_place:
                    await stream.send(BlobRefused(wanted.request, BlobCode.BUSY, "too many fetch from this Island now"))
                    return
                await visit.answer(wanted)

    async def _next(self, stream: FrameStream) -> Wanted | None:
        """None where nothing was asked for in a long time."""
        with trio.move_on_after(limits.BLOB_IDLE_S):
            message = await stream.receive()
            if not isinstance(message, Wanted):
                raise RemoteProtocolError(f"{type(message).__name__} is nothing to ask an Island for")
            return message
        return None

    @contextmanager
    def _place(self, peer: str) -> Iterator[bool]:
        if self._streams[peer] >= limits.BLOB_STREAMS_PER_PEER_MAX or self._streams.total() >= limits.BLOB_STREAMS_MAX:
            self.refused += 1
            yield False
            return
        self._streams[peer] += 1
        try:
            yield True
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
                self.bytes_served.pop(peer, None)

    def count(self, peer: str, size: int) -> None:
        self.bytes_served[peer] += size
        self.bytes_total += size

    async def find(self, key: BlobKey, digest: str) -> StoredBlob | None:
        return await trio.to_thread.run_sync(partial(self._store.find, key, digest, self._may))

    def open(self, blob: StoredBlob) -> AbstractContextManager[OpenBlob]:
        return self._store.open(blob)


class _Visit:
    """What one peer asks for on one stream. The blob that it asked for last stays open."""

    def __init__(self, server: BlobServer, stream: FrameStream, opened: ExitStack) -> None:
        self._server, self._stream, self._opened = server, stream, opened
        self._open: OpenBlob | None = None

    async def answer(self, wanted: Wanted) -> None:
        try:
            if isinstance(wanted, TreeWanted):
                await self._tree(wanted)
            elif isinstance(wanted, HaveWanted):
                is_held = await self._server.find(BlobKey.ROOT, wanted.root) is not None
                await self._send(Have(wanted.request, Held.ALL if is_held else Held.NONE))
            else:
                await self._chunks(wanted)
        except _Refusal as refusal:
            await self._refuse(wanted, refusal.code, str(refusal))
        except (OSError, ConfigError) as error:
            log.warning("a blob cannot be read: %s", error)
            await self._refuse(wanted, BlobCode.UNREADABLE, "the blob cannot be read")

    async def _send(self, message: object) -> None:
        """Raises LinkLost, also where the peer does not read."""
        with trio.move_on_after(limits.BLOB_SEND_S) as scope:
            await self._stream.send(message)
        if scope.cancelled_caught:
            self._stream.abort()
            raise LinkLost(f"{self._stream.remote_peer} has not taken what it asked for within {limits.BLOB_SEND_S:g} s")

    async def _refuse(self, wanted: Wanted, code: BlobCode, message: str) -> None:
        self._server.refused += 1
        await self._send(BlobRefused(wanted.request, code, message))

    async def _tree(self, wanted: TreeWanted) -> None:
        blob = await self._server.find(wanted.key, wanted.digest)
        if blob is None:
            raise _Refusal(BlobCode.UNKNOWN_BLOB, "this blob is not here")
        await self._send(Tree(wanted.request, blob.model.sha256, blob.tree.size, blob.tree.leaves))

    async def _opened_blob(self, root: str) -> OpenBlob:
        if self._open is None or self._open.blob.root != root:
            blob = await self._server.find(BlobKey.ROOT, root)
            if blob is None:
                raise _Refusal(BlobCode.UNKNOWN_BLOB, "this blob is not here")
            self._opened.close()
            self._open = None
            self._open = self._opened.enter_context(self._server.open(blob))
        return self._open

    async def _chunks(self, wanted: ChunksWanted) -> None:
        opened = await self._opened_blob(wanted.root)
        end = wanted.first + wanted.count
        if end > opened.blob.tree.chunks:
            raise _Refusal(BlobCode.OUT_OF_RANGE, f"the blob has {opened.blob.tree.chunks} chunks")
        for first in range(wanted.first, end, _READ_CHUNKS):
            chunks = await trio.to_thread.run_sync(opened.read, first, min(_READ_CHUNKS, end - first))
            for index, data in enumerate(chunks, first):
                await trio.sleep(self._server.pace.wait_s(self._stream.remote_peer, len(data), trio.current_time()))
                await self._send(Chunk(wanted.request, index, data))
                self._server.count(self._stream.remote_peer, len(data))
