"""Fetches one blob from several peers at once over ``/archipelag/blob/1``, and from the publisher's sources where no peer has it.

The shell round protocol.blob_fetch: a task for each peer that reads what it sends, tasks that verify and write in threads, one that hashes
the whole as it grows, and a clock. Each peer's word on the tree is taken first. Where the caller knows the root, no other tree is followed;
where he knows only the SHA-256 of the whole, the tree that most peers name is followed, and whoever named it is to blame if the whole turns
out to be something else: then it is tried again without them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import trio

from node.greeting import exchange_hello
from node.net.frames import FrameStream
from node.net.host import Host
from node.net.oneline import one_line
from protocol import checks, limits
from protocol.blob_fetch import SOURCES, Ask, BlobFetch, Drop, Fault, choose_root
from protocol.blobs import (
    BLOB,
    BLOB_PROTOCOL,
    BlobCode,
    BlobKey,
    BlobRefused,
    BlobTree,
    Chunk,
    ChunksWanted,
    Have,
    HaveWanted,
    Held,
    Tree,
    TreeWanted,
    unpack_held,
)
from protocol.errors import ArchipelagError, ConfigError, LinkLost, RemoteProtocolError
from protocol.messages import Hello
from runtimes.store.blob_partial import BlobPartial
from runtimes.store.blob_store import BlobStore, StoredBlob
from runtimes.store.errors import WrongContent
from runtimes.store.files import LOCK_POLL_S, Cancelled
from runtimes.store.progress import Progress, no_progress

log = logging.getLogger(__name__)

_TICK_S = 0.1
_VOTES_S = 2.0  # so long after the first tree others may name theirs, where only the SHA-256 is known
_WRITERS = 2
_QUEUED_CHUNKS = 8  # that wait for a writer; then peers have to wait
_HASH_CHUNKS = 16  # hashed in one go, 0.01 s
_SOURCE_PATIENCE_S = 3.0  # peers that have not come by then are not waited for before the source is read
_TRIES = 3  # to reach a peer whose link is lost
_RETRY_S = 0.5

T = TypeVar("T")
ReadSource = Callable[[int, int], Awaitable[bytes]]
"""``await read(offset, count)``: so many bytes of the blob from its publisher's source. Raises ArchipelagError or OSError."""


class BlobUnavailable(ConfigError):
    """No peer, and no source that was given, has what is left. What came is kept for the next try. ``faults``: of peers, why not."""

    def __init__(self, message: str, faults: Mapping[str, Drop]) -> None:
        super().__init__(message)
        self.faults = faults


@dataclass(frozen=True, slots=True)
class BlobWanted:
    """``root``, ``sha256`` or both: in hex, empty where unknown. ``bytes_max``: what the manifest says that it may have."""

    name: str
    root: str = ""
    sha256: str = ""
    suffix: str = ""
    bytes_max: int = limits.BLOB_BYTES_MAX

    def __post_init__(self) -> None:
        for name, digest in (("root", self.root), ("sha256", self.sha256)):
            if digest:
                checks.content_hash(name, digest)
        if not (self.root or self.sha256):
            raise ValueError("a blob is asked for by its root or its SHA-256")

    @property
    def key(self) -> str:
        """Names the download on disk."""
        return self.sha256 or self.root

    @property
    def ask(self) -> tuple[BlobKey, str]:
        """By what peers are asked: each knows the SHA-256 of its files, not each has made their trees."""
        return (BlobKey.SHA256, self.sha256) if self.sha256 else (BlobKey.ROOT, self.root)


@dataclass(frozen=True, slots=True)
class Fetched:
    """``chunks_by_peer``: good ones, and ``bytes_by_peer`` those in bytes, SOURCES among them; both empty where the blob was here already.
    ``faults``: the peers that were dropped, and why."""

    blob: StoredBlob
    chunks_by_peer: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    bytes_by_peer: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    faults: Mapping[str, Drop] = field(default_factory=lambda: MappingProxyType({}))


