"""The same bars with the whole decision: candidates of the index, guards, and the cosine of the real MiniLM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from coordinator.cache.normal import core
from tests.coordinator.cache import cache_pairs, cache_paraphrases
from tests.coordinator.cache.cache_deciding import COSINE_MIN, refusal
from tests.coordinator.cache.cache_minilm import MiniLm

SEED = 30
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def model() -> MiniLm:
    return MiniLm()


def _embed(model: MiniLm, pairs: list[tuple[str, str]]) -> None:
    model.vectors([core(text) for pair in pairs for text in pair])  # in batches; afterwards they are known


def _false_hits(model: MiniLm, half: str, count: int, record: Record) -> None:
    pairs = [(pair.asked, pair.kept) for pair in cache_pairs.pairs(getattr(cache_pairs, half), count, SEED)]
    _embed(model, pairs)
    near = sum(float(first @ second) >= COSINE_MIN for first, second in (model.vectors([core(text) for text in pair]) for pair in pairs))
    false = [pair for pair in pairs if not refusal(model, *pair)]
    record("near_by_cosine", near)
    record("false_hits", len(false))
    assert near > 0.5 * count  # by the vectors alone most would be given
    assert len(false) <= 0.005 * count, false[:5]


def _hits(model: MiniLm, half: str, count: int, record: Record) -> None:
    same = cache_paraphrases.paraphrases(getattr(cache_paraphrases, half), count, SEED)
    _embed(model, [(each.asked, each.kept) for each in same])
    refused = Counter(refusal(model, each.asked, each.kept) for each in same)
    hits = refused.pop("", 0)
    record("hits", hits)
    record("refused", dict(refused))
    assert hits >= 0.60 * count, refused


@pytest.mark.parametrize("half", ["TUNED", "HELD_OUT"])
def test_some_look_alikes_and_paraphrases(model: MiniLm, half: str, record_property: Record) -> None:
    _false_hits(model, half, 160, record_property)
    _hits(model, half, 100, record_property)


@pytest.mark.soak
@pytest.mark.parametrize("half", ["TUNED", "HELD_OUT"])
def test_all_look_alikes(model: MiniLm, half: str, record_property: Record) -> None:
    _false_hits(model, half, 2_400, record_property)


@pytest.mark.soak
@pytest.mark.parametrize("half", ["TUNED", "HELD_OUT"])
def test_all_paraphrases(model: MiniLm, half: str, record_property: Record) -> None:
    _hits(model, half, 800, record_property)
