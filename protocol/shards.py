"""Shards: ranges of a model's layers as files, and what a range weighs.

A manifest says of a model what a planner has to know (bytes of each layer, of the embeddings, of the head, of one token's KV cells) and
which ranges lie ready as files. The cut is canonical: the same range of the same model is the same file everywhere, with the same hash.
Pure arithmetic and a JSON form; cutting is done in runtimes/gguf.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from protocol import checks, limits
from protocol.errors import ConfigError

MANIFEST_VERSION = 1
# A stage's process beside weights, KV cells and buffers: interpreter, libraries, frames; and what the tokenizer of the last stage takes
# for each token of the vocabulary. Measured on Linux with llama-cpp-python 0.3.36: 58 to 61 MB, and 18 MB for 49,152 tokens.
PROCESS_BYTES, TOKENIZER_BYTES_A_TOKEN = 60_000_000, 360
WHOLE_BYTES = 288 * 2**20  # a whole model's engine has room for more jobs: buffers and process as runtimes.gguf.budget counts them at least
_BYTES_MAX = 2**50


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Layers ``low`` up to, not including, ``high``; counted from 0."""

    low: int
    high: int

    def __post_init__(self) -> None:
        checks.in_range("first layer", self.low, 0, limits.LAYERS_MAX - 1)
        checks.in_range("layer behind the last", self.high, self.low + 1, limits.LAYERS_MAX)

    def __len__(self) -> int:
        return self.high - self.low

    def __str__(self) -> str:
        """``0-14``: first and last layer, as people count them."""
        return f"{self.low}-{self.high - 1}"


@dataclass(frozen=True, slots=True)
class ShardManifest:
    """``layer_bytes`` and ``kv_bytes`` (of one token's cells, f16) have one entry for each layer; all sizes in bytes.

    The first stage carries ``embedding_bytes``, the last ``head_bytes`` (final norm and output matrix), every one ``shared_bytes``.
    ``compute_bytes``: buffers of a first, a middle and a last stage as measured where the model was cut, with ``micro_batch`` rows; an
    Island's own measure replaces it. ``model_sources``: URIs of the whole model's parts, joined in order; empty where only shards can be
    had. ``shard_urls[i]``: where shard i lies ready, empty strings allowed: who holds the model cuts it himself.
    """

    version: int
    name: str
    architecture: str
    model_sha256: str
    model_bytes: int
    model_sources: tuple[str, ...]
    total_layers: int
    width: int
    vocabulary: int
    context_tokens: int
    embedding_bytes: int
    head_bytes: int
    shared_bytes: int
    layer_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    micro_batch: int
    compute_bytes: tuple[int, int, int]
    min_shards: int = 2
    max_shards: int = limits.ROUTE_STAGES_MAX
    shard_layers: tuple[LayerRange, ...] = ()
    shard_hashes: tuple[str, ...] = ()
    shard_bytes: tuple[int, ...] = ()
    shard_urls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.version != MANIFEST_VERSION:
            raise ValueError(f"manifest version {self.version} is not {MANIFEST_VERSION}")
        checks.label("name", self.name, limits.NAME_CHARS_MAX)
        checks.label("architecture", self.architecture, limits.NAME_CHARS_MAX)
        checks.content_hash("model_sha256", self.model_sha256)
        checks.at_most("model_sources", self.model_sources, limits.MODEL_PARTS_MAX)
        for text in (*self.model_sources, *self.shard_urls):
            checks.printable("a source", text, limits.TEXT_CHARS_MAX)
        checks.in_range("total_layers", self.total_layers, 2, limits.LAYERS_MAX)
        for name in ("width", "vocabulary", "context_tokens", "micro_batch"):
            checks.in_range(name, getattr(self, name), 1, 2**31)
        for name in ("model_bytes", "embedding_bytes", "head_bytes", "shared_bytes"):
            checks.in_range(name, getattr(self, name), 0, _BYTES_MAX)
        for sizes in (self.layer_bytes, self.kv_bytes, self.compute_bytes, self.shard_bytes):
            for size in sizes:
                checks.in_range("a size in bytes", size, 0, _BYTES_MAX)
        if not len(self.layer_bytes) == len(self.kv_bytes) == self.total_layers:
            raise ValueError("layer_bytes and kv_bytes need one entry for each layer")
        checks.in_range("min_shards", self.min_shards, 1, limits.ROUTE_STAGES_MAX)
        checks.in_range("max_shards", self.max_shards, self.min_shards, limits.ROUTE_STAGES_MAX)
        self._check_shards()

    def _check_shards(self) -> None:
        count = len(self.shard_layers)
        if not count == len(self.shard_hashes) == len(self.shard_bytes) == len(self.shard_urls):
            raise ValueError("shard_layers, shard_hashes, shard_bytes and shard_urls need one entry for each shard")
        checks.at_most("shards", self.shard_layers, limits.LAYERS_MAX)
        checks.unique("shard_layers", self.shard_layers)
        for layers, digest in zip(self.shard_layers, self.shard_hashes, strict=True):
            self.check_range(layers)
            checks.content_hash("a shard's hash", digest)

    def check_range(self, layers: LayerRange) -> None:
        """Raises ValueError for layers that the model does not have."""
        if layers.high > self.total_layers:
            raise ValueError(f"{self.name} has layers 0-{self.total_layers - 1}, not {layers}")

    def is_first(self, layers: LayerRange) -> bool:
        return layers.low == 0

    def is_last(self, layers: LayerRange) -> bool:
        return layers.high == self.total_layers

    def weights_bytes(self, layers: LayerRange) -> int:
        """Exact bytes of the tensors of a shard."""
        ends = self.embedding_bytes * self.is_first(layers) + self.head_bytes * self.is_last(layers)
        return self.shared_bytes + ends + sum(self.layer_bytes[layers.low : layers.high])

    def kv_bytes_per_token(self, layers: LayerRange) -> int:
        return sum(self.kv_bytes[layers.low : layers.high])

    def measured_compute_bytes(self, layers: LayerRange) -> int:
        """Compute buffers of such a stage on the machine that cut the model."""
        return self.compute_bytes[2 if self.is_last(layers) else 0 if self.is_first(layers) else 1]

    def process_bytes(self, layers: LayerRange) -> int:
        """Of such a stage's process, as far as it can be known beforehand."""
        if self.is_first(layers) and self.is_last(layers):
            return max(0, WHOLE_BYTES - self.measured_compute_bytes(layers))
        return PROCESS_BYTES + TOKENIZER_BYTES_A_TOKEN * self.vocabulary * self.is_last(layers)

    def stage_bytes(
        self, layers: LayerRange, cells: int, compute_bytes: int | None = None, process_bytes: int | None = None
    ) -> int:
        """Memory of a stage: weights, KV cells and, of all but the last, the hidden states that it keeps so that the next one can be
        replaced, all exact; compute buffers and process, where they are not given, as they can be known beforehand."""
        kept = 0 if self.is_last(layers) else 4 * self.width
        compute_bytes = self.measured_compute_bytes(layers) if compute_bytes is None else compute_bytes
        process_bytes = self.process_bytes(layers) if process_bytes is None else process_bytes
        per_cell = self.kv_bytes_per_token(layers) + kept
        return self.weights_bytes(layers) + per_cell * cells + compute_bytes + process_bytes

    def shard_hash(self, layers: LayerRange) -> str:
        """SHA-256 of the file of these layers, or empty where it does not stand here."""
        return dict(zip(self.shard_layers, self.shard_hashes, strict=True)).get(layers, "")


