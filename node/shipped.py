"""The Cargos that ship with the program. A release of it vouches for them, so they need no signature; their address is that of their
manifest, the same at every Island of the same release."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from node.cargo_folder import CARGO_FILE, read_folder
from protocol.blobs import BlobTree, leaf_hash
from protocol.cargos import (
    CARGO_VERSION,
    CachePolicy,
    CargoFile,
    CargoManifest,
    Needs,
    Runtime,
    address_of,
    canonical_json,
)
from protocol.errors import ConfigError
from protocol.identity import peer_id_of
from protocol.prices import Ask
from runtimes import cargos
from runtimes.container import echo
from runtimes.diffusers import shapes
from runtimes.wasm import modules

# A public key to which nobody knows the secret one: what ships is not signed, and nobody can publish under this name.
PUBLISHER = peer_id_of(hashlib.sha256(b"archipelag shipped cargos/1").digest())
RELEASE = "1.0.0"
MODULE_PATH = "module.wasm"
_FOLDERS = {"container-echo": echo.FOLDER, "shapes": shapes.FOLDER}  # Cargos with a folder of their own, as a publisher has it
_PUBLISHED_AT_MS = 1_790_000_000_000
_MIB = 1024**2
_DRAWS = frozenset({"uuid"})  # modules whose answers are not to be the same again, so none is kept


@dataclass(frozen=True, slots=True)
class Example:
    """``input``: the JSON object of a job. ``output``: the lines that come of it, as JSON objects. ``tolerance``: how far numbers of
    another machine may lie from them, relative to the larger, at least to 1; "..." stands for whatever is not told (runtimes/cargos)."""

    input: dict[str, Any]
    output: list[dict[str, Any]]
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Shipped:
    """``files``: those that ship too, path -> where they lie; the others have sources."""

    manifest: CargoManifest
    address: str
    files: Mapping[str, Path]
    example: Example | None


@lru_cache(maxsize=1)
def shipped_names() -> tuple[str, ...]:
    """In alphabetical order."""
    of_folders = [name for name, folder in _FOLDERS.items() if (folder / CARGO_FILE).is_file()]
    return tuple(sorted([*map(cargo_name, modules.pins()), *(file.stem for file in cargos.FOLDER.glob("*.toml")), *of_folders]))


def cargo_name(module: str) -> str:
    """Of a WASM module."""
    return module.replace("_", "-")


@lru_cache(maxsize=256)
def shipped(name: str) -> Shipped | None:
    """None where there is none of that name. Raises ConfigError for files that are not as they should be."""
    if name not in shipped_names():
        return None
    if name in _FOLDERS:
        return _of_folder(name, _FOLDERS[name], CARGO_FILE)
    module = next((module for module in modules.pins() if cargo_name(module) == name), None)
    if module is not None:
        return _of_module(name, module)
    return _of_folder(name, cargos.FOLDER, f"{name}.toml")


def shipped_addresses() -> dict[str, str]:
    """Name -> content address, of all that ship. Reads and hashes their files."""
    return {name: one.address for name in shipped_names() if (one := shipped(name)) is not None}


def _of_module(name: str, module: str) -> Shipped:
    loaded = modules.load(module)
    size = len(loaded.wasm)
    file = CargoFile(MODULE_PATH, loaded.content_hash, size, (), BlobTree(size, _leaves(loaded.wasm)).root())
    manifest = CargoManifest(
        version=CARGO_VERSION,
        name=name,
        release=RELEASE,
        publisher=PUBLISHER,
        runtime=Runtime.WASM,
        entry=MODULE_PATH,
        files=(file,),
        needs=Needs(memory_bytes=256 * _MIB, time_s=60),
        ask=Ask(),
        trust_level=0,
        licence="Apache-2.0",
        description=loaded.about[:500],
        options=canonical_json({}),
        input_schema=canonical_json({}),
        output_schema=canonical_json({}),
        cache=CachePolicy(enabled=module not in _DRAWS),
        published_at_ms=_PUBLISHED_AT_MS,
    )
    example = Example(loaded.example_input, loaded.example_output)
    return Shipped(manifest, address_of(manifest), {MODULE_PATH: modules.FOLDER / f"{module}.wasm"}, example)


def _leaves(data: bytes) -> bytes:
    from protocol.limits import BLOB_CHUNK_BYTES

    return b"".join(leaf_hash(data[at : at + BLOB_CHUNK_BYTES]) for at in range(0, len(data), BLOB_CHUNK_BYTES))


def _of_folder(name: str, folder: Path, toml: str) -> Shipped:
    manifest = read_folder(folder, PUBLISHER, _PUBLISHED_AT_MS, file_name=toml)
    if manifest.name != name:
        raise ConfigError(f"{toml} of {name} names itself {manifest.name}; install archipelag again")
    here = {file.path: folder / file.path for file in manifest.files if (folder / file.path).is_file()}
    return Shipped(manifest, address_of(manifest), here, _example(cargos.FOLDER / f"{name}.example.json"))


def _example(file: Path) -> Example | None:
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return Example(found["input"], found["output"], found.get("tolerance", 0.0))
