"""Cargos that a node can open without a network's word: those that ship, a ``.cargo`` file, or a folder that is still being made."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from node.cargo_folder import CARGO_FILE, check_folder, read_folder
from node.shipped import Example, shipped, shipped_names
from protocol.cargos import CargoFile, CargoManifest, address_of, read_cargo, unexpired
from protocol.errors import ConfigError, RemoteProtocolError
from runtimes.store import ConsoleProgress, ModelStore
from runtimes.store.progress import Progress

_SUFFIX = ".cargo"
_ENVELOPE_BYTES_MAX = 256 * 1024


@dataclass(frozen=True, slots=True)
class LocalCargo:
    """``folder``: where files of it lie, under their paths in the manifest; ``here``: those that are known to lie elsewhere.
    ``is_signed``: whether its publisher's signature was checked."""

    manifest: CargoManifest
    address: str
    folder: Path | None
    here: Mapping[str, Path]
    is_signed: bool = False
    example: Example | None = None


def find_local(name: str, publisher: str) -> LocalCargo | None:
    """What ``name`` stands for: a shipped Cargo, a ``.cargo`` file, or a folder with a cargo.toml, whose manifest is made now for
    ``publisher``. None for anything else. Raises ConfigError for a file or folder that is not as it should be."""
    if name in shipped_names():
        found = shipped(name)
        assert found is not None
        return LocalCargo(found.manifest, found.address, None, found.files, example=found.example)
    path = Path(name).expanduser()
    if path.suffix == _SUFFIX and path.is_file():
        return _of_file(path)
    if (path / CARGO_FILE).is_file():
        manifest = read_folder(path, publisher, _now_ms())
        return LocalCargo(manifest, address_of(manifest), path, {})
    return None


def _of_file(path: Path) -> LocalCargo:
    try:
        with open(path, "rb") as file:
            cargo = read_cargo(file.read(_ENVELOPE_BYTES_MAX))
        unexpired(cargo.manifest, _now_ms())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except RemoteProtocolError as error:
        raise ConfigError(f"{path}: {error}") from error
    return LocalCargo(cargo.manifest, cargo.address, path.parent, {}, is_signed=True)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def bring_files(cargo: LocalCargo, store: ModelStore, stack: ExitStack, told: Progress | None = None) -> dict[str, Path]:
    """Path in the manifest -> where the checked file lies; from the folder, else from the store or its sources, and then held until the
    stack ends. ``told``: who hears how far it is; None: the console. Raises ConfigError that says which file cannot be had."""
    places: dict[str, Path] = dict(cargo.here)
    with ConsoleProgress() if told is None else nullcontext(told) as progress:
        if cargo.folder is not None:
            await trio.to_thread.run_sync(_take_from_folder, cargo, places, progress)
        for file in cargo.manifest.files:
            if file.path not in places:
                places[file.path] = await _fetch(file, cargo.manifest, store, progress, stack)
    return places


def _take_from_folder(cargo: LocalCargo, places: dict[str, Path], progress: Progress) -> None:
    assert cargo.folder is not None
    there = tuple(file for file in cargo.manifest.files if (cargo.folder / file.path).exists())
    if complaints := check_folder(cargo.manifest, cargo.folder, progress, there):
        raise ConfigError(f"{cargo.manifest.name}: {complaints[0]}")
    places.update({file.path: cargo.folder / file.path for file in there})


async def _fetch(file: CargoFile, manifest: CargoManifest, store: ModelStore, progress: Progress, stack: ExitStack) -> Path:
    sources = [source for source in file.sources if not source.startswith("peer:")]
    if not sources:
        raise ConfigError(f"{manifest.name}: {file.path} is not here, and its manifest names no source that can be read from here")
    cancelled = threading.Event()
    fetch = partial(
        store.fetch,
        sources,
        progress,
        cancelled.is_set,
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        name=f"{manifest.name}/{file.path}",
        suffix=Path(file.path).suffix,
    )
    try:
        model = await trio.to_thread.run_sync(fetch, abandon_on_cancel=True)
    finally:
        cancelled.set()  # after a Ctrl-C the thread stops at its next piece; what it has is kept and resumed
    return stack.enter_context(store.hold(model))
