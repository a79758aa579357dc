"""The worker of a stage: which batches share a call, what it refuses, and that one bad batch spoils no other."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from protocol.activations import Activations
from protocol.errors import Code, ConfigError, Refused
from protocol.stage_messages import Span
from runtimes.gguf import activations
from runtimes.gguf.layers import Rows, Stage
from runtimes.gguf.llama import Floats, LlamaFull
from runtimes.gguf.messages import Batch, BatchDone, BatchFailed, CopyCells, CutCells, Ready
from runtimes.gguf.stage_worker import LoadedStage, StageWorker, next_group

WIDTH, VOCABULARY, ROWS_MAX = 4, 100, 8
F32 = Activations.F32
READY = Ready("engine", 64, 64, 4, 0, 0, 0, 0.0, 0, WIDTH, 0)


def decode(number: int, *sequences: int) -> Batch:
    return Batch(number, tuple(Span(sequence, 5, 1) for sequence in sequences), F32)


def prompt(number: int, sequence: int, rows: int) -> Batch:
    return Batch(number, (Span(sequence, 0, rows),), F32)


COPY, CUT = CopyCells(0, 1, 3), CutCells(2, 0)

GROUPS: dict[str, tuple[list[Any], list[int]]] = {
    "one": ([prompt(1, 1, 3)], [0]),
    "all that fit": ([decode(1, 1), decode(2, 2, 3), decode(3, 4)], [0, 1, 2]),
    "a copy alone": ([COPY, decode(1, 1)], [0]),
    "a cut alone": ([CUT, CUT], [0]),
    "never past a copy": ([prompt(1, 1, 2), COPY, decode(2, 2)], [0]),
    "never past a cut": ([decode(1, 1), CUT, decode(2, 2)], [0]),
    "decode before prompts": ([prompt(1, 1, 4), decode(2, 2)], [1, 0]),
    "decode instead of prompts": ([prompt(1, 1, 8), decode(2, 2)], [1]),
    "not before its own prompt": ([prompt(1, 1, 4), decode(2, 1)], [0]),
    "nor before what waits for that": ([prompt(1, 1, 4), decode(2, 1, 2), decode(3, 2)], [0]),
    "others go before": ([prompt(1, 1, 4), decode(2, 1), decode(3, 2)], [2, 0]),
    "no sequence twice": ([decode(1, 1), decode(2, 1)], [0]),
    "no more rows than a call has": ([prompt(1, 1, 5), prompt(2, 2, 4)], [0]),
    "as many rows as a call has": ([prompt(1, 1, 5), prompt(2, 2, 3)], [0, 1]),
    "too many rows, but alone": ([prompt(1, 1, 20), prompt(2, 2, 2)], [0]),
    "none takes the place of one that is too large": ([prompt(1, 1, 5), prompt(2, 2, 5), prompt(3, 3, 2)], [0]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_which_batches_go_next(name: str) -> None:
    items, chosen = GROUPS[name]
    assert next_group(items, ROWS_MAX) == chosen


def some_items(chance: Random) -> list[Any]:
    items: list[Any] = []
    for number in range(chance.randint(1, 10)):
        kind = chance.random()
        if kind < 0.1:
            items.append(CopyCells(chance.randrange(5), chance.randrange(5), 1))
        elif kind < 0.2:
            items.append(CutCells(chance.randrange(5), 0))
        else:
            sequences = chance.sample(range(1, 6), chance.randint(1, 3))
            most = 1 if chance.random() < 0.5 else 6
            items.append(Batch(number + 1, tuple(Span(sequence, 0, chance.randint(1, most)) for sequence in sequences), F32))
    return items


def sequences_of(batch: Batch) -> set[int]:
    return {span.sequence for span in batch.spans}


def size(batch: Batch) -> int:
    return sum(span.count for span in batch.spans)


def goes_first(items: list[Any], index: int) -> bool:
    """Whether a batch only decodes and nothing that has to go before it waits before it."""
    ahead: set[int] = set()
    for item in items[:index]:
        if not isinstance(item, Batch):
            return False
        if size(item) > len(item.spans) or not ahead.isdisjoint(sequences_of(item)):
            ahead |= sequences_of(item)
    item = items[index]
    return isinstance(item, Batch) and size(item) == len(item.spans) and ahead.isdisjoint(sequences_of(item))


@pytest.mark.parametrize("seed", range(20))
def test_a_group_keeps_the_order_that_matters(seed: int) -> None:
    chance = Random(seed)
    for _ in range(150):
        items = some_items(chance)
        chosen = next_group(items, ROWS_MAX)
        assert chosen and len(set(chosen)) == len(chosen)
        if not isinstance(items[0], Batch):
            assert chosen == [0]
            continue
        group = [items[index] for index in chosen]
        assert all(isinstance(item, Batch) for item in items[: max(chosen) + 1])
        assert len(group) == 1 or sum(map(size, group)) <= ROWS_MAX
        assert len(set.union(*map(sequences_of, group))) == sum(len(batch.spans) for batch in group)
        for index in chosen:
            left = [items[at] for at in range(index) if at not in chosen]
            assert all(sequences_of(batch).isdisjoint(sequences_of(items[index])) for batch in left)
        first_prompt = next((at for at, batch in enumerate(group) if size(batch) > len(batch.spans)), len(group))
        assert all(not goes_first(items, index) for index in chosen[first_prompt:])
        assert not any(goes_first(items, at) for at in range(len(items)) if at not in chosen) or goes_first(items, chosen[0])


@pytest.mark.parametrize("seed", range(5))
def test_all_that_waits_is_done_in_the_end_and_each_sequence_in_order(seed: int) -> None:
    chance = Random(seed)
    for _ in range(100):
        items = some_items(chance)
        left, done = list(items), []
        while left:
            chosen = next_group(left, ROWS_MAX)
            done += [left[index] for index in chosen]
            for index in sorted(chosen, reverse=True):
                del left[index]
        assert len(done) == len(items)
        for sequence in range(1, 6):
            mine = [item for item in items if not isinstance(item, Batch) or sequence in sequences_of(item)]
            assert [item for item in done if any(item is one for one in mine)] == mine


# ---- a worker over a stage that only notes


class FakeStage:
    """Hidden states out are those in, or made of the tokens; ``calls``: the rows of each call."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(width=WIDTH, copy_prefix=lambda *copy: self.did.append(("copy", *copy)))
        self.did: list[Any] = []
        self.calls: list[Rows] = []
        self.error: Exception | None = None
        self.poison = False

    def cut(self, sequence: int, length: int = 0) -> None:
        self.did.append(("cut", sequence, length))

    def forward(self, rows: Rows) -> Floats:
        self.calls.append(rows)
        self.did.append(("compute", len(rows)))
        if self.error is not None:
            raise self.error
        values = rows.values
        hidden = values if values.ndim == 2 else np.repeat(values[:, None], WIDTH, axis=1)
        hidden = hidden.astype(np.float32)
        if self.poison:
            hidden[0, 0] = np.nan
        return hidden


