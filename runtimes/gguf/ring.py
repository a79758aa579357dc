"""The driver's layers: its own, behind those of other Islands. What the engine calls a step goes round a ring of stages.

``launch`` sends token ids to the first stage; the hidden states that come round are put in by ``arrived`` and computed here, in the order
in which the steps were launched. Several that have come meanwhile are computed in one batch. What the engine does to sequences is done
here in the same order, and told to the other stages, where it takes effect between the same rows.

Sequences have the engine's numbers here, which are used again and again, and numbers of the ring, which never are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from protocol.activations import Activations
from protocol.stage_messages import Span, StageTime
from runtimes.gguf import activations
from runtimes.gguf.layers import Landed, Rows, Stage
from runtimes.gguf.llama import Floats
from runtimes.gguf.messages import EndSequences, Launch, OpenSequence
from runtimes.gguf.shelf import State

Send = Callable[[object], None]


@dataclass(slots=True, eq=False)
class _Step:
    number: int
    rows: Rows
    hidden: Floats | None = None
    slowest_s: float = 0.0


class RingLayers:
    """Implements runtimes.gguf.layers.Layers. ``send`` takes messages for the node; ``batch_rows``: as many as one batch may have."""

    def __init__(self, stage: Stage, send: Send, batch_rows: int) -> None:
        self._stage, self._send, self._batch_rows = stage, send, batch_rows
        self.stages = 2  # until a job says how many its route has
        self._width = stage.context.width
        self._numbers: dict[int, int] = {}  # of the engine -> of the ring
        self._last_number = 0
        self._queue: deque[_Step | Callable[[], None]] = deque()
        self._steps: dict[int, _Step] = {}
        self._landed: deque[Landed] = deque()
        self.batches = 0
        self.steps_batched = 0

    def __repr__(self) -> str:
        return f"<RingLayers of {self.stages} stages, {len(self._steps)} steps under way>"

    def begin(self, sequence: int, job: int, declared: int, keep: int, source: int, shared: int) -> None:
        self._last_number += 1
        self._numbers[sequence] = self._last_number
        number = self._numbers[source] if shared else 0
        self._send(OpenSequence(self._last_number, job, declared, keep, number, shared))
        if shared:
            self._do(lambda: self._stage.begin(sequence, job, declared, keep, source, shared))

    def cut(self, sequence: int, length: int = 0) -> None:
        if length:
            raise ValueError("a sequence of a pipeline is ended, not shortened")
        if (number := self._numbers.pop(sequence, 0)) != 0:
            self._send(EndSequences((number,)))
        self._do(lambda: self._stage.cut(sequence))

    def save(self, sequence: int) -> State:
        raise ValueError("a pipeline keeps no prefixes outside the cells")  # its shelf has no room, so nobody asks

    def restore(self, sequence: int, state: State) -> None:
        raise ValueError("a pipeline keeps no prefixes outside the cells")

    def _do(self, action: Callable[[], None]) -> None:
        if self._queue:
            self._queue.append(action)
        else:
            action()

    def launch(self, step: int, rows: Rows) -> None:
        spans = []
        edges = np.flatnonzero(np.diff(rows.sequences)) + 1
        for low, high in zip([0, *edges], [*edges, len(rows)], strict=True):
            number = self._numbers[int(rows.sequences[low])]
            spans.append(Span(number, int(rows.positions[low]), int(high - low)))
        entry = _Step(step, rows)
        self._queue.append(entry)
        self._steps[step] = entry
        self._send(Launch(step, tuple(spans), np.ascontiguousarray(rows.values, "<i4").tobytes()))

    def arrived(self, step: int, times: tuple[StageTime, ...], kind: Activations, data: bytes | memoryview) -> None:
        """Raises Refused(BAD_INPUT) for hidden states that are none. One that is not awaited, or came before, is dropped."""
        entry = self._steps.get(step)
        if entry is None or entry.hidden is not None:
            return
        hidden = activations.decode(data, self._width, kind)
        if len(hidden) != len(entry.rows):
            raise ValueError(f"step {step} has {len(entry.rows)} rows, and {len(hidden)} came")
        entry.hidden = hidden
        entry.slowest_s = max((time.compute_us for time in times), default=0) / 1e6

    def collect(self) -> Landed | None:
        if not self._landed:
            self._compute()
        return self._landed.popleft() if self._landed else None

    def _compute(self) -> None:
        """One batch of the steps at the head of the queue that have come round, up to the first that has not or the first action."""
        steps: list[_Step] = []
        rows = 0
        while self._queue:
            head = self._queue[0]
            if not isinstance(head, _Step):
                if steps:
                    break
                head()
            elif head.hidden is None or (steps and rows + len(head.rows) > self._batch_rows):
                break
            else:
                steps.append(head)
                rows += len(head.rows)
            self._queue.popleft()
        if steps:
            self._forward(steps)

    def _forward(self, steps: list[_Step]) -> None:
        hidden = [step.hidden for step in steps if step.hidden is not None]
        parts = [step.rows for step in steps]
        if len(steps) == 1:
            rows = parts[0].with_hidden(hidden[0])
        else:
            rows = Rows(
                np.concatenate(hidden),
                np.concatenate([part.positions for part in parts]),
                np.concatenate([part.sequences for part in parts]),
                np.concatenate([part.wanted for part in parts]),
            )
        self._stage.launch(steps[0].number, rows)
        landed = self._stage.collect()
        if landed is None:
            raise ValueError("a stage computes what was launched")
        self.batches += 1
        self.steps_batched += len(steps)
        at = 0
        for step in steps:
            count = int(step.rows.wanted.sum())
            del self._steps[step.number]
            slowest_s = max(step.slowest_s, landed.seconds)
            self._landed.append(Landed(step.number, landed.logits[at : at + count], slowest_s, landed.own_seconds / len(steps)))
            at += count
