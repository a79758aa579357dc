"""Choosing tokens: order of the steps, chance as a function of seed and position, logprobs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from protocol.generation import Sampling
from runtimes.gguf.sampler import Floats, Sampler, logprob_entry, sample, uniform

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def reference(logits: Floats, s: Sampling) -> Floats:
    """The distribution that the steps leave, the slow and plain way."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / s.temperature)
    probabilities = weights / weights.sum()
    order = sorted(range(len(logits)), key=lambda i: (-probabilities[i], i))
    if s.top_k:
        order = order[: s.top_k]
    kept: list[int] = []
    total, mass = sum(probabilities[i] for i in order), 0.0
    for i in order:
        if kept and mass >= s.top_p * total:
            break
        kept.append(i)
        mass += probabilities[i]
    kept = [i for i in kept if probabilities[i] >= s.min_p * probabilities[kept[0]]]
    out = np.zeros(len(logits))
    out[kept] = probabilities[kept] / sum(probabilities[i] for i in kept)
    return out.astype(np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7),
        Sampling(temperature=2.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.72),
        Sampling(temperature=1.0, min_p=0.3),
        Sampling(temperature=1.3, top_k=4, top_p=0.9, min_p=0.2),
        Sampling(temperature=1.0, top_p=0.0),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    grid = (np.arange(20_000) + 0.5) / 20_000
    counts = np.bincount([sample(LOGITS.copy(), sampling, chance) for chance in grid], minlength=5)
    assert counts / len(grid) == pytest.approx(reference(LOGITS, sampling), abs=2e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_p=0.9), Sampling(temperature=1.5, min_p=0.02), Sampling(top_k=700)])
def test_large_vocabularies_take_the_same_tokens_as_the_plain_way(sampling: Sampling, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = (generator.standard_normal(5_000) * 2).astype(np.float32)
    expected = reference(logits, sampling)
    chosen = {sample(logits.copy(), sampling, chance) for chance in generator.random(400)}
    assert chosen <= set(np.flatnonzero(expected))
    assert len(chosen) > 50


def test_chance_depends_on_seed_position_and_draw_alone() -> None:
    values = {uniform(seed, position, draw) for seed in range(20) for position in range(20) for draw in range(2)}
    assert len(values) == 800 and all(0 <= value < 1 for value in values)
    assert uniform(7, 3) == uniform(7, 3) == pytest.approx(0.5, abs=0.5)
    assert abs(np.mean([uniform(1, n) for n in range(4000)]) - 0.5) < 0.02


def test_a_resumed_sampler_goes_on_with_the_same_tokens() -> None:
    sampling = Sampling(temperature=1.1, seed=11, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.2)
    generator = np.random.default_rng(5)
    rows = generator.standard_normal((30, 64)).astype(np.float32)
    whole = Sampler(sampling, [1, 2])
    tokens = []
    for row in rows:
        tokens.append(whole.choose(row.copy()))
        whole.accept(tokens[-1])
    resumed = Sampler(sampling, [1, 2])
    for token in tokens[:13]:
        resumed.accept(token)
    again = []
    for row in rows[13:]:
        again.append(resumed.choose(row.copy()))
        resumed.accept(again[-1])
    assert again == tokens[13:]


def test_greedy_takes_the_first_of_equals() -> None:
    sampler = Sampler(Sampling(temperature=0.0), [])
    assert sampler.is_plain
    assert sampler.choose(np.array([1, 3, 3, 2], np.float32)) == 1


def test_bias_and_penalties() -> None:
    forced = Sampler(Sampling(temperature=0.0, logit_bias=((4, 100.0), (10_000, 5.0))), [])
    assert forced.choose(LOGITS.copy()) == 4
    penalised = Sampler(Sampling(temperature=0.0, presence_penalty=2.0), [0])
    assert penalised.choose(LOGITS.copy()) == 0, "presence counts the answer, not the prompt"
    penalised.accept(0)
    assert penalised.choose(LOGITS.copy()) == 1
    repeated = Sampler(Sampling(temperature=0.0, repetition_penalty=5.0), [0])
    assert repeated.choose(LOGITS.copy()) != 0, "repetition counts the prompt too"
    frequent = Sampler(Sampling(temperature=0.0, frequency_penalty=0.2), [])
    chosen = []
    for _ in range(4):
        chosen.append(frequent.choose(LOGITS.copy()))
        frequent.accept(chosen[-1])
    assert chosen == [0, 0, 1, 0]


class EvenOnly:
    """A grammar that allows even tokens."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allows(self, token: int) -> bool:
        return token % 2 == 0

    def filter(self, logits: Floats) -> Floats:
        return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf).astype(np.float32)

    def best(self, logits: Floats) -> int:
        return int(self.filter(logits).argmax())

    def accept(self, token: int) -> None:
        assert self.allows(token), "llama.cpp would abort"
        self.accepted.append(token)


def test_a_grammar_is_never_broken_and_keeps_the_distribution() -> None:
    counts = np.zeros(5)
    for seed in range(6000):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], EvenOnly())
        counts[sampler.choose(LOGITS.copy())] += 1
    assert counts / 6000 == pytest.approx([0.4 / 0.6, 0, 0.15 / 0.6, 0, 0.05 / 0.6], abs=0.02)
    greedy = Sampler(Sampling(temperature=0.0), [], EvenOnly())
    assert not greedy.is_plain
    assert greedy.choose(np.array([0, 5, 1, 4, 2], np.float32)) == 4


def test_logprobs_are_openai_s_content_entries() -> None:
    pieces = [b"a", b"\xff", "é".encode(), b"d", b"e"]
    entry = json.loads(logprob_entry(LOGITS, 1, 2, pieces.__getitem__))
    assert entry["token"] == "\ufffd" and entry["bytes"] == [255]
    assert entry["logprob"] == pytest.approx(math.log(0.3), abs=1e-5)
    assert [top["bytes"] for top in entry["top_logprobs"]] == [[97], [255]]
    assert entry["top_logprobs"][0]["logprob"] == pytest.approx(math.log(0.4), abs=1e-5)
    assert json.loads(logprob_entry(LOGITS, 0, 0, pieces.__getitem__))["top_logprobs"] == []
    assert json.loads(logprob_entry(np.array([0, -np.inf], np.float32), 1, 0, pieces.__getitem__))["logprob"] == -9999.0
