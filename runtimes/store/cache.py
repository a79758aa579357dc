"""The cache folder: what lies in it, who uses it, what goes when room is needed. Shared by all nodes of a user.

A blob is called by its SHA-256 and never changes. Beside it lies a note with its size, time of change and inode as they were when it
was hashed: while these agree it is not hashed again. The note's own time of change says when the blob was last used.

    SHA.gguf       the model; whoever uses it holds a shared flock on it, and eviction wants an exclusive one
    SHA.tree       its tree of hashes, where a peer has asked for it (blob_store.py); goes with the blob
    SHA.note       its note, written before the blob is moved in: a blob without a note would never be evicted
    KEY.origin     which SHA a source without a hash gave
    KEY.file       the note of a user's own file, which stays where it lies
    KEY.lock       held while KEY is being fetched, so that two processes do it once
    KEY.partial    a download under way, with KEY.state (partial.py); KEY.wheel/ is pip's folder
    cache.lock     held while blobs are moved in or evicted

A process that is killed leaves nothing but KEY.partial and KEY.wheel/: the next fetch resumes the one and empties the other.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from runtimes.store.errors import DiskFull
from runtimes.store.files import Cancelled, locked, read_json, sha256_of, sync_folder, try_lock, write_json
from runtimes.store.progress import Progress

log = logging.getLogger(__name__)

DISK_MARGIN_BYTES = 64 * 1024 * 1024  # left free, so that the rest of the machine goes on
PARTIAL_LIFETIME_S = 7 * 86_400.0  # an abandoned download is deleted after this
_LOCK_RETRY_S = 0.01


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A verified file on this machine. ``name`` is what people call it, ``sha256`` what it is."""

    path: Path
    sha256: str
    name: str
    bytes: int

    def __repr__(self) -> str:
        return f"<StoredModel {self.name}: {self.bytes} bytes, sha256 {self.sha256[:12]}…>"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """``last_used_s``: seconds since 1970."""

    model: StoredModel
    last_used_s: float
    in_use: bool


