"""A shard's file on this machine: from a folder of its owner's, from the cache, ready-made from its address, or cut out of the model.

Whatever it comes from, it is verified: by the hash that the manifest gives, or by having been cut here from a model with the manifest's
hash. Blocking; for a worker thread. Memory is not needed for any of it, disk is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError
from protocol.shards import LayerRange, ShardManifest
from runtimes.catalogue import CATALOGUE
from runtimes.gguf.shard import cut, read_shard_layers
from runtimes.store import ModelStore
from runtimes.store.files import Cancelled, never, sha256_of
from runtimes.store.progress import Progress, no_progress
from runtimes.store.sources import scheme_of

_FOLDER = "shards"
_FOREIGN = frozenset({"file", "http"})  # sources that a manifest from elsewhere must not make us read


@dataclass(frozen=True, slots=True)
class ShardFile:
    path: Path
    sha256: str


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
                yield ShardFile(path, manifest.model_sha256)
            return
        found = self._in_folders(manifest, layers) or self._in_cache(manifest, layers)
        if found is None:
            found = self._ready_made(manifest, layers, progress, cancelled)
        if found is None:
            with self._model(manifest, progress, cancelled) as model:
                found = self._cut(model, manifest, layers, progress)
        yield found

    def _in_folders(self, manifest: ShardManifest, layers: LayerRange) -> ShardFile | None:
        for folder in self._folders:
            for path in sorted(folder.glob("*.gguf")):
                if _holds(path, manifest, layers) and (found := _verified(path, manifest, layers)) is not None:
                    return found
        return None

    def _in_cache(self, manifest: ShardManifest, layers: LayerRange) -> ShardFile | None:
        path, note = self._place(manifest, layers)
        if not path.exists() or not note.exists() or not _holds(path, manifest, layers):
            return None
        expected = manifest.shard_hash(layers) or note.read_text().strip()
        return ShardFile(path, expected) if _hash(path) == expected else None

    def _place(self, manifest: ShardManifest, layers: LayerRange) -> tuple[Path, Path]:
        name = f"{manifest.model_sha256[:16]}.{layers}.gguf"
        folder = self._store.cache_dir / _FOLDER
        return folder / name, folder / f"{name}.sha256"

    def _ready_made(
        self, manifest: ShardManifest, layers: LayerRange, progress: Progress, cancelled: Cancelled
    ) -> ShardFile | None:
        places = dict(zip(manifest.shard_layers, manifest.shard_urls, strict=True))
        url, digest = places.get(layers, ""), manifest.shard_hash(layers)
        if not url or not self._may_read(url):
            return None
        model = self._store.fetch([url], progress, cancelled, sha256=digest)
        return ShardFile(model.path, model.sha256)

    @contextmanager
    def _model(self, manifest: ShardManifest, progress: Progress, cancelled: Cancelled) -> Iterator[Path]:
        """The whole model. Raises ConfigError where it cannot be had from here."""
        for folder in self._folders:
            for path in sorted(folder.glob("*.gguf")):
                if path.stat().st_size == manifest.model_bytes and _hash(path) == manifest.model_sha256:
                    yield path
                    return
        entry = CATALOGUE.get(manifest.name)
        sources = [source for source in manifest.model_sources if self._may_read(source)]
        if entry is not None and entry.sha256 == manifest.model_sha256:
            model = self._store.fetch(manifest.name, progress, cancelled)
        elif sources and len(sources) == len(manifest.model_sources):
            model = self._store.fetch(sources, progress, cancelled, sha256=manifest.model_sha256)
        else:
            raise ConfigError(
                f"the manifest of {manifest.name} names no source that this Island may read; put its shards or the model into a folder "
                "and name that with --shard-dir"
            )
        with self._store.hold(model) as path:
            yield path

    def _may_read(self, source: str) -> bool:
        return self._own_manifest or scheme_of(source) not in _FOREIGN

    def _cut(self, model: Path, manifest: ShardManifest, layers: LayerRange, progress: Progress) -> ShardFile:
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
        note.write_text(digest + "\n")
        return ShardFile(path, digest)


def _holds(path: Path, manifest: ShardManifest, layers: LayerRange) -> bool:
    try:
        facts = read_shard_layers(path)
    except (ConfigError, OSError):
        return False
    return facts is not None and (facts.model_sha256, facts.layers) == (manifest.model_sha256, layers)


def _verified(path: Path, manifest: ShardManifest, layers: LayerRange) -> ShardFile | None:
    """A file of the owner's, if it is the one of the manifest; where that names none, the owner vouches for it."""
    digest, expected = _hash(path), manifest.shard_hash(layers)
    return ShardFile(path, digest) if expected in ("", digest) else None


def _hash(path: Path) -> str:
    return sha256_of(path, path.name, no_progress, never)