class BlobFetcher:
    """``addresses``: where a peer may be reached that we are not connected to."""

    def __init__(
        self, host: Host, store: BlobStore, hello: Callable[[], Hello], addresses: Callable[[str], Sequence[str]] = lambda peer: ()
    ) -> None:
        self.host, self.store, self.hello, self.addresses = host, store, hello, addresses

    def __repr__(self) -> str:
        return f"<BlobFetcher of {self.host!r} into {self.store!r}>"

    async def fetch(
        self,
        wanted: BlobWanted,
        peers: Sequence[str],
        progress: Progress = no_progress,
        source: ReadSource | None = None,
        tree_wait_s: float = math.inf,
    ) -> Fetched:
        """The blob, verified and in the store. ``source`` is read for chunks that no peer gives, and where the peers are slow;
        ``tree_wait_s``: so long for the first peer to name a tree, where there is another way to the file.

        Raises BlobUnavailable, WrongContent where root and SHA-256 are not of the same file, DiskFull, OSError. Cancelled, it keeps what
        came.
        """
        faults: dict[str, Drop] = {}
        with ExitStack() as held:
            while (lock := self.store.try_fetching(wanted.key)) is None:
                progress(f"{wanted.name}: somebody else on this machine is fetching it, waiting", 0, None)
                await trio.sleep(LOCK_POLL_S)
            held.enter_context(lock)
            if (found := await in_thread(partial(self._find, wanted))) is not None:
                return Fetched(found)
            while True:
                honest = [peer for peer in peers if not (peer in faults and faults[peer].fault.is_guilt)]
                attempt = _Attempt(self, wanted, honest, progress, source, faults)
                attempt.tree_wait_s = tree_wait_s
                try:
                    return await attempt.run()
                except WrongContent as error:
                    if wanted.root or not attempt.blame_tree():
                        raise
                    log.warning("%s", error)

    def _find(self, wanted: BlobWanted, cancelled: Cancelled) -> StoredBlob | None:
        found = self.store.find(*wanted.ask, cancelled=cancelled)
        return None if found is None or (wanted.root and found.root != wanted.root) else found


async def in_thread(call: Callable[[Cancelled], T]) -> T:
    """``call(cancelled)`` in a thread, which ends before this does, also where it is cancelled."""
    stop = threading.Event()
    outcome: list[T] = []
    errors: list[Exception] = []

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            outcome.append(await trio.to_thread.run_sync(call, stop.is_set))
        except (ArchipelagError, OSError) as error:
            errors.append(error)
        nursery.cancel_scope.cancel()
    await trio.lowlevel.checkpoint_if_cancelled()
    if errors:
        raise errors[0]
    return outcome[0]


@dataclass(eq=False)
class _Link:
    """A peer that we are talking to: what is to be asked, and the end of it."""

    asks: trio.MemorySendChannel[Ask]
    scope: trio.CancelScope


