"""Cuts a range of layers out of a GGUF model into a GGUF file of its own that llama.cpp runs as it is. Layout: ggml's docs/gguf.md.

The cut is canonical: the bytes follow from the model's bytes and the range alone, so whoever holds the model can make the shard, and its
hash says that it is the same one. What goes where:

    every shard   its layers, numbered anew from 0; the final norm, which llama.cpp demands; tensors that belong to no layer (rope_freqs)
    first         the embedding matrix; no tokenizer. One row of zeros is added where the number of rows is even: llama.cpp takes the
                  matrix for the output matrix too, and would keep a second copy, repacked for the CPU; it repacks no odd number of rows
    middle        an embedding matrix of one row of zeros, since there has to be one
    last          the output matrix under the embedding's name, which llama.cpp takes for both; tokenizer and chat template

Tensors stand in the model's order, the matrix last. No file is ever held in memory whole. shard_check.py proves that the shards of a
model compute what it computes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from protocol import checks, limits
from protocol.errors import ConfigError
from protocol.shards import MANIFEST_VERSION, LayerRange, ShardManifest
from runtimes.gguf.shard_header import (
    ARRAY,
    BOOL,
    HIGH_KEY,
    LOW_KEY,
    MAGIC,
    MODEL_KEY,
    SCALARS,
    STRING,
    TOTAL_KEY,
    UINT32,
    Entry,
    GgufHeader,
    ShardFacts,
    Tensor,
    read_header,
    read_shard_layers,
    refusal,
    shard_facts,
)
from runtimes.store.errors import DiskFull
from runtimes.store.files import never, sha256_of, sync_folder
from runtimes.store.progress import Progress, no_progress

__all__ = ["GgufHeader", "ShardFacts", "cut", "make_manifest", "planned_bytes", "read_header", "read_shard_layers", "verified_layers"]

_VERSION_WRITTEN = 3
_CHUNK_BYTES = 1024 * 1024
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Architectures whose layers are global or local by their number, where the file does not say it: one in so many is global, the last.
_GLOBAL_EVERY = {"gemma3": 6}
_ELEMENT_BYTES = 2  # of the KV cache: f16


def verified_layers(path: Path, manifest: ShardManifest, progress: Progress = no_progress) -> LayerRange:
    """The layers of a shard whose bytes are those that the manifest names. Raises ConfigError for any other file."""
    facts = read_shard_layers(path)
    if facts is None or facts.model_sha256 != manifest.model_sha256 or facts.total_layers != manifest.total_layers:
        raise ConfigError(f"{path} is no shard of {manifest.name} (SHA-256 {manifest.model_sha256[:12]}…); fetch the right one")
    expected = manifest.shard_hash(facts.layers)
    if not expected:
        raise ConfigError(f"the manifest of {manifest.name} lists no shard of the layers {facts.layers}; cut one of its ranges")
    found = sha256_of(path, f"{path.name}: checking", progress, never)
    if found != expected:
        raise ConfigError(f"{path} has the SHA-256 {found}, the manifest says {expected}: it was changed; delete it and cut it anew")
    return facts.layers


def make_manifest(path: Path, name: str, sha256: str, sources: Sequence[str]) -> ShardManifest:
    """What a planner needs to know of a whole model; ``compute_bytes`` are 0 until shard_check.py has measured them.

    ``sha256``: of the file, as the store found it. ``weights_bytes`` of the manifest are exact for every range but the whole model.
    Raises ConfigError where the file cannot be cut.
    """
    # Not above: loading engines needs more packages than reading files does.
    from runtimes.gguf.load import MICRO_BATCH_CPU

    header = read_header(path)
    embedding, head = _matrices(header)
    stub_bytes = embedding.row_bytes  # is in no shard that has a matrix, so the ends weigh that much less than their matrices
    layer_bytes, head_bytes, shared_bytes = [0] * header.total_layers, head.size - stub_bytes, stub_bytes
    for tensor in header.tensors.values():
        if tensor.layer >= 0:
            layer_bytes[tensor.layer] += tensor.size
        elif _is_of_head(tensor.name):
            head_bytes += tensor.size
        elif tensor.name not in (_EMBEDDING, _HEAD):
            shared_bytes += tensor.size
    try:
        return ShardManifest(
            version=MANIFEST_VERSION,
            name=name,
            architecture=header.architecture,
            model_sha256=sha256,
            model_bytes=header.file_bytes,
            model_sources=tuple(sources),
            total_layers=header.total_layers,
            width=header.number("embedding_length"),
            vocabulary=head.rows,
            context_tokens=header.number("context_length"),
            embedding_bytes=_first_rows(embedding) * stub_bytes - stub_bytes,
            head_bytes=head_bytes,
            shared_bytes=shared_bytes,
            layer_bytes=tuple(layer_bytes),
            kv_bytes=_kv_bytes(header),
            micro_batch=MICRO_BATCH_CPU,
            compute_bytes=(0, 0, 0),
            max_shards=min(limits.ROUTE_STAGES_MAX, max(2, header.total_layers)),
        )
    except ValueError as error:
        raise ConfigError(f"{path} cannot be described by a manifest: {error}; use another name or another model file") from error


def _kv_bytes(header: GgufHeader) -> tuple[int, ...]:
    """Bytes of one token's K and V in each layer. Layers with a sliding window may have heads of another size."""
    total = header.total_layers
    heads = header.numbers("attention.head_count", (1,) * total)
    kv_heads = header.numbers("attention.head_count_kv", heads)
    default = header.number("embedding_length") // max(1, heads[0])
    key, value = (header.number(f"attention.{kind}_length", default) for kind in ("key", "value"))
    local_key, local_value = header.number("attention.key_length_swa", key), header.number("attention.value_length_swa", value)
    local = _window_pattern(header) or (False,) * total
    lengths = [local_key + local_value if is_local else key + value for is_local in local]
    return tuple(count * length * _ELEMENT_BYTES for count, length in zip(kv_heads, lengths, strict=True))


