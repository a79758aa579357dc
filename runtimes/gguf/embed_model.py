"""Vectors of texts by a loaded model, in two ways.

A model that writes text reads a text piece by piece, with its KV cells, and its last layer's states behind the final norm are pooled here:
by their mean, or as the file's ``pooling_type`` says. The graph ends there, so the output matrix is not multiplied. A model for
embeddings (BERT and its kin) sees a whole text at once, and llama.cpp pools. Both give what ``llama_cpp.Llama(embedding=True)`` gives for a
text: flash attention stays off, since it adds up in f16 on a CPU, which moves a vector by up to 4e-3. And on a CPU each text is computed
alone, so that its vector is the same bit for bit whatever came with it: side by side, sums over cells are rounded otherwise, and the
8-bit activations of a quantised model make much of that (SmolLM2-135M Q4_1, 60 texts of 13 tokens: 10 of them moved, by up to 3.5e-3, and
it took 0.58 of the time).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import numpy as np

from runtimes.gguf.embed_input import Vector
from runtimes.gguf.llama import Context, ContextSize, Ints, LlamaError, Model

_ROWS_LEAST = 8
TEXTS_GPU = 32  # under way at once where they are computed together
_ENCODERS = frozenset(  # architectures whose attention looks both ways, also where the file does not say so
    "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 neo-bert modern-bert eurobert gemma-embedding".split()
)


class Pooling(IntEnum):
    """``enum llama_pooling_type``."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4  # a reranker: it has no vectors


def is_encoder(model: Model) -> bool:
    """Whether the model makes vectors only."""
    architecture = model.meta("general.architecture")
    return architecture in _ENCODERS or model.meta(f"{architecture}.attention.causal") == "false"


def pooling_of(model: Model) -> Pooling:
    """As the file says; the mean where it does not."""
    said = model.meta(f"{model.meta('general.architecture')}.pooling_type")
    known = said.isdigit() and int(said) in list(Pooling)
    return (Pooling(int(said)) if known else Pooling.MEAN) or Pooling.MEAN


@dataclass(slots=True, eq=False)
class Text:
    """A text of an embedding job. ``done``: so many of its tokens are computed. ``vector`` once all are; ``total``: sum or state so far."""

    tokens: Ints
    done: int = 0
    sequence: int = -1
    total: Any = None
    vector: Vector | None = field(default=None, repr=False)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


def piece(left: int, rows: int) -> int:
    """How many of a text's ``left`` rows are computed next, of about ``rows``: a row alone takes another path through llama.cpp, whose sums
    are rounded otherwise, so none is left over. Pieces of 2 to 60 rows give the same vector bit for bit."""
    count = min(rows, left)
    return count - 1 if left - count == 1 and count > 2 else count


class Vectors(Protocol):
    """``tokens_max``: of one text, and of all that are under way together; ``texts_max``: how many those may be."""

    dimensions: int
    tokens_max: int
    texts_max: int

    def compute(self, texts: Sequence[Text], rows: int) -> int:
        """Goes on with these texts, in their order, by about so many rows, at least a few; those that are complete get their vectors.
        Returns the rows. Raises LlamaError."""
        ...

    def forget(self, text: Text) -> None:
        """A text that is given up or complete gives its room back."""
        ...

    def close(self) -> None: ...


class DecoderVectors:
    """A second context over a model that writes text; ``size.cells`` for all texts under way."""

    def __init__(self, model: Model, size: ContextSize, pooling: Pooling) -> None:
        self.context = Context(model, size, emits_hidden=True, behind_norm=True)
        self.dimensions, self.tokens_max, self.texts_max = self.context.width, self.context.cells, size.sequences
        self._pooling = pooling
        self._free = list(range(size.sequences - 1, -1, -1))

    def __repr__(self) -> str:
        return f"<DecoderVectors of {self.dimensions}, {self._pooling.name}>"

    def close(self) -> None:
        self.context.close()

    def compute(self, texts: Sequence[Text], rows: int) -> int:
        parts: list[tuple[Text, int]] = []
        left = min(max(_ROWS_LEAST, rows), self.context.size.batch)
        for text in texts:
            if left and (text.sequence >= 0 or self._free):
                text.sequence = self._free.pop() if text.sequence < 0 else text.sequence
                count = piece(text.left, left)
                parts.append((text, count))
                left = max(0, left - count)
        states = self._states(parts)
        at = 0
        for text, count in parts:
            self._pool(text, states[at : at + count])
            at += count
        return at

    def _states(self, parts: Sequence[tuple[Text, int]]) -> Vector:
        tokens = np.concatenate([text.tokens[text.done : text.done + count] for text, count in parts])
        positions = np.concatenate([np.arange(text.done, text.done + count, dtype=np.int32) for text, count in parts])
        sequences = np.concatenate([np.full(count, text.sequence, np.int32) for text, count in parts])
        self.context.decode(tokens, positions, sequences, np.ones(len(tokens), np.int8))
        states = self.context.hidden()
        if states.shape != (len(tokens), self.dimensions):
            raise LlamaError(f"the model gave states of shape {states.shape} for {len(tokens)} tokens")
        return states

    def _pool(self, text: Text, states: Vector) -> None:
        if self._pooling is Pooling.MEAN:
            added = states.sum(axis=0, dtype=np.float64)
            text.total = added if text.total is None else text.total + added
        elif self._pooling is Pooling.LAST or text.total is None:
            text.total = states[-1 if self._pooling is Pooling.LAST else 0].copy()
        text.done += len(states)
        if not text.left:
            whole = text.total / len(text.tokens) if self._pooling is Pooling.MEAN else text.total
            text.vector = whole.astype(np.float32)

    def forget(self, text: Text) -> None:
        if text.sequence >= 0:
            self.context.cut(text.sequence)
            self._free.append(text.sequence)
            text.sequence = -1


class EncoderVectors:
    """A model for embeddings: at most ``together`` whole texts of at most ``tokens`` in one call."""

    def __init__(self, model: Model, tokens: int, together: int, threads: int, pooling: Pooling) -> None:
        size = ContextSize(tokens, together, batch=tokens, micro_batch=tokens, outputs=tokens, threads=threads)
        self.context = Context(model, size, pooling=int(pooling))
        self.dimensions, self.tokens_max, self.texts_max = self.context.width_out, tokens, together

    def __repr__(self) -> str:
        return f"<EncoderVectors of {self.dimensions}>"

    def close(self) -> None:
        self.context.close()

    def compute(self, texts: Sequence[Text], rows: int) -> int:
        chosen: list[Text] = []
        count = 0
        for text in texts[: self.texts_max]:
            if chosen and count + len(text.tokens) > min(rows, self.tokens_max):
                break
            chosen.append(text)
            count += len(text.tokens)
        positions = np.concatenate([np.arange(len(text.tokens), dtype=np.int32) for text in chosen])
        sequences = np.concatenate([np.full(len(text.tokens), number, np.int32) for number, text in enumerate(chosen)])
        self.context.encode(np.concatenate([text.tokens for text in chosen]), positions, sequences)
        for number, text in enumerate(chosen):
            text.vector, text.done = self.context.pooled(number), len(text.tokens)
        return count

    def forget(self, text: Text) -> None:
        """It has no room beyond a call."""
