"""A model in several stages under one engine: the same answers as whole, token for token, with steps under way side by side."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protocol.activations import Activations
from protocol.generation import ChatMessage, GenerationRequest, Role, Sampling
from runtimes.gguf.layers import Rows
from runtimes.gguf.load import PIPELINE_SLOTS
from tests.runtimes.gguf.ring import CELLS, TOPICS, Cuts, Ring


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
AT_ONCE = 8  # 772 tokens together at most: no engine promises the same logits behind more than 1,024 cells of ended sequences


def compare(cuts: Cuts, stages: int, count: int) -> None:
    """Jobs side by side in several stages answer as each does alone in the whole model."""
    asked = requests(count)
    whole, ring = Ring(cuts.chain()), Ring(cuts.chain(*EDGES[stages]), seed=stages)
    for request in asked:
        whole.start(request)
        whole.run()
        ring.start(request)
        if len(ring.answers) % AT_ONCE == 0:
            ring.run()
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