class FakeLink:
    def __init__(self, *incoming: Any) -> None:
        self.incoming = list(incoming)
        self.sent: list[Any] = []

    def send(self, *messages: object) -> None:
        self.sent += messages

    def receive(self) -> Any:
        return self.incoming.pop(0)

    def receive_nowait(self) -> Any:
        return self.incoming.pop(0) if self.incoming else None


class Bench:
    """A worker whose turns are called by hand."""

    def __init__(self, *incoming: Any, vocabulary: int = 0) -> None:
        self.stage, self.link = FakeStage(), FakeLink(*incoming)
        self.loaded = LoadedStage(cast(Stage, self.stage), READY, ROWS_MAX, vocabulary)
        self.worker = StageWorker(self.link, self.loaded)

    def run(self) -> None:
        """Turns until nothing waits."""
        while self.worker._items or self.link.incoming:
            self.worker.turn()

    def answers(self, kind: type[Any]) -> dict[int, Any]:
        return {message.batch: message for message in self.link.sent if isinstance(message, kind)}


def hidden_batch(number: int, *spans: tuple[int, int, int], kind: Activations = F32) -> Batch:
    made = tuple(Span(*span) for span in spans)
    values = [[100 * span.sequence + at] * WIDTH for span in made for at in range(span.position, span.end)]
    return Batch(number, made, kind, activations.encode(np.array(values, np.float32), kind))


def token_batch(number: int, tokens: list[int], count: int | None = None) -> Batch:
    return Batch(number, (Span(1, 0, len(tokens) if count is None else count),), F32, np.array(tokens, "<i4").tobytes())


def test_batches_that_waited_together_are_computed_in_one_call() -> None:
    batches = [hidden_batch(1, (1, 5, 1), (2, 7, 1)), hidden_batch(2, (3, 0, 3)), hidden_batch(3, (4, 9, 1))]
    bench = Bench(*batches)
    bench.worker.turn()
    (call,) = bench.stage.calls
    assert list(call.positions) == [5, 7, 9, 0, 1, 2]
    assert list(call.sequences) == [0, 1, 3, 2, 2, 2]
    assert list(call.wanted) == [1] * 6
    done = bench.answers(BatchDone)
    assert [message.batch for message in bench.link.sent] == [1, 3, 2]
    assert {answer.together for answer in done.values()} == {3}
    assert all(done[batch.batch].rows == batch.rows for batch in batches)


