"""The files of Cargos: out of the store, from several Islands at once, or from their publishers' sources; held while a Cargo is loaded.

Each file is asked for by its content. Who is asked: Islands that advertise it, then neighbours that may have it, together. Where they lack
chunks or are slow, the publisher's source joins in the middle; where nobody has the file, it comes from its sources as a whole. Nothing is
installed but what was verified (runtimes/store), so whatever breaks in the middle leaves a download to go on with and no half file.

Sources of manifests are strangers' words: https to public addresses only (runtimes/store/public_web.py), never more bytes than the manifest
says, and never in the operator's name.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from node.blob_fetcher import BlobFetcher, BlobUnavailable, BlobWanted, Fetched, in_thread
from node.loading import Loadings
from node.net.host import Host
from protocol import limits
from protocol.ads import Ad
from protocol.blob_fetch import SOURCES, Drop
from protocol.blobs import BlobKey
from protocol.cargos import CargoFile, CargoManifest, address_of
from protocol.errors import ConfigError
from protocol.messages import Hello
from runtimes.catalogue import CatalogueEntry
from runtimes.store.blob_store import EMPTY_SHA256, BlobStore
from runtimes.store.cache import StoredModel
from runtimes.store.errors import DiskFull, FetchError, WrongContent
from runtimes.store.progress import Progress, no_progress
from runtimes.store.public_web import PublicOnly
from runtimes.store.source_reader import SourceReader, open_reader
from runtimes.store.sources import suffix_of
from runtimes.store.store import ModelStore
from runtimes.store.web import WebPolicy

log = logging.getLogger(__name__)

PUBLIC_WEB = WebPolicy(public=PublicOnly())
_TREE_WAIT_S = 10.0  # for a peer to name a tree, where there are sources too
_HOLD_TRIES = 3  # a file may be evicted between the moment it is there and the one in which it is held
_BAD_PEERS_MAX = 1000  # remembered


@dataclass(frozen=True, slots=True)
class FileWanted:
    """One file, by content. ``sources``: parts in order, as in a manifest; ``hints``: hashes by which ads may name who has it; ``root``
    may be empty where nobody has made the tree; ``size_bytes``: exact, or 0 where it is not known. ``joins_only``: sources help peers out,
    and where no peer has the file it is not brought."""

    name: str
    sha256: str
    size_bytes: int
    root: str = ""
    suffix: str = ""
    sources: tuple[str, ...] = ()
    hints: frozenset[str] = frozenset()
    joins_only: bool = False

    @property
    def readable(self) -> tuple[str, ...]:
        """The sources, if they can be read without an Island."""
        return () if any(source.startswith("peer:") for source in self.sources) else self.sources


@dataclass(slots=True)
class FetchCounts:
    """``bytes_kept``: were here already. ``whole``: files that came from their sources alone."""

    files: int = 0
    bytes_kept: int = 0
    bytes_from_peers: int = 0
    bytes_from_sources: int = 0
    whole: int = 0
    failed: int = 0


class SharedFiles:
    """What an Island gives to others: files of Cargos and shards that it holds, as long as it holds them."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<SharedFiles: {len(self._held)}>"

    def may(self, sha256: str) -> bool:
        return sha256 in self._held

    def share(self, sha256: str) -> None:
        """For the rest of this run."""
        self._held[sha256] += 1

    @contextmanager
    def sharing(self, sha256: str) -> Iterator[None]:
        self._held[sha256] += 1
        try:
            yield
        finally:
            self._held[sha256] -= 1
            if not self._held[sha256]:
                del self._held[sha256]


def peers_to_ask(
    ads: Iterable[Ad],
    hints: frozenset[str],
    connected: Sequence[str],
    round_trips_s: Mapping[str, float],
    own: str,
    refused: Collection[str] = (),
) -> tuple[str, ...]:
    """Who may have a file: first those whose ad names one of ``hints`` (a Cargo, a model, a shard), then neighbours; of each the nearest
    first, and where that is not known in an order that differs from one Island to another. At most BLOB_PEERS_ASKED_MAX."""

    def order(peer: str) -> tuple[float, bytes]:
        return round_trips_s.get(peer, float("inf")), hashlib.sha256(f"{own} {peer}".encode()).digest()

    holders = {ad.peer for ad in ads if _names_any(ad, hints)}
    ranked = [*sorted(holders, key=order), *sorted(set(connected) - holders, key=order)]
    return tuple(peer for peer in ranked if peer != own and peer not in refused)[: limits.BLOB_PEERS_ASKED_MAX]


