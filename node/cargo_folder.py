"""A publisher's folder and the manifest that is made of it: ``cargo.toml`` beside the files of a Cargo.

    name = "text-stats"            lower-case words
    release = "1.0.0"              each release once; only ever upwards
    runtime = "wasm"               gguf, onnx, wasm, container or diffusers
    entry = "module.wasm"          the file that the runtime begins with; of a container the image by its digest
    licence = "Apache-2.0"
    ask = "0.001+0+0"              credits per job + per 1,000 output tokens + per second

    [files."module.wasm"]          a file of the folder, which is hashed, or one that lies elsewhere: then sha256, size_bytes and root
    sources = ["https://…"]        where others find it; without, only Islands that have it can give it on

    [needs]                        the most that one job may use
    memory_mb = 256
    time_s = 60

``[options]``, ``[input_schema]`` and ``[output_schema]`` are tables that become JSON; ``[cache]`` has enabled, ttl_s,
similarity_milli and public (protocol.cargos.CachePolicy). Nothing is read outside the folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from protocol import checks, limits
from protocol.blobs import BlobTree, leaf_hash
from protocol.cargos import (
    CARGO_VERSION,
    CachePolicy,
    CargoFile,
    CargoManifest,
    Needs,
    Runtime,
    canonical_json,
    check_name,
    check_path,
    release_of,
)
from protocol.errors import ConfigError
from protocol.prices import Ask, parse_ask
from runtimes.catalogue import ROOTS
from runtimes.store.progress import Progress, no_progress

CARGO_FILE = "cargo.toml"
_TOML_BYTES_MAX = 256 * 1024
_READ_BYTES = limits.BLOB_CHUNK_BYTES  # a leaf each
_MB = 1024 * 1024
_TEXTS = ("name", "release", "runtime", "entry", "licence")
_KNOWN = {
    *_TEXTS,
    "description",
    "ask",
    "trust_level",
    "files",
    "needs",
    "cache",
    "options",
    "input_schema",
    "output_schema",
    "expires_days",
}
_NEEDS = {"memory_mb": _MB, "disk_mb": _MB, "gpu_memory_mb": _MB, "output_mb": _MB, "time_s": 1, "cpu_threads": 1}
_DAY_MS = 86_400_000
_SHOWN_BYTES = 64 * _MB  # what takes no moment shows no progress


def read_folder(
    folder: Path, publisher: str, now_ms: int, progress: Progress = no_progress, file_name: str = CARGO_FILE
) -> CargoManifest:
    """The manifest that a folder makes now. Raises ConfigError that says what is wrong in which field."""
    found = _read_toml(folder / file_name)
    unknown = sorted(found.keys() - _KNOWN)
    if unknown:
        _wrong(f"{', '.join(unknown)} is not known; possible are {', '.join(sorted(_KNOWN))}")
    texts = {name: _text(found, name) for name in _TEXTS}
    files = _files(folder, _table(found, "files"), progress)
    days = _whole(found, "expires_days", 0)
    try:
        return CargoManifest(
            version=CARGO_VERSION,
            name=texts["name"],
            release=texts["release"],
            publisher=publisher,
            runtime=_runtime(texts["runtime"]),
            entry=texts["entry"],
            files=files,
            needs=_needs(_table(found, "needs")),
            ask=_ask(found),
            trust_level=_whole(found, "trust_level", 0),
            licence=texts["licence"],
            description=_text(found, "description", ""),
            options=canonical_json(_table(found, "options")),
            input_schema=canonical_json(_table(found, "input_schema")),
            output_schema=canonical_json(_table(found, "output_schema")),
            cache=_cache(_table(found, "cache")),
            published_at_ms=now_ms,
            expires_at_ms=now_ms + days * _DAY_MS if days else 0,
        )
    except (ValueError, TypeError) as error:
        _wrong(str(error))


def name_of(folder: Path) -> tuple[str, str]:
    """Name and release that a folder stands for. Raises ConfigError."""
    found = _read_toml(folder / CARGO_FILE)
    name, release = _text(found, "name"), _text(found, "release")
    try:
        check_name(name)
        release_of(release)
    except ValueError as error:
        _wrong(str(error))
    return name, release


def check_folder(
    manifest: CargoManifest, folder: Path, progress: Progress = no_progress, files: tuple[CargoFile, ...] | None = None
) -> list[str]:
    """What is not as the manifest says: files (all, where ``files`` names none) that are missing, or have other contents. Empty where all
    is well."""
    found = []
    for file in manifest.files if files is None else files:
        try:
            size, digest, root = _hash(folder, file.path, progress)
        except ConfigError as error:
            found.append(str(error))
            continue
        if (size, digest) != (file.size_bytes, file.sha256):
            found.append(
                f"{file.path} has {size} bytes and the hash {digest[:16]}…, not {file.size_bytes} and {file.sha256[:16]}…"
            )
        elif file.root not in ("", root):
            found.append(f"{file.path} has the root {root[:16]}…, not {file.root[:16]}…: no Island could give it to another")
    return found


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {file} ({error.strerror}); make one with: archipelag-node cargo new NAME"
        ) from error
    if len(data) > _TOML_BYTES_MAX:
        raise ConfigError(f"{file} has {len(data)} bytes; at most {_TOML_BYTES_MAX} are read")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no valid TOML: {error}") from error


def _wrong(message: str) -> NoReturn:
    raise ConfigError(f"{CARGO_FILE}: {message}")


def _text(found: Mapping[str, Any], name: str, missing: str | None = None) -> str:
    value = found.get(name, missing)
    if value is None:
        _wrong(f"{name} is missing")
    if not isinstance(value, str):
        _wrong(f"{name} is a text in quotes, not {value!r:.60}")
    return value


def _whole(found: Mapping[str, Any], name: str, missing: int) -> int:
    value = found.get(name, missing)
    if type(value) is not int or not 0 <= value <= 2**40:
        _wrong(f"{name} is a whole number, not {value!r:.60}")
    return value


def _table(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = found.get(name, {})
    if not isinstance(value, dict):
        _wrong(f"{name} is a table: [{name}]")
    return value


def _runtime(text: str) -> Runtime:
    if text not in list(Runtime):
        _wrong(f"runtime is one of {', '.join(Runtime)}, not {text[:40]!r}")
    return Runtime(text)


def _ask(found: Mapping[str, Any]) -> Ask:
    try:
        return parse_ask(_text(found, "ask", "0"))
    except ValueError as error:
        _wrong(f"ask: {error}")


def _needs(table: Mapping[str, Any]) -> Needs:
    unknown = sorted(table.keys() - _NEEDS.keys())
    if unknown:
        _wrong(f"needs.{unknown[0]} is not known; possible are {', '.join(sorted(_NEEDS))}")
    values = {name: _whole(table, name, 0) * unit for name, unit in _NEEDS.items() if name in table}
    plain = {name.replace("_mb", "_bytes"): value for name, value in values.items()}
    return Needs(**({"memory_bytes": 256 * _MB, "time_s": 60} | plain))


def _cache(table: Mapping[str, Any]) -> CachePolicy:
    plain = CachePolicy()
    unknown = sorted(table.keys() - {"enabled", "ttl_s", "similarity_milli", "public"})
    enabled, public = table.get("enabled", plain.enabled), table.get("public", plain.public)
    if unknown or not isinstance(enabled, bool) or not isinstance(public, bool):
        _wrong("cache has enabled and public (true or false), ttl_s and similarity_milli")
    similarity_milli = _whole(table, "similarity_milli", plain.similarity_milli)
    return CachePolicy(enabled, _whole(table, "ttl_s", plain.ttl_s), similarity_milli, public)


def _files(folder: Path, table: Mapping[str, Any], progress: Progress) -> tuple[CargoFile, ...]:
    if len(table) > limits.CARGO_FILES_MAX:
        _wrong(f"a Cargo has at most {limits.CARGO_FILES_MAX} files, not {len(table)}")
    return tuple(_file(folder, path, entry, progress) for path, entry in sorted(table.items()))


def _file(folder: Path, path: str, entry: Any, progress: Progress) -> CargoFile:
    if not isinstance(entry, dict) or entry.keys() - {"sources", "sha256", "size_bytes", "root"}:
        _wrong(f"files.{path[:60]!r} has sources, sha256, size_bytes and root, and nothing else")
    sources = entry.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        _wrong(f"files.{path[:60]!r}: sources is a list of texts")
    try:
        check_path("files", path)
        if not (folder / path).exists() and "sha256" in entry:
            return _elsewhere(path, entry, tuple(sources))
        size, digest, root = _hash(folder, path, progress)
        if entry.get("sha256", digest) != digest:
            _wrong(f"{path} has another hash than sha256 says: {digest}")
        if entry.get("root", root) != root:
            _wrong(f"{path} has another root than root says: {root}")
        return CargoFile(path, digest, size, tuple(sources), root)
    except ValueError as error:
        _wrong(str(error))


def _elsewhere(path: str, entry: Mapping[str, Any], sources: tuple[str, ...]) -> CargoFile:
    """A file that is not in the folder. Raises ValueError, ConfigError."""
    digest, size = _text(entry, "sha256"), _whole(entry, "size_bytes", -1)
    root = _text(entry, "root", ROOTS.get(digest, ""))
    if not root and size > limits.BLOB_CHUNK_BYTES:
        _wrong(f"files.{path[:60]!r} needs its root too; lay the file into the folder once, build, and `cargo show` prints it")
    return CargoFile(path, digest, size, sources, root)


def _hash(folder: Path, path: str, progress: Progress) -> tuple[int, str, str]:
    """Size, SHA-256 and root (empty of an empty file) of a plain file of the folder. Raises ConfigError, also for a way out by a symbolic
    link."""
    check_path("path", path)
    at = folder
    for piece in path.split("/"):
        at = at / piece
        if at.is_symlink():
            raise ConfigError(f"{path} is, or leads through, a symbolic link; copy the file into the folder")
    digest, done, leaves = hashlib.sha256(), 0, bytearray()
    try:
        with open(os.open(at, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=_READ_BYTES) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is no plain file")
            while piece_bytes := file.read(_READ_BYTES):
                digest.update(piece_bytes)
                leaves += leaf_hash(piece_bytes)
                done += len(piece_bytes)
                if status.st_size > _SHOWN_BYTES:
                    progress(f"hashing {path}", done, status.st_size)
    except OSError as error:
        raise ConfigError(f"cannot read {path} in {folder}: {error.strerror}") from error
    try:
        return done, digest.hexdigest(), BlobTree(done, bytes(leaves)).root() if done else ""
    except ValueError as error:
        raise ConfigError(f"{path} is too large, or changed while it was read: {error}") from error


def template(name: str, runtime: Runtime) -> str:
    """The text of a new ``cargo.toml``. Raises ValueError for a name that is none."""
    checks.printable("name", name, limits.CARGO_NAME_CHARS_MAX)
    entry, more = _ENTRIES[runtime]
    files = (
        ""
        if runtime is Runtime.CONTAINER
        else f'\n[files."{entry}"]\nsources = []             # such as "https://…", "hf:OWNER/NAME:FILE" or "pypi:NAME==VERSION/PATH"\n'
    )
    return f"""\
