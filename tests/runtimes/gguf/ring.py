"""A model in several stages under one engine, all in this process.

The stages are real files, cut out of the model; what travels between them does so as bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from protocol.activations import Activations
from protocol.generation import GenerationRequest
from protocol.shards import LayerRange
from protocol.stage_messages import StageTime
from runtimes.gguf import activations
from runtimes.gguf.engine import Engine
from runtimes.gguf.kv import KvBook
from runtimes.gguf.layers import Rows, Stage
from runtimes.gguf.llama import Floats, Ints, Model
from runtimes.gguf.load import PIPELINE_SEQUENCES, PIPELINE_SLOTS, STAGE_ROWS, stage_size
from runtimes.gguf.messages import Ended, EndSequences, Launch, OpenSequence
from runtimes.gguf.prepare import Preparer
from runtimes.gguf.ring import RingLayers
from runtimes.gguf.scheduler import TimeModel
from runtimes.gguf.shard import cut, read_header
from runtimes.gguf.template import ChatTemplate

CELLS = 2048
SALT = b"account"
TOPICS = ("an island", "the sea", "a lighthouse", "three birds", "bread", "rain in spring", "a long war", "numbers")


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    end: Ended | None = None


class Ring:
    """An engine over stages in this process. ``pull`` lets what is under way go one stage further, in an order drawn by ``rng``."""

    def __init__(self, stages: Sequence[Stage], kind: Activations = Activations.F32, seed: int = 0) -> None:
        self.stages, self._kind, self._rng = list(stages), kind, random.Random(seed)
        for stage in stages:
            stage.context.clear()
        last = stages[-1]
        model = last.context.model
        self.book = KvBook(CELLS, PIPELINE_SLOTS, PIPELINE_SEQUENCES)
        layers: Stage | RingLayers = last
        if len(stages) > 1:
            layers = self.layers = RingLayers(last, self._hear, STAGE_ROWS)
            self.layers.stages = len(stages)
        self.engine = Engine(layers, model, model.end_tokens(), self.book, TimeModel(0.02, 0.002), STAGE_ROWS)
        template = ChatTemplate(model.chat_template(100_000), model.special_text(model.bos()), model.special_text(model.eos()))
        self.preparer = Preparer(model, template, CELLS)
        self._numbers: dict[int, int] = {}
        self._free = list(range(PIPELINE_SEQUENCES))
        self._links: list[deque[object]] = [deque() for _ in range(len(stages) - 1)]
        self.answers: dict[int, Answer] = {}
        self.under_way_max = 0
        self.pulls = 1  # between two steps of the engine

    def _hear(self, message: object) -> None:
        self._links[0].append(message)

    def start(self, request: GenerationRequest) -> int:
        number = len(self.answers) + 1
        self.answers[number] = Answer()
        self.engine.submit(self.preparer.job(number, request, SALT, ""))
        return number

    def turn(self) -> None:
        events = self.engine.step()
        at = 0
        for output in events.outputs:
            self.answers[output.job].tokens += events.tokens[at : at + output.count]
            at += output.count
        for over in events.over:
            assert isinstance(over, Ended)
            self.answers[over.job].end = over
        self.under_way_max = max(self.under_way_max, len(self.engine._flights))
        for _ in range(self.pulls):
            self._pull()

    def run(self) -> None:
        while not self.engine.is_idle:
            self.turn()
        self.engine.tidy()
        while any(self._links):
            self._pull()

    def _pull(self) -> None:
        """One message over each of some links; the last link's go to the driver."""
        waiting = [index for index, link in enumerate(self._links) if link]
        for index in self._rng.sample(waiting, self._rng.randint(1, len(waiting)) if waiting else 0):
            self._handle(index, self._links[index].popleft())

    def _handle(self, index: int, message: object) -> None:
        stage = self.stages[index]
        passed: object = message
        if isinstance(message, OpenSequence):
            if index == 0:
                self._numbers[message.sequence] = self._free.pop()
            if message.shared:
                stage.context.copy_prefix(self._numbers[message.source], self._numbers[message.sequence], message.shared)
        elif isinstance(message, EndSequences):
            for number in message.sequences:
                stage.cut(self._numbers[number])
                if index == len(self._links) - 1:
                    self._free.append(self._numbers.pop(number))
        elif isinstance(message, Launch):
            rows = self._rows(message, stage, is_first=index == 0)
            passed = Launch(message.step, message.spans, activations.encode(stage.forward(rows), self._kind))
        if index + 1 < len(self._links):
            self._links[index + 1].append(passed)
        elif isinstance(passed, Launch):
            self.layers.arrived(passed.step, (StageTime(1000, 1000),), self._kind, passed.rows)

    def _rows(self, message: Launch, stage: Stage, is_first: bool) -> Rows:
        values: Ints | Floats
        values = np.frombuffer(message.rows, "<i4") if is_first else activations.decode(message.rows, stage.context.width, self._kind)
        positions = np.concatenate([np.arange(span.position, span.end, dtype=np.int32) for span in message.spans])
        sequences = np.concatenate([np.full(span.count, self._numbers[span.sequence], np.int32) for span in message.spans])
        return Rows(values, positions, sequences, np.ones(len(positions), np.int8))


@dataclass
class Cuts:
    """Stages of the model by their inner edges; the whole one by none."""

    source: Path
    folder: Path
    loaded: dict[LayerRange, Stage] = field(default_factory=dict)

    def chain(self, *edges: int) -> list[Stage]:
        total = read_header(self.source).total_layers
        ends = [0, *edges, total]
        return [self._stage(LayerRange(low, high), total) for low, high in pairwise(ends)]

    def _stage(self, layers: LayerRange, total: int) -> Stage:
        if layers not in self.loaded:
            path = self.source
            if len(layers) < total:
                path = self.folder / f"{layers}.gguf"
                cut(self.source, path, layers, "ab" * 32)
            self.loaded[layers] = Stage(Model(str(path), plain=True), stage_size(CELLS, threads=1), is_last=layers.high == total)
        return self.loaded[layers]
