"""The worker of a stage that is not the last: batches of rows in, hidden states out. Used by worker.py, whose process it lives in.

One thread: a hand-over between two would cost each token the time of a wake-up. Batches of several frames and jobs that wait together
are computed in one call; those that only decode go before prompts, so that nobody who reads waits for somebody else's prompt, but never
before a batch with rows of the same sequence. Copies and cuts keep their place between batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from protocol.errors import Code, ConfigError, Refused
from runtimes.gguf import activations
from runtimes.gguf.layers import Rows, Stage
from runtimes.gguf.llama import Floats, Ints, LlamaError
from runtimes.gguf.messages import Batch, BatchDone, BatchFailed, CopyCells, CutCells, Ready


class StageLink(Protocol):
    def send(self, *messages: object) -> None: ...

    def receive(self) -> Any:
        """Waits for a message."""
        ...

    def receive_nowait(self) -> Any:
        """None where there is no message yet."""
        ...


class LoadedStage:
    """A stage with what its worker has to know. ``rows_max``: of one call; ``vocabulary``: 0 where hidden states come in."""

    def __init__(self, stage: Stage, ready: Ready, rows_max: int, vocabulary: int) -> None:
        self.stage, self.ready, self.rows_max, self.vocabulary = stage, ready, rows_max, vocabulary

    def __repr__(self) -> str:
        return f"<LoadedStage {self.stage!r}>"

    def values(self, batch: Batch) -> Ints | Floats:
        """The input of a batch. Raises Refused(BAD_INPUT)."""
        count = sum(span.count for span in batch.spans)
        if not self.vocabulary:
            hidden = activations.decode(batch.rows, self.stage.context.width, batch.activations)
            if len(hidden) != count:
                raise Refused(Code.BAD_INPUT, f"{len(hidden)} hidden states came for {count} rows")
            return hidden
        tokens = np.frombuffer(batch.rows, "<i4").astype(np.int32)
        if len(tokens) != count or tokens.min(initial=0) < 0 or tokens.max(initial=0) >= self.vocabulary:
            raise Refused(Code.BAD_INPUT, "tokens came that this model does not have")
        return tokens


def next_group(items: Sequence[Any], rows_max: int) -> list[int]:
    """Which of the items that wait to take next, as indices: one copy or cut, or batches for one call, those that decode first.

    Never past a copy or a cut, nor a batch before one of the same sequence; more rows than ``rows_max`` only as a single batch.
    """
    if not isinstance(items[0], Batch):
        return [0]
    ahead: set[int] = set()  # sequences of batches that are left out
    decode: list[int] = []
    prompts: list[int] = []
    for index, item in enumerate(items):
        if not isinstance(item, Batch):
            break
        if all(span.count == 1 for span in item.spans) and ahead.isdisjoint(span.sequence for span in item.spans):
            decode.append(index)
        else:
            prompts.append(index)
            ahead.update(span.sequence for span in item.spans)
    chosen: list[int] = []
    rows = 0
    for index in (*decode, *prompts):
        size = sum(span.count for span in items[index].spans)
        if chosen and rows + size > rows_max:
            break
        chosen.append(index)
        rows += size
    return _once_each(items, chosen)


def _once_each(items: Sequence[Any], chosen: list[int]) -> list[int]:
    """Two batches with rows of one sequence go in two calls: within one, the order of rows is not ours."""
    seen: set[int] = set()
    kept = []
    for index in chosen:
        sequences = {span.sequence for span in items[index].spans}
        if not seen.isdisjoint(sequences):
            break
        seen |= sequences
        kept.append(index)
    return kept


class StageWorker:
    """The loop over one loaded stage."""

    def __init__(self, link: StageLink, loaded: LoadedStage) -> None:
        self._link, self._loaded = link, loaded
        self._items: list[Any] = []

    def __repr__(self) -> str:
        return f"<StageWorker {len(self._items)} items wait>"

    def run(self) -> None:
        """Says that it is ready and computes until the end of the process, which the end of the stream brings."""
        self._link.send(self._loaded.ready)
        while True:
            self.turn()

    def turn(self) -> None:
        """Takes what has come, waits where nothing has, and does what is next."""
        message = self._link.receive_nowait() if self._items else self._link.receive()
        while message is not None:
            if not isinstance(message, Batch | CopyCells | CutCells):
                raise ConfigError(f"the worker of a stage has no use for {type(message).__name__}")
            self._items.append(message)
            message = self._link.receive_nowait()
        chosen = next_group(self._items, self._loaded.rows_max)
        group = [self._items[index] for index in chosen]
        for index in sorted(chosen, reverse=True):
            del self._items[index]
        first = group[0]
        if isinstance(first, CopyCells):
            self._loaded.stage.context.copy_prefix(first.source, first.target, first.length)
        elif isinstance(first, CutCells):
            self._loaded.stage.cut(first.sequence, first.length)
        else:
            self._compute(group)

    def _compute(self, group: list[Batch]) -> None:
        good: list[tuple[Batch, Ints | Floats]] = []
        for batch in group:
            try:
                good.append((batch, self._loaded.values(batch)))
            except Refused as refusal:
                self._link.send(BatchFailed(batch.batch, refusal.code, refusal.message))
        if not good:
            return
        started = time.perf_counter()
        try:
            hidden = self._forward(_rows(good))
        except LlamaError as error:
            self._link.send(*(BatchFailed(batch.batch, Code.NO_CAPACITY, str(error)[:300]) for batch, _ in good))
            return
        compute_us = int((time.perf_counter() - started) * 1e6)
        answers: list[object] = []
        at = 0
        for batch, values in good:
            end = at + len(values)
            answers.append(_answer(batch, hidden[at:end], compute_us, len(good)))
            at = end
        self._link.send(*answers)


    def _forward(self, rows: Rows) -> Floats:
        """In pieces where there are more rows than one call takes: rows that a neighbour had lost come in large frames."""
        size = self._loaded.rows_max
        if len(rows) <= size:
            return self._loaded.stage.forward(rows)
        pieces = [
            Rows(rows.values[at : at + size], rows.positions[at : at + size], rows.sequences[at : at + size], rows.wanted[at : at + size])
            for at in range(0, len(rows), size)
        ]
        return np.concatenate([self._loaded.stage.forward(piece) for piece in pieces])


def _answer(batch: Batch, hidden: Floats, compute_us: int, together: int) -> object:
    try:
        return BatchDone(batch.batch, compute_us, together, activations.encode(hidden, batch.activations))
    except Refused as refusal:  # our own values do not fit the encoding: not the fault of whoever sent the rows
        return BatchFailed(batch.batch, Code.INTERNAL, refusal.message)


def _rows(good: list[tuple[Batch, Ints | Floats]]) -> Rows:
    spans = [span for batch, _ in good for span in batch.spans]
    values = good[0][1] if len(good) == 1 else np.concatenate([values for _, values in good])
    positions = np.concatenate([np.arange(span.position, span.end, dtype=np.int32) for span in spans])
    sequences = np.repeat(np.array([span.sequence - 1 for span in spans], np.int32), [span.count for span in spans])
    return Rows(values, positions, sequences, np.ones(len(positions), np.int8))