def manifest_to_json(manifest: ShardManifest) -> str:
    """Sorted keys and one trailing newline: equal manifests are equal text."""
    plain = asdict(manifest)
    plain["shard_layers"] = [[layers.low, layers.high] for layers in manifest.shard_layers]
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def manifest_from_json(text: str) -> ShardManifest:
    """Raises ConfigError that says what is wrong."""
    try:
        plain = json.loads(text)
        if not isinstance(plain, dict):
            raise ValueError("it is no JSON object")
        known = {field.name: field.type for field in fields(ShardManifest)}
        if odd := sorted(set(plain) ^ set(known)):
            raise ValueError(f"these fields are missing or unknown: {', '.join(odd)}")
        return ShardManifest(**{name: _typed(str(known[name]), name, value) for name, value in plain.items()})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"the shard manifest cannot be used: {error}; write it anew with `archipelag-node cargo shard`") from error


def _typed(kind: str, name: str, value: Any) -> Any:
    """A field as the dataclass wants it: exact types, lists as tuples."""
    if kind in ("int", "str"):
        wanted: type[Any] = int if kind == "int" else str
        if type(value) is not wanted:
            raise ValueError(f"{name} must be {kind}")
        return value
    if type(value) is not list:
        raise ValueError(f"{name} must be a list")
    if "LayerRange" in kind:
        if any(type(pair) is not list or [type(n) for n in pair] != [int, int] for pair in value):
            raise ValueError(f"{name} must hold pairs of layer numbers")
        return tuple(LayerRange(*pair) for pair in value)
    wanted = int if "int" in kind else str
    if any(type(item) is not wanted for item in value):
        raise ValueError(f"every entry of {name} must be {wanted.__name__}")
    if name == "compute_bytes" and len(value) != 3:
        raise ValueError("compute_bytes has three entries: first, middle and last stage")
    return tuple(value)