def planned_bytes(header: GgufHeader, layers: LayerRange, model_sha256: str) -> int:
    """Size of the file that ``cut`` would write. Raises ConfigError where it would."""
    return _Plan(header, layers, model_sha256).file_bytes


def cut(source: Path, target: Path, layers: LayerRange, model_sha256: str, progress: Progress = no_progress) -> str:
    """Writes the layers of a whole model to ``target``, all or nothing, and returns the SHA-256 of the file.

    ``model_sha256``: of ``source``, as the store found it; it is written into the shard and not computed again.
    Raises ConfigError (DiskFull) for a source that cannot be cut, a range that it does not have, and a target that cannot be written.
    """
    try:
        checks.content_hash("the model's hash", model_sha256)
    except ValueError as error:
        raise ConfigError(f"{error}; give the SHA-256 of the model's file") from None
    plan = _Plan(read_header(source), layers, model_sha256)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with _clear_errors(target, plan.file_bytes):
            with open(source, "rb") as model, open(temporary, "wb") as file:
                output = _Output(model, file, lambda done: progress(f"layers {layers}", done, plan.file_bytes))
                plan.write(output)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return output.digest.hexdigest()


@contextmanager
def _clear_errors(target: Path, needed_bytes: int) -> Iterator[None]:
    """The kernel's errors as sentences that say what to do. Raises ConfigError, DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"the disk that holds {target.parent} is full: {target.name} needs {needed_bytes:,} bytes; free some room there or "
                "choose a folder on another disk, then cut again"
            ) from error
        raise ConfigError(f"{target} cannot be written ({error.strerror}); check the folder and its rights") from error


def _is_of_head(name: str) -> bool:
    """What only the output needs, beside the matrix itself: a bias. llama.cpp demands ``output_norm`` everywhere."""
    return name.startswith("output.") and name != _HEAD


def _first_rows(embedding: Tensor) -> int:
    """Odd; the module's docstring says why."""
    return embedding.rows | 1


