"""The node's side of a stage that is not the last; implements runtimes.base.StageEngine over a worker process.

An engine that ends is started again by itself; its listener hears that the cells are gone and asks for the rows that it needs anew.
"""

from __future__ import annotations

from typing import Any

import trio

from protocol.activations import Activations
from protocol.errors import RemoteProtocolError
from protocol.stage_messages import Span
from runtimes.base import StageListener
from runtimes.gguf.messages import Batch, BatchDone, BatchFailed, CopyCells, CutCells, Load, Ready
from runtimes.gguf.process import EngineProcess
from runtimes.worker_process import Walls, WorkerLink


class StageCargo(EngineProcess):
    """Made by ``runtimes.gguf.process.opened``."""

    def __init__(self, order: Load, walls: Walls | None = None) -> None:
        super().__init__(order, walls)
        self.listener: StageListener | None = None
        self._owed: set[int] = set()
        self.batches = 0

    def __repr__(self) -> str:
        return f"<StageCargo {self._order.name} layers {self._order.layers}, {'alive' if self.alive else 'down'}>"

    @property
    def order(self) -> Load:
        return self._order

    def compute(self, batch: int, spans: tuple[Span, ...], kind: Activations, rows: bytes) -> None:
        if self._worker is None:
            return  # the listener has heard that the engine is lost, and asks anew when it is back
        if not self._owed:
            self._worker.heard_s = trio.current_time()
        self._owed.add(batch)
        self._worker.send_nowait(Batch(batch, spans, kind, rows))

    def copy(self, source: int, target: int, length: int) -> None:
        if self._worker is not None:
            self._worker.send_nowait(CopyCells(source, target, length))

    def cut(self, sequence: int, length: int) -> None:
        if self._worker is not None:
            self._worker.send_nowait(CutCells(sequence, length))

    def _is_busy(self) -> bool:
        return bool(self._owed)

    def _hear(self, worker: WorkerLink, message: Any) -> None:
        if isinstance(message, Ready):
            is_first = self._ready is None
            self._ready, self._worker, worker.ready_s = message, worker, trio.current_time()
            if self.listener is not None and not is_first:
                self.listener.engine_back()
            self._notify()
        elif isinstance(message, BatchDone):
            self._owed.discard(message.batch)
            self.batches += 1
            if self.listener is not None:
                self.listener.computed(message.batch, message.rows, message.compute_us, message.together)
        elif isinstance(message, BatchFailed):
            self._owed.discard(message.batch)
            if self.listener is not None:
                self.listener.failed(message.batch, message.code, message.message)
        else:
            raise RemoteProtocolError(f"the worker of a stage does not say {type(message).__name__}")

    def _bury(self, code: int) -> None:
        self._owed.clear()
        if self.listener is not None:
            self.listener.engine_lost()
        self._notify()
