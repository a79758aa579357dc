"""The model that ships for the cache, MiniLM, in this process: what a Coordinator has of its worker, without the worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtimes.lines.engine import LoadOrder
from runtimes.onnx.engine import OnnxEngine, load
from runtimes.store import ModelStore
from tests.runtimes.onnx.onnx_models import run

Vectors = npt.NDArray[np.float32]

_FILES = {"model.onnx": "minilm-l6-v2", "tokenizer.json": "minilm-l6-v2-tokenizer"}
_TEXTS_AT_ONCE = 64


class MiniLm:
    """Vectors of length 1, each text computed once. ``state`` and ``embed`` are those of the cache's Embedding."""

    state = "on"

    def __init__(self) -> None:
        store = ModelStore()
        files = {path: str(Path(store.fetch(name).path)) for path, name in _FILES.items()}
        options = {"task": "embeddings", "max_tokens": 256}
        self._engine: OnnxEngine = load(LoadOrder("minilm-l6-v2", "ab" * 32, "model.onnx", files, options, 1))
        self._known: dict[str, Vectors] = {}

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """One row of 384 for each text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for at in range(0, len(new), _TEXTS_AT_ONCE):
            some = new[at : at + _TEXTS_AT_ONCE]
            found = np.array(run(self._engine, input=some)["embeddings"], np.float32)
            self._known |= dict(zip(some, found / np.linalg.norm(found, axis=1, keepdims=True), strict=True))
        return np.stack([self._known[text] for text in texts])

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[float(value) for value in row] for row in self.vectors(texts)]
