"""Whether a model may be loaded at all: it is ONNX, it opens no file but the Cargo's own, and it wants no operators from a library."""

from __future__ import annotations

import mmap
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass

from protocol import cargos
from protocol.errors import ConfigError
from runtimes.onnx.wire import ModelNotes, read_notes

# Operators that the CPU build of onnxruntime has of its own: ONNX's, classical machine learning, and Microsoft's contributions.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})

_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x80", "a pickle"),
    (0, b"PK\x03\x04", "a zip file, as torch saves models"),
    (0, b"GGUF", "a GGUF file; its runtime is gguf"),
    (0, b"\x89HDF", "an HDF5 file"),
    (4, b"ORTM", "onnxruntime's own format"),
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model that may be loaded. ``external``: place of each further file that its tensors lie in, by the name it gives it."""

    place: str
    external: Mapping[str, str]


def check_model(entry: str, files: Mapping[str, str]) -> ModelFile:
    """``entry`` is one of ``files``: path in the manifest -> place on disk. Raises ConfigError with what is wrong."""
    if entry not in files:
        raise ConfigError(f"the model {entry} is none of the Cargo's files")
    place = files[entry]
    try:
        with open(place, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ConfigError(f"the model {entry} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                notes = _notes(mapped, entry)
    except OSError as error:
        raise ConfigError(f"the model {entry} cannot be read: {error.strerror}") from error
    if strange := sorted(notes.domains - notes.own_domains - DOMAINS):
        raise ConfigError(f"the model wants operators of {strange[0][:80]!r}, which need a library; onnxruntime's own are allowed")
    return ModelFile(place, _external(entry, files, notes))


def _notes(mapped: mmap.mmap, entry: str) -> ModelNotes:
    for at, magic, what in _FOREIGN:
        if mapped[at : at + len(magic)] == magic:
            raise ConfigError(f"the model {entry} is {what}; only ONNX models are taken, since other formats may run code")
    with memoryview(mapped) as view:
        return read_notes(view)


def _external(entry: str, files: Mapping[str, str], notes: ModelNotes) -> dict[str, str]:
    found: dict[str, str] = {}
    for location, offset, length in notes.external:
        path = posixpath.join(posixpath.dirname(entry), location)
        try:  # absolute, "..", "*/_ORT_MEM_ADDR_/*" (bytes anywhere in our memory): none of them is a plain path
            cargos.check_path("location", location)
            start, size = int(offset or "0"), int(length or "0")
        except ValueError:
            raise ConfigError(f"the model keeps tensors in {location[:80]!r}, outside the Cargo; use a plain path beside it") from None
        if path not in files:
            raise ConfigError(f"the model keeps tensors in {location[:80]!r}, which the manifest does not list")
        try:
            there = os.stat(files[path]).st_size
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        if start < 0 or size < 0 or start + size > there:
            raise ConfigError(f"the model has tensors beyond the end of {path}, which has {there} bytes")
        found[location] = files[path]
    return found
