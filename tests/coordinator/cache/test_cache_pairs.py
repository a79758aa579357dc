"""The bars of the semantic step without its model: the index and the guards let pass at most 0.5 % of 2,000 look-alikes, a thousand of
either half, and at least 60 % of paraphrases.

The model can only refuse more; with it the same sets are walked by test_cache_pairs_minilm.py. Plain word overlap stands beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.coordinator.cache import cache_pairs, cache_paraphrases
from tests.coordinator.cache.cache_deciding import OVERLAP_MIN, dice, jaccard, refusal
from tests.coordinator.cache.support_log import INTENTS, MANNERS, REPEATED, support_log

PAIRS, PARAPHRASES, SEED = 1_000, 500, 20
HALVES = ("TUNED", "HELD_OUT")


@pytest.mark.parametrize("half", HALVES)
def test_look_alikes_are_refused(half: str, record_property: Callable[[str, object], None]) -> None:
    pairs = cache_pairs.pairs(getattr(cache_pairs, half), PAIRS, SEED)
    assert len(pairs) == PAIRS and len({pair.template for pair in pairs}) >= 60
    false = [pair for pair in pairs if not refusal(None, pair.asked, pair.kept)]
    record_property("false_hits", len(false))
    assert len(false) <= 0.005 * PAIRS, false[:5]


@pytest.mark.parametrize("half", HALVES)
def test_paraphrases_are_found(half: str, record_property: Callable[[str, object], None]) -> None:
    same = cache_paraphrases.paraphrases(getattr(cache_paraphrases, half), PARAPHRASES, SEED)
    assert len(same) == PARAPHRASES
    refused = Counter(refusal(None, each.asked, each.kept) for each in same)
    hits = refused.pop("", 0)
    record_property("hits", hits)
    record_property("refused", dict(refused))
    assert hits >= 0.60 * PARAPHRASES, refused


@pytest.mark.parametrize("half", HALVES)
def test_plain_overlap_would_mix_up_many(half: str) -> None:
    """What 85 % of the words in common would do with the same pairs: the reason for all this."""
    pairs = cache_pairs.pairs(getattr(cache_pairs, half), PAIRS, SEED)
    assert sum(dice(pair.asked, pair.kept) >= OVERLAP_MIN for pair in pairs) > 0.40 * PAIRS
    assert sum(jaccard(pair.asked, pair.kept) >= OVERLAP_MIN for pair in pairs) > 0.15 * PAIRS


def test_sets_are_seeded_and_share_nothing() -> None:
    for module in (cache_pairs, cache_paraphrases):
        assert not set(module.TUNED.words) & set(module.HELD_OUT.words) - {"n", "day", "thing"}
    assert cache_pairs.pairs(cache_pairs.TUNED, 50, 1) == cache_pairs.pairs(cache_pairs.TUNED, 50, 1)
    assert cache_pairs.pairs(cache_pairs.TUNED, 50, 1) != cache_pairs.pairs(cache_pairs.TUNED, 50, 2)
    texts = [{text for _, *pair in half.templates for text in pair} for half in (cache_pairs.TUNED, cache_pairs.HELD_OUT)]
    assert not texts[0] & texts[1]


def test_the_log_is_what_it_says() -> None:
    log = support_log(2_000, 3)
    manners = Counter(line.manner for line in log)
    assert len(INTENTS) >= 60 and log == support_log(2_000, 3)
    assert abs(1 - manners["new"] / len(log) - REPEATED) < 0.03
    assert set(manners) == {"new"} | {name for name, _ in MANNERS}
    fresh = [line.meaning for line in log if line.manner == "new"]
    assert len(fresh) == len(set(fresh))
    seen: set[str] = set()
    for line in log:
        assert (line.meaning in seen) == (line.manner != "new")
        seen.add(line.meaning)