class _Attempt:
    """One try: a tree is agreed on, and everything is fetched by it."""

    def __init__(
        self,
        fetcher: BlobFetcher,
        wanted: BlobWanted,
        peers: Sequence[str],
        progress: Progress,
        source: ReadSource | None,
        faults: dict[str, Drop],
    ) -> None:
        self._fetcher, self._wanted, self._progress, self._source = fetcher, wanted, progress, source
        self._faults = faults
        self._peers = tuple(dict.fromkeys(peers))
        self._trying = set(self._peers)  # may still say or give something
        self._trees: dict[str, tuple[str, BlobTree]] = {}  # what each peer names: root and tree
        self._changed = trio.Event()  # somebody has named a tree, has begun to give, or is gone
        self._began = trio.Event()
        self._root = ""
        self._plan = BlobFetch(0)
        self._bytes: Counter[str] = Counter()
        self._partial: BlobPartial | None = None
        self._links: dict[str, _Link] = {}
        self._chunks_in, self._chunks_out = trio.open_memory_channel[tuple[str, int, bytes]](_QUEUED_CHUNKS)
        self._grown = trio.Event()
        self._error: Exception | None = None
        self._over = trio.Event()
        self.tree_wait_s = math.inf

    def blame_tree(self) -> list[str]:
        """Whoever named the tree that was followed is to blame; who that is."""
        guilty = [peer for peer, (root, _) in self._trees.items() if root == self._root]
        for peer in guilty:
            self._faults[peer] = Drop(peer, Fault.LIE, "named a tree that is not of the file that was asked for")
        return guilty

    async def run(self) -> Fetched:
        """Raises BlobUnavailable, WrongContent, DiskFull, OSError."""
        found: list[Fetched] = []
        async with trio.open_nursery() as nursery:
            for peer in self._peers:
                nursery.start_soon(self._meet, peer)
            try:
                found.append(await self._follow())
            except (ArchipelagError, OSError) as error:
                self._error = error
            nursery.cancel_scope.cancel()
        if self._error is not None:
            raise self._error
        return found[0]

    async def _follow(self) -> Fetched:
        tree = await self._agree()
        begin = partial(self._fetcher.store.begin, self._wanted.key, tree, self._progress)
        with await in_thread(begin) as self._partial:
            self._plan = BlobFetch(tree.chunks, (index for index, there in enumerate(self._partial.there()) if there))
            await self._transfer()
            self._faults.update(self._plan.faults)
            if self._error is not None:
                raise self._error
            if not self._plan.is_done:
                raise self._unavailable(f"{self._plan.left} of {self._plan.chunks} chunks are missing")
            wanted = self._wanted
            install = partial(self._fetcher.store.install, self._partial, wanted.sha256, wanted.name, wanted.suffix, "peers")
            blob = await trio.to_thread.run_sync(install)
        for peer, (root, _) in self._trees.items():
            if root != self._root:
                self._fault(peer, Fault.LIE, "named a tree that is not of the file that was asked for")
        came, sizes = dict(self._plan.came), dict(self._bytes)
        return Fetched(blob, MappingProxyType(came), MappingProxyType(sizes), MappingProxyType(self._faults))

    def _unavailable(self, why: str) -> BlobUnavailable:
        reasons = "; ".join(f"{drop.peer}: {drop.detail}" for drop in self._faults.values()) or "no peer is known"
        return BlobUnavailable(f"{self._wanted.name} cannot be had from peers: {why} ({reasons}).", MappingProxyType(self._faults))

    def _fault(self, peer: str, fault: Fault, detail: str) -> None:
        log.info("%s from %s: %s: %s", self._wanted.name, peer, fault, detail)
        self._faults[peer] = Drop(peer, fault, detail)

    # -- which tree

    async def _agree(self) -> BlobTree:
        """Raises BlobUnavailable where nobody names a tree."""
        stored = await trio.to_thread.run_sync(self._fetcher.store.stored_tree, self._wanted.key)
        stored_root = await trio.to_thread.run_sync(stored.root) if stored is not None else ""
        if stored is not None and stored_root == self._wanted.root:
            return self._settle(stored_root, stored)
        with trio.move_on_after(self.tree_wait_s):
            await self._wait_named(lambda: bool(self._trees))
        if not self._wanted.root:
            with trio.move_on_after(_VOTES_S):
                await self._wait_named(lambda: False)
        root = choose_root({peer: root for peer, (root, _) in self._trees.items()}, stored_root)
        if root is None:
            raise self._unavailable("nobody has it")
        return self._settle(root, next(tree for named, tree in self._trees.values() if named == root))

    async def _wait_named(self, is_enough: Callable[[], bool]) -> None:
        """Until that, or until no peer is left that may still name a tree."""
        while self._trying - self._trees.keys() and not is_enough():
            await self._changed.wait()

    def _settle(self, root: str, tree: BlobTree) -> BlobTree:
        self._root = root
        return tree

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _hear_tree(self, peer: str, stream: FrameStream) -> bool:
        """Whether the peer has named a tree that may be the one. Raises LinkLost, RemoteProtocolError, TooSlowError."""
        wanted = self._wanted
        with trio.fail_after(limits.BLOB_TREE_WAIT_S):
            await stream.send(TreeWanted(1, *wanted.ask))
            answer = await stream.receive()
        if isinstance(answer, BlobRefused):
            if answer.code is BlobCode.BUSY:
                raise LinkLost(f"is busy: {answer.message}")
            self._fault(peer, Fault.REFUSED, f"refused: {answer.code}")
            return False
        if not isinstance(answer, Tree) or answer.request != 1:
            raise RemoteProtocolError(f"asked for a tree, {peer} answered {type(answer).__name__}")
        tree = answer.tree()
        root = await trio.to_thread.run_sync(tree.root)
        if wanted.sha256 not in ("", answer.sha256) or (not wanted.sha256 and root != wanted.root):
            self._fault(peer, Fault.LIE, "named a tree that is not of the file that was asked for")
            return False
        if wanted.root not in ("", root):  # no guilt: whoever gave us root and hash may have joined what does not belong together
            self._fault(peer, Fault.REFUSED, "names another root for the file's hash; it, or who named both, is wrong")
            return False
        if tree.size > wanted.bytes_max:
            self._fault(peer, Fault.REFUSED, f"has {tree.size} bytes of it, {wanted.bytes_max} are allowed")
            return False
        self._trees[peer] = root, tree
        self._note_change()
        return True

    # -- peers

    async def _meet(self, peer: str) -> None:
        """Everything with one peer, from the first dial to the last chunk."""
        for turn in range(_TRIES):
            if turn:
                await trio.sleep(_RETRY_S)
            try:
                with trio.CancelScope() as scope:
                    await self._talk(peer, scope)
                break
            except (LinkLost, trio.TooSlowError) as error:
                self._plan.lost(peer, one_line(error))
                self._fault(peer, Fault.LOST, one_line(error))
            except (ArchipelagError, OSError) as error:
                self._plan.breached(peer, one_line(error))
                self._fault(peer, Fault.BREACH, one_line(error))
                break
            finally:
                self._links.pop(peer, None)
        self._trying.discard(peer)
        self._note_change()
        self._act()

    async def _talk(self, peer: str, scope: trio.CancelScope) -> None:
        """Raises LinkLost, RemoteProtocolError, TooSlowError; returns where the peer is of no more use."""
        host = self._fetcher.host
        if not host.is_connected(peer) and (addresses := self._fetcher.addresses(peer)):
            host.remember(peer, addresses)
        try:
            stream = await host.open(peer, BLOB_PROTOCOL, BLOB)
        except RemoteProtocolError as error:  # it may be older than this protocol, which is no guilt
            self._fault(peer, Fault.REFUSED, one_line(error))
            return
        try:
            await exchange_hello(stream, self._fetcher.hello())
            if not await self._hear_tree(peer, stream):
                return
            await self._began.wait()
            if self._trees[peer][0] != self._root:
                return
            held = await self._hear_held(stream)
            if held is not None and not any(held):
                self._fault(peer, Fault.REFUSED, "holds nothing of it")
                return
            await self._exchange(peer, held, stream, scope)
        finally:
            stream.abort()

    async def _hear_held(self, stream: FrameStream) -> list[bool] | None:
        """None for all. Raises LinkLost, RemoteProtocolError, TooSlowError."""
        with trio.fail_after(limits.BLOB_TREE_WAIT_S):
            await stream.send(HaveWanted(2, self._root))
            answer = await stream.receive()
        if not isinstance(answer, Have) or answer.request != 2:
            raise RemoteProtocolError(f"asked what it has, {stream.remote_peer} answered {type(answer).__name__}")
        if answer.held is Held.ALL:
            return None
        return unpack_held(bytes(answer.bits), self._plan.chunks) if answer.bits else [False] * self._plan.chunks

    async def _exchange(self, peer: str, held: list[bool] | None, stream: FrameStream, scope: trio.CancelScope) -> None:
        asks, to_ask = trio.open_memory_channel[Ask](2 * limits.BLOB_REQUESTS_OPEN_MAX)
        if not self._plan.joined(peer, held, trio.current_time()):
            return
        self._links[peer] = _Link(asks, scope)
        self._note_change()
        self._act()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_asks, stream, to_ask)
            end = await self._hear_chunks(peer, stream)
            nursery.cancel_scope.cancel()
        raise end

    async def _say_asks(self, stream: FrameStream, asks: trio.MemoryReceiveChannel[Ask]) -> None:
        try:
            async for ask in asks:
                await stream.send(ChunksWanted(ask.request, self._root, ask.first, ask.count))
        except LinkLost as error:
            log.debug("asking %s: %s", stream.remote_peer, error)  # whoever reads the stream learns of it too

    async def _hear_chunks(self, peer: str, stream: FrameStream) -> LinkLost | RemoteProtocolError:
        """Until the stream ends; why it did."""
        while True:
            try:
                message = await stream.receive()
            except (LinkLost, RemoteProtocolError) as error:
                return error
            now_s = trio.current_time()
            if isinstance(message, Chunk):
                if self._plan.arrived(peer, message.request, message.index, now_s):
                    await self._chunks_in.send((peer, message.index, message.data))
            elif isinstance(message, BlobRefused):
                self._plan.refused(peer, message.request, message.code, now_s)
            else:
                return RemoteProtocolError(f"{type(message).__name__} is no answer to a request for chunks")
            self._plan.ready(peer, trio.current_time())
            self._act()

    def _act(self) -> None:
        """Does what the plan says now."""
        if not self._began.is_set():
            return
        for step in self._plan.steps(trio.current_time()):
            link = self._links.get(step.peer)
            if isinstance(step, Drop):
                self._fault(step.peer, step.fault, step.detail)
            if link is None:
                continue
            if isinstance(step, Ask):
                link.asks.send_nowait(step)
            else:
                link.scope.cancel()
        if self._plan.is_done or (self._plan.is_stuck and self._source is None and not self._may_come()):
            self._over.set()

    def _may_come(self) -> bool:
        """Whether some peer is still being met."""
        return bool(self._trying - self._links.keys())

    # -- chunks

    async def _transfer(self) -> None:
        """Until all chunks are there, nobody has the rest, or this machine fails (self._error)."""
        async with trio.open_nursery() as nursery:
            if self._source is not None:
                nursery.start_soon(self._read_source, self._source)
            for _ in range(_WRITERS):
                nursery.start_soon(self._guarded, self._write)
            nursery.start_soon(self._guarded, self._hash)
            nursery.start_soon(self._tick)
            self._began.set()
            self._act()
            await self._over.wait()
            nursery.cancel_scope.cancel()

    async def _tick(self) -> None:
        while True:
            await trio.sleep(_TICK_S)
            self._act()

    async def _guarded(self, work: Callable[[BlobPartial], Awaitable[None]]) -> None:
        assert self._partial is not None
        try:
            await work(self._partial)
        except (ArchipelagError, OSError) as error:
            self._error = error
            self._over.set()

    async def _write(self, target: BlobPartial) -> None:
        async for peer, index, data in self._chunks_out:
            if await trio.to_thread.run_sync(target.put, index, data):
                before = self._plan.came[peer]
                self._plan.verified(peer, index)
                self._bytes[peer] += len(data) * (self._plan.came[peer] - before)
                self._grown.set()
                self._progress(f"{self._wanted.name}: from peers", target.bytes_there(), target.tree.size)
            else:
                self._plan.bad(peer, index)
            self._act()

    async def _hash(self, target: BlobPartial) -> None:
        while True:
            await self._grown.wait()
            self._grown = trio.Event()
            while await trio.to_thread.run_sync(target.hash_ahead, _HASH_CHUNKS):
                pass

    async def _read_source(self, read: ReadSource) -> None:
        """Begins when every peer that may come has come, or has been waited for."""
        assert self._partial is not None
        tree = self._partial.tree
        with trio.move_on_after(_SOURCE_PATIENCE_S):
            while self._may_come():
                await self._changed.wait()
        asks, to_ask = trio.open_memory_channel[Ask](1)
        self._plan.joined(SOURCES, None, trio.current_time())
        self._links[SOURCES] = _Link(asks, trio.CancelScope())
        self._source = None
        self._act()
        try:
            async for ask in to_ask:
                for index in range(ask.first, ask.first + ask.count):
                    data = await read(tree.offset(index), tree.chunk_bytes(index))
                    if self._plan.arrived(SOURCES, ask.request, index, trio.current_time()):
                        await self._chunks_in.send((SOURCES, index, data))
                    self._plan.ready(SOURCES, trio.current_time())
                    self._act()
        except (ArchipelagError, OSError) as error:
            self._plan.lost(SOURCES, one_line(error))
            self._fault(SOURCES, Fault.LOST, one_line(error))
            self._act()