name = "{name}"
release = "0.1.0"        # raise it for every change: a release means one Cargo for ever
runtime = "{runtime}"
entry = "{entry}"
licence = "Apache-2.0"   # an SPDX expression
description = ""
ask = "0.001+0+0"        # credits per job + per 1,000 output tokens + per second
trust_level = 0          # 0: 256 MB, 60 s, 1 CPU; 1: 1 GB, 300 s, 2 CPUs; 2 and 3: 8 GB, 600 s, 4 CPUs
{files}
[needs]
memory_mb = 256
time_s = 60

[options]
{more}
[input_schema]           # a JSON schema; empty takes any object
type = "object"

[cache]                  # of answers, which are free to whoever asks the same again
enabled = true           # false where it draws, looks at the clock or at anything else but its input
ttl_s = 3600
similarity_milli = 850   # of language models: how alike two questions have to be, in thousandths; 1000: equal
public = false           # true: an account may be given what another one's job has answered
"""


_ENTRIES = {
    Runtime.WASM: ("module.wasm", ""),
    Runtime.ONNX: ("model.onnx", 'task = "feature-extraction"\n'),
    Runtime.GGUF: ("model.gguf", ""),
    Runtime.CONTAINER: ("example.org/image@sha256:" + "0" * 64, ""),
    Runtime.DIFFUSERS: ("model_index.json", ""),
}
