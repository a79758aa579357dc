"""Blobs of the cache as peers ask for them: by root or by SHA-256, with their trees; and the way in for what peers gave.

A tree is made when it is first asked for, by reading the file once, and kept beside it as SHA.tree until the file is evicted. Only what
the cache itself holds can be found here, never a user's own file that lies elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol import checks, limits
from protocol.blobs import BlobKey, BlobTree, leaf_hash
from runtimes.store.blob_partial import BlobPartial, stored_tree
from runtimes.store.cache import Cache, StoredModel, known_hash, mark_of
from runtimes.store.errors import DiskFull, FetchCancelled, WrongContent
from runtimes.store.files import Cancelled, never, read_json, try_lock, write_json
from runtimes.store.gguf_file import check_gguf
from runtimes.store.progress import Progress, no_progress
from runtimes.store.store import default_cache_dir, default_cap_bytes

EMPTY_SHA256 = hashlib.sha256().hexdigest()


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A verified file of the cache and its tree."""

    model: StoredModel
    tree: BlobTree
    root: str


class OpenBlob:
    """A blob that is being read: it is not evicted meanwhile. Blocking; any thread."""

    def __init__(self, blob: StoredBlob, descriptor: int) -> None:
        self.blob = blob
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<OpenBlob {self.blob.model.name}, {self.blob.tree.chunks} chunks>"

    def read(self, first: int, count: int) -> list[bytes]:
        """``count`` chunks from ``first`` on. Raises OSError, also where the file has become shorter."""
        tree = self.blob.tree
        chunks = []
        for index in range(first, first + count):
            chunk = os.pread(self._descriptor, tree.chunk_bytes(index), tree.offset(index))
            if len(chunk) != tree.chunk_bytes(index):
                raise OSError(f"{self.blob.model.path} is shorter than it was")
            chunks.append(chunk)
        return chunks


