"""A stage: a range of layers that turns rows into rows. A whole model is a pipeline of one stage.

Rows are positions of any sequences: token ids for the first stage, hidden states (n, width) for the others. The last stage gives
logits of the flagged rows, the others hidden states of all rows, which is what travels to the next Island. Measured exact (difference
0.0) for llama, qwen2, qwen3, qwen3moe and gemma3.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtimes.gguf.llama import Context, ContextSize, Floats, Ints, Model
from runtimes.gguf.shelf import State


@dataclass(frozen=True, slots=True)
class Rows:
    """One step's input. ``values``: int32 (n,) or float32 (n, width); the others (n,); ``wanted``: 1 where logits are to be read."""

    values: Ints | Floats
    positions: Ints
    sequences: Ints
    wanted: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.positions)

    def with_hidden(self, hidden: Floats) -> Rows:
        """The same rows for the next stage."""
        if len(hidden) != len(self):
            raise ValueError(f"{len(self)} rows cannot carry {len(hidden)} hidden states")
        return Rows(hidden, self.positions, self.sequences, self.wanted)


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that is computed. ``logits`` (flagged rows, vocabulary), valid until the next one is collected; ``seconds``: of the stage
    that took longest; ``own_seconds``: of this process."""

    step: int
    logits: Floats
    seconds: float
    own_seconds: float


class Layers(Protocol):
    """What the engine asks of whoever computes: this process, or a pipeline of Islands. Everything happens in the order of the calls."""

    @property
    def stages(self) -> int:
        """How many compute one behind the other: so many steps keep all of them busy."""
        ...

    def begin(self, sequence: int, job: int, declared: int, keep: int, source: int, shared: int) -> None:
        """A job's sequence of at most ``declared`` positions begins with the first ``shared`` ones of ``source``. Its first ``keep``
        tokens are known for certain: prompt and delivered answer."""
        ...

    def launch(self, step: int, rows: Rows) -> None:
        """Begins a step; rows of one sequence stand together."""
        ...

    def collect(self) -> Landed | None:
        """The oldest step under way, if it is done; a pipeline of one stage computes it now."""
        ...

    def cut(self, sequence: int, length: int = 0) -> None: ...

    def save(self, sequence: int) -> State:
        """What these layers hold of a sequence, as bytes for ``restore``."""
        ...

    def restore(self, sequence: int, state: State) -> None:
        """The sequence holds what was saved; it needs as many free cells."""
        ...


class Stage:
    """A range of layers in this process. ``is_last`` stages hold the output matrix; one that is first, too, is a whole model."""

    stages = 1

    def __init__(self, model: Model, size: ContextSize, is_last: bool = True) -> None:
        self.context = Context(model, size, emits_hidden=not is_last)
        self.is_last = is_last
        self._launched: tuple[int, Rows] | None = None

    def __repr__(self) -> str:
        return f"<Stage {'with' if self.is_last else 'without'} output, {self.context!r}>"

    def forward(self, rows: Rows) -> Floats:
        """Logits of the flagged rows, valid until the next call; or hidden states (n, width) of a stage that is not the last."""
        wanted = rows.wanted if self.is_last else np.ones(len(rows), np.int8)
        self.context.decode(rows.values, rows.positions, rows.sequences, wanted)
        return self.context.logits(int(wanted.sum())) if self.is_last else self.context.hidden()

    def begin(self, sequence: int, job: int, declared: int, keep: int, source: int, shared: int) -> None:
        if shared:
            self.context.copy_prefix(source, sequence, shared)

    def launch(self, step: int, rows: Rows) -> None:
        if self._launched is not None:
            raise ValueError("a single stage computes one step at a time")
        self._launched = step, rows

    def collect(self) -> Landed | None:
        if self._launched is None:
            return None
        (step, rows), self._launched = self._launched, None
        started = time.perf_counter()
        logits = self.forward(rows)
        seconds = time.perf_counter() - started
        return Landed(step, logits, seconds, seconds)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.context.copy_prefix(source, target, length)

    def cut(self, sequence: int, length: int = 0) -> None:
        self.context.cut(sequence, length)

    def save(self, sequence: int) -> State:
        return self.context.save(sequence)

    def restore(self, sequence: int, state: State) -> None:
        self.context.restore(sequence, state)

    def close(self) -> None:
        self.context.close()