def _matrices(header: GgufHeader) -> tuple[Tensor, Tensor]:
    """Embedding and output matrix of a whole model: the same tensor where they are tied. Raises ConfigError."""
    if shard_facts(header) is not None:
        raise ConfigError(f"{header.path} is a shard itself; name the whole model's file")
    parts, predicted = header.entries.get("split.count"), header.value("nextn_predict_layers")
    if parts is not None and parts.value not in (0, 1):
        raise ConfigError(f"{header.path} is one of {parts.value} files of a model; join them with `llama-gguf-split --merge` first")
    if predicted:
        raise ConfigError(f"{header.path} has layers that predict further tokens, which no shard can hold; use a model file without them")
    embedding = header.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[0] != header.number("embedding_length"):
        raise refusal(header.path, f"it has no usable {_EMBEDDING}")
    head = header.tensors.get(_HEAD, embedding)
    if head.shape != embedding.shape:
        raise refusal(header.path, f"{_HEAD} has the shape {head.shape}, {_EMBEDDING} {embedding.shape}")
    return embedding, head


def _window_pattern(header: GgufHeader) -> tuple[bool, ...]:
    """For each layer whether it sees only a window, where that depends on its number; empty where it does not."""
    value, window = header.value("attention.sliding_window_pattern"), header.value("attention.sliding_window")
    if isinstance(value, tuple):
        return tuple(bool(flag) for flag in header.numbers("attention.sliding_window_pattern", ()))
    if header.architecture not in _GLOBAL_EVERY or not window:
        return ()
    every = _GLOBAL_EVERY[header.architecture] if value is None else value
    if not isinstance(every, int) or every < 0:
        raise refusal(header.path, f"its sliding_window_pattern is {value!r}")
    return tuple(every == 0 or layer % every < every - 1 for layer in range(header.total_layers))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor to be written: ``size`` bytes of the source from ``start`` on, then ``zeros``."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int
    zeros: int = 0


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of the source, from ``start`` up to, not including, ``end``."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class _Plan:
    """Everything of a shard but the bytes themselves. Raises ConfigError where the model cannot be cut so."""

    def __init__(self, header: GgufHeader, layers: LayerRange, model_sha256: str) -> None:
        if layers.high > header.total_layers:
            raise ConfigError(f"{header.path} has the layers 0-{header.total_layers - 1}, not {layers}; ask for layers that it has")
        if len(layers) == header.total_layers:
            raise ConfigError(f"the layers {layers} are all of {header.path}: use the model's file itself, or ask for fewer layers")
        self._header, self._layers = header, layers
        self._is_first, self._is_last = layers.low == 0, layers.high == header.total_layers
        # A window that no layer has makes llama.cpp end the process, so it must not be named then.
        self._local = _window_pattern(header)[layers.low : layers.high]
        self._is_global = header.architecture in _GLOBAL_EVERY and bool(self._local) and not any(self._local)
        embedding, head = _matrices(header)
        self._rows = head.rows if self._is_last else _first_rows(embedding) if self._is_first else 1
        self._pieces = list(self._chosen(embedding, head))
        entries = self._entries(model_sha256)
        lists = (_packed_piece(piece, offset) for piece, offset in zip(self._pieces, self._offsets(), strict=True))
        counts = MAGIC + struct.pack("<IQQ", _VERSION_WRITTEN, len(self._pieces), len(entries))
        self._front: list[bytes | _Span] = [counts, *entries, *lists]
        front_bytes = sum(len(part) for part in self._front)
        self._front.append(b"\0" * self._padding(front_bytes))
        self.file_bytes = front_bytes + len(self._front[-1]) + sum(self._padded(piece) for piece in self._pieces)

    def write(self, output: _Output) -> None:
        for part in self._front:
            if isinstance(part, _Span):
                output.copy(part.start, len(part))
            else:
                output.write(part)
        for piece in self._pieces:
            output.copy(piece.start, piece.size)
            output.write(b"\0" * (self._padded(piece) - piece.size))

    def _padding(self, size: int) -> int:
        return -size % self._header.alignment

    def _padded(self, piece: _Piece) -> int:
        size = piece.size + piece.zeros
        return size + self._padding(size)

    def _offsets(self) -> Iterator[int]:
        offset = 0
        for piece in self._pieces:
            yield offset
            offset += self._padded(piece)

    def _chosen(self, embedding: Tensor, head: Tensor) -> Iterator[_Piece]:
        for tensor in self._header.tensors.values():
            name = tensor.name
            if tensor.layer >= 0:
                if not self._layers.low <= tensor.layer < self._layers.high:
                    continue
                name = f"blk.{tensor.layer - self._layers.low}.{name.split('.', 2)[2]}"
            elif name in (_EMBEDDING, _HEAD) or (_is_of_head(name) and not self._is_last):
                continue
            yield _Piece(name, tensor.shape, tensor.kind, tensor.start, tensor.size)
        if self._is_last:
            yield _Piece(_EMBEDDING, head.shape, head.kind, head.start, head.size)
        else:
            size = embedding.size if self._is_first else 0
            zeros = self._rows * embedding.row_bytes - size
            yield _Piece(_EMBEDDING, (embedding.shape[0], self._rows), embedding.kind, embedding.start, size, zeros)

    def _entries(self, model_sha256: str) -> list[bytes | _Span]:
        """The source's metadata in its order, as far as it holds for the range; then what is new."""
        header, layers = self._header, self._layers
        own: dict[str, bytes] = {f"{header.architecture}.block_count": struct.pack("<II", UINT32, len(layers))}
        if not self._is_last:
            own["tokenizer.ggml.model"] = struct.pack("<I", STRING) + _packed_text("none")
            own[f"{header.architecture}.vocab_size"] = struct.pack("<II", UINT32, self._rows)
        if self._local and not self._is_global:
            packed = struct.pack(f"<IIQ{len(layers)}?", ARRAY, BOOL, len(layers), *self._local)
            own[f"{header.architecture}.attention.sliding_window_pattern"] = packed
        own[MODEL_KEY] = struct.pack("<I", STRING) + _packed_text(model_sha256)
        for key, number in ((LOW_KEY, layers.low), (HIGH_KEY, layers.high), (TOTAL_KEY, header.total_layers)):
            own[key] = struct.pack("<II", UINT32, number)
        kept = (self._kept(entry) for key, entry in header.entries.items() if key not in own)
        return [*(entry for entry in kept if entry is not None), *(_packed_text(key) + value for key, value in own.items())]

    def _kept(self, entry: Entry) -> bytes | _Span | None:
        """An entry of the source: whole, cut to the range, or not at all."""
        if entry.key.startswith("split.") or (entry.key.startswith("tokenizer.") and not self._is_last):
            return None
        if self._is_global and entry.key.startswith(f"{self._header.architecture}.attention.sliding_window"):
            return None
        arch, total = self._header.architecture, self._header.total_layers
        is_of_layers = entry.items == total and entry.key.startswith(f"{arch}.") and not entry.key.startswith(f"{arch}.rope.")
        if not is_of_layers or not isinstance(entry.value, tuple):
            return _Span(entry.start, entry.end)
        values = entry.value[self._layers.low : self._layers.high]
        form = f"<IIQ{len(values)}{SCALARS[entry.item_kind]}"
        return _packed_text(entry.key) + struct.pack(form, ARRAY, entry.item_kind, len(values), *values)


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_piece(piece: _Piece, offset: int) -> bytes:
    count = len(piece.shape)
    return _packed_text(piece.name) + struct.pack(f"<I{count}QIQ", count, *piece.shape, piece.kind, offset)


class _Output:
    """The file that is written, its hash and who watches."""

    def __init__(self, model: BinaryIO, file: BinaryIO, watch: Callable[[int], None]) -> None:
        self.digest = hashlib.sha256()
        self._model, self._file, self._watch = model, file, watch
        self._done = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self._done += len(data)
        self._watch(self._done)

    def copy(self, start: int, size: int) -> None:
        self._model.seek(start)
        while size:
            data = self._model.read(min(size, _CHUNK_BYTES))
            if not data:
                raise ConfigError(f"{self._model.name} became shorter while it was cut; leave it alone and cut again")
            self.write(data)
            size -= len(data)