class Cache:
    """Makes its folder. Raises ConfigError where it may not."""

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self.folder = folder.absolute()
        self.cap_bytes = cap_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"The model cache {self.folder} cannot be made: {error.strerror}. Set ARCHIPELAG_CACHE_DIR to a folder that you "
                "may write to."
            ) from error

    def path(self, key: str, ending: str) -> Path:
        return self.folder / f"{key}{ending}"

    # Blobs and notes

    def blob(self, digest: str, suffix: str) -> Path | None:
        """The blob of that hash, also where it was first fetched under another suffix."""
        named = read_json(self.path(digest, ".note")).get("file")
        names = [digest + suffix, *([named] if isinstance(named, str) and named.startswith(digest) else [])]
        paths = (self.folder / name for name in names)
        return next((path for path in paths if path.is_file()), None)

    def add(self, source: Path, digest: str, suffix: str, name: str, origin: str) -> None:
        """Move a finished file in, in one step, and evict down to the cap."""
        blob = self.path(digest, suffix)
        with self._alone():
            if not blob.exists():
                note = {"name": name, "source": origin, "file": blob.name, "sha256": digest, "mark": mark_of(source)}
                write_json(self.path(digest, ".note"), note)
                os.replace(source, blob)
                sync_folder(self.folder)
            self.touch(digest)
            self._evict_to(self.cap_bytes, spare=digest)

    def remove(self, blob: Path, digest: str) -> None:
        blob.unlink(missing_ok=True)
        self.path(digest, ".tree").unlink(missing_ok=True)
        self.path(digest, ".note").unlink(missing_ok=True)

    def touch(self, digest: str) -> None:
        """It was used now."""
        try:
            os.utime(self.path(digest, ".note"))
        except FileNotFoundError:
            log.debug("no note of %s: a user's own file, or evicted just now", digest)

    def entries(self) -> Sequence[CacheEntry]:
        """Least recently used first."""
        found = (self._entry(note) for note in self.folder.glob("*.note"))
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.last_used_s)

    def _entry(self, note: Path) -> CacheEntry | None:
        known = read_json(note)
        name, file, digest = (known.get(key) for key in ("name", "file", "sha256"))
        if not (isinstance(name, str) and isinstance(file, str) and isinstance(digest, str)):
            return None
        path = self.folder / file
        try:
            model = StoredModel(path, digest, name, path.stat().st_size)
            return CacheEntry(model, note.stat().st_mtime, _in_use(path))
        except FileNotFoundError:
            return None

    # Use

    @contextmanager
    def hold(self, model: StoredModel) -> Iterator[Path]:
        descriptor = self._open_held(model)
        try:
            self.touch(model.sha256)
            yield model.path
        finally:
            os.close(descriptor)

    def _open_held(self, model: StoredModel) -> int:
        try:
            descriptor = os.open(model.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"{model.path} cannot be opened: {error.strerror}. Fetch {model.name} again.") from error
        while not try_lock(descriptor, shared=True):
            time.sleep(_LOCK_RETRY_S)  # an eviction is looking at it, which takes no longer than a stat
        if not _is_still(descriptor, model.path):
            os.close(descriptor)
            raise ConfigError(f"{model.path} was evicted from the cache in between. Fetch {model.name} again.")
        return descriptor

    # Room

    def evict(self, bytes_max: int) -> Sequence[StoredModel]:
        """Returns what was deleted: least recently used first, never what is in use; and abandoned downloads."""
        with self._alone():
            self._drop_old_partials()
            return self._evict_to(bytes_max, spare=None)

    def make_room(self, bytes_expected: int, bytes_there: int) -> int:
        """How many more bytes may be written, once what is in the way of ``bytes_expected`` is evicted. Of the file there are
        ``bytes_there`` already; ``bytes_expected`` is 0 where nobody said. Raises DiskFull.
        """
        if bytes_expected > self.cap_bytes:
            raise DiskFull(
                f"The model has {bytes_expected:,} bytes, the cache may hold {self.cap_bytes:,}. Raise ARCHIPELAG_CACHE_BYTES "
                "and start again."
            )
        needed = max(0, bytes_expected - bytes_there)
        with self._alone():
            self._evict_to(self.cap_bytes - bytes_expected, spare=None)
            if (free := self._free_bytes()) < needed:
                used = sum(entry.model.bytes for entry in self.entries())
                self._evict_to(max(0, used - (needed - free)), spare=None)
                free = self._free_bytes()
        if free < max(1, needed):
            raise DiskFull(
                f"The disk that holds {self.folder} has {max(0, free):,} bytes to spare, {needed:,} are needed. Free some room, or set "
                "ARCHIPELAG_CACHE_DIR to a folder on another disk, and start again."
            )
        return min(free, self.cap_bytes - bytes_there)

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free - DISK_MARGIN_BYTES

    def _evict_to(self, bytes_max: int, spare: str | None) -> Sequence[StoredModel]:
        """The caller holds cache.lock; the blob ``spare`` stays."""
        entries = self.entries()
        used = sum(entry.model.bytes for entry in entries)
        gone = []
        for entry in entries:
            if used <= bytes_max:
                break
            if entry.model.sha256 != spare and self._delete_unused(entry.model):
                used -= entry.model.bytes
                gone.append(entry.model)
                log.info("evicted %r", entry.model)
        return gone

    def _delete_unused(self, model: StoredModel) -> bool:
        descriptor = os.open(model.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not try_lock(descriptor, shared=False):
                return False
            self.remove(model.path, model.sha256)
            return True
        finally:
            os.close(descriptor)

    def _drop_old_partials(self) -> None:
        for path in self.folder.glob("*.partial"):
            key = path.name.removesuffix(".partial")
            descriptor = os.open(self.path(key, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if try_lock(descriptor, shared=False) and time.time() - path.stat().st_mtime > PARTIAL_LIFETIME_S:
                    path.unlink()
                    self.path(key, ".state").unlink(missing_ok=True)
            finally:
                os.close(descriptor)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with locked(self.path("cache", ".lock")):
            yield


def known_hash(path: Path, note: Path) -> str | None:
    """The SHA-256 that ``path`` had when it was last hashed, if size, time of change and inode are as they were."""
    known = read_json(note)
    digest = known.get("sha256")
    return digest if isinstance(digest, str) and known.get("mark") == mark_of(path) else None


def verified_hash(path: Path, note: Path, stage: str, progress: Progress, cancelled: Cancelled) -> str:
    """The known hash, or a new one, which is remembered. Raises FetchCancelled."""
    if (known := known_hash(path, note)) is not None:
        return known
    mark = mark_of(path)
    found = sha256_of(path, stage, progress, cancelled)
    if mark == mark_of(path):  # else it is being written right now, and nothing is worth remembering
        remembered: dict[str, Any] = read_json(note)
        write_json(note, remembered | {"sha256": found, "mark": mark})
    return found


def mark_of(path: Path) -> Sequence[int]:
    """What changes when a file changes: size, time of change, inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _in_use(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not try_lock(descriptor, shared=False)
    finally:
        os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that ``path`` names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