def _names_any(ad: Ad, hints: frozenset[str]) -> bool:
    return any(offer.content_hash in hints for offer in ad.offers) or any(shard.shard_hash in hints for shard in ad.shards)


def open_cargo_store(
    host: Host,
    hello: Callable[[], Hello],
    ads: Callable[[], Iterable[Ad]],
    addresses: Callable[[str], Sequence[str]],
    cache_dir: Path | None = None,
    cap_bytes: int | None = None,
    web: WebPolicy = PUBLIC_WEB,
) -> CargoStore:
    """The store of an Island: peers are found by ``ads`` (of its book) and among its neighbours. Raises ConfigError for a folder that
    cannot be used."""

    def candidates(hints: frozenset[str], refused: Collection[str]) -> Sequence[str]:
        return peers_to_ask(ads(), hints, host.connected_peers(), host.round_trips_s(), host.peer_id, refused)

    fetcher = BlobFetcher(host, BlobStore(cache_dir, cap_bytes), hello, addresses)
    return CargoStore(fetcher, ModelStore(cache_dir, cap_bytes, web), candidates, web)


@dataclass(eq=False)
class CargoStore:
    """``candidates(hints, refused)``: peers to ask, the best first. ``models`` brings what strangers name, so its web is PUBLIC_WEB or
    stricter; it has the same folder as the fetcher's store."""

    fetcher: BlobFetcher
    models: ModelStore
    candidates: Callable[[frozenset[str], Collection[str]], Sequence[str]]
    web: WebPolicy = PUBLIC_WEB
    shared: SharedFiles = field(default_factory=SharedFiles)
    loadings: Loadings = field(default_factory=Loadings)
    counts: FetchCounts = field(default_factory=FetchCounts)
    bad_peers: dict[str, str] = field(default_factory=dict)  # and what they did; not asked again in this run

    def __post_init__(self) -> None:
        # One blob at a time from peers, so that no peer sees more streams of ours than it has to serve (BLOB_STREAMS_PER_PEER_MAX).
        self._turn = trio.CapacityLimiter(1)

    def __repr__(self) -> str:
        return f"<CargoStore of {self.store!r}, {self.counts.files} files fetched>"

    @property
    def store(self) -> BlobStore:
        return self.fetcher.store

    # -- Cargos

    async def fetch(self, manifest: CargoManifest, progress: Progress = no_progress) -> Mapping[str, Path]:
        """A Cargo's files by their paths, verified, in the store. They may be evicted later: who loads them uses ``held``.

        Raises ConfigError that says what to do (DiskFull, FetchError, WrongContent). Cancelled, it keeps what came for the next try.
        """
        async with self.held(manifest, progress) as files:
            return files

    @asynccontextmanager
    async def held(self, manifest: CargoManifest, progress: Progress = no_progress) -> AsyncIterator[Mapping[str, Path]]:
        """As ``fetch``; while the context lasts the files stay, and are given to other Islands."""
        with ExitStack() as stack:
            yield await self._hold_all(manifest, progress, stack)

    async def take_in(self, manifest: CargoManifest, files: Mapping[str, Path]) -> None:
        """Copies files of a Cargo that lie elsewhere on this disk, and were checked there, into the store, from where others get them.
        Raises ConfigError."""
        for file in manifest.files:
            place = files.get(file.path)
            if place is not None and file.size_bytes and await trio.to_thread.run_sync(self.store.model, file.sha256) is None:
                await trio.to_thread.run_sync(self._copy_in, file, place, manifest.name)

    def _copy_in(self, file: CargoFile, place: Path, name: str) -> None:
        self.store.make_room({file.sha256: file.size_bytes})
        try:
            with tempfile.TemporaryDirectory(dir=self.models.cache_dir) as folder:
                copy = Path(folder) / "file"
                shutil.copyfile(place, copy)
                with open(copy, "rb") as data:
                    if hashlib.file_digest(data, "sha256").hexdigest() != file.sha256:
                        raise WrongContent(f"{place} has changed since it was checked; build and sign its Cargo again.")
                self.models.adopt(copy, file.sha256, suffix_of(file.path), f"{name}: {file.path}", f"file:{place}")
        except OSError as error:
            raise FetchError(f"{place} cannot be copied to {self.models.cache_dir}: {error.strerror or error}.") from error

    async def _hold_all(self, manifest: CargoManifest, progress: Progress, stack: ExitStack) -> Mapping[str, Path]:
        address = address_of(manifest)
        wanted = {file.sha256: _wanted(manifest, file, address) for file in manifest.files}
        with self.loadings.loading(manifest.name, address, manifest.size_bytes) as loading:
            held: dict[str, StoredModel] = {}
            for digest, one in wanted.items():
                if (model := await self._hold_kept(one, stack)) is not None:
                    held[digest] = model
                    self.counts.bytes_kept += model.bytes
                    loading.finished(model.bytes)
            missing = {digest: one for digest, one in wanted.items() if digest not in held}
            if missing:
                await self._make_room({digest: one.size_bytes for digest, one in missing.items()})
            for digest, one in missing.items():
                held[digest] = await self._bring_and_hold(one, loading.heard(progress, one.size_bytes), stack)
                loading.finished(one.size_bytes)
            for file in manifest.files:
                if held[file.sha256].bytes != file.size_bytes:
                    raise WrongContent(f"{file.path} has {held[file.sha256].bytes:,} bytes, the manifest says {file.size_bytes:,}.")
        for digest in held:
            stack.enter_context(self.shared.sharing(digest))
        return {file.path: held[file.sha256].path for file in manifest.files}

    async def _make_room(self, sizes: Mapping[str, int]) -> None:
        try:
            await trio.to_thread.run_sync(self.store.make_room, sizes)
        except OSError as error:
            raise FetchError(f"{self.store.cache_dir} cannot be used: {error.strerror or error}.") from error

    async def _hold_kept(self, wanted: FileWanted, stack: ExitStack) -> StoredModel | None:
        """What is here and verified, held from now on."""
        try:
            model = await trio.to_thread.run_sync(self.store.model, wanted.sha256)
            if model is None and wanted.sha256 == EMPTY_SHA256:
                model = await trio.to_thread.run_sync(self.store.add_empty, wanted.name)
        except OSError as error:
            raise FetchError(f"{wanted.name} cannot be stored or read: {error.strerror or error}.") from error
        if model is not None:
            with suppress(ConfigError):  # evicted since we looked
                stack.enter_context(self.store.hold(model))
                return model
        return None

    async def _bring_and_hold(self, wanted: FileWanted, progress: Progress, stack: ExitStack) -> StoredModel:
        for _ in range(_HOLD_TRIES):
            await self.bring(wanted, progress)
            if (model := await self._hold_kept(wanted, stack)) is not None:
                return model
        raise FetchError(f"{wanted.name} was evicted as soon as it was there. Raise ARCHIPELAG_CACHE_BYTES and start again.")

    # -- single files

    async def bring(self, wanted: FileWanted, progress: Progress = no_progress) -> None:
        """The file, verified, in the store: from peers and sources together, else from its sources. Raises ConfigError (DiskFull,
        FetchError, WrongContent)."""
        try:
            await self._bring(wanted, progress)
        except OSError as error:
            self.counts.failed += 1
            raise FetchError(f"{wanted.name} cannot be stored or read: {error.strerror or error}.") from error
        except ConfigError:
            self.counts.failed += 1
            raise

    async def _bring(self, wanted: FileWanted, progress: Progress) -> None:
        nobody = await self._from_peers(wanted, progress)
        if nobody is None:
            return
        if wanted.joins_only:
            raise FetchError(nobody)
        if not wanted.readable:
            raise FetchError(f"{nobody} It has no source that can be read; try again when an Island has it.")
        try:
            await self._from_sources(wanted, progress)
        except (DiskFull, WrongContent):
            raise
        except FetchError as error:
            raise FetchError(f"{error} And {nobody}") from error

    async def _from_peers(self, wanted: FileWanted, progress: Progress) -> str | None:
        """None where it is here now; else why it is not. Raises DiskFull, WrongContent, OSError."""
        async with self._turn:
            peers = self.candidates(wanted.hints | {wanted.sha256}, self.bad_peers)
            reader = open_reader(wanted.readable, wanted.size_bytes, self.web) if wanted.size_bytes else None
            bytes_max = wanted.size_bytes or limits.BLOB_BYTES_MAX
            blob = BlobWanted(wanted.name, wanted.root, wanted.sha256, wanted.suffix, min(bytes_max, limits.BLOB_BYTES_MAX))
            wait_s = _TREE_WAIT_S if wanted.readable else limits.BLOB_TREE_WAIT_S
            try:
                if not peers and (reader is None or not await self._has_begun(wanted)):
                    return f"{wanted.name} cannot be had from peers: none is known."
                read = None if reader is None else partial(_read, reader)
                self._note(await self.fetcher.fetch(blob, peers, progress, read, wait_s))
            except BlobUnavailable as error:
                self._blame(error.faults.values())
                return str(error)
            finally:
                if reader is not None:
                    reader.close()
        return None

    async def _has_begun(self, wanted: FileWanted) -> bool:
        """Whether peers have given a part of it in an earlier try: then the source alone can give the rest."""
        tree = await trio.to_thread.run_sync(self.store.stored_tree, wanted.sha256)
        return tree is not None and await trio.to_thread.run_sync(tree.root) == wanted.root

    def _note(self, fetched: Fetched) -> None:
        self._blame(fetched.faults.values())
        if not fetched.chunks_by_peer:
            self.counts.bytes_kept += fetched.blob.model.bytes
            return
        self.counts.files += 1
        from_sources = fetched.bytes_by_peer.get(SOURCES, 0)
        self.counts.bytes_from_sources += from_sources
        self.counts.bytes_from_peers += sum(fetched.bytes_by_peer.values()) - from_sources

    def _blame(self, faults: Iterable[Drop]) -> None:
        for drop in faults:
            if drop.fault.is_guilt and drop.peer != SOURCES and len(self.bad_peers) < _BAD_PEERS_MAX:
                self.bad_peers[drop.peer] = drop.detail
                log.warning("%s is not asked for files any more: it %s", drop.peer, drop.detail)

    async def _from_sources(self, wanted: FileWanted, progress: Progress) -> None:
        """Raises FetchError, WrongContent, DiskFull, OSError."""
        cancelled = threading.Event()
        fetch = partial(
            self.models.fetch,
            list(wanted.readable),
            progress,
            cancelled.is_set,
            sha256=wanted.sha256,
            size_bytes=wanted.size_bytes or None,
            name=wanted.name,
            suffix=wanted.suffix,
        )
        try:
            model = await trio.to_thread.run_sync(fetch, abandon_on_cancel=True)
        finally:
            cancelled.set()  # the thread stops at its next piece; what it has is kept and resumed
        self.counts.files += 1
        self.counts.whole += 1
        self.counts.bytes_from_sources += model.bytes
        if wanted.root:
            await self._check_root(wanted)

    async def _check_root(self, wanted: FileWanted) -> None:
        """Who names a root of another file would have every Island that gives this one away taken for a liar. Raises WrongContent."""
        blob = await in_thread(lambda cancelled: self.store.find(BlobKey.SHA256, wanted.sha256, cancelled=cancelled))
        if blob is not None and blob.root != wanted.root:
            raise WrongContent(f"The root and the hash that the manifest gives for {wanted.name} are not of the same file.")


def of_catalogue(entry: CatalogueEntry) -> FileWanted:
    """A model that this program vouches for: from peers where they have it, else from its sources."""
    hints = frozenset({entry.sha256})
    return FileWanted(entry.name, entry.sha256, entry.size_bytes, entry.root, entry.suffix, entry.parts, hints)


async def _read(reader: SourceReader, offset: int, count: int) -> bytes:
    return await trio.to_thread.run_sync(reader.read, offset, count, abandon_on_cancel=True)


def _wanted(manifest: CargoManifest, file: CargoFile, address: str) -> FileWanted:
    name, hints = f"{manifest.name}: {file.path}", frozenset({address})
    return FileWanted(name, file.sha256, file.size_bytes, file.root, suffix_of(file.path), file.sources, hints)

