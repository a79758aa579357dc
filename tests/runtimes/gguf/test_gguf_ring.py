"""A model in several stages under one engine: the same answers as whole, token for token, with steps under way side by side.

The stages are real files, cut out of the model, and compute in this process; what travels between them does so as bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from protocol.activations import Activations
from protocol.generation import ChatMessage, GenerationRequest, Role, Sampling
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


@pytest.fixture(scope="module")
def cuts(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cuts]:
    cuts = Cuts(smollm2_path, tmp_path_factory.mktemp("shards"))
    yield cuts
    for stage in cuts.loaded.values():
        stage.close()
        stage.context.model.close()


def chat(text: str, max_tokens: int = 12, temperature: float = 0.0, seed: int = 0) -> GenerationRequest:
    messages = (ChatMessage(Role.SYSTEM, "You are a helpful AI assistant."), ChatMessage(Role.USER, text))
    return GenerationRequest(messages=messages, max_tokens=max_tokens, sampling=Sampling(temperature=temperature, seed=seed))


def requests(count: int) -> list[GenerationRequest]:
    """Prompts of many lengths, some of several chunks."""
    rng = random.Random(7)
    return [chat(f"Number {i}: write about {' and '.join(rng.choices(TOPICS, k=rng.choice((1, 2, 30))))}.", 10) for i in range(count)]


EDGES = {2: (11,), 3: (7, 20), 5: (3, 9, 16, 22)}


def compare(cuts: Cuts, stages: int, count: int) -> None:
    asked = requests(count)
    whole, ring = Ring(cuts.chain()), Ring(cuts.chain(*EDGES[stages]), seed=stages)
    for request in asked:
        whole.start(request)
        ring.start(request)
        if len(whole.answers) % PIPELINE_SLOTS == 0:
            whole.run()
            ring.run()
    whole.run()
    ring.run()
    assert [answer.tokens for answer in ring.answers.values()] == [answer.tokens for answer in whole.answers.values()]
    assert ring.under_way_max > stages, "several steps were under way at once"
    assert ring.book.tokens_free == CELLS and ring.book.slots_free == PIPELINE_SLOTS


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_greedy_answers_are_those_of_the_whole_model(cuts: Cuts, stages: int) -> None:
    compare(cuts, stages, 8)


@pytest.mark.soak
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_200_greedy_answers_are_those_of_the_whole_model(cuts: Cuts, stages: int) -> None:
    compare(cuts, stages, 200)


def test_logits_differ_by_nothing(cuts: Cuts) -> None:
    first, middle, last = cuts.chain(7, 20)
    (whole,) = cuts.chain()
    for stage in (first, middle, last, whole):
        stage.context.clear()
    rng = np.random.default_rng(3)
    for position, count in ((0, 50), (50, 7), (57, 1), (58, 1)):
        tokens = rng.integers(0, 49_000, count).astype(np.int32)
        rows = Rows(tokens, np.arange(position, position + count, dtype=np.int32), np.zeros(count, np.int32), np.ones(count, np.int8))
        expected = whole.forward(rows).copy()
        hidden = middle.forward(rows.with_hidden(first.forward(rows)))
        assert np.array_equal(last.forward(rows.with_hidden(hidden)), expected)


@pytest.mark.parametrize("kind", [Activations.F16, Activations.INT8])
def test_smaller_activations_answer_alike(cuts: Cuts, kind: Activations) -> None:
    ring = Ring(cuts.chain(11), kind)
    number = ring.start(chat("What is the capital of France?", 8))
    ring.run()
    text = b"".join(cuts.chain()[0].context.model.piece(token) for token in ring.answers[number].tokens)
    assert b"Paris" in text


def test_a_cancelled_job_gives_its_cells_back_when_its_steps_have_landed(cuts: Cuts) -> None:
    ring = Ring(cuts.chain(11))
    kept, gone = ring.start(chat("Write about the sea.", 20)), ring.start(chat("Write about bread.", 20))
    ring.engine.step()
    ring.engine.step()
    assert ring.engine.cancel(gone) and not ring.engine.cancel(gone)
    ring.run()
    alone = Ring(cuts.chain())
    number = alone.start(chat("Write about the sea.", 20))
    alone.run()
    assert ring.answers[kept].tokens == alone.answers[number].tokens
    assert not ring.answers[gone].tokens and ring.book.tokens_free == CELLS


def test_a_seed_means_the_same_in_one_stage_and_in_three(cuts: Cuts) -> None:
    whole, ring = Ring(cuts.chain()), Ring(cuts.chain(7, 20), seed=5)
    for engine in (whole, ring):
        for seed in range(4):
            engine.start(chat("Write a poem about rain.", 16, temperature=0.9, seed=seed))
        engine.run()
    assert [answer.tokens for answer in ring.answers.values()] == [answer.tokens for answer in whole.answers.values()]


def test_steps_that_came_round_together_are_computed_in_one_batch(cuts: Cuts) -> None:
    ring = Ring(cuts.chain(11), seed=1)
    ring.pulls = 4
    for topic in TOPICS:
        ring.start(chat(f"Write about {topic}.", 24))
    ring.run()
    assert ring.layers.steps_batched > ring.layers.batches > 0


def test_the_next_turn_shares_what_stands_in_the_cells_of_all_stages(cuts: Cuts) -> None:
    ring = Ring(cuts.chain(7, 20), seed=2)
    begun = "Tell me a long story about a lighthouse, three birds and bread. "
    first = ring.start(chat(begun + "Begin.", 8))
    while not ring.answers[first].tokens:
        ring.turn()
    second = ring.start(chat(begun + "End.", 8))
    ring.run()
    whole = Ring(cuts.chain())
    plain = whole.start(chat(begun + "End.", 8))
    whole.run()
    assert ring.answers[second].tokens == whole.answers[plain].tokens
    ends = [ring.answers[number].end for number in (first, second)]
    assert ends[1] is not None and ends[1].cached_tokens > 0