def test_copies_and_cuts_keep_their_place() -> None:
    bench = Bench(hidden_batch(1, (1, 0, 2)), CopyCells(0, 1, 2), hidden_batch(2, (2, 2, 1)), CutCells(0, 0), hidden_batch(3, (1, 0, 1)))
    bench.run()
    assert bench.stage.did == [("compute", 2), ("copy", 0, 1, 2), ("compute", 1), ("cut", 0, 0), ("compute", 1)]
    assert [answer.together for answer in bench.answers(BatchDone).values()] == [1, 1, 1]


def test_a_bad_batch_does_not_spoil_the_others_in_its_call() -> None:
    bad = Batch(2, (Span(2, 0, 1),), F32, np.array([1, np.nan, 3, 4], "<f4").tobytes())
    short = Batch(3, (Span(3, 0, 2),), F32, bytes(4 * WIDTH))
    ragged = Batch(4, (Span(4, 0, 1),), F32, bytes(4 * WIDTH - 1))
    good = [hidden_batch(1, (1, 0, 1)), hidden_batch(5, (5, 3, 1))]
    bench = Bench(good[0], bad, short, ragged, good[1])
    bench.run()
    failed, done = bench.answers(BatchFailed), bench.answers(BatchDone)
    assert {number: answer.code for number, answer in failed.items()} == {2: Code.BAD_INPUT, 3: Code.BAD_INPUT, 4: Code.BAD_INPUT}
    assert "1 hidden states came for 2 rows" in failed[3].message
    assert {number: answer.rows for number, answer in done.items()} == {batch.batch: batch.rows for batch in good}


def test_a_call_in_which_all_are_bad_is_not_made() -> None:
    bench = Bench(token_batch(1, [VOCABULARY]), vocabulary=VOCABULARY)
    bench.run()
    assert not bench.stage.calls and bench.answers(BatchFailed).keys() == {1}


def test_a_frame_larger_than_a_call_is_computed_in_pieces() -> None:
    count = 2 * ROWS_MAX + 3
    bench = Bench(hidden_batch(1, (1, 0, count)))
    bench.run()
    assert [len(call) for call in bench.stage.calls] == [ROWS_MAX, ROWS_MAX, 3]
    assert bench.answers(BatchDone)[1].rows == hidden_batch(1, (1, 0, count)).rows


def test_a_call_that_fails_is_told_for_each_of_its_batches() -> None:
    bench = Bench(hidden_batch(1, (1, 0, 1)), hidden_batch(2, (2, 0, 1)))
    error = bench.stage.error = LlamaFull("no KV cells for 2 rows")
    bench.run()
    told = [(answer.batch, answer.code, answer.message) for answer in bench.link.sent]
    assert told == [(number, Code.NO_CAPACITY, str(error)) for number in (1, 2)]


def test_hidden_states_that_came_out_as_no_numbers_are_not_sent_and_are_nobody_elses_fault() -> None:
    bench = Bench(hidden_batch(1, (1, 0, 1)), hidden_batch(2, (2, 0, 1)))
    bench.stage.poison = True  # of the first row
    bench.run()
    assert bench.answers(BatchFailed).keys() == {1} and bench.answers(BatchDone).keys() == {2}
    assert bench.answers(BatchFailed)[1].code is Code.INTERNAL


@pytest.mark.parametrize("tokens", [[0], [VOCABULARY - 1], [3, 0, 99]])
def test_tokens_of_the_vocabulary_are_taken(tokens: list[int]) -> None:
    bench = Bench(token_batch(1, tokens), vocabulary=VOCABULARY)
    bench.run()
    (done,) = bench.answers(BatchDone).values()
    assert list(activations.decode(done.rows, WIDTH, F32)[:, 0]) == tokens


@pytest.mark.parametrize(("tokens", "count"), [([-1], 1), ([VOCABULARY], 1), ([5, 2**31 - 1], 2), ([1, 2], 1), ([1], 2), ([], 1)])
def test_tokens_that_the_model_does_not_have_are_refused(tokens: list[int], count: int) -> None:
    bench = Bench(vocabulary=VOCABULARY)
    with pytest.raises(Refused, match="tokens came that this model does not have") as refused:
        bench.loaded.values(token_batch(1, tokens, count))
    assert refused.value.code is Code.BAD_INPUT


def test_results_travel_as_their_batch_came() -> None:
    bench = Bench(*(hidden_batch(number, (number, 0, 1), kind=kind) for number, kind in enumerate(Activations, 1)))
    bench.run()
    assert len(bench.stage.calls) == 1
    for number, kind in enumerate(Activations, 1):
        assert bench.answers(BatchDone)[number].rows == hidden_batch(number, (number, 0, 1), kind=kind).rows


def test_other_messages_are_of_no_use() -> None:
    worker = StageWorker(FakeLink(READY), Bench().loaded)
    with pytest.raises(ConfigError, match="no use for Ready"):
        worker.turn()
    assert repr(worker) == "<StageWorker 0 items wait>"
