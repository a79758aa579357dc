"""The manifest of a made-up model of equal layers, for tests of planning."""

from __future__ import annotations

from typing import Any

from protocol.shards import MANIFEST_VERSION, ShardManifest


def model(layers: int = 12, **changes: Any) -> ShardManifest:
    """Layers of 1 MB, with 4 bytes of KV a token; ``changes`` are of any fields."""
    plain: dict[str, Any] = {
        "version": MANIFEST_VERSION,
        "name": "big",
        "architecture": "llama",
        "model_sha256": "aa" * 32,
        "model_bytes": 0,
        "model_sources": (),
        "total_layers": layers,
        "width": 2,
        "vocabulary": 100,
        "context_tokens": 8192,
        "embedding_bytes": 3_000,
        "head_bytes": 5_000,
        "shared_bytes": 10,
        "layer_bytes": (1_000_000,) * layers,
        "kv_bytes": (4,) * layers,
        "micro_batch": 32,
        "compute_bytes": (100, 200, 300),
    }
    return ShardManifest(**{**plain, **changes})
