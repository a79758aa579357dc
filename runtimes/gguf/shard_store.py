"""A shard's file on this machine: from a folder of its owner's, from the cache, ready-made from its address, or cut out of the model.

Whatever it comes from, it is verified: by the hash that the manifest gives, or by having been cut here from a model with the manifest's
hash. Shards lie in the cache by their content like all other files, so they count towards its cap, and peers can have them; a note
``shards/MODEL.LAYERS.gguf.sha256`` says which one was cut for which layers. Blocking; for a worker thread. Memory is not needed for any
of it, disk is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import ConfigError
from protocol.shards import LayerRange, ShardManifest
from runtimes.catalogue import CATALOGUE, ROOTS
from runtimes.gguf.shard import cut, read_shard_layers
from runtimes.store import ModelStore, StoredModel
from runtimes.store.files import Cancelled, never, sha256_of
from runtimes.store.progress import Progress, no_progress
from runtimes.store.sources import scheme_of

_FOLDER = "shards"
_FOREIGN = frozenset({"file", "http"})  # sources that a manifest from elsewhere must not make us read
_PUBLIC = frozenset({"https", "hf", "pypi", "peer"})


@dataclass(frozen=True, slots=True)
class ShardFile:
    """``came_from``: "folder" (the owner's own), "cache", "address" (ready-made), "cut", or "model" where it is a whole one."""

    path: Path
    sha256: str
    came_from: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Lacking:
    """A file that would do, and that peers may have. ``size_bytes``: exact; ``root`` may be empty."""

    sha256: str
    size_bytes: int
    root: str
    sources: tuple[str, ...]


def is_public(manifest: ShardManifest) -> bool:
    """Whether what is cut from the model may be given to others: everybody can have it anyway."""
    if manifest.model_sha256 in ROOTS:
        return True
    return bool(manifest.model_sources) and all(scheme_of(source) in _PUBLIC for source in manifest.model_sources)


class ShardStore:
    """``folders``: of the owner's, with shards or models that are found by what they hold. ``own_manifest``: the manifest is the owner's
    too, so its ``file:`` sources may be read."""

    def __init__(self, store: ModelStore, folders: Sequence[Path] = (), own_manifest: bool = False) -> None:
        self._store, self._folders, self._own_manifest = store, tuple(folders), own_manifest

    def __repr__(self) -> str:
        return f"<ShardStore in {self._store.cache_dir}, {len(self._folders)} folders>"

    @contextmanager
    def obtain(
        self, manifest: ShardManifest, layers: LayerRange, progress: Progress = no_progress, cancelled: Cancelled = never
    ) -> Iterator[ShardFile]:
        """The file of these layers, which stays while the context lasts. Raises ConfigError that says what to do, FetchCancelled."""
        manifest.check_range(layers)
        if manifest.is_first(layers) and manifest.is_last(layers):
            with self._model(manifest, progress, cancelled) as path:
                yield ShardFile(path, manifest.model_sha256, "model")
            return
        if (own := self._in_folders(manifest, layers)) is not None:
            yield own
            return
        came_from, found = "cache", self._in_cache(manifest, layers)
        if found is None:
            came_from, found = "address", self._ready_made(manifest, layers, progress, cancelled)
        if found is None:
            came_from = "cut"
            with self._model(manifest, progress, cancelled) as model:
                found = self._cut(model, manifest, layers, progress)
        with self._store.hold(found) as path:
            yield ShardFile(path, found.sha256, came_from)

    def lacking(self, manifest: ShardManifest, layers: LayerRange) -> Sequence[Lacking]:
        """What peers may be asked for, each of which would do, the best first; nothing where it is here, or seems to be."""
        found = []
        is_whole = manifest.is_first(layers) and manifest.is_last(layers)
        if not is_whole:
            if any(_holds(path, manifest, layers) for path in self._own_files()) or self._in_cache(manifest, layers) is not None:
                return []
            if digest := manifest.shard_hash(layers):
                place = manifest.shard_layers.index(layers)
                url = manifest.shard_urls[place]
                found.append(Lacking(digest, manifest.shard_bytes[place], "", self._public([url] if url else [])))
        has_model = self._store.kept(manifest.model_sha256, ".gguf") is not None
        if has_model or any(path.stat().st_size == manifest.model_bytes for path in self._own_files()):
            return [] if is_whole or not found else found
        sources = self._public(manifest.model_sources)
        return [*found, Lacking(manifest.model_sha256, manifest.model_bytes, ROOTS.get(manifest.model_sha256, ""), sources)]

    def _own_files(self) -> Iterator[Path]:
        return (path for folder in self._folders for path in sorted(folder.glob("*.gguf")))

    def _public(self, sources: Sequence[str]) -> tuple[str, ...]:
        return tuple(sources) if all(scheme_of(source) in _PUBLIC for source in sources) else ()

    def _in_folders(self, manifest: ShardManifest, layers: LayerRange) -> ShardFile | None:
        for path in self._own_files():
            if _holds(path, manifest, layers) and (found := _verified(path, manifest, layers)) is not None:
                return found
        return None

    def _in_cache(self, manifest: ShardManifest, layers: LayerRange) -> StoredModel | None:
        digest = manifest.shard_hash(layers) or _noted(self._place(manifest, layers)[1])
        found = self._store.kept(digest, ".gguf") if digest else None
        return found if found is not None and _holds(found.path, manifest, layers) else None

    def _place(self, manifest: ShardManifest, layers: LayerRange) -> tuple[Path, Path]:
        name = f"{manifest.model_sha256[:16]}.{layers}.gguf"
        folder = self._store.cache_dir / _FOLDER
        return folder / name, folder / f"{name}.sha256"

    def _ready_made(
        self, manifest: ShardManifest, layers: LayerRange, progress: Progress, cancelled: Cancelled
    ) -> StoredModel | None:
        places = dict(zip(manifest.shard_layers, manifest.shard_urls, strict=True))
        url, digest = places.get(layers, ""), manifest.shard_hash(layers)
        if not url or not self._may_read(url):
            return None
        size = dict(zip(manifest.shard_layers, manifest.shard_bytes, strict=True))[layers]
        return self._store.fetch([url], progress, cancelled, sha256=digest, size_bytes=size or None)

    @contextmanager
    def _model(self, manifest: ShardManifest, progress: Progress, cancelled: Cancelled) -> Iterator[Path]:
        """The whole model. Raises ConfigError where it cannot be had from here."""
        for path in self._own_files():
            if path.stat().st_size == manifest.model_bytes and _hash(path) == manifest.model_sha256:
                yield path
                return
        entry = CATALOGUE.get(manifest.name)
        sources = [source for source in manifest.model_sources if self._may_read(source)]
        kept = self._store.kept(manifest.model_sha256, ".gguf")
        if kept is not None:
            model = kept
        elif entry is not None and entry.sha256 == manifest.model_sha256:
            model = self._store.fetch(manifest.name, progress, cancelled)
        elif sources and len(sources) == len(manifest.model_sources):
            model = self._store.fetch(
                sources, progress, cancelled, sha256=manifest.model_sha256, size_bytes=manifest.model_bytes or None
            )
        else:
            raise ConfigError(
                f"the manifest of {manifest.name} names no source that this Island may read; put its shards or the model into a folder "
                "and name that with --shard-dir"
            )
        with self._store.hold(model) as path:
            yield path

    def _may_read(self, source: str) -> bool:
        return self._own_manifest or scheme_of(source) not in _FOREIGN

    def _cut(self, model: Path, manifest: ShardManifest, layers: LayerRange, progress: Progress) -> StoredModel:
        path, note = self._place(manifest, layers)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = cut(model, path, layers, manifest.model_sha256, progress)
        expected = manifest.shard_hash(layers)
        if expected and expected != digest:
            path.unlink(missing_ok=True)
            raise ConfigError(
                f"layers {layers} of {manifest.name} cut here have the SHA-256 {digest}, the manifest says {expected}: it is not of this "
                "model; write it anew with `archipelag-node cargo shard`"
            )
        found = self._store.adopt(path, digest, ".gguf", f"{manifest.name} layers {layers}", "cut")
        note.write_text(digest + "\n")
        return found


def _noted(note: Path) -> str:
    """The hash in a note, empty where there is none."""
    try:
        return note.read_text().strip()
    except (OSError, ValueError):
        return ""


def _holds(path: Path, manifest: ShardManifest, layers: LayerRange) -> bool:
    try:
        facts = read_shard_layers(path)
    except (ConfigError, OSError):
        return False
    return facts is not None and (facts.model_sha256, facts.layers) == (manifest.model_sha256, layers)


def _verified(path: Path, manifest: ShardManifest, layers: LayerRange) -> ShardFile | None:
    """A file of the owner's, if it is the one of the manifest; where that names none, the owner vouches for it."""
    digest, expected = _hash(path), manifest.shard_hash(layers)
    return ShardFile(path, digest, "folder") if expected in ("", digest) else None


def _hash(path: Path) -> str:
    return sha256_of(path, path.name, no_progress, never)
