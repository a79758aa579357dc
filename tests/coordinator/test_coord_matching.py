"""The choice of an Island, as a table: facts, wish, what must come out. That columns agree with a plain loop is in test_coord_columns."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from coordinator.columns import WEIGHTS, Candidate, Columns, Known
from coordinator.matching import (
    CONSIDERED_MAX,
    PREFIX_POINTS,
    Choice,
    Level,
    Refusal,
    Wish,
    choose,
    declared_tokens,
    explanation,
)
from coordinator.regions import EU, SWITZERLAND, parse_policy
from protocol.errors import Code
from protocol.prices import Ask
from tests.coordinator.fakes import HASH_A, HASH_B, offer

NOW_S = 100.0
GB = 1_000_000_000
Island = tuple[Candidate, Known]


def island(
    name: str,
    *,
    busy: int = 0,
    kv: int = 0,
    draining: bool = False,
    seq: int = 5,
    known: Known | None = None,
    **changes: Any,
) -> Island:
    plain = {"slots_total": 4, "slots_free": 4, "kv_tokens_total": 8000, "kv_tokens_free": 8000, "context_tokens": 4096}
    candidate = Candidate(name, 1, seq, draining, offer("m", **{**plain, **changes}), busy, kv)
    return candidate, known or Known()


def wish(**changes: Any) -> Wish:
    return Wish(**{"cargo": "m", "tokens": 500, **changes})


def columns(facts: Sequence[Island]) -> Columns:
    return Columns.of("m", [candidate for candidate, _ in facts], {it.island: known for it, known in facts})


def choice_of(facts: Sequence[Island], wanted: Wish, seed: int = 1) -> Choice:
    choice = choose(columns(facts), wanted, NOW_S, random.Random(seed))
    assert isinstance(choice, Choice)
    return choice


def refusal_of(facts: Sequence[Island], wanted: Wish) -> Refusal:
    refusal = choose(columns(facts), wanted, NOW_S, random.Random(1))
    assert isinstance(refusal, Refusal)
    return refusal


def known(**changes: Any) -> Known:
    return Known(**changes)


def used(percent: int) -> Known:
    """So much of its memory is in use."""
    return Known(memory_offered_bytes=10 * GB, memory_other_bytes=percent * GB // 10)


CHOICES: list[tuple[str, list[Island], Wish, str]] = [
    ("the only one", [island("A")], wish(), "A"),
    ("the faster", [island("A", tokens_per_s=10.0), island("B", tokens_per_s=30.0)], wish(), "B"),
    ("the idler of equals", [island("A", busy=2), island("B", busy=1)], wish(), "B"),
    ("half as fast but idle", [island("A", tokens_per_s=20.0, busy=3), island("B", tokens_per_s=10.0)], wish(), "B"),
    ("unknown speed counts as typical", [island("A", busy=1, tokens_per_s=20.0), island("B")], wish(), "B"),
    ("not one that drains", [island("A", draining=True, tokens_per_s=99.0), island("B")], wish(), "B"),
    ("not a full one", [island("A", busy=4, tokens_per_s=99.0), island("B", busy=3)], wish(), "B"),
    ("not one that failed", [island("A"), island("B", busy=3)], wish(excluded={"A": 5}), "B"),
    ("one that failed and came back", [island("A", seq=6)], wish(excluded={"A": 5}), "A"),
    ("not one that rests", [island("A"), island("B", busy=3)], wish(resting={"A": NOW_S + 1}), "B"),
    ("one that has rested", [island("A")], wish(resting={"A": NOW_S}), "A"),
    ("where the prompt fits", [island("A", tokens_per_s=99.0, context_tokens=400), island("B")], wish(), "B"),
    ("where KV room is left", [island("A", tokens_per_s=99.0, kv=7900), island("B")], wish(), "B"),
    ("a guess never refuses", [island("A", context_tokens=100)], wish(tokens=9000), "A"),
    ("only a larger context", [island("A"), island("B", context_tokens=8192)], wish(context_over=4096), "B"),
    ("who knows the conversation", [island("A"), island("B", busy=1)], wish(affinity="B"), "B"),
    ("though another is faster", [island("A", tokens_per_s=60.0), island("B", tokens_per_s=40.0)], wish(affinity="B"), "B"),
    ("unless it is far busier", [island("A"), island("B", busy=3)], wish(affinity="B"), "A"),
    ("or far slower", [island("A", tokens_per_s=90.0), island("B", tokens_per_s=10.0)], wish(affinity="B"), "A"),
    ("or full", [island("A", tokens_per_s=1.0), island("B", busy=4, tokens_per_s=99.0)], wish(affinity="B"), "A"),
    ("the same model file", [island("A", content_hash=HASH_B), island("B", busy=3)], wish(content_hash=HASH_A), "B"),
    (
        "the same engine rather than a faster one",
        [island("A", tokens_per_s=99.0, engine="e2"), island("B", engine="e1", tokens_per_s=1.0)],
        wish(content_hash=HASH_A, engine="e1"),
        "B",
    ),
    ("another engine rather than none", [island("A", engine="e2")], wish(content_hash=HASH_A, engine="e1"), "A"),
    # what this Coordinator has seen
    (
        "measured speed rather than a claim",
        [island("A", tokens_per_s=500.0, known=known(measured_tokens_per_s=5)), island("B", tokens_per_s=40.0)],
        wish(),
        "B",
    ),
    (
        "a claim counts up to twice what was measured",
        [island("A", tokens_per_s=1e7, busy=3), island("B", known=known(measured_tokens_per_s=30))],
        wish(),
        "B",
    ),
    ("not one that cools down", [island("A", known=known(cool_until_s=NOW_S + 1)), island("B", busy=3)], wish(), "B"),
    ("one that has cooled down", [island("A", known=known(cool_until_s=NOW_S)), island("B", busy=1)], wish(), "A"),
    ("one that cools down rather than none", [island("A", known=known(cool_until_s=NOW_S + 1))], wish(), "A"),
    (
        "the best where all cool down",
        [island("A", busy=2, known=known(cool_until_s=999)), island("B", known=known(cool_until_s=999))],
        wish(),
        "B",
    ),
    ("only who is approved", [island("A", known=known(is_approved=False)), island("B", busy=3)], wish(), "B"),
    ("more karma among likes", [island("A", known=known(karma_milli=50_000)), island("B")], wish(), "A"),
    ("karma is not all", [island("A", busy=2, known=known(karma_milli=50_000)), island("B")], wish(), "B"),
    ("without debts", [island("A", known=known(karma_milli=-3000)), island("B")], wish(), "B"),
    # memory
    ("60 % of memory rather than 95 %", [island("A", known=used(95)), island("B", known=used(60))], wish(), "B"),
    ("60 % of memory rather than 20 %", [island("A", known=used(20)), island("B", known=used(60))], wish(), "B"),
    ("what this job adds counts", [island("A", known=used(60), kv_bytes_per_token=8_000_000), island("B", known=used(50))], wish(), "B"),
    ("unknown memory rather than full", [island("A", known=used(95)), island("B")], wish(), "B"),
    # price
    (
        "the cheaper of likes",
        [island("A", ask=Ask(per_job=2000)), island("B", ask=Ask(per_job=1000))],
        wish(),
        "B",
    ),
    (
        "dearer where it is much faster",
        [island("A", ask=Ask(per_job=2000), tokens_per_s=90.0), island("B", ask=Ask(per_job=1000), tokens_per_s=9.0)],
        wish(),
        "A",
    ),
    (
        "what the job may cost",
        [island("A", ask=Ask(per_job=2001), tokens_per_s=90.0), island("B", ask=Ask(per_job=2000), tokens_per_s=9.0)],
        wish(price_max_micros=2000),
        "B",
    ),
    (
        "priced by what it may use",
        [island("A", ask=Ask(per_1k_output=1000), tokens_per_s=90.0), island("B", ask=Ask(per_job=400), busy=3)],
        wish(price_max_micros=400, output_tokens=401),
        "B",
    ),
    ("a free one by any limit", [island("A", ask=Ask()), island("B")], wish(price_max_micros=0), "A"),
    # regions
    ("within the policy", [island("A"), island("B", busy=3, known=known(region="de"))], wish(policy=EU), "B"),
    (
        "within a list",
        [island("A", known=known(region="de")), island("B", busy=3, known=known(region="us-east-1"))],
        wish(policy=parse_policy({"regions": ["us-east"]})),
        "B",
    ),
    (
        "the same region among equals",
        [island("A", known=known(region="fr")), island("B", known=known(region="de"))],
        wish(region="de"),
        "B",
    ),
    (
        "a neighbour rather than any",
        [island("A", known=known(region="us")), island("B", known=known(region="fr"))],
        wish(region="de"),
        "B",
    ),
    (
        "region only breaks ties",
        [island("A", tokens_per_s=11.0), island("B", tokens_per_s=10.0, known=known(region="de"))],
        wish(region="de"),
        "A",
    ),
    # quotes
    ("the Island of the quote", [island("A", tokens_per_s=90.0), island("B", tokens_per_s=9.0, busy=3)], wish(island="B"), "B"),
    ("another where it is gone", [island("A")], wish(island="B"), "A"),
    ("or has failed", [island("A"), island("B")], wish(island="B", excluded={"B": 5}), "A"),
    ("or cools down", [island("A"), island("B", known=known(cool_until_s=999))], wish(island="B"), "A"),
    ("or drains", [island("A"), island("B", draining=True)], wish(island="B"), "A"),
    ("also where it asks more by now", [island("A"), island("B", ask=Ask(2000))], wish(island="B", price_max_micros=1500), "B"),
]

REFUSALS: list[tuple[str, list[Island], Wish, Code, str]] = [
    ("nobody has it", [], wish(), Code.UNKNOWN_CARGO, "no Island offers the model 'm'"),
    ("all full", [island("A", busy=4), island("B", busy=5)], wish(), Code.NO_CAPACITY, "are busy"),
    ("all resting", [island("A")], wish(resting={"A": NOW_S + 0.1}), Code.NO_CAPACITY, "are busy"),
    ("all failed", [island("A")], wish(excluded={"A": 5}), Code.NO_ISLAND, "that can take this job"),
    ("all draining", [island("A", draining=True)], wish(), Code.NO_ISLAND, "that can take this job"),
    ("none approved", [island("A", known=known(is_approved=False))], wish(), Code.NO_ISLAND, "that can take this job"),
    ("only another file", [island("A", content_hash=HASH_B)], wish(content_hash=HASH_A), Code.NO_ISLAND, "can take"),
    ("no context that large", [island("A")], wish(context_over=4096), Code.NO_ISLAND, "can take"),
    ("an offer without slots", [island("A", slots_total=0, slots_free=0)], wish(), Code.NO_CAPACITY, "are busy"),
    ("full counts before failed", [island("A", busy=4), island("B")], wish(excluded={"B": 5}), Code.NO_CAPACITY, "busy"),
    ("outside the policy", [island("A", known=known(region="us"))], wish(policy=EU), Code.NO_ISLAND, "no Island in eu"),
    ("no region matches no policy", [island("A")], wish(policy=SWITZERLAND), Code.NO_ISLAND, "in switzerland offers"),
    (
        "the policy holds while those within it are full",
        [island("A"), island("B", busy=4, known=known(region="fr"))],
        wish(policy=EU),
        Code.NO_CAPACITY,
        "busy",
    ),
    (
        "and while they have failed",
        [island("A"), island("B", known=known(region="fr"))],
        wish(policy=EU, excluded={"B": 9}),
        Code.NO_ISLAND,
        "no Island in eu",
    ),
    ("too dear", [island("A")], wish(price_max_micros=999), Code.NO_ISLAND, "for at most 0.000999 credits"),
    (
        "affordable but full",
        [island("A", busy=4), island("B", ask=Ask(5000))],
        wish(price_max_micros=1000),
        Code.NO_CAPACITY,
        "busy",
    ),
    ("the Island of the quote is full", [island("A"), island("B", busy=4)], wish(island="B"), Code.NO_CAPACITY, "quote"),
    (
        "the healthy are full: waiting is better than failing",
        [island("A", busy=4), island("B", known=known(cool_until_s=999))],
        wish(),
        Code.NO_CAPACITY,
        "busy",
    ),
]


@pytest.mark.parametrize(("facts", "wanted", "name"), [row[1:] for row in CHOICES], ids=[row[0] for row in CHOICES])
def test_chooses(facts: list[Island], wanted: Wish, name: str) -> None:
    for order in (facts, facts[::-1]):
        choice = choice_of(order, wanted)
        assert choice.candidate.island == choice.considered[0].island == name
        assert choice.reasons


@pytest.mark.parametrize(
    ("facts", "wanted", "code", "text"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_refuses(facts: list[Island], wanted: Wish, code: Code, text: str) -> None:
    refusal = refusal_of(facts, wanted)
    assert refusal.code is code and text in refusal.message
    assert refusal.by_price == (refusal.cheapest_micros is not None) == ("credits" in text)


def test_a_refusal_by_price_names_the_cheapest_that_could_do_it() -> None:
    facts = [
        island("A", ask=Ask(3000)),
        island("B", ask=Ask(2000), busy=4),  # full at the moment, but that passes
        island("C", ask=Ask(500), draining=True),
        island("D", ask=Ask(400), known=known(region="us")),
        island("E", ask=Ask(2500), known=known(region="de")),
        island("F", ask=Ask(3500), known=known(region="de")),
    ]
    refusal = refusal_of(facts, wish(price_max_micros=300))
    assert refusal.by_price and refusal.cheapest_micros == 400
    refusal = refusal_of(facts, wish(price_max_micros=300, policy=EU))
    assert refusal.by_price and refusal.cheapest_micros == 2500
    assert refusal.filtered == {"draining": 1, "policy": 3, "price": 2}
    assert "wants up to 0.0025" in refusal.message


def test_equals_are_drawn_evenly_and_repeatably() -> None:
    facts = columns([island(name) for name in "ABCD"])

    def draw(seed: int) -> list[str]:
        rng = random.Random(seed)
        choices = [choose(facts, wish(), NOW_S, rng) for _ in range(400)]
        return [choice.candidate.island for choice in choices if isinstance(choice, Choice)]

    assert draw(7) == draw(7) != draw(8)
    assert all(60 < count < 140 for count in Counter(draw(7)).values())


def test_load_spreads_over_likes_and_by_speed() -> None:
    facts = columns([island(name, tokens_per_s=30.0) for name in "ABC"] + [island("D", tokens_per_s=90.0)])
    rng, taken = random.Random(2), Counter[str]()
    for _ in range(8):
        choice = choose(facts, wish(), NOW_S, rng)
        assert isinstance(choice, Choice)
        name = choice.candidate.island
        taken[name] += 1
        facts.set_busy(name, taken[name], 0)
    # three times as fast, so the first jobs are its; but none takes its last slot while the others idle
    assert taken["D"] == 3 and sorted(taken.values()) == [1, 2, 2, 3]


@pytest.mark.parametrize("runtime", [*WEIGHTS, "echo"])
def test_weights_are_those_of_the_runtime(runtime: str) -> None:
    stated = {"gguf": (50, 35, 15), "container": (30, 40, 30), "wasm": (25, 40, 35), "onnx": (45, 40, 15)}
    facts = [island("A", runtime=runtime, busy=1, known=used(60)), island("B", runtime=runtime, known=used(20))]
    choice = choice_of(facts, wish(tokens=0))
    points = {one.island: one for one in choice.considered}
    speed, fit, headroom = stated.get(runtime, stated["wasm"])
    assert (points["A"].speed, points["A"].fit, points["A"].headroom) == pytest.approx((75, 100, 75))
    assert points["A"].score == pytest.approx(0.75 * speed + 1.00 * fit + 0.75 * headroom)
    assert points["B"].score == pytest.approx(1.00 * speed + 0.60 * fit + 1.00 * headroom)


def test_the_sweet_spot_of_memory() -> None:
    facts = columns([island(str(percent), known=used(percent)) for percent in range(0, 121)])
    points = facts.fit(0).tolist()
    assert max(points) == points[60] == pytest.approx(100)
    assert points[:61] == sorted(points[:61]) and points[60:] == sorted(points[60:], reverse=True)
    assert points[95] < points[20] < points[60] and points[100:] == pytest.approx([0.0] * 21)


def test_a_prefix_shows_as_a_term() -> None:
    choice = choice_of([island("A"), island("B")], wish(affinity="B"))
    assert choice.considered[0].terms == (("prefix", PREFIX_POINTS),)
    assert "served this conversation before (+20.0)" in choice.reasons


def test_measured_round_trips_count_and_the_unmeasured_are_typical() -> None:
    facts = columns([island(name) for name in "ABC"])
    facts.set_round_trips({"A": 0.150, "B": 0.010})
    choice = choose(facts, wish(), NOW_S, random.Random(1))
    assert isinstance(choice, Choice) and [one.island for one in choice.considered] == ["B", "C", "A"]
    assert dict(choice.considered[0].terms) == {"round trip": pytest.approx(-1.0)}
    assert dict(choice.considered[1].terms) == {"round trip": pytest.approx(-8.0)}


def test_at_most_ten_are_considered_the_best_first_and_the_rest_is_counted() -> None:
    facts = [island(f"I{number}", tokens_per_s=float(number)) for number in range(1, 31)]
    facts += [island("full", busy=4), island("draining", draining=True), island("dear", ask=Ask(10**9))]
    choice = choice_of(facts, wish(price_max_micros=10**6))
    assert [one.island for one in choice.considered] == [f"I{number}" for number in range(30, 30 - CONSIDERED_MAX, -1)]
    scores = [one.score for one in choice.considered]
    assert scores == sorted(scores, reverse=True) and choice.score == scores[0]
    assert choice.islands == 33 and choice.filtered == {"draining": 1, "price": 1, "capacity": 1}


def test_a_drawn_one_stands_first_among_those_considered() -> None:
    facts = [island(f"I{number}") for number in range(40)]
    drawn = {choice_of(facts, wish(), seed).candidate.island for seed in range(40)}
    assert len(drawn) > 15
    choice = choice_of(facts, wish(), 3)
    names = [one.island for one in choice.considered]
    assert names[0] == choice.candidate.island and len(set(names)) == CONSIDERED_MAX and choice.ties == 40


def test_what_only_ranks_is_said() -> None:
    facts = [island("A", context_tokens=10), island("B", context_tokens=10)]
    choice = choice_of(facts, wish(affinity="A"))
    assert "no Island seems to have the room" in choice.reasons
    assert not choice.filtered
    choice = choice_of([island("A", engine="e1"), island("B")], wish(engine="e1"))
    assert "same engine" in choice.reasons and choice.filtered == {"engine": 1}
    choice = choice_of([island("A", known=known(cool_until_s=999))], wish())
    assert "cooling down after failures, but nobody else is left" in choice.reasons and "only one" in choice.reasons
    choice = choice_of([island("A"), island("B")], wish(island="B"))
    assert "as quoted" in choice.reasons and "put aside: 1 for quote" in choice.reasons
    choice = choice_of([island("A"), island("B")], wish())
    assert "drawn among 2 equals" in choice.reasons


LEVELS = [
    (island("A", known=used(60)), Level.PERFECT),
    (island("A", known=used(90)), Level.GOOD),
    (island("A"), Level.GOOD),
    (island("A", slots_total=10, busy=9), Level.FAIR),
    (island("A", slots_total=100, busy=99), Level.POOR),
]


@pytest.mark.parametrize(("one", "level"), LEVELS)
def test_levels(one: Island, level: Level) -> None:
    (considered,) = choice_of([one], wish()).considered
    assert considered.level is level


def test_the_answer_to_why_this_island() -> None:
    facts = [
        island("A", tokens_per_s=40.0, known=used(60)),
        island("B", tokens_per_s=20.0, known=Known(region="us"), ask=Ask(2000)),
        island("C", known=known(is_approved=False)),
    ]
    answer = json.loads(json.dumps(explanation(choice_of(facts, wish()))))
    assert answer["island"] == "A" and answer["level"] == "Perfect" and answer["price_max"] == "0.001"
    assert answer["islands"] == 3 and answer["filtered"] == {"approval": 1}
    assert [one["island"] for one in answer["considered"]] == ["A", "B"]
    assert answer["considered"][1]["speed"] == 50.0 and answer["considered"][1]["terms"] == {"price": -7.5}
    assert answer["reasons"] == ["Perfect: speed 100, fit 100, headroom 100 of 100", "put aside: 1 for approval"]


def test_the_answer_to_why_none() -> None:
    refusal = refusal_of([island("A", known=known(region="de"))], wish(policy=EU, price_max_micros=1))
    answer = json.loads(json.dumps(explanation(refusal)))
    assert answer["island"] is None and answer["code"] == "no_island"
    assert answer["cheapest"] == "0.001" and answer["filtered"] == {"price": 1}


def test_declared_length_counts_prompt_and_answer() -> None:
    assert declared_tokens(300, 50) == 150