class BlobStore:
    """Blocking, and safe to call from any thread. The same folder as a ModelStore's."""

    def __init__(self, cache_dir: Path | None = None, cap_bytes: int | None = None) -> None:
        self._cache = Cache(cache_dir or default_cache_dir(), default_cap_bytes() if cap_bytes is None else cap_bytes)
        self._making = threading.Lock()  # one tree at a time: it reads a whole file
        self._roots: dict[str, str] = {}  # root -> SHA-256
        self._trees_seen: set[str] = set()  # files that were looked into for their root

    def __repr__(self) -> str:
        return f"<BlobStore {self._cache.folder}, {len(self._roots)} roots known>"

    @property
    def cache_dir(self) -> Path:
        return self._cache.folder

    # -- what is here

    def find(
        self, key: BlobKey, digest: str, may: Callable[[str], bool] = lambda sha256: True, cancelled: Cancelled = never
    ) -> StoredBlob | None:
        """The blob, if it is here, unchanged since it was verified, and ``may`` (of its SHA-256) allows it.

        Raises FetchCancelled while its tree is made; OSError.
        """
        checks.content_hash("digest", digest)
        sha256 = digest if key is BlobKey.SHA256 else self._sha256_of(digest)
        if sha256 is None or not may(sha256):
            return None
        model = self.model(sha256)
        if model is None or not 0 < model.bytes <= limits.BLOB_BYTES_MAX:
            return None
        tree_path = self._cache.path(sha256, ".tree")
        known = read_json(tree_path)
        tree, root = _sound_tree(known)
        if tree is None or known.get("mark") != list(mark_of(model.path)):
            tree, root = self._make_tree(model, tree_path, cancelled)
        self._roots[root] = sha256
        return StoredBlob(model, tree, root)

    def model(self, sha256: str) -> StoredModel | None:
        """The file, if it is here and unchanged since it was verified. Makes no tree. Raises OSError."""
        path = self._cache.blob(sha256, "")
        note = self._cache.path(sha256, ".note")
        try:
            if path is None or known_hash(path, note) != sha256:
                return None
            name = read_json(note).get("name")
            size = path.stat().st_size
        except FileNotFoundError:  # evicted while we looked
            return None
        return StoredModel(path, sha256, name if isinstance(name, str) else sha256[:12], size)

    def _sha256_of(self, root: str) -> str | None:
        """Which file has this root, of those whose tree was made."""
        if root not in self._roots:
            for path in self._cache.folder.glob("*.tree"):
                if path.name in self._trees_seen:
                    continue
                self._trees_seen.add(path.name)
                found = read_json(path).get("root")
                if isinstance(found, str):
                    self._roots[found] = path.name.removesuffix(".tree")
        return self._roots.get(root)

    def _make_tree(self, model: StoredModel, tree_path: Path, cancelled: Cancelled) -> tuple[BlobTree, str]:
        with self._making:
            tree, root = _sound_tree(known := read_json(tree_path))
            mark = list(mark_of(model.path))
            if tree is not None and known.get("mark") == mark:
                return tree, root
            leaves = []
            with open(model.path, "rb", buffering=0) as file:
                while chunk := file.read(limits.BLOB_CHUNK_BYTES):
                    if cancelled():
                        raise FetchCancelled(f"cancelled while the tree of {model.name} was made")
                    leaves.append(leaf_hash(chunk))
            tree = BlobTree(model.bytes, b"".join(leaves))
            root = tree.root()
            self._keep_tree(tree_path, tree, root, mark)
            return tree, root

    def _keep_tree(self, path: Path, tree: BlobTree, root: str, mark: Sequence[int]) -> None:
        write_json(path, {"root": root, "size": tree.size, "leaves": tree.leaves.hex(), "mark": list(mark)})

    @contextmanager
    def open(self, blob: StoredBlob) -> Iterator[OpenBlob]:
        """Raises ConfigError where it was evicted since it was found, OSError."""
        with self._cache.hold(blob.model) as path:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield OpenBlob(blob, descriptor)
            finally:
                os.close(descriptor)

    def hold(self, model: StoredModel) -> AbstractContextManager[Path]:
        """As ModelStore.hold."""
        return self._cache.hold(model)

    # -- what comes in

    def make_room(self, sizes: Mapping[str, int]) -> None:
        """Evicts what is in the way of files that are still to come, by key and in bytes. Raises DiskFull where they do not fit beside what
        is in use, on the disk or under the cap; OSError."""
        wanted = sum(sizes.values())
        partials = (self._cache.path(key, ".partial") for key in sizes)
        there = sum(path.stat().st_blocks * 512 for path in partials if path.exists())
        self._cache.make_room(wanted, min(there, wanted))
        kept = sum(entry.model.bytes for entry in self._cache.entries())
        if kept + wanted > self._cache.cap_bytes:
            raise DiskFull(
                f"{wanted:,} bytes are to be stored, the cache may hold {self._cache.cap_bytes:,} and {kept:,} of them are in use. Raise "
                "ARCHIPELAG_CACHE_BYTES, or load fewer Cargos, and start again."
            )

    def add_empty(self, name: str) -> StoredModel:
        """The file of no bytes, which nobody has to fetch. Raises DiskFull, OSError."""
        growing = self._cache.path(EMPTY_SHA256, f".{os.getpid()}.tmp")
        growing.touch(mode=0o600)
        self._cache.add(growing, EMPTY_SHA256, "", name, "")
        growing.unlink(missing_ok=True)
        return StoredModel(self._cache.path(EMPTY_SHA256, ""), EMPTY_SHA256, name, 0)

    def try_fetching(self, key: str) -> AbstractContextManager[None] | None:
        """Held while the blob ``key`` is fetched; None while another does it, also a ModelStore of any process. Never blocks."""
        descriptor = os.open(self._cache.path(key, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not try_lock(descriptor, shared=False):
            os.close(descriptor)
            return None
        return _closing(descriptor)

    def stored_tree(self, key: str) -> BlobTree | None:
        """The tree of a download that was broken off."""
        return stored_tree(self._cache.path(key, ".state"))

    def begin(self, key: str, tree: BlobTree, progress: Progress = no_progress, cancelled: Cancelled = never) -> BlobPartial:
        """A partial for a blob, with room made for it; the caller holds ``try_fetching``. Raises DiskFull, FetchCancelled, OSError."""
        path, state_path = self._cache.path(key, ".partial"), self._cache.path(key, ".state")
        there = path.stat().st_blocks * 512 if path.exists() else 0
        self._cache.make_room(tree.size, min(there, tree.size))
        return BlobPartial(path, state_path, tree, progress, cancelled)

    def install(self, partial: BlobPartial, expected_sha256: str, name: str, suffix: str, origin: str) -> StoredBlob:
        """Move a complete partial into the cache. ``expected_sha256`` may be empty where nobody knows it. Raises WrongContent, and then
        nothing of it is left; DiskFull, OSError."""
        digest = partial.finish()
        try:
            if expected_sha256 and digest != expected_sha256:
                raise WrongContent(
                    f"{name} has the SHA-256 {digest}, but {expected_sha256} was expected. What was downloaded is deleted. Start again; "
                    "if it stays wrong, the root and the hash are not of the same file."
                )
            if suffix == ".gguf":
                check_gguf(partial.path)
        except WrongContent:
            partial.discard()
            raise
        root = partial.tree.root()
        path = self._cache.blob(digest, suffix)
        if path is not None and known_hash(path, self._cache.path(digest, ".note")) != digest:
            self._cache.remove(path, digest)  # it has changed since it was verified
            path = None
        if path is None:
            path = self._cache.path(digest, suffix)
            self._cache.add(partial.path, digest, suffix, name, origin)
            self._keep_tree(self._cache.path(digest, ".tree"), partial.tree, root, mark_of(path))
        partial.discard()
        self._roots[root] = digest
        return StoredBlob(StoredModel(path, digest, name, partial.tree.size), partial.tree, root)


def _sound_tree(known: dict[str, object]) -> tuple[BlobTree | None, str]:
    """The tree and its root as they were kept, if they are well formed."""
    size, leaves, root = known.get("size"), known.get("leaves"), known.get("root")
    if type(size) is not int or not isinstance(leaves, str) or not isinstance(root, str):
        return None, ""
    try:
        return BlobTree(size, bytes.fromhex(leaves)), root
    except ValueError:
        return None, ""


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)
