"""The choice of an Island, as a table: facts, wish, what must come out."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from coordinator.matching import Candidate, Choice, Refusal, Wish, choose, declared_tokens
from protocol.errors import Code
from tests.coordinator.fakes import HASH_A, HASH_B, offer

NOW_S = 100.0


def candidate(
    name: str, *, busy: int = 0, kv: int = 0, draining: bool = False, seq: int = 5, **changes: Any
) -> Candidate:
    plain = {"slots_total": 4, "slots_free": 4, "kv_tokens_total": 8000, "kv_tokens_free": 8000, "context_tokens": 4096}
    return Candidate(name, 1, seq, draining, offer("m", **{**plain, **changes}), busy, kv)


def wish(**changes: Any) -> Wish:
    return Wish(**{"cargo": "m", "tokens": 500, **changes})


CHOICES: list[tuple[str, list[Candidate], Wish, str]] = [
    ("the only one", [candidate("A")], wish(), "A"),
    ("the faster", [candidate("A", tokens_per_s=10.0), candidate("B", tokens_per_s=30.0)], wish(), "B"),
    ("the idler of equals", [candidate("A", busy=2), candidate("B", busy=1)], wish(), "B"),
    (
        "half as fast but idle",
        [candidate("A", tokens_per_s=20.0, busy=3), candidate("B", tokens_per_s=10.0)],
        wish(),
        "B",
    ),
    ("unknown speed counts as typical", [candidate("A", busy=1, tokens_per_s=20.0), candidate("B")], wish(), "B"),
    ("not one that drains", [candidate("A", draining=True, tokens_per_s=99.0), candidate("B")], wish(), "B"),
    ("not a full one", [candidate("A", busy=4, tokens_per_s=99.0), candidate("B", busy=3)], wish(), "B"),
    ("not one that failed", [candidate("A"), candidate("B", busy=3)], wish(excluded={"A": 5}), "B"),
    ("one that failed and came back", [candidate("A", seq=6)], wish(excluded={"A": 5}), "A"),
    ("not one that rests", [candidate("A"), candidate("B", busy=3)], wish(resting={"A": NOW_S + 1}), "B"),
    ("one that has rested", [candidate("A")], wish(resting={"A": NOW_S}), "A"),
    ("where the prompt fits", [candidate("A", tokens_per_s=99.0, context_tokens=400), candidate("B")], wish(), "B"),
    ("where KV room is left", [candidate("A", tokens_per_s=99.0, kv=7900), candidate("B")], wish(), "B"),
    ("a guess never refuses", [candidate("A", context_tokens=100)], wish(tokens=9000), "A"),
    ("only a larger context", [candidate("A"), candidate("B", context_tokens=8192)], wish(context_over=4096), "B"),
    ("who knows the conversation", [candidate("A"), candidate("B", busy=1)], wish(affinity="B"), "B"),
    ("unless it is far busier", [candidate("A"), candidate("B", busy=3)], wish(affinity="B"), "A"),
    (
        "the same model file",
        [candidate("A", content_hash=HASH_B), candidate("B", busy=3)],
        wish(content_hash=HASH_A),
        "B",
    ),
    (
        "the same engine rather than a faster one",
        [candidate("A", tokens_per_s=99.0, engine="e2"), candidate("B", engine="e1", tokens_per_s=1.0)],
        wish(content_hash=HASH_A, engine="e1"),
        "B",
    ),
    ("another engine rather than none", [candidate("A", engine="e2")], wish(content_hash=HASH_A, engine="e1"), "A"),
]

REFUSALS: list[tuple[str, list[Candidate], Wish, Code]] = [
    ("nobody has it", [], wish(), Code.UNKNOWN_CARGO),
    ("all full", [candidate("A", busy=4), candidate("B", busy=5)], wish(), Code.NO_CAPACITY),
    ("all resting", [candidate("A")], wish(resting={"A": NOW_S + 0.1}), Code.NO_CAPACITY),
    ("all failed", [candidate("A")], wish(excluded={"A": 5}), Code.NO_ISLAND),
    ("all draining", [candidate("A", draining=True)], wish(), Code.NO_ISLAND),
    ("only another file", [candidate("A", content_hash=HASH_B)], wish(content_hash=HASH_A), Code.NO_ISLAND),
    ("no context that large", [candidate("A")], wish(context_over=4096), Code.NO_ISLAND),
    ("an offer without slots", [candidate("A", slots_total=0, slots_free=0)], wish(), Code.NO_CAPACITY),
    ("full counts before failed", [candidate("A", busy=4), candidate("B")], wish(excluded={"B": 5}), Code.NO_CAPACITY),
]


@pytest.mark.parametrize(("facts", "wanted", "island"), [row[1:] for row in CHOICES], ids=[row[0] for row in CHOICES])
def test_chooses(facts: list[Candidate], wanted: Wish, island: str) -> None:
    for order in (facts, facts[::-1]):
        choice = choose(order, wanted, NOW_S, random.Random(1))
        assert isinstance(choice, Choice) and choice.candidate.island == island
        assert choice.reasons


@pytest.mark.parametrize(("facts", "wanted", "code"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_refuses(facts: list[Candidate], wanted: Wish, code: Code) -> None:
    refusal = choose(facts, wanted, NOW_S, random.Random(1))
    assert isinstance(refusal, Refusal) and refusal.code is code


def test_equals_are_drawn_evenly_and_repeatably() -> None:
    facts = [candidate(name) for name in "ABCD"]

    def draw(seed: int) -> list[str]:
        rng = random.Random(seed)
        choices = [choose(facts, wish(), NOW_S, rng) for _ in range(400)]
        return [choice.candidate.island for choice in choices if isinstance(choice, Choice)]

    assert draw(7) == draw(7) != draw(8)
    assert all(60 < count < 140 for count in Counter(draw(7)).values())


def test_reasons_say_what_counted() -> None:
    facts = [candidate("A", context_tokens=10), candidate("B", context_tokens=10)]
    choice = choose(facts, wish(affinity="A"), NOW_S, random.Random(1))
    assert isinstance(choice, Choice)
    assert choice.reasons == ("speed x headroom", "served this conversation before", "no Island seems to have the room")


def test_declared_length_counts_prompt_and_answer() -> None:
    assert declared_tokens(300, 50) == 150
